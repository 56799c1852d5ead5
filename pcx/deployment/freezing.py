"""Models for inference alone, whose prompts' keys and values are constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pcx.models.vpt.block import PromptedBlock
from pcx.models.vpt.model import VPT
from pcx.training.precision import AMP, cast_weights


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
    check_folded("model", model)
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    dtype, copied = AMP[amp], folded_copy(model)
    for layer in copied.layers:
        layer.make_constant(prefixes_of(layer))
    if dtype is not None:
        _cast(copied.backbone, dtype)
    return Frozen(copied.backbone, dtype)


def _cast(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Casts what autocast would cast in every call."""
    cast_weights(backbone, dtype)
    for module in backbone.modules():
        if isinstance(module, PromptedBlock):
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point() and buffer.dtype != torch.float64:
                    setattr(module, name, buffer.to(dtype))


def folded_copy(model: VPT) -> VPT:
    copied = model.keep([torch.arange(m) for m in model.counts]).eval()
    copied.path = "folded"
    return copied


def prefixes_of(layer: Any) -> list[tuple[Tensor, Tensor]]:
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


def check_folded(name: str, model: Any) -> None:
    if not isinstance(model, VPT):
        raise ValueError(f"{name}: a {type(model).__name__}, expected a pcx.VPT")
    if model.kind == "shallow":
        raise ValueError(
            f"{name}: the prompts of kind='shallow' do not fold: their outputs travel on"
        )
