"""Which prompts to keep, given their scores."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pcx.arguments import real_number

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
    rows = checked_scores(scores)
    groups = [torch.cat(rows)] if scope == "global" else rows
    most = max(map(len, groups), default=0)
    kept = [_top(group, _count(keep, len(group), most)) for group in groups]
    if not sum(map(len, kept)):
        raise ValueError(f"keep: {keep} of {sum(map(len, rows))} prompts keeps none; raise it")
    if scope == "local":
        return kept
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return [kept[0][(kept[0] >= low) & (kept[0] < high)] - low for low, high in pairwise(bounds)]


def checked_scores(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores per layer, [m_l] each, as float64 on the CPU.

    Raises:
        ValueError: they are no such list, or a score is not finite.
    """
    if isinstance(scores, Tensor | str) or not isinstance(scores, Sequence) or not len(scores):
        raise ValueError(
            f"scores: got {_said(scores)}, expected a list with one tensor [m] per layer, as "
            "pcx.score gives it"
        )
    for i, row in enumerate(scores):
        if not isinstance(row, Tensor) or row.dim() != 1 or row.is_complex():
            raise ValueError(f"scores: layer {i} is {_said(row)}, expected a tensor [m]")
        if not row.isfinite().all():
            raise ValueError(f"scores: layer {i} has scores that are NaN or infinite")
    return [row.detach().double().cpu() for row in scores]


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else repr(value)


def _top(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _count(keep: Any, total: int, most: int) -> int:
    if isinstance(keep, numbers.Integral) and not isinstance(keep, bool):
        count = int(keep)
        if not 1 <= count <= most:
            raise ValueError(f"keep: {count}, expected a count of 1 to {most}")
        return min(count, total)
    share = real_number("keep", keep, above=0, most=1, expected="a fraction in (0, 1] or a count")
    return int((Decimal(str(share)) * total).to_integral_value(ROUND_HALF_UP))
