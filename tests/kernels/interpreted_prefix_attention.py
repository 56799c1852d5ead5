"""The Triton kernels in Triton's interpreter, on the CPU; run by test_prefix_attention.py.

The interpreter has to be chosen before the kernels are imported, hence a process of its own.
"""

import math
import os

import pytest
import torch

from pcx.kernels.prefix_attention.backward import backward
from pcx.kernels.prefix_attention.forward import forward
from pcx.ops.bias import five_dimensions, four_dimensions
from pcx.ops.reference import prefix_attention as reference

assert os.environ["TRITON_INTERPRET"] == "1"
SMALL = (16, 16, 4, 1)  # several tiles of small inputs
TILES = {"query": SMALL, "own": SMALL, "prefix": SMALL}
ALL = (True, True, True, False)


def rand(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def inputs(batch=2, heads=2, n=21, own=None, m=9, dim=16, sets=(), dtype=torch.float32):
    """Queries, keys and values as timm lays them out, and prefixes."""
    own = n if own is None else own
    shapes = ((batch, n, heads, dim), (batch, own, heads, dim), (batch, own, heads, dim))
    tokens = [rand(*shape, seed=i, dtype=dtype).transpose(1, 2) for i, shape in enumerate(shapes)]
    return *tokens, *(rand(*sets, heads, m, dim, seed=i, dtype=dtype) for i in (3, 4))


def check(tensors, index=None, lengths=None, bias=None, scale=None, poison=True, rtol=1e-5):
    """Forward and backward against the reference in float64."""
    q = tensors[0]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = [t.double().requires_grad_() for t in tensors]
    trained = bias is not None and bias.dtype != torch.bool
    wide_bias = bias.double().requires_grad_() if trained else bias
    five = None if bias is None else five_dimensions(bias, q.shape[:1])
    expected, expected_lse = reference.prefix_attention(
        *wide,
        prefix_index=index,
        prefix_lengths=lengths,
        bias=None
        if bias is None
        else four_dimensions(five_dimensions(wide_bias, q.shape[:1]), len(q)),
        scale=scale,
        return_lse=True,
    )
    out, lse = forward(*tensors, index, lengths, five, scale, SMALL)
    grad_out, grad_lse = rand(*out.shape, seed=7, dtype=q.dtype), rand(*lse.shape, seed=8)
    finite = expected_lse.detach().isfinite()
    grad_lse = grad_lse * finite
    found = backward(
        grad_out,
        grad_lse,
        *tensors,
        index,
        lengths,
        five,
        out,
        lse,
        scale,
        (True, True, True, trained),
        TILES,
    )
    loss = (expected * grad_out).sum() + (expected_lse.masked_fill(~finite, 0) * grad_lse).sum()
    wanted = torch.autograd.grad(loss, [*wide, wide_bias] if trained else wide)
    found = [g for g in found if g is not None]
    if trained:
        found[-1] = found[-1].sum_to_size(bias.shape)
    pairs = [(out, expected), (lse, expected_lse), *zip(found, wanted, strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b.detach(), rtol=rtol, atol=rtol)
    return out, lse, found


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that is not written shows."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        made = new_empty(self, *args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.parametrize("m", [0, 1, 16, 23, 40])
def test_prefix_lengths(m):
    check(inputs(m=m))


@pytest.mark.parametrize("dim", [32, 12, 24, 40])  # 24 = 16 + 8, 40 = 32 + 8
def test_head_dims(dim):
    check(inputs(dim=dim))


@pytest.mark.parametrize("more", [3, 4, 8])
def test_rows_that_are_parts_of_wider_ones(more):
    check(tuple(x[..., :24] for x in inputs(dim=24 + more)))


@pytest.mark.parametrize(("n", "own"), [(1, 30), (2, 16), (33, 5), (16, 16)])
def test_own_keys_of_another_number(n, own):
    check(inputs(n=n, own=own))


def test_half_precision():
    check(inputs(dtype=torch.float16), rtol=3e-2)


def test_many_samples_share_a_prefix_in_chunks():
    check(inputs(batch=40, n=17, heads=1))


def test_a_scale_of_one_s_own():
    check(inputs(), scale=0.7)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in place of a GPU
def test_a_row_masked_by_the_least_number_takes_the_mean():
    q, k, v, prefix_k, prefix_v = inputs(m=0)
    bias = torch.zeros(21, 21)
    bias[2] = torch.finfo(torch.float32).min
    given = (q, k, v, prefix_k, prefix_v, None, None, five_dimensions(bias, q.shape[:1]))
    out, lse = forward(*given, q.shape[-1] ** -0.5, SMALL)
    torch.testing.assert_close(out[:, :, 2], v.mean(2), rtol=1e-5, atol=1e-5)
    assert lse.isfinite().all()


@pytest.mark.parametrize("lengths", [None, [9, 0, 4]])
def test_sets(lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    index = torch.tensor([2, 0, 2, 2, 1])
    check(inputs(batch=5, sets=(3,)), index=index, lengths=lengths)
    unused = torch.tensor([2, 0, 2, 2, 2])  # nobody has set 1
    check(inputs(batch=5, sets=(3,)), index=unused, lengths=lengths)


def test_sets_and_saved_tensors_of_other_strides():
    q, k, v, pk, pv = inputs(batch=5, sets=(3,))
    index, lengths = torch.tensor([2, 0, 2, 2, 1]), torch.tensor([9, 0, 4])
    apart = [torch.stack([t, t + 7], 1)[:, 0] for t in (index, lengths)]
    check((q, k, v, pk, pv), index=apart[0], lengths=apart[1])
    one = torch.tensor([1]).expand(5)
    check((q, k, v, pk, pv), index=one)
    out, lse = forward(q, k, v, pk, pv, index, lengths, None, 0.25, SMALL)
    rest = (q, k, v, pk, pv, index, lengths, None)
    right = backward(out, None, *rest, out, lse, 0.25, ALL, TILES)
    moved = out.mT.contiguous().mT, lse.contiguous()
    for a, b in zip(
        backward(out, None, *rest, *moved, 0.25, ALL, TILES)[:5], right[:5], strict=True
    ):
        assert torch.equal(a, b)


def test_one_set_for_each_sample_also_without_memory_of_its_own():
    check(inputs(batch=3, sets=(3,)))
    q, k, v, pk, pv = inputs(batch=3)
    check((q, k, v, pk.expand(3, *pk.shape), pv.expand(3, *pv.shape)))


@pytest.mark.parametrize(
    "shape", [(21, 21), (1, 2, 21, 21), (4, 1, 1, 21), (4, 2, 21, 1), (4, 2, 21, 21)]
)
def test_bias(shape):
    check(inputs(batch=4), bias=rand(*shape))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities
def test_a_mask_also_of_whole_rows():
    seen = rand(2, 1, 21, 21) > 0
    check(inputs(), bias=seen)
    seen[1, :, 4] = False
    out, lse, _ = check(inputs(m=0), bias=seen)
    assert not out[1, :, 4].any()
    assert (lse[1, :, 4] == -math.inf).all()


def test_windows_share_a_bias():
    """Swin's: 3 windows per image, the same bias for every image."""
    q, k, v, pk, pv = inputs(batch=6)
    bias = rand(1, 3, 2, 21, 21)
    out, _ = forward(q, k, v, pk, pv, None, None, bias, 0.25, SMALL)
    for b in range(6):
        alone = (t[b : b + 1] for t in (q, k, v))
        expected = reference.prefix_attention(*alone, pk, pv, bias=bias[:, b % 3], scale=0.25)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_needed_is_not_computed():
    q, k, v, pk, pv = inputs()
    out, lse = forward(q, k, v, pk, pv, None, None, None, 0.25, SMALL)
    rest = (out, None, q, k, v, pk, pv, None, None, None, out, lse, 0.25)
    whole = backward(*rest, ALL, TILES)
    part = backward(*rest, (False, False, True, False), TILES)
    assert [g is None for g in part] == [True, True, True, False, False, True]
    assert torch.equal(part[3], whole[3])
    assert torch.equal(part[4], whole[4])


def test_the_gradient_of_a_bias_alone():
    q, k, v, pk, pv = inputs()
    bias = rand(1, 1, 2, 21, 21)
    out, lse = forward(q, k, v, pk, pv, None, None, bias, 0.25, SMALL)
    rest = (out, None, q, k, v, pk, pv, None, None, bias, out, lse, 0.25)
    whole = backward(*rest, (True, True, True, True), TILES)
    alone = backward(*rest, (False, False, False, True), TILES)
    assert alone[:5] == (None,) * 5
    assert torch.equal(alone[5], whole[5])


def test_repeats_bit_by_bit():
    q, k, v, pk, pv = inputs(batch=40, n=17, heads=1)
    out, lse = forward(q, k, v, pk, pv, None, None, None, 0.25, SMALL)
    rest = (out, None, q, k, v, pk, pv, None, None, None, out, lse, 0.25)
    one, two = (backward(*rest, ALL, TILES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:5], two[:5], strict=True))


def test_layout_is_the_fake_s():
    q, k, v, pk, pv = inputs()
    out, lse = forward(q, k, v, pk, pv, None, None, None, 0.25)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.transpose(0, 1).is_contiguous()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities
def test_what_is_not_finite_is_passed_on():
    q, k, v, pk, pv = inputs()
    q[0, 0, 1, 0], v[1, 1, 2, 3] = math.nan, math.inf
    out, _ = forward(q, k, v, pk, pv, None, None, None, 0.25, SMALL)
    expected = reference.prefix_attention(q, k, v, pk, pv, scale=0.25)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


BIASES = {
    "none": None,
    "shared": (1, 2, 49, 49),  # as Swin's
    "of windows": (3, 2, 49, 49),  # as Swin's with shifted windows
    "a mask of windows": (3, 1, 49, 49),
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(("m", "own"), [(9, 49), (0, 49), (50, 49), (50, 64)])
def test_small_samples_are_packed(kind, m, own):
    """Four images of three windows, of which one program computes several."""
    from pcx.kernels.prefix_attention.launch import bias_arguments
    from pcx.kernels.prefix_attention.windows import packing_of

    q, k, v, pk, pv = inputs(12, 2, 49, own, m, 32, dtype=torch.float16)
    bias = None
    if BIASES[kind] is not None:
        bias = rand(*BIASES[kind][:3], own)
        bias = bias > -1 if "mask" in kind else bias
        if "mask" in kind:
            bias[0, :, 3] = False  # a row that attends to nothing of its own
        bias = five_dimensions(bias, (4, 3))
    _, *described = bias_arguments(bias, q)
    packing = packing_of(q, own, m, False, *described)
    assert packing.samples > 1
    assert packing.groups == (3 if "windows" in kind else 1)
    assert packing.chunks * packing.samples >= 12 // packing.groups
    out, lse = forward(q, k, v, pk, pv, None, None, bias, 0.2)
    wide = (t.double() for t in (q, k, v, pk, pv))
    four = None if bias is None else four_dimensions(bias, 12)
    expected, expected_lse = reference.prefix_attention(
        *wide, bias=four, scale=0.2, return_lse=True
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


def test_samples_with_biases_of_their_own_are_not_packed():
    from pcx.kernels.prefix_attention.launch import bias_arguments
    from pcx.kernels.prefix_attention.windows import packing_of

    q = inputs(12, 2, 49, dim=32, dtype=torch.float16)[0]
    each = five_dimensions(rand(4, 1, 2, 49, 49), (4, 3))
    assert packing_of(q, 49, 9, False, *bias_arguments(each, q)[1:]) is None
    assert packing_of(q, 49, 9, True, *bias_arguments(None, q)[1:]) is None
    assert packing_of(q.float(), 49, 9, False, *bias_arguments(None, q)[1:]) is None
    assert packing_of(q[:1], 49, 9, False, *bias_arguments(None, q[:1])[1:]) is None
