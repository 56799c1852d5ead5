"""prefix_attention against attention written out, and its errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pcx import prefix_attention

B, H, N, S, M, D, DV = 3, 2, 5, 7, 4, 8, 6


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(m=M, sets=()):
    return (
        rand(B, H, N, D),
        rand(B, H, S, D, seed=1),
        rand(B, H, S, DV, seed=2),
        rand(*sets, H, m, D, seed=3),
        rand(*sets, H, m, DV, seed=4),
    )


def written_out(q, k, v, prefix_k, prefix_v, bias=None, scale=None):
    """Sample by sample, softmax by hand; prefixes [B, H, m, d]."""
    rows, denominators = [], []
    for b in range(len(q)):
        keys, values = torch.cat([prefix_k[b], k[b]], 1), torch.cat([prefix_v[b], v[b]], 1)
        logits = q[b] @ keys.mT * (1 / math.sqrt(D) if scale is None else scale)
        if bias is not None:
            logits[..., prefix_k.shape[2] :] += bias.expand(B, H, N, S)[b]
        weights = logits.exp()
        rows.append(weights / weights.sum(-1, keepdim=True) @ values)
        denominators.append(weights.sum(-1).log())
    return torch.stack(rows), torch.stack(denominators)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, S), (1, H, N, S), (B, 1, N, S), (N, S)])
@pytest.mark.parametrize("m", [0, 1, M])
def test_shared_prefix(m, bias_shape, scale):
    q, k, v, pk, pv = inputs(m)
    bias = None if bias_shape is None else rand(*bias_shape, seed=9)
    expected, lse = written_out(
        q, k, v, pk.expand(B, -1, -1, -1), pv.expand(B, -1, -1, -1), bias, scale
    )
    torch.testing.assert_close(prefix_attention(q, k, v, pk, pv, bias=bias, scale=scale), expected)
    found = prefix_attention(q, k, v, pk, pv, bias=bias, scale=scale, return_lse=True)
    torch.testing.assert_close(found, (expected, lse))


def test_sets_are_chosen_by_index():
    q, k, v, pk, pv = inputs(sets=(2,))
    index = torch.tensor([1, 0, 1])
    expected, _ = written_out(q, k, v, pk[index], pv[index])
    torch.testing.assert_close(prefix_attention(q, k, v, pk, pv, prefix_index=index), expected)


def test_lengths_hide_the_end_of_a_set():
    q, k, v, pk, pv = inputs(sets=(2,))
    index, lengths = torch.tensor([1, 0, 1]), torch.tensor([2, 0])
    found = prefix_attention(q, k, v, pk, pv, prefix_index=index, prefix_lengths=lengths)
    for b, g in enumerate(index):
        n = int(lengths[g])
        alone = [t[b : b + 1] for t in (q, k, v)]
        torch.testing.assert_close(
            found[b : b + 1], prefix_attention(*alone, pk[g, :, :n], pv[g, :, :n])
        )


def test_a_boolean_bias_hides_keys():
    q, k, v, pk, pv = inputs()
    seen = torch.tensor([True, False, True, True, False, False, True])
    expected = prefix_attention(q, k[:, :, seen], v[:, :, seen], pk, pv)
    torch.testing.assert_close(prefix_attention(q, k, v, pk, pv, bias=seen), expected)


@given(m=st.integers(0, 9), s=st.integers(1, 9), n=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_properties(m, s, n, seed):
    q, k, v = rand(2, H, n, D, seed=seed), rand(2, H, s, D, seed=seed), rand(2, H, s, DV, seed=seed)
    pk = rand(H, m, D, seed=seed + 1).requires_grad_()
    pv = rand(H, m, DV, seed=seed + 1).requires_grad_()
    out = prefix_attention(q, k, v, pk, pv)
    keys = torch.cat([pk.expand(2, -1, -1, -1), k], 2)
    values = torch.cat([pv.expand(2, -1, -1, -1), v], 2)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, keys, values))
    order = torch.randperm(m)
    torch.testing.assert_close(prefix_attention(q, k, v, pk[:, order], pv[:, order]), out)
    whole = torch.autograd.grad(out.sum(), (pk, pv))
    halves = [
        torch.autograd.grad(prefix_attention(q[i], k[i], v[i], pk, pv).sum(), (pk, pv))
        for i in (slice(0, 1), slice(1, 2))
    ]
    for both, one, two in zip(whole, *halves, strict=True):
        torch.testing.assert_close(both, one + two)


def test_gradients():
    tensors = [t[:2, :1, :2].clone().requires_grad_() for t in inputs()[:3]]
    prefixes = [t[:1, :2].clone().requires_grad_() for t in inputs()[3:]]
    assert torch.autograd.gradcheck(prefix_attention, (*tensors, *prefixes))


def test_autocast_casts_as_sdpa_does():
    q, k, v, pk, pv = (t.float() for t in inputs())
    bias = rand(1, 1, N, S).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert prefix_attention(q, k.bfloat16(), v, pk, pv, bias=bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a tensor"),
        ({"q": rand(H, N, D)}, ValueError, r"q: shape \(2, 5, 8\), expected rank"),
        ({"k": rand(B, 1, S, D)}, ValueError, r"k: shape \(3, 1, 7, 8\), expected \(3, 2, 7, 8\)"),
        ({"k": rand(B, H, S, D).float()}, TypeError, "k: dtype torch.float32, but q has"),
        ({"v": rand(B, H, S - 1, DV)}, ValueError, "v: shape"),
        ({"v": rand(B, H, S, DV).to("meta")}, ValueError, "v: on meta"),
        ({"prefix_k": rand(H, M, D + 1)}, ValueError, "prefix_k: shape"),
        ({"prefix_v": rand(H, M + 1, DV)}, ValueError, "prefix_v: shape"),
        ({"prefix_index": torch.zeros(B).long()}, ValueError, "no set dimension"),
        ({"bias": rand(N, S + M)}, ValueError, r"bias: shape \(5, 11\) does not broadcast"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    with pytest.raises(error, match=message):
        prefix_attention(**{**dict(zip(names, inputs(), strict=True)), **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prefix_index: needed"),
        ({"prefix_index": torch.tensor([0, 1, 2])}, r"values 0\.\.2, expected 0\.\.1"),
        ({"prefix_index": torch.tensor([0, 1])}, r"prefix_index: .* expected int64 \[3\]"),
        (
            {"prefix_index": torch.tensor([0, 1, 1]), "prefix_lengths": torch.tensor([1])},
            "prefix_lengths: .* expected int64",
        ),
    ],
)
def test_bad_sets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prefix_attention(*inputs(sets=(2,)), **arguments)
