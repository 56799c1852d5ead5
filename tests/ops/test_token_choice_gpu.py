"""The CUDA kernels that choose tokens, against the stages written out in torch."""

import pytest
import torch

from pcx.ops.library import EXTENSION
from pcx.ops.reference import token_choice as reference
from pcx.ops.token_choice import dissimilar_tokens, important_tokens
from pcx.token_pruning import stages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cuda" not in EXTENSION, reason="pcx was built without CUDA"),
]
OPERATIONS = torch.ops.pcx


def scores_of(batch, heads, n, seed=0, flat=False):
    """Of heads of several variances, so that the filter takes some."""
    generator = torch.Generator().manual_seed(seed + n)
    spread = torch.rand(batch, heads, 1, generator=generator) * (0.01 if flat else 2)
    scores = (torch.randn(batch, heads, n, generator=generator) * spread).exp()
    return (scores / scores.sum(-1, keepdim=True)).cuda()


@pytest.mark.parametrize("n", [2, 31, 32, 33, 67, 197, 256, 257, 577, 1024, 1025])
@pytest.mark.parametrize(("heads", "flat"), [(1, False), (6, False), (6, True), (65, False)])
def test_important_tokens(n, heads, flat):
    scores = scores_of(9, heads, n, flat=flat)
    variances = reference.filter_heads(scores)
    if heads == 6:
        assert variances.all() == flat  # where none passes all are used
    for protected in (0, 1):
        for keep in {0, 1, (n - protected) // 2, n - protected}:
            arguments = (scores, keep, protected, *reference.VARIANCES)
            found = OPERATIONS.important_tokens(*arguments, None)
            expected = OPERATIONS.important_tokens_written_out(*arguments, None)
            assert torch.equal(found, expected)
            among = torch.arange(n, device="cuda").expand(9, -1) * 3 + 1
            found = OPERATIONS.important_tokens(*arguments, among)
            assert torch.equal(found, expected * 3 + 1)


def test_equal_scores_and_numbers_that_are_none():
    scores = torch.full((2, 1, 40), 1 / 40, device="cuda")
    found = OPERATIONS.important_tokens(scores, 7, 2, *reference.VARIANCES, None)
    assert found.tolist() == [list(range(9))] * 2
    scores[1, 0, 20] = torch.nan
    for keep in (5, 38):
        found = OPERATIONS.important_tokens(scores, keep, 2, *reference.VARIANCES, None)
        expected = OPERATIONS.important_tokens_written_out(
            scores, keep, 2, *reference.VARIANCES, None
        )
        assert torch.equal(found, expected)


def similarity(votes, keys, protected):
    """[B, |A|] largest cosines in float64, of group A in the order of tokens, and the group."""
    combined = reference.combine_heads(votes, reference.filter_heads(votes))[:, protected:]
    order = combined.sort(dim=1, descending=True, stable=True).indices + protected
    size = order.shape[1] // 2
    a, b = order[:, -size:].sort(1).values, order[:, :-size]
    features = torch.nn.functional.normalize(keys.double().mean(1), dim=-1)
    alike = reference.pick(features, a) @ reference.pick(features, b).mT
    return alike.amax(2), a


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [3, 34, 66, 129, 197, 256, 300])
@pytest.mark.parametrize("dim", [8, 64, 72, 80])
def test_dissimilar_tokens(n, dim, dtype):
    """What goes is as like as what float64 drops, to float32 rounding."""
    batch, heads, protected = 5, 3, 1
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(batch, n, 2, heads, dim, generator=generator).to(dtype).cuda()
    keys = keys.permute(2, 0, 3, 1, 4)[1]
    votes = scores_of(batch, heads, n)
    alike, a = similarity(votes, keys, protected)
    for drop in {1, a.shape[1] // 3, a.shape[1]}:
        found = OPERATIONS.dissimilar_tokens(votes, keys, drop, protected, *reference.VARIANCES)
        assert found.shape == (batch, n - drop)
        for sample in range(batch):
            stays = found[sample].tolist()
            assert stays == sorted(set(stays))
            assert set(range(n)) - set(stays) <= set(a[sample].tolist())
            gone = ~torch.isin(a[sample], found[sample])
            best = alike[sample].sort(descending=True).values[:drop]
            torch.testing.assert_close(
                alike[sample][gone].sort(descending=True).values, best, rtol=0, atol=2e-6
            )


def test_equal_patches_go_in_their_order():
    keys = torch.ones(1, 2, 12, 16, device="cuda")
    votes = torch.full((1, 2, 12), 1 / 12, device="cuda")
    found = OPERATIONS.dissimilar_tokens(votes, keys, 2, 2, *reference.VARIANCES)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5, 6, 9, 10, 11]]  # A is the last five
    expected = OPERATIONS.dissimilar_tokens_written_out(votes, keys, 2, 2, *reference.VARIANCES)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ranking", ["pagerank", "cls", "average"])
@pytest.mark.parametrize("iters", [1, 5])
@pytest.mark.parametrize("similar", [0, 10])
def test_a_layer_as_on_the_cpu(ranking, iters, similar):
    generator = torch.Generator().manual_seed(1)
    qkv = (
        torch.randn(6, 197, 3, 6, 64, generator=generator)
        * torch.tensor([2.0, 1, 1])[:, None, None]
    )
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind()
    arguments = {
        "keep": 120,
        "similar": similar,
        "iters": iters,
        "protected": 1,
        "ranking": ranking,
    }
    expected = stages.prune(q, k, **arguments)
    found = stages.prune(q.cuda(), k.cuda(), **arguments).cpu()
    same = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    assert min(same) >= 120  # of 121; two scores may be equal but for rounding


def test_a_named_backend_runs_or_says_why():
    scores, keys = scores_of(5, 3, 40), torch.randn(5, 3, 40, 64, device="cuda")
    for call in (
        lambda backend: important_tokens(scores, 7, protected=1, backend=backend),
        lambda backend: dissimilar_tokens(scores, keys, 7, protected=1, backend=backend),
    ):
        assert torch.equal(call("cuda"), call("auto"))
        assert "kernel" in kernels_of(lambda call=call: call("cuda"))
        assert "important_kernel" not in kernels_of(lambda call=call: call("reference"))
    many, wide = scores_of(2, 3, 1025), scores.double()
    for found, reason in ((many, "at most 1024 tokens, got 1025"), (wide, "float32 scores, got")):
        with pytest.raises(ValueError, match=f"backend: 'cuda' cannot run: .*{reason}"):
            important_tokens(found, 7, protected=1, backend="cuda")
    with pytest.raises(ValueError, match="'cuda' cannot run: .* multiple of 8, got 62"):
        dissimilar_tokens(scores, keys[..., :62], 7, protected=1, backend="cuda")


def kernels_of(call):
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as seen:
        call()
        torch.cuda.synchronize()
    return " ".join(event.key for event in seen.key_averages())


def test_the_kernels_are_taken_where_they_fit():
    qkv = torch.randn(4, 197, 3, 6, 64, device="cuda", dtype=torch.bfloat16)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind()
    for ranking, iters, expected in (
        ("pagerank", 1, ("once_kernel", "dissimilar_kernel", "important_kernel")),
        ("pagerank", 5, ("once_kernel", "pagerank_kernel", "important_kernel")),
        ("random", 1, ("important_kernel",)),
    ):
        names = kernels_of(
            lambda ranking=ranking, iters=iters: stages.prune(
                q, k, keep=100, similar=10, iters=iters, protected=1, ranking=ranking
            )
        )
        assert all(kernel in names for kernel in expected), names
        assert "sort" not in names
