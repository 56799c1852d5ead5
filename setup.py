"""Builds `pcx._C` where torch can be imported, and installs pure Python where it cannot.

The extension holds the C++ and CUDA backends of the operations. Everything works without it. CUDA
sources are compiled where nvcc of torch's own major version is found; no GPU is needed for that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
# The CUDA kernels are written for Hopper's own instructions; Triton serves every other GPU.
HOPPER = "arch=compute_90a,code=sm_90a"


def say(message: str) -> None:
    print(f"pcx: {message}", file=sys.stderr)


def find_cuda() -> str | None:
    """The toolkit's folder, with its headers: nvcc on PATH may lie outside of it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc:
        candidates.insert(1, str(Path(nvcc).resolve().parent.parent))
    for folder in candidates:
        needed = ("bin/nvcc", "include/cuda_runtime.h")
        if folder and all((Path(folder) / name).exists() for name in needed):
            return folder
    return None


def nvcc_fits(cuda: str | None, wanted: str | None) -> bool:
    """Whether there is an nvcc of the major version that torch was built with."""
    if cuda is None or wanted is None:
        return False
    said = subprocess.run([f"{cuda}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", said)
    if found is None or found[1] != wanted.split(".")[0]:
        say(f"nvcc of {cuda} is not CUDA {wanted}'s: building without the CUDA kernels")
        return False
    return True


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for q in patterns for p in (ROOT / "csrc").glob(q))


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
    files, kind = sources("*.cpp", "cpu/*.cpp"), cpp_extension.CppExtension
    flags = {"cxx": ["-O3", "-std=c++20", "-fopenmp"]}
    if nvcc_fits(cuda, torch.version.cuda):
        files, kind = files + sources("cuda/*.cpp", "cuda/*.cu"), cpp_extension.CUDAExtension
        flags["cxx"].append("-DPCX_CUDA")
        flags["nvcc"] = ["-O3", "-std=c++20", "-gencode", HOPPER]
    say(f"building pcx._C from {len(files)} sources with torch {torch.__version__}")
    # Not linked with OpenMP: torch brings its own, and a second one would not see the first's
    # threads.
    extension = kind("pcx._C", files, extra_compile_args=flags)

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
