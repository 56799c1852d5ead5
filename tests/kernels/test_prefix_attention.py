"""The Triton kernels without a GPU: interpreted, and compiled for one that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
triton = pytest.importorskip("triton")


def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "interpreted_prefix_attention.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


@pytest.fixture
def recorded(monkeypatch):
    from pcx.kernels import prefix_attention as kernel

    names = ("_forward", "_query_gradient", "_key_gradients")
    recorders = {name: Recorder(getattr(kernel, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernel, name, recorder)
    return kernel, recorders


def launch(kernel, m, dim, dtype, n=197):
    q, k, v = torch.empty(4, n, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    pk, pv = torch.empty(2, 12, m, dim, dtype=dtype).unbind(0)
    out, lse = kernel.forward(q, k, v, pk, pv, None, None, None, 0.125)
    needs = (True, True, True, False)
    kernel.backward(out, None, q, k, v, pk, pv, None, None, None, out, lse, 0.125, needs)


TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def source_of(kernel, args, options):
    """The specialised source that Triton's own launcher would compile, and its options."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        exact = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and exact:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if exact and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = dict(options)
    for parameter in kernel.params[len(args) :]:
        signature[parameter.name] = "constexpr"
        constants[parameter.name] = options.pop(parameter.name)
    return ASTSource(kernel, signature, constants, attributes), options


@pytest.mark.parametrize(
    ("capability", "m", "dim", "dtype"),
    [
        (90, 200, 64, torch.bfloat16),
        (90, 50, 80, torch.float16),
        (80, 200, 64, torch.bfloat16),
    ],
)
def test_compiles_without_spilling(recorded, capability, m, dim, dtype):
    from triton.backends.compiler import GPUTarget

    kernel, recorders = recorded
    launch(kernel, m, dim, dtype)
    for name, recorder in recorders.items():
        for args, options in recorder.launches:
            source, options = source_of(recorder.kernel, args, options)
            compiled = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options=options
            )
            assert not spills(compiled), f"{name} at {options} spills registers"
            if capability == 90 and name == "_forward":
                assert "wgmma" in compiled.asm["ptx"]


def spills(compiled) -> bool:
    """Whether the machine code stores to or loads from local memory."""
    return bool(re.search(r"\b(STL|LDL)\b", compiled.asm["sass"]))


def test_at_most_five_forms_of_the_forward_up_to_200_prompts(recorded):
    """Every layer of a condensed model has its own number of prompts."""
    kernel, recorders = recorded
    forms = set()
    for m in range(201):
        recorders["_forward"].launches.clear()
        launch(kernel, m, 64, torch.bfloat16)
        ((args, options),) = recorders["_forward"].launches
        source, options = source_of(recorders["_forward"].kernel, args, options)
        forms.add(
            (
                str(sorted(source.signature.items())),
                str(sorted(source.constants.items())),
                str(sorted(source.attrs.items())),
                str(sorted(options.items())),
            )
        )
    assert len(forms) <= 5
