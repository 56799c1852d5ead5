"""The Triton kernel of logit_gate without a GPU: interpreted, and compiled for one."""

import pytest
import torch
from without_gpu import Recorder, compiled, interpret, spills

pytest.importorskip("triton")


def test_in_the_interpreter():
    assert interpret("interpreted_logit_gate.py") >= 12


@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("m", [10, 200])
def test_logit_gradients_compile_without_spilling(monkeypatch, m, dim):
    from pcx.kernels import logit_gate as kernel

    recorder = Recorder(kernel._logit_gradient)
    monkeypatch.setattr(kernel, "_logit_gradient", recorder)
    rows = torch.empty(8, 197, 12, dim, dtype=torch.bfloat16).transpose(1, 2)
    prefix = torch.empty(12, m, dim, dtype=torch.bfloat16)
    lse = torch.empty(12, 8, 197).transpose(0, 1)
    kernel.prefix_logit_gradient(rows, rows, prefix, prefix, rows, lse, 0.125)
    ((args, options),) = recorder.launches
    assert not spills(compiled(recorder.kernel, args, options, 90))
