"""Which prompts are kept."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcx import select

SCORES = [torch.tensor([0.1, 0.9, 0.3]), torch.tensor([]), torch.tensor([0.8, 0.2])]


def as_lists(kept):
    return [k.tolist() for k in kept]


@pytest.mark.parametrize(
    ("keep", "scope", "expected"),
    [
        (2, "global", [[1], [], [0]]),
        (0.5, "global", [[1, 2], [], [0]]),  # 2.5 rounds up
        (1.0, "global", [[0, 1, 2], [], [0, 1]]),
        (0.5, "local", [[1, 2], [], [0]]),  # 1.5 and 1
        (1, "local", [[1], [], [0]]),
        (3, "local", [[0, 1, 2], [], [0, 1]]),
    ],
)
def test_examples(keep, scope, expected):
    assert as_lists(select(SCORES, keep, scope=scope)) == expected


def test_the_earlier_of_equal_scores_is_kept():
    assert as_lists(select([torch.ones(3), torch.ones(3)], 4)) == [[0, 1, 2], [0]]


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any),
    percent=st.integers(1, 100),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_the_best_are_kept_and_counted(counts, percent, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(m, generator=generator) for m in counts]
    expected = int((Decimal(percent) / 100 * sum(counts)).to_integral_value(ROUND_HALF_UP))
    if not expected:
        with pytest.raises(ValueError, match="keeps none"):
            select(scores, percent / 100)
        return
    kept = select(scores, percent / 100)
    assert sum(map(len, kept)) == expected
    inside = torch.cat([s[k] for s, k in zip(scores, kept, strict=True)])
    outside = torch.cat(scores).sort(descending=True).values[expected:]
    assert not len(outside) or inside.min() >= outside.max()
    assert all(torch.equal(k, k.sort().values) for k in kept)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "keep: 0, expected a count of 1 to 5"),
        (6, "keep: 6, expected a count of 1 to 5"),
        (0.0, "keep: 0.0, expected a fraction"),
        (1.1, "keep: 1.1, expected a fraction"),
        (0.05, "keeps none"),
        (True, "keep: True"),
        ("all", "keep: 'all'"),
    ],
)
def test_bad_keeps_are_named(keep, message):
    with pytest.raises(ValueError, match=message):
        select(SCORES, keep)


def test_bad_scores_and_scopes_are_named():
    with pytest.raises(ValueError, match="scope: got 'layer'"):
        select(SCORES, 1, scope="layer")
    with pytest.raises(ValueError, match="scores: layer 1 has scores that are NaN"):
        select([torch.ones(2), torch.tensor([float("nan")])], 1)
