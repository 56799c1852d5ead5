"""Where the prompts of each layer come from: parameters of their own, shared ones, a projection.

Each is a sequence of the layers' prompts [m, D], which blocks and scores read; it can keep
some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pcx.models.vpt.prompts import prompt_parameter

SHARES = (None, "intra", "inter", "all")


class OwnPrompts(nn.ParameterList):
    """A parameter for each layer, [m, D], or [2, m, H*d] of kind "prefix"."""

    tied: ClassVar[bool] = False

    def count(self, i: int) -> int:
        """The number of prompts of layer i."""
        return self[i].shape[-2]

    def keep(self, rows: Sequence[Tensor]) -> None:
        """Keeps some prompts of each layer, by their indices."""
        for i, index in enumerate(rows):
            given = self[i]
            kept = given.detach().index_select(-2, index.to(given.device))
            self[i] = prompt_parameter(kept, trained=given.requires_grad or not given.numel())


class SharedPrompts(nn.Module):
    """Prompts that are views of fewer numbers, or come out of a map (VPT paper, App. D).

    Args:
        counts: prompts of each layer.
        sources: of each layer, or one for all, [m, ...]; or [1, ...] where a layer's prompts are
            all alike.
        dim: D of the prompts.
        within: whether a layer's prompts are all alike ("intra" and "all").
        projection: from a source to prompts [m, D]; identity by default.

    Attributes:
        tied: whether all layers have the same prompts ("inter" and "all").
    """

    def __init__(
        self,
        counts: Sequence[int],
        sources: Sequence[Tensor],
        dim: int,
        *,
        within: bool = False,
        projection: nn.Module | None = None,
    ):
        super().__init__()
        self.counts = tuple(counts)
        self.sources = nn.ParameterList(prompt_parameter(source) for source in sources)
        self.within = within
        self.dim = dim
        self.projection = nn.Identity() if projection is None else projection

    @property
    def tied(self) -> bool:
        return len(self.sources) == 1 and len(self.counts) > 1

    def count(self, i: int) -> int:
        """The number of prompts of layer i."""
        return self.counts[i]

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Tensor:
        """The prompts of layer i, [m, D]."""
        source = self.sources[0 if self.tied else i]
        if self.within:
            source = source[: min(1, self.counts[i])]
        elif self.tied:
            source = source[: self.counts[i]]
        prompts = self.projection(source) if self.counts[i] else source.new_empty(0, self.dim)
        return prompts.expand(self.counts[i], -1) if self.within else prompts

    def keep(self, rows: Sequence[Tensor]) -> None:
        """Keeps some prompts, by their indices: of tied ones the same in every layer.

        Raises:
            ValueError: the prompts are tied, and the layers keep others.
        """
        used = [index.tolist() for index, m in zip(rows, self.counts, strict=True) if m]
        if self.tied and any(index != used[0] for index in used):
            raise ValueError(
                "kept: the layers share their prompts, so that each keeps the same ones; give the "
                "same indices for every layer that has prompts"
            )
        self.counts = tuple(
            len(index) if m else 0 for index, m in zip(rows, self.counts, strict=True)
        )
        for i, source in enumerate(self.sources):
            index: Any = torch.tensor(used[0] if self.tied and used else rows[i].tolist())
            if self.within:  # the one row stands for all that are kept
                index = index[:1] * 0
            kept = source.detach().index_select(0, index.long().to(source.device))
            self.sources[i] = prompt_parameter(kept, trained=source.requires_grad)


def shared_prompts(
    counts: Sequence[int],
    dim: int,
    draw: Callable[[int, int], Tensor],
    *,
    share: str | None,
    project: int | None,
) -> SharedPrompts:
    """Prompts of a layer or of all layers that are the same, or come out of a linear layer.

    Args:
        counts: prompts of each layer.
        dim: D.
        draw: of a number of prompts and their width, the start of a source.
        share: one of `SHARES`.
        project: width of the sources, which one linear layer maps to D; None for no such layer.

    Raises:
        ValueError: prompts are shared between layers of other counts.
    """
    width, most = project or dim, max(counts)
    across = share in ("inter", "all")
    if across and len({m for m in counts if m}) > 1:
        raise ValueError(
            f"num_prompts: {list(counts)}, and share={share!r} has the same prompts in every "
            "layer; give one number"
        )
    rows = [most] if across else list(counts)
    if share in ("intra", "all"):
        rows = [min(1, m) for m in rows]
    sources = [draw(m, width) for m in rows]
    projection = None
    if project is not None:
        projection = nn.Linear(project, dim).to(sources[0])
        nn.init.kaiming_normal_(projection.weight, a=0, mode="fan_out")  # as published
    return SharedPrompts(
        counts, sources, dim, within=share in ("intra", "all"), projection=projection
    )
