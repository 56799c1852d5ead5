"""The two gradients of prefix_attention, Python's and that of csrc, give the same."""

import itertools

import pytest
import torch

from pcx.ops import prefix_attention as op
from pcx.ops.library import EXTENSION

pytestmark = pytest.mark.skipif("cpu" not in EXTENSION, reason="pcx._C was not built here")

B, H, N, S, M, D, DV = 6, 2, 5, 7, 4, 8, 6
NAMES = ("q", "k", "v", "prefix_k", "prefix_v", "bias")
LIBRARY = torch.library.Library("pcx_python_gradient", "FRAGMENT")
LIBRARY.define(
    str(torch.ops.pcx.prefix_attention.default._schema).replace("pcx::prefix_attention", "attend")
)


@torch.library.impl(LIBRARY, "attend", "CPU")
def attend(*arguments):
    return torch.ops.pcx.prefix_attention(*arguments)


torch.library.register_autograd(
    "pcx_python_gradient::attend", op._gradients, setup_context=op._setup_context, lib=LIBRARY
)
PYTHON = torch.ops.pcx_python_gradient.attend
CPP = torch.ops.pcx.prefix_attention


def rand(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype, sets, bias):
    shapes = [(B, H, N, D), (B, H, S, D), (B, H, S, DV), (*sets, H, M, D), (*sets, H, M, DV)]
    tensors = [rand(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return [*tensors, None if bias is None else rand(*bias, dtype=dtype, seed=9)]


def gradients(call, tensors, wanted, *, index=None, lengths=None, with_lse="both"):
    """By the inputs in `wanted`; None where the loss does not reach one."""
    tensors = [
        t if t is None else t.clone().requires_grad_(name in wanted)
        for name, t in zip(NAMES, tensors, strict=True)
    ]
    out, lse = call(*tensors[:5], index, lengths, tensors[5], 0.3, "cpu")
    by_out = rand(*out.shape, dtype=out.dtype, seed=20)
    by_lse = rand(*lse.shape, dtype=lse.dtype, seed=21)
    loss = 0
    if with_lse != "lse alone":
        loss = loss + (out * by_out).sum().double()
    if with_lse != "out alone":
        loss = loss + (lse * by_lse).sum().double()
    loss.backward()
    return {name: t.grad for name, t in zip(NAMES, tensors, strict=True) if t is not None}, (
        out,
        lse,
    )


def check(*arguments, **options):
    found, outputs = gradients(PYTHON, *arguments, **options)
    expected, right = gradients(CPP, *arguments, **options)
    assert all(map(torch.equal, outputs, right))
    assert found.keys() == expected.keys()
    for name in found:
        a, b = found[name], expected[name]
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            assert torch.equal(a, b), name
    return found


SETS = {
    "one prefix": ((), {}),
    "a set per sample": ((B,), {}),
    "an index": ((2,), {"index": torch.tensor([1, 0, 1, 1, 0, 0])}),
    "lengths": ((B,), {"lengths": torch.tensor([0, 1, 2, 3, 4, 4])}),
    "both": (
        (2,),
        {"index": torch.tensor([1, 0, 1, 1, 0, 0]), "lengths": torch.tensor([2, 4])},
    ),
}
BIASES = [
    None,
    (1, 1, 1, 1, 1),
    (1, 1, H, N, S),
    (1, B, 1, N, S),
    (1, B, H, 1, S),
    (2, 1, H, N, S),
    (B, 1, 1, N, 1),
    (1, 3, H, N, S),
    (2, 3, H, N, S),
]


@pytest.mark.parametrize("with_lse", ["both", "out alone", "lse alone"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("sets", SETS)
def test_all_gradients(sets, bias, with_lse):
    shape, chosen = SETS[sets]
    found = check(inputs(torch.float64, shape, bias), NAMES, with_lse=with_lse, **chosen)
    assert all(grad is not None for grad in found.values())
    if bias is not None:
        assert found["bias"].shape == bias


@pytest.mark.parametrize("sets", ["one prefix", "both"])
@pytest.mark.parametrize("bias", [None, (1, 3, H, N, S)])
def test_every_subset_of_inputs(sets, bias):
    shape, chosen = SETS[sets]
    names = NAMES if bias is not None else NAMES[:5]
    for count in range(1, len(names) + 1):
        for wanted in itertools.combinations(names, count):
            found = check(inputs(torch.float64, shape, bias), wanted, **chosen)
            assert {name for name, grad in found.items() if grad is not None} == set(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, None])
def test_dtypes(dtype, bias_dtype):
    tensors = inputs(dtype, (), (1, B, 1, N, S))
    tensors[5] = tensors[5].to(bias_dtype or dtype)
    found = check(tensors, NAMES)
    assert [grad.dtype for grad in found.values()] == [t.dtype for t in tensors]


def test_a_boolean_bias_has_no_gradient():
    tensors = inputs(torch.float64, (), (1, 1, 1, 1, S))
    tensors[5] = tensors[5] > 0
    found = check(tensors, NAMES[:5])
    assert found["bias"] is None


def test_no_samples():
    tensors = inputs(torch.float64, (), (1, 1, H, N, S))
    tensors[:3] = [t[:0] for t in tensors[:3]]
    found = check(tensors, NAMES)
    assert not found["bias"].any()
    assert not found["prefix_k"].any()
