"""The methods of scoring: what each must observe, and how it reduces that to a number a prompt.

`pcx.condensation.SCORES` names them. There are three kinds.

| kind | observes |
| --- | --- |
| `FromPrompts` | the prompts alone |
| `PerSample` | one forward, and one backward where it needs gradients, of each sample |
| `ByRemoval` | the losses with a prompt changed, one prompt at a time |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pcx.models.vpt.model import VPT

OBSERVABLE = ("gradient", "gate", "cls")


@dataclass(frozen=True)
class Seen:
    """What a batch showed of every prompt, [B, all layers' m]; None where it was not observed.

    Attributes:
        norm: "gradient": ||g * p||_2, g the gradient of the sample's own loss by prompt p.
        inner: "gradient": |<g, p>|.
        slope: "gate": the derivative of the sample's loss by a number added to the logits of the
            prompt's key, summed over heads and queries.
        cls_attention: "cls": the attention of [CLS] to the prompt, mean over heads.
    """

    norm: Tensor | None = None
    inner: Tensor | None = None
    slope: Tensor | None = None
    cls_attention: Tensor | None = None


@dataclass(frozen=True)
class FromPrompts:
    """A score that reads no data: `score(model, seed)` gives [m_l] of every layer."""

    score: Callable[[VPT, int], list[Tensor]]


@dataclass(frozen=True)
class PerSample:
    """A score whose mean over samples is taken in one pass over the data.

    Attributes:
        observes: some of `OBSERVABLE`, which the pass must see.
        reduce: from a batch's `Seen` to [B, all layers' m].
    """

    observes: frozenset[str]
    reduce: Callable[[Seen], Tensor | None]


@dataclass(frozen=True)
class ByRemoval:
    """A score by the loss's change where one prompt is changed.

    Attributes:
        change: from a layer's prompts [..., m, D] and the place of one to the changed prompts.
    """

    change: Callable[[Tensor, int], Tensor]


def _magnitude(model: VPT, seed: int) -> list[Tensor]:
    return [_rows(p.detach(), model.kind).norm(dim=-1) for p in model.prompts]


def _random(model: VPT, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(m, generator=generator, dtype=torch.float64) for m in model.counts]


def _rows(prompts: Tensor, kind: str) -> Tensor:
    """One row of numbers per prompt, [..., m, *]: kind "prefix" has a key and a value row."""
    return prompts.transpose(-3, -2).flatten(-2) if kind == "prefix" else prompts


def _without_row(prompts: Tensor, i: int) -> Tensor:
    return torch.cat([prompts[..., :i, :], prompts[..., i + 1 :, :]], dim=-2)


def _with_zero_row(prompts: Tensor, i: int) -> Tensor:
    changed = prompts.clone()
    changed[..., i, :] = 0
    return changed


TAYLOR = PerSample(frozenset({"gradient"}), lambda seen: seen.norm)
TAYLOR_INNER = PerSample(frozenset({"gradient"}), lambda seen: seen.inner)
GATE = PerSample(frozenset({"gate"}), lambda seen: seen.slope.abs())  # type: ignore[union-attr]
CLS_ATTENTION = PerSample(frozenset({"cls"}), lambda seen: seen.cls_attention)
MAGNITUDE = FromPrompts(_magnitude)
RANDOM = FromPrompts(_random)
EXACT = ByRemoval(_without_row)
EXACT_ZERO = ByRemoval(_with_zero_row)
