"""weighted_pagerank against its definition in float64, and its errors."""

import pytest
import torch

import pcx
from pcx.ops.reference import weighted_pagerank as reference
from pcx.ops.reference.attention import additive

BACKENDS = ["operation", "reference"]


def graph(n, dtype=torch.float64, batch=2, heads=3, dim=16, peaked=3.0):
    """Queries are scaled, so that scores still change after a few iterations."""
    generator = torch.Generator().manual_seed(n)
    q, k = torch.randn(2, batch, heads, n, dim, generator=generator, dtype=torch.float64)
    return (q * peaked).to(dtype), k.to(dtype)


def by_definition(q, k, iters, init=None):
    attention = (q.double() @ k.double().transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    scores = q.new_full(q.shape[:3], 1 / q.shape[2], dtype=torch.float64)
    scores = scores if init is None else (init / init.sum(-1, keepdim=True)).expand_as(scores)
    for _ in range(iters):
        scores = torch.einsum("bhij,bhi->bhj", attention, scores)
    return scores


def call(backend, q, k, iters, **arguments):
    if backend == "operation":
        return pcx.weighted_pagerank(q, k, iters=iters, **arguments)
    wide = torch.promote_types(q.dtype, torch.float32)
    n = arguments["among"].shape[1] if "among" in arguments else q.shape[2]
    init = arguments.get("init", torch.ones(1, 1, n)).to(wide).expand(*q.shape[:2], n)
    bias = arguments.get("bias")
    return reference.weighted_pagerank(
        q,
        k,
        init / init.sum(-1, keepdim=True),
        None if bias is None else additive(bias, wide).expand(*q.shape[:2], n, n),
        arguments.get("prefix_k"),
        arguments.get("among"),
        iters,
        arguments.get("scale") or q.shape[-1] ** -0.5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [50, 145, 197, 577])
@pytest.mark.parametrize("iters", [1, 5, 30, 50])
def test_equals_the_definition(backend, n, iters):
    q, k = graph(n, torch.float32)
    found = call(backend, q, k, iters)
    expected = by_definition(q, k, iters)
    assert found.dtype == torch.float32
    assert ((found - expected).abs() / expected).max() < 1e-4
    assert (found.double().sum(-1) - 1).abs().max() < 1e-5


def test_the_graphs_here_tell_iterations_apart():
    q, k = graph(197)
    one, five, thirty = (by_definition(q, k, iters) for iters in (1, 5, 30))
    assert ((one - five).abs() / five).max() > 0.1
    assert ((five - thirty).abs() / thirty).max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    q, k = graph(37, dtype)
    found = call(backend, q, k, 7)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), by_definition(q, k, 7), rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_start(backend):
    q, k = graph(20)
    init = torch.ones(1, 1, 20, dtype=torch.float64)
    init[..., 0] = 20**0.5
    found = call(backend, q, k, 2, init=init)
    torch.testing.assert_close(found, by_definition(q, k, 2, init))
    assert not torch.allclose(found, by_definition(q, k, 2))
    torch.testing.assert_close(call(backend, q, k, 0, init=init).sum(-1), torch.ones(2, 3).double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_tokens_and_layout_do_not_matter(backend):
    q, k = graph(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    found = call(backend, q[:, :, order].mT.contiguous().mT, k[:, :, order], 4)
    torch.testing.assert_close(found, call(backend, q, k, 4)[..., order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_among_some_tokens(backend):
    q, k = graph(12)
    index = torch.tensor([[3, 1, 7, 0], [11, 2, 5, 6]])
    bias = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    found = call(backend, q, k, 3, among=index, bias=bias)
    for b in range(2):
        rows = q[[b]][:, :, index[b]], k[[b]][:, :, index[b]]
        torch.testing.assert_close(found[[b]], call(backend, *rows, 3, bias=bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_none_spoil_their_head(backend):
    q, k = graph(12)
    q[1, 2, 5, 7] = torch.nan
    found = call(backend, q, k, 2)
    assert found[1, 2].isnan().all()
    assert found.isnan().sum() == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_get_nothing(backend):
    q, k = graph(12)
    mask = torch.ones(12, dtype=torch.bool)
    mask[5:] = False
    found = call(backend, q, k, 3, bias=mask[None, None, None])
    assert not found[..., 5:].any()
    init = mask.double()[None, None]
    kept = call(backend, q[:, :, :5], k[:, :, :5], 3)
    torch.testing.assert_close(
        call(backend, q, k, 3, bias=mask[None, None, None], init=init)[..., :5], kept
    )
    additive = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    logits = q @ k.mT / 4 + additive
    expected = (logits.softmax(-1).mT @ q.new_full((12, 1), 1 / 12))[..., 0]
    torch.testing.assert_close(call(backend, q, k, 1, bias=additive), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iters", [1, 6])
def test_prefix_keys_are_sinks(backend, iters):
    """As the tokens' part of PageRank over prompts and tokens, of which prompts pass nothing on."""
    q, k = graph(15)
    prefix = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(2)).double()
    keys = torch.cat([prefix.expand(2, 3, 4, 16), k], 2)
    attention = (q @ keys.mT / 4).softmax(-1)
    scores = q.new_full((2, 3, 15, 1), 1 / 15)
    for _ in range(iters):
        scores = attention[..., 4:].mT @ scores
    expected = (scores / scores.sum(-2, keepdim=True))[..., 0]
    found = call(backend, q, k, iters, prefix_k=prefix)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, call(backend, q, k, iters), rtol=1e-3)


@pytest.mark.parametrize("run", [torch.ops.pcx.weighted_pagerank, reference.weighted_pagerank])
def test_autocast_changes_nothing(run):
    q, k = graph(197, torch.bfloat16)
    init = torch.full((2, 3, 197), 1 / 197)
    expected = run(q, k, init, None, None, None, 30, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(q, k, init, None, None, None, 30, 0.25)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_no_samples():
    q, k = graph(5)
    assert pcx.weighted_pagerank(q[:0], k[:0], iters=3).shape == (0, 3, 5)


def test_opcheck():
    q, k = graph(6)
    init = torch.full((2, 3, 6), 1 / 6, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.pcx.weighted_pagerank.default,
        (q, k, init, None, None, None, 3, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.pcx.weighted_pagerank.default,
        (q, k, init[..., :2], None, None, torch.tensor([[1, 5], [0, 2]]), 3, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"iters": -1}, ValueError, "iters: -1, expected a whole number, 0 or more"),
        ({"iters": 2.0}, ValueError, "iters: 2.0, expected a whole number"),
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q: shape \(2, 3, 4\), expected \[B, H, N, d\]"),
        ({"k": torch.zeros(2, 3, 4, 16)}, ValueError, r"k: shape \(2, 3, 4, 16\), expected q's"),
        ({"k": torch.zeros(2, 3, 5, 16, device="meta")}, ValueError, "k: on meta, but q is on cpu"),
        ({"q": torch.zeros(2, 3, 5, 16).long()}, TypeError, "expected floating point"),
        ({"init": torch.ones(4)}, ValueError, r"init: shape \(4,\), expected one that broadcasts"),
        ({"init": -torch.ones(5)}, ValueError, "init: expected no negative score"),
        ({"bias": torch.ones(4, 5)}, ValueError, r"bias: shape \(4, 5\), expected one that"),
        ({"bias": torch.ones(5, 5).int()}, TypeError, "bias: torch.int32, expected floating point"),
        ({"prefix_k": torch.ones(2, 1, 16)}, ValueError, r"expected \[H, m, d\] = \(3, m, 16\)"),
        ({"among": torch.zeros(3, 4).long()}, ValueError, r"among: torch.int64 of shape \(3, 4\)"),
        ({"among": torch.zeros(2, 4)}, ValueError, r"among: .*, expected int64 \[2, n\]"),
        (
            {"among": torch.tensor([[0], [5]])},
            ValueError,
            "among: values 0 to 5, expected tokens, 0 to 4",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    q, k = graph(5)
    with pytest.raises(error, match=message):
        pcx.weighted_pagerank(**{"q": q, "k": k, "iters": 2, **change})
