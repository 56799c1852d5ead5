"""Zero-TPrune's stages against the paper's examples and a form written with loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcx.ops.reference.token_choice import most_important
from pcx.token_pruning import stages


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_hand(q, k, iters, boost):
    """One sample's I-stage, token by token."""
    heads, n, dim = q.shape
    found = []
    for h in range(heads):
        weights = torch.softmax(q[h] @ k[h].T / math.sqrt(dim), -1)
        s = torch.ones(n, dtype=torch.float64)
        s[0] = math.sqrt(n) if boost else 1
        s = s / s.sum()
        for _ in range(iters):
            s = torch.stack([(weights[:, i] * s).sum() for i in range(n)])
        found.append(s)
    variances = [float(((n * s - 1) ** 2).mean()) for s in found]
    used = [s for s, v in zip(found, variances, strict=True) if 0.01 <= v <= 0.7] or found
    return torch.stack([s**2 for s in used]).sum(0).sqrt() / len(used)


@pytest.mark.parametrize("boost", [False, True])
@pytest.mark.parametrize("iters", [1, 5])
def test_importance(iters, boost):
    q, k = 2 * rand(3, 4, 17, 8), rand(3, 4, 17, 8, seed=1)
    found = stages.importance(q, k, iters=iters, cls_boost=boost)
    for sample in range(3):
        torch.testing.assert_close(found[sample], by_hand(q[sample], k[sample], iters, boost))


def test_the_boost_of_cls_acts():
    q, k = 2 * rand(1, 2, 9, 8), rand(1, 2, 9, 8, seed=1)
    plain, boosted = (stages.importance(q, k, iters=1, cls_boost=b) for b in (False, True))
    assert not torch.allclose(plain, boosted)


# Six patches behind one protected token, the first the most important. Copies: 1 = 5, 2 = 3.
FEATURES = torch.tensor(
    [[[9.0, 9], [1.0, 0.1], [0.1, 1.0], [0.11, 1.0], [-1, 0.5], [1.01, 0.1], [-0.3, -1]]]
).double()
SCORES = torch.tensor([[0.0, 6, 5, 4, 3, 2, 1]])


@pytest.mark.parametrize(
    ("partition", "dropped"),
    [
        ("sequential-u", {5}),  # of 4, 5, 6, the one like 1
        ("sequential-i", {1}),  # of 1, 2, 3, the one like 5
        ("alternating", {2}),  # of 2, 4, 6, the one like 3
        ("none", {1, 5}),  # of all, one of the two most alike
    ],
)
def test_similar_patches_go_by_partition(partition, dropped):
    found = stages.without_similar(FEATURES, SCORES, 1, protected=1, partition=partition)
    (gone,) = {*range(7)} - {*found[0].tolist()}
    assert gone in dropped
    assert found[0].tolist() == sorted(found[0].tolist())


@pytest.mark.parametrize("measure", ["cosine", "dot", 1, 2.0, 3, math.inf])
@pytest.mark.parametrize("partition", stages.PARTITIONS)
def test_similar_patches_by_hand(partition, measure):
    features, scores = rand(4, 14, 5), rand(4, 14, seed=1)
    protected, drop = 3, 2

    def likeness(x, y):
        if measure == "dot":
            return float(x @ y)
        if measure == "cosine":
            return float(x @ y / x.norm() / y.norm())
        return -float((x - y).norm(p=measure))

    found = stages.without_similar(
        features, scores, drop, protected=protected, partition=partition, measure=measure,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    chance = torch.rand(4, 11, generator=torch.Generator().manual_seed(3))
    for b in range(4):
        order = sorted(range(protected, 14), key=lambda i: -float(scores[b, i]))
        if partition == "random":
            order = [int(i) + protected for i in chance[b].argsort()]
        group_a, group_b = {
            "sequential-u": (order[6:], order[:6]),
            "sequential-i": (order[:5], order[5:]),
            "alternating": (order[1::2], order[::2]),
            "random": (order[:5], order[5:]),
            "none": (order, order),
        }[partition]
        best = {
            i: max(likeness(features[b, i], features[b, j]) for j in group_b if j != i)
            for i in group_a
        }
        gone = sorted(best, key=best.get, reverse=True)[:drop]
        assert found[b].tolist() == [i for i in range(14) if i not in gone]


def test_what_cannot_be_dropped_is_an_error():
    with pytest.raises(ValueError, match="drop: 4 similar patches, but partition 'sequential-u'"):
        stages.without_similar(FEATURES, SCORES, 4, protected=1)
    with pytest.raises(ValueError, match="partition: got 'halves'"):
        stages.without_similar(FEATURES, SCORES, 1, protected=1, partition="halves")
    for measure in ("l2", 0.5, math.nan):
        with pytest.raises(ValueError, match="measure: got"):
            stages.without_similar(FEATURES, SCORES, 1, protected=1, measure=measure)


@pytest.mark.parametrize("similar", [0, 3])
def test_a_layer_is_its_stages_one_after_the_other(similar):
    q, k = 2 * rand(2, 3, 20, 8), rand(2, 3, 20, 8, seed=1)
    bias = rand(1, 3, 20, 20, seed=2)
    found = stages.prune(q, k, keep=6, similar=similar, iters=5, protected=2, bias=bias)
    assert found.shape == (2, 8)
    for b in range(2):
        votes = stages.importance(q[[b]], k[[b]], iters=1, bias=bias)
        left = stages.without_similar(k[[b]].mean(1), votes, similar, protected=2)[0]
        scores = stages.importance(
            q[[b]][:, :, left], k[[b]][:, :, left], iters=5, cls_boost=True,
            bias=bias[:, :, left][..., left],
        )  # fmt: skip
        assert found[b].tolist() == left[most_important(scores, 6, protected=2)[0]].tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1, 9), (2, 1, 9, 9), (9, 9), (1, 3, 9, 1)])
def test_a_broadcast_bias(shape):
    q, k = rand(2, 3, 9, 8), rand(2, 3, 9, 8, seed=1)
    bias = rand(*shape, seed=4) > -1
    arguments = {"keep": 3, "similar": 2, "iters": 3, "protected": 1}
    found = stages.prune(q, k, bias=bias, **arguments)
    assert torch.equal(found, stages.prune(q, k, bias=bias.expand(2, 3, 9, 9), **arguments))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_the_order_of_patches_does_not_matter(seed):
    q, k = 2 * rand(1, 2, 12, 6, seed=seed), rand(1, 2, 12, 6, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(11, generator=generator)])
    arguments = {"keep": 5, "similar": 3, "iters": 4, "protected": 1}
    here = stages.prune(q, k, **arguments)[0]
    there = stages.prune(q[:, :, order], k[:, :, order], **arguments)[0]
    assert sorted(order[there].tolist()) == here.tolist()


@pytest.mark.parametrize("ranking", stages.RANKINGS)
def test_rankings(ranking):
    q, k, bias = 2 * rand(2, 3, 9, 8), rand(2, 3, 9, 8, seed=1), rand(3, 9, 9, seed=2)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(8) + bias).softmax(-1)
    torch.manual_seed(5)
    scores = {
        "pagerank": stages.importance(q, k, iters=4, cls_boost=True, bias=bias),
        "cls": weights[:, :, 0].mean(1),
        "average": weights.mean((1, 2)),
        "random": torch.rand(2, 9),
    }[ranking]
    torch.manual_seed(5)
    found = stages.prune(q, k, keep=3, similar=0, iters=4, protected=2, ranking=ranking, bias=bias)
    assert torch.equal(found, most_important(scores, 3, protected=2))


def test_autocast_does_not_round_likeness():
    features, scores = rand(2, 40, 8).float(), rand(2, 40, seed=1).float()
    expected = stages.without_similar(features, scores, 9, protected=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stages.without_similar(features, scores, 9, protected=1), expected)


def test_one_shape_for_all_samples_compiles_into_one_graph():
    q, k = rand(2, 3, 20, 8).float(), rand(2, 3, 20, 8, seed=1).float()

    def layer(q, k):
        return stages.prune(q, k, keep=6, similar=3, iters=5, protected=1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), layer(q, k))
