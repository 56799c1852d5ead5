"""Triton's kernels without a GPU: interpreted, and compiled for one that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch


def interpret(file: str) -> int:
    """Runs a file of tests/kernels in Triton's interpreter; how many passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parent / "kernels" / file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}


def source_of(kernel, args, options):
    """The specialised source that Triton's own launcher would compile, and its options."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}

    def described(value, place, exact):
        """The type of an argument, or the types of a tuple's items; fills the other two."""
        if isinstance(value, tuple):
            return tuple(described(item, (*place, i), exact) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[place] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value == 1 and exact:
            constants[place] = 1
            return "constexpr"
        if exact and value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        signature[parameter.name] = described(value, (i,), not parameter.do_not_specialize)
    options = dict(options)
    for parameter in kernel.params[len(args) :]:
        signature[parameter.name] = "constexpr"
        constants[parameter.name] = options.pop(parameter.name)
    return ASTSource(kernel, signature, constants, attributes), options


def compiled(kernel, args, options, capability):
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(kernel, args, options)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spills(compiled) -> bool:
    """Whether the machine code stores to or loads from local memory."""
    return bool(re.search(r"\b(STL|LDL)\b", compiled.asm["sass"]))
