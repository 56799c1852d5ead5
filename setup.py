"""Builds `pcx._C` where torch can be imported, and installs pure Python where it cannot.

The extension holds the C++ and CUDA backends of the operations. Everything works without it. CUDA
sources are compiled where nvcc is found; without a GPU at hand TORCH_CUDA_ARCH_LIST says for which.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;9.0a"


def say(message: str) -> None:
    print(f"pcx: {message}", file=sys.stderr)


def find_cuda() -> str | None:
    """The real toolkit folder: nvcc on PATH may be a link that lies outside of it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc:
        candidates.insert(1, str(Path(nvcc).resolve().parent.parent))
    for folder in candidates:
        if folder and (Path(folder) / "bin" / "nvcc").exists():
            return folder
    return None


def extension_arguments() -> dict:
    """`ext_modules` and `cmdclass` for setup, empty where the extension cannot be built."""
    cuda = find_cuda()
    if cuda:
        os.environ["CUDA_HOME"] = cuda
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        say(f"torch cannot be imported ({error}): installing without the compiled extension")
        return {}
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
    kind, flags = cpp_extension.CppExtension, {"cxx": ["-O3", "-std=c++20", "-fopenmp"]}
    if kernels and cuda and torch.version.cuda:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        kind, flags = cpp_extension.CUDAExtension, {**flags, "nvcc": ["-O3"]}
        sources += kernels
    say(f"building pcx._C from {len(sources)} sources with torch {torch.__version__}")
    # Not linked with OpenMP: torch brings its own, and a second one would not see the first's
    # threads.
    extension = kind("pcx._C", sources, extra_compile_args=flags)

    class OptionalBuild(cpp_extension.BuildExtension):
        """Goes on in pure Python where the compiler fails."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, use_ninja=shutil.which("ninja") is not None, **kwargs)

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # compilers fail in many ways, none of which is fatal here
                say(f"the extension was not built ({error}): installing without it")
                self.extensions = []

    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(packages=find_namespace_packages(include=["pcx", "pcx.*"]), **extension_arguments())
