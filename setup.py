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
# Those of prefix_attention are written for Hopper's own instructions and are empty elsewhere.
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a")


def say(message: str) -> None:
    print(f"pcx: {message}", file=sys.stderr)


def find_cuda(wanted: str) -> str | None:
    """A toolkit's folder with nvcc of the major version wanted, and the headers.

    nvcc on PATH may be a link, or a script that lies outside of the folder.
    """
    nvcc = shutil.which("nvcc")
    near = Path(nvcc).resolve().parent.parent if nvcc else None
    for folder in (os.environ.get("CUDA_HOME"), near, "/usr/local/cuda"):
        if folder is None:
            continue
        command, header = Path(folder) / "bin" / "nvcc", Path(folder) / "include" / "cuda_runtime.h"
        if not (command.exists() and header.exists()):
            continue
        said = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)", said)
        if found and found[1] == wanted.split(".")[0]:
            return str(folder)
    return None


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for q in patterns for p in (ROOT / "csrc").glob(q))


def extension_arguments() -> dict:
    """`ext_modules` and `cmdclass` for setup, empty where the extension cannot be built."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        say(f"torch cannot be imported ({error}): installing without the compiled extension")
        return {}
    cuda = find_cuda(torch.version.cuda) if torch.version.cuda else None
    if cuda:
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = cuda
    elif torch.version.cuda:
        say(f"no nvcc of CUDA {torch.version.cuda} was found: building without the CUDA kernels")

    def extension(with_cuda: bool):
        # Not linked with OpenMP: torch brings its own, and a second one would not see the first's
        # threads.
        files, flags = sources("*.cpp", "cpu/*.cpp"), ["-O3", "-std=c++20", "-fopenmp"]
        headers = sources("*.h", "*/*.h", "cuda/*.cuh")
        kind, compilers = cpp_extension.CppExtension, {"cxx": flags}
        if with_cuda:
            files += sources("cuda/*.cpp", "cuda/*.cu")
            kind = cpp_extension.CUDAExtension
            flags.append("-DPCX_CUDA")
            # 177: what is not used, as in a kernel that is empty
            compilers["nvcc"] = ["-O3", "-std=c++20", "-diag-suppress", "177"]
            for architecture in ARCHITECTURES:
                compilers["nvcc"] += ["-gencode", architecture]
        say(f"building pcx._C from {len(files)} sources with torch {torch.__version__}")
        return kind("pcx._C", files, depends=headers, extra_compile_args=compilers)

    class OptionalBuild(cpp_extension.BuildExtension):
        """Goes on without the CUDA kernels, or in pure Python, where a compiler fails."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, use_ninja=shutil.which("ninja") is not None, **kwargs)

        def run(self) -> None:
            compiler = self.compiler  # a name, which a run replaces by what it stands for
            if self._built():
                return
            if cuda:
                say("building without the CUDA kernels")
                self.compiler = compiler
                (part,) = self.extensions
                vars(part).update(vars(extension(with_cuda=False)))
                if self._built():
                    return
            say("installing without the extension")
            self.extensions = []

        def _built(self) -> bool:
            try:
                super().run()
            except Exception as error:  # compilers fail in many ways, none of which is fatal here
                say(f"the extension was not built ({error})")
                return False
            return True

    return {
        "ext_modules": [extension(with_cuda=cuda is not None)],
        "cmdclass": {"build_ext": OptionalBuild},
    }


setup(packages=find_namespace_packages(include=["pcx", "pcx.*"]), **extension_arguments())
