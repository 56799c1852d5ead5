"""Several tuned models on one backbone, run in one batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.checkpoints.fingerprint import backbone_fingerprint
from pcx.deployment.freezing import Frozen
from pcx.models.block_forward import reduction_of
from pcx.models.vpt.model import VPT


class Ensemble(Frozen):
    """Several VPTs on one backbone; made by `pcx.ensemble`."""

    def __init__(self, backbone: nn.Module, members: int):
        super().__init__(backbone)
        self.members = members

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Images [B, 3, H, W] -> each member's logits, [k, B, C]."""
        repeated = x.expand(self.members, *x.shape).flatten(0, 1)  # member by member
        return super().forward(repeated, **inputs).unflatten(0, (self.members, -1))


class _MemberHeads(nn.Module):
    """The k members' heads, each for its part of the batch."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(0, (len(self.heads), -1))
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)])


@torch.no_grad()
def ensemble(models: Sequence[VPT]) -> Ensemble:
    """Several VPTs on one backbone as one model, run in one batch.

    Each image passes the backbone once per member; the members' prompts are sets of keys and values
    of one attention call, ragged where the members were condensed.

    Args:
        models: VPTs of the same backbone, of any counts, with heads of one size.

    Returns:
        A module for inference that maps images [B, 3, H, W] to logits [k, B, C];
        `.softmax(-1).mean(0)` averages the members.

    Raises:
        ValueError: no models, another backbone or size of head, or prompts that do not
            fold.

    Example:
        >>> probabilities = pcx.ensemble([a, b])(images).softmax(-1).mean(0)
    """
    if not models:
        raise ValueError("models: none given")
    for i, model in enumerate(models):
        if not isinstance(model, VPT):
            raise ValueError(f"models[{i}]: a {type(model).__name__}, expected a pcx.VPT")
        model.check_folds(f"models[{i}]")
    _check_alike(models)
    copied = models[0].copy().eval()
    copied.path = "folded"
    for i, layer in enumerate(copied.layers):
        layer.make_constant(*_joined([m.layers[i].constants_of_prompts() for m in models]))
    members = zip(*(model.heads for model in models), strict=True)
    for name, heads in zip(copied.spec.heads, members, strict=True):
        copied.backbone.set_submodule(name, _MemberHeads([copy.deepcopy(h).eval() for h in heads]))
    return Ensemble(copied.backbone, members=len(models))


def _joined(
    members: list[list[tuple[Tensor, Tensor]]],
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Joins members' keys and values into padded sets [k, H, m, d]; lengths where they differ."""
    counts = [pairs[0][0].shape[-2] for pairs in members]
    most = max(counts)

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(t, (0, 0, 0, most - t.shape[-2])) for t in tensors])

    calls = [
        (stacked([key for key, _ in call]), stacked([value for _, value in call]))
        for call in zip(*members, strict=True)
    ]
    lengths = torch.tensor(counts, device=calls[0][0].device) if len(set(counts)) > 1 else None
    return calls, lengths


def _check_alike(models: Sequence[VPT]) -> None:
    first = models[0]
    sizes = [[tuple(p.shape) for head in m.heads for p in head.parameters()] for m in models]
    kept = backbone_fingerprint(first)
    for i, model in enumerate(models[1:], 1):
        if backbone_fingerprint(model) != kept:
            raise ValueError(f"models[{i}]: its backbone's weights are not those of models[0]")
        changed = _of_backbone(model)
        other = [n for n, t in _of_backbone(first).items() if not torch.equal(t, changed[n])]
        if other:
            raise ValueError(
                f"models[{i}]: it trained {other[0]!r} of the backbone, which models[0] has with "
                "other values; an ensemble runs one backbone for all, so give models that train "
                "prompts and heads alone"
            )
        if reduction_of(model) != reduction_of(first):
            raise ValueError(
                f"models[{i}]: its tokens are reduced by {reduction_of(model)}, and those of "
                f"models[0] by {reduction_of(first)}; an ensemble runs one backbone for all, so "
                "set the same up on each, or none"
            )
        if (model.read_only, sizes[i]) != (first.read_only, sizes[0]):
            raise ValueError(
                f"models[{i}]: heads of {sizes[i]} (read_only={model.read_only}), expected "
                f"{sizes[0]} (read_only={first.read_only}) as models[0] has"
            )


def _of_backbone(model: VPT) -> dict[str, Tensor]:
    """The model's own tensors among the backbone's, but for its heads."""
    heads = tuple(f"backbone.{name}." for name in model.spec.heads)
    own = model.own_state().items()
    return {n: t for n, t in own if n.startswith("backbone.") and not n.startswith(heads)}
