"""Triton's kernels of weighted_pagerank without a GPU: interpreted, and compiled for one."""

import pytest
import torch
from without_gpu import Recorder, compiled, interpret, spills

pytest.importorskip("triton")


def test_in_the_interpreter():
    assert interpret("interpreted_weighted_pagerank.py") >= 34


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("more", [False, True])
def test_compiles_without_spilling(monkeypatch, capability, dtype, dim, more):
    from pcx.kernels import weighted_pagerank as kernel

    monkeypatch.setattr(kernel, "products_of_warps", lambda q: capability != 90)
    recorders = [Recorder(kernel._divide), Recorder(kernel._vote)]
    monkeypatch.setattr(kernel, "_divide", recorders[0])
    monkeypatch.setattr(kernel, "_vote", recorders[1])
    rows = torch.empty(8, 577, 12, dim, dtype=dtype).transpose(1, 2)
    init = torch.empty(8, 12, 577)
    bias = torch.empty(8, 1, 577, 577).expand(8, 12, 577, 577) if more else None
    prefix = torch.empty(12, 10, dim, dtype=dtype) if more else None
    kernel.weighted_pagerank(rows, rows, init, bias, prefix, 1, 0.125)
    for recorder in recorders:
        ((args, options),) = recorder.launches
        assert not spills(compiled(recorder.kernel, args, options, capability))
