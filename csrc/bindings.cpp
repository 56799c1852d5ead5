// The compiled extension pcx._C. It registers implementations of the ops that Python defines, and
// says how it was built.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "operations.h"

namespace py = pybind11;

namespace {

#ifdef PCX_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda"] = kCuda;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  info["schemas"] = pcx::kSchemas;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled backends of pcx";
  module.def("build_info", &build_info, "Versions and options this extension was built with.");
  module.def("register_operations", &pcx::register_operations,
             "Implements the operations whose schemas are defined. Called once.");
}
