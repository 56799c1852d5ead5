"""Models for inference alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones.outputs import logits_of
from pcx.backbones.residual import Wrapper
from pcx.models.base import TunedModel
from pcx.training.precision import AMP, cast_weights


class Frozen(nn.Module):
    """A tuned model, or several on one backbone, for inference.

    `pcx.freeze` and `pcx.ensemble` make it.
    """

    def __init__(self, backbone: nn.Module, amp: torch.dtype | None = None):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.amp = amp
        self.training = False

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Images [B, 3, H, W], or what the backbone takes -> logits [B, C], or features [B, D]."""
        if self.amp is None:
            return logits_of(self.backbone(x, **inputs))
        with torch.autocast(x.device.type, self.amp):
            return logits_of(self.backbone(x, **inputs))

    @property
    def pretrained_cfg(self) -> Any:
        """timm's configuration of the backbone, read by `timm.data.resolve_model_data_config`."""
        return self.backbone.pretrained_cfg

    def train(self, mode: bool = True) -> Frozen:
        """Raises a ValueError for training."""
        if mode:
            raise ValueError("mode: this model is for inference; train the model it came from")
        return self


@torch.no_grad()
def freeze(model: TunedModel, *, amp: str = "no") -> Frozen:
    """Makes a model for inference; what the method adds becomes constants where it folds.

    The keys and values of a VPT's prompts are computed once and kept as buffers; the prompts and
    their projections are gone. The backbone's weights are shared with the model's, which computes
    as before.

    Args:
        model: a tuned model; a VPT of kind "deep" or "prefix".
        amp: "bf16" or "fp16" to compute in autocast with the weights of linear and convolutional
            layers cast once, which autocast does anew in every call and to the same bits. The cast
            weights are the frozen model's own. "no" leaves precision to the caller.

    Returns:
        A module that maps images to logits as the model does in eval mode, to rounding. It has no
        prompts, no parameter that requires a gradient, and cannot be put into training mode.

    Raises:
        ValueError: the model is no tuned model, its prompts do not fold (kind "shallow"), or amp is
            none of the three.

    Example:
        >>> deployed = pcx.freeze(model)
        >>> logits = deployed(images)
    """
    if not isinstance(model, TunedModel):
        raise ValueError(
            f"model: a {type(model).__name__}, expected a pcx.VPT or a model of another method of "
            "pcx.METHODS"
        )
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    dtype, backbone = AMP[amp], model.deployed()
    if dtype is not None:
        _cast(backbone, dtype)
    return Frozen(backbone, dtype)


def _cast(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Casts what autocast would cast in every call: weights, and what the method put in."""
    cast_weights(backbone, dtype)
    for module in backbone.modules():
        if isinstance(module, Wrapper):
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point() and buffer.dtype != torch.float64:
                    setattr(module, name, buffer.to(dtype))
