// The compiled part of pcx. Operations are registered with TORCH_LIBRARY_IMPL against schemas that
// Python defines; this module only makes them loadable and says how it was built.

#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled backends of pcx";
  module.def("build_info", &build_info, "Versions and options this extension was built with.");
}
