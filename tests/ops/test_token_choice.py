"""The ops that choose tokens against the paper's examples, and their errors."""

import math

import pytest
import torch

from pcx.ops.reference import token_choice as reference
from pcx.ops.token_choice import dissimilar_tokens, important_tokens


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scores_of(batch=3, heads=4, n=14, seed=0):
    return (rand(batch, heads, n, seed=seed) * 0.5).softmax(-1)


def test_a_head_s_emphasis_is_the_paper_s_example():
    """Table 4: A, B and C have [9, 9, 9], [9, 0, 0] and [3, 3, 3]; averages would say B = C."""
    scores = torch.tensor([[[9.0, 9, 3], [9, 0, 3], [9, 0, 3]]])  # [1, heads, tokens]
    a, b, c = reference.combine_heads(scores, torch.ones(1, 3, dtype=torch.bool))[0].tolist()
    assert a > b > c
    assert a == pytest.approx(math.sqrt(3 * 81) / 3)
    only_first = torch.tensor([[True, False, False]])
    assert reference.combine_heads(scores, only_first)[0].tolist() == [9, 9, 3]


def test_heads_are_filtered_by_the_variance_of_scores_whose_mean_is_one():
    n = 100
    flat, peaked = torch.full((n,), 1.0), torch.zeros(n)
    peaked[0] = n  # a variance of 99
    some = torch.cat([torch.full((n // 2,), 0.5), torch.full((n // 2,), 1.5)])  # 0.25
    scores = torch.stack([flat, some, peaked])[None] / n
    assert reference.filter_heads(scores).tolist() == [[False, True, False]]
    assert reference.filter_heads(scores, 0.25, 0.25).tolist() == [[False, True, False]]
    assert reference.filter_heads(scores, 0.0, 0.2).tolist() == [[True, False, False]]
    assert reference.filter_heads(scores, 1.0, 2.0).tolist() == [[True, True, True]]


def test_the_most_important_stay_in_their_order():
    scores = torch.tensor([[0.0, 5, 1, 4, 1, 3], [9, 1, 2, 3, 4, 5]])
    found = reference.most_important(scores, 2, protected=1)
    assert found.tolist() == [[0, 1, 3], [0, 4, 5]]
    assert reference.most_important(scores, 0, protected=2).tolist() == [[0, 1]] * 2
    assert reference.most_important(scores, 5, protected=1).tolist() == [list(range(6))] * 2
    with pytest.raises(ValueError, match="keep: 6 of 5 patches"):
        reference.most_important(scores, 6, protected=1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_important_tokens(backend):
    scores, protected, keep = scores_of(), 2, 5
    combined = reference.combine_heads(scores, reference.filter_heads(scores))
    found = important_tokens(scores, keep, protected=protected, backend=backend)
    for b in range(len(scores)):
        order = sorted(range(protected, 14), key=lambda i: -float(combined[b, i]))
        assert found[b].tolist() == [0, 1, *sorted(order[:keep])]
    among = torch.arange(14).expand(3, -1) * 3 + 1
    chosen = important_tokens(scores, keep, protected=protected, among=among, backend=backend)
    assert torch.equal(chosen, found * 3 + 1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dissimilar_tokens(backend):
    votes, k, protected, drop = scores_of(), rand(3, 4, 14, 6), 2, 3
    combined = reference.combine_heads(votes, reference.filter_heads(votes))
    keys = torch.nn.functional.normalize(k.mean(1), dim=-1)
    found = dissimilar_tokens(votes, k, drop, protected=protected, backend=backend)
    for b in range(len(votes)):
        order = sorted(range(protected, 14), key=lambda i: -float(combined[b, i]))
        alike = {i: max(float(keys[b, i] @ keys[b, j]) for j in order[:6]) for i in order[6:]}
        gone = sorted(alike, key=alike.get, reverse=True)[:drop]
        assert found[b].tolist() == [i for i in range(14) if i not in gone]


def test_the_bounds_of_the_variance_choose_the_heads():
    scores = torch.tensor([[[0.5, 0.1, 0.1, 0.3], [0.25, 0.26, 0.25, 0.24]]]).double()
    both = [important_tokens(scores, 1, protected=1, variances=v) for v in ((0.1, 1), (0, 0.01))]
    assert [found.tolist() for found in both] == [[[0, 3]], [[0, 1]]]


def test_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="keep: 13 of 12 patches"):
        important_tokens(scores_of(), 13, protected=2)
    with pytest.raises(ValueError, match="drop: 7 similar patches, .* of 12 offers 6"):
        dissimilar_tokens(scores_of(), rand(3, 4, 14, 6), 7, protected=2)


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    scores = scores_of()
    torch.library.opcheck(
        torch.ops.pcx.important_tokens.default, (scores, 4, 2, 0.01, 0.7, None), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.pcx.dissimilar_tokens.default,
        (scores, rand(3, 4, 14, 6), 3, 2, 0.01, 0.7),
        test_utils=tests,
    )


def test_an_export_ranks_equal_scores_as_a_stable_sort_does():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (5, 23), generator=generator).float()
    scores[1, ::3], scores[2, 5:9], scores[3, 1::4] = torch.nan, torch.inf, -torch.inf
    scores[4] = 1.0
    expected = scores.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(reference.ranked(scores), expected)
    places = reference.places_by_rank(scores)
    assert torch.equal(places.gather(1, expected), torch.arange(23).expand(5, -1))

    class Ranked(torch.nn.Module):
        def forward(self, scores):
            return reference.ranked(scores)

    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Ranked(), (scores,), dynamic_shapes=({0: batch},))
    assert not any("sort" in str(node.target) for node in program.graph.nodes)
    for count in (1, 3, 5):
        assert torch.equal(program.module()(scores[:count]), expected[:count])
