"""Which prompts to keep, given their scores."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise

import torch
from torch import Tensor

SCOPES = ("global", "local")


def select(scores: Sequence[Tensor], keep: float | int, *, scope: str = "global") -> list[Tensor]:
    """The prompts with the highest scores (Prompt Condensation, Algorithm 1, line 3).

    Args:
        scores: per layer, [m_l].
        keep: a float in (0, 1] is a fraction, an int a count (per layer where local); half a prompt
            rounds up.
        scope: "global" ranks the prompts of all layers together, "local" each layer by itself.

    Returns:
        Per layer, the kept indices, ascending, int64. Of equal scores the earlier is kept.

    Raises:
        ValueError: keep or scope is out of range, a score is not finite, or nothing would be kept.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: got {scope!r}, expected one of {SCOPES}")
    rows = [s.detach().double().cpu() for s in scores]
    for i, row in enumerate(rows):
        if row.dim() != 1 or not row.isfinite().all():
            raise ValueError(f"scores: layer {i} is not a vector of finite numbers")
    groups = [torch.cat(rows)] if scope == "global" else rows
    most = max(map(len, groups), default=0)
    kept = [_top(group, _count(keep, len(group), most)) for group in groups]
    if not sum(map(len, kept)):
        raise ValueError(f"keep: {keep} of {sum(map(len, rows))} prompts keeps none; raise it")
    if scope == "local":
        return kept
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return [kept[0][(kept[0] >= low) & (kept[0] < high)] - low for low, high in pairwise(bounds)]


def _top(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _count(keep: float | int, total: int, most: int) -> int:
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise ValueError(f"keep: {keep!r}, expected a fraction in (0, 1] or a count")
    if isinstance(keep, int):
        if not 1 <= keep <= most:
            raise ValueError(f"keep: {keep}, expected a count of 1 to {most}")
        return min(keep, total)
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep}, expected a fraction in (0, 1]")
    return int((Decimal(str(keep)) * total).to_integral_value(ROUND_HALF_UP))
