"""Run by test_weighted_pagerank.py with TRITON_INTERPRET=1: Triton's kernels on the CPU."""

import pytest
import torch

from pcx.kernels import weighted_pagerank as kernel
from pcx.ops.reference import weighted_pagerank as reference


def graph(n, dim, dtype, batch=2, heads=2, peaked=3.0):
    """As timm's projection lays them out."""
    generator = torch.Generator().manual_seed(n + dim)
    qkv = torch.randn(batch, n, 3, heads, dim, generator=generator)
    q, k, _ = qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q * peaked, k


def check(q, k, *, iters, init=None, bias=None, prefix=None):
    batch, heads, n, dim = q.shape
    if init is None:
        init = torch.full((1, 1, 1), 1 / n).expand(batch, heads, n)
    found = kernel.weighted_pagerank(q, k, init, bias, prefix, iters, dim**-0.5)
    wide = [None if x is None else x.double() for x in (q, k, init, bias, prefix)]
    expected = reference.weighted_pagerank(*wide, None, iters, dim**-0.5)
    assert found.dtype == torch.float32
    assert found.shape == (batch, heads, n)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "dim"), [(1, 16), (33, 24), (64, 32), (65, 80), (145, 64)])
@pytest.mark.parametrize("iters", [1, 5])
def test_equals_the_matrix_written_out(n, dim, dtype, iters):
    found = check(*graph(n, dim, dtype), iters=iters)
    assert (found.double().sum(-1) - 1).abs().max() < 1e-5


def test_many_tokens_and_iterations():
    check(*graph(213, 16, torch.float32, batch=1, heads=1), iters=30)


def test_a_head_start_and_no_iteration():
    q, k = graph(20, 16, torch.float32)
    init = torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(0))
    init /= init.sum(-1, keepdim=True)
    check(q, k, iters=3, init=init)
    kept = kernel.weighted_pagerank(q, k, init, None, None, 0, 0.25)
    assert torch.equal(kept, init)
    assert kept.data_ptr() != init.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m", [1, 70])
def test_a_prefix_takes_its_share(dtype, m):
    q, k = graph(40, 24, dtype)
    prefix = torch.randn(2, m, 24, generator=torch.Generator().manual_seed(m)).to(dtype)
    check(q, k, iters=4, prefix=prefix)


def test_biases():
    q, k = graph(40, 24, torch.float32)
    generator = torch.Generator().manual_seed(1)
    check(q, k, iters=3, bias=torch.randn(2, 1, 40, 40, generator=generator).expand(2, 2, 40, 40))
    mask = torch.zeros(40)
    mask[25:] = -torch.inf
    found = check(q, k, iters=3, bias=mask.expand(2, 2, 40, 40))
    assert not found[..., 25:].any()


def test_a_row_that_attends_to_nothing():
    q, k = graph(40, 24, torch.float32)
    bias = torch.zeros(2, 2, 40, 40)
    bias[1, 0, 7] = -torch.inf
    check(q, k, iters=3, bias=bias)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of columns that are not stored
@pytest.mark.parametrize("shift", [None, -40, 40])
def test_large_logits_neither_overflow_nor_vanish(shift):
    q, k = graph(40, 24, torch.float32, peaked=100.0 if shift is None else 1.0)
    if shift is not None:
        q[..., 0], k[..., 0] = 40, shift
    init = torch.full((2, 2, 40), 1 / 40)
    found = kernel.weighted_pagerank(q, k, init, None, None, 1, 0.2)
    wide = (q.double(), k.double(), init.double())
    expected = reference.weighted_pagerank(*wide, None, None, None, 1, 0.2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)


def test_a_negative_scale():
    q, k = graph(40, 24, torch.float32)
    init = torch.full((2, 2, 40), 1 / 40)
    found = kernel.weighted_pagerank(q, k, init, None, None, 2, -0.2)
    assert torch.equal(found, kernel.weighted_pagerank(-q, k, init, None, None, 2, 0.2))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_are_none_spoil_their_head():
    q, k = graph(70, 16, torch.float32)
    q[1, 0, 5, 7] = torch.nan
    init = torch.full((2, 2, 70), 1 / 70)
    found = kernel.weighted_pagerank(q, k, init, None, None, 2, 0.25)
    assert found[1, 0].isnan().all()
    assert found.isnan().sum() == 70


def test_no_samples():
    q, k = graph(5, 16, torch.float32)
    found = kernel.weighted_pagerank(q[:0], k[:0], torch.ones(0, 2, 5), None, None, 3, 0.25)
    assert found.shape == (0, 2, 5)
