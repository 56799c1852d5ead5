"""Models for inference alone, whose prompts' keys and values are constants."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.amp import AMP, cast_weights
from pcx.prompted_block import PromptedBlock
from pcx.save import backbone_fingerprint
from pcx.vpt import VPT


class Frozen(nn.Module):
    """A VPT, or several on one backbone, for inference; made by `pcx.freeze` and `pcx.ensemble`."""

    def __init__(self, backbone: nn.Module, amp: torch.dtype | None = None):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.amp = amp
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], or what the backbone takes -> logits [B, C], or features [B, D]."""
        if self.amp is None:
            out = self.backbone(x)
        else:
            with torch.autocast(x.device.type, self.amp):
                out = self.backbone(x)
        return out.logits if hasattr(out, "logits") else out

    def train(self, mode: bool = True) -> Frozen:
        """Raises a ValueError for training."""
        if mode:
            raise ValueError("mode: this model is for inference; train the pcx.VPT it came from")
        return self


class Ensemble(Frozen):
    """Several VPTs on one backbone; made by `pcx.ensemble`."""

    def __init__(self, backbone: nn.Module, members: int):
        super().__init__(backbone)
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> each member's logits, [k, B, C]."""
        repeated = x.expand(self.members, *x.shape).flatten(0, 1)  # member by member
        return super().forward(repeated).unflatten(0, (self.members, -1))


class _MemberHeads(nn.Module):
    """The k members' heads, each for its part of the batch."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(0, (len(self.heads), -1))
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)])


@torch.no_grad()
def freeze(model: VPT, *, amp: str = "no") -> Frozen:
    """A model for inference whose prompts are folded into constants.

    The keys and values of the prompts are computed once and kept as buffers; the prompts and their
    projections are gone. The backbone's weights are shared with the model's, which is not changed.

    Args:
        model: a VPT on the folded path.
        amp: "bf16" or "fp16" to compute in autocast with the weights of linear and convolutional
            layers cast once, which autocast does anew in every call and to the same bits. The cast
            weights are the frozen model's own. "no" leaves precision to the caller.

    Returns:
        A module that maps images to logits as the model does in eval mode, to rounding. It has no
        prompts, no parameter that requires a gradient, and cannot be put into training mode.

    Raises:
        ValueError: the model is no VPT, its prompts do not fold (kind "shallow"), or amp is none of
            the three.

    Example:
        >>> deployed = pcx.freeze(model)
        >>> logits = deployed(images)
    """
    _check_folded("model", model)
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    dtype, copied = AMP[amp], _copy(model)
    for layer in copied.layers:
        layer.make_constant(_prefixes(layer))
    if dtype is not None:
        _cast(copied.backbone, dtype)
    return Frozen(copied.backbone, dtype)


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
        _check_folded(f"models[{i}]", model)
    _check_alike(models)
    copied = _copy(models[0])
    for i, layer in enumerate(copied.layers):
        layer.make_constant(*_joined([_prefixes(model.layers[i]) for model in models]))
    members = zip(*(model.heads for model in models), strict=True)
    for name, heads in zip(copied.anatomy.heads, members, strict=True):
        copied.backbone.set_submodule(name, _MemberHeads([copy.deepcopy(h).eval() for h in heads]))
    return Ensemble(copied.backbone, members=len(models))


def _cast(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Casts what autocast would cast in every call."""
    cast_weights(backbone, dtype)
    for module in backbone.modules():
        if isinstance(module, PromptedBlock):
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point() and buffer.dtype != torch.float64:
                    setattr(module, name, buffer.to(dtype))


def _copy(model: VPT) -> VPT:
    copied = model.keep([torch.arange(m) for m in model.counts]).eval()
    copied.path = "folded"
    return copied


def _prefixes(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of a layer's prompts for each attention call, [H, m, d]."""
    mode, layer.training = layer.training, False
    try:
        prompts = layer.prompt_sets(1)
        if prompts.shape[-2]:
            pairs = layer.prefixes(prompts)
        else:
            heads, dk, dv = layer.head_dims
            empty = [prompts.new_empty(heads, 0, d) for d in (dk, dv)]
            pairs = [(empty[0], empty[1])] * layer.calls
    finally:
        layer.training = mode
    return [(key.detach().contiguous(), value.detach().contiguous()) for key, value in pairs]


def _joined(
    members: list[list[tuple[Tensor, Tensor]]],
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Sets [k, H, m, d] for each attention call, padded, and their lengths where they differ."""
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


def _check_folded(name: str, model: Any) -> None:
    if not isinstance(model, VPT):
        raise ValueError(f"{name}: a {type(model).__name__}, expected a pcx.VPT")
    if model.kind == "shallow":
        raise ValueError(
            f"{name}: the prompts of kind='shallow' do not fold: their outputs travel on"
        )


def _check_alike(models: Sequence[VPT]) -> None:
    first = models[0]
    sizes = [[tuple(p.shape) for head in m.heads for p in head.parameters()] for m in models]
    kept = backbone_fingerprint(first)
    for i, model in enumerate(models[1:], 1):
        if backbone_fingerprint(model) != kept:
            raise ValueError(f"models[{i}]: its backbone's weights are not those of models[0]")
        if (model.read_only, sizes[i]) != (first.read_only, sizes[0]):
            raise ValueError(
                f"models[{i}]: heads of {sizes[i]} (read_only={model.read_only}), expected "
                f"{sizes[0]} (read_only={first.read_only}) as models[0] has"
            )
