"""The Triton kernels of salient_linear without a GPU: interpreted, and compiled for one."""

import pytest
import torch
from without_gpu import Recorder, compiled, interpret, spills

pytest.importorskip("triton")


def test_in_the_interpreter():
    assert interpret("interpreted_salient_linear.py") >= 110


@pytest.mark.parametrize(("dim", "count"), [(64, 1), (192, 32), (768, 96), (768, 100), (1024, 256)])
@pytest.mark.parametrize(
    ("dtype", "product"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_compiles_without_spilling(monkeypatch, dim, count, dtype, product):
    from pcx.kernels import salient_linear as kernel

    recorder = Recorder(kernel._salient)
    monkeypatch.setattr(kernel, "_salient", recorder)
    weight, bias, affine = torch.empty(count, count), torch.empty(count), torch.empty(dim)
    rest = (torch.arange(count), weight, bias, 1.0, affine, affine, 1e-6, product, product, True)
    for rows in (1, 197, 64 * 197):
        x = torch.empty(rows, dim, dtype=dtype)
        kernel.salient_linear(x, *rest)
    for args, options in recorder.launches:
        assert not spills(compiled(recorder.kernel, args, options, 90))


@pytest.mark.parametrize(("dim", "count"), [(64, 1), (192, 32), (768, 96), (768, 100), (1024, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_compile_without_spilling(monkeypatch, dim, count, dtype):
    from pcx.kernels import salient_linear_gradient as kernel

    recorder = Recorder(kernel._gradient)
    monkeypatch.setattr(kernel, "_gradient", recorder)
    weight, affine = torch.empty(count, count), torch.empty(dim)
    for rows in (1, 197, 64 * 197):
        x, statistic = torch.empty(rows, dim, dtype=dtype), torch.empty(rows, 1)
        rest = (torch.arange(count), weight, 1.0, x, statistic, statistic, affine, torch.bfloat16)
        kernel.row_gradients(x, x.bfloat16(), *rest)
    for args, options in recorder.launches:
        assert not spills(compiled(recorder.kernel, args, options, 90))
