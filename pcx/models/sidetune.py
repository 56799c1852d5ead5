"""Side-tuning: a small network beside the backbone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones.outputs import logits_of
from pcx.backbones.residual import Wrapper
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel
from pcx.models.heads import trained_dtype

LEAST = 64  # pixels of a side that AlexNet's convolutions need; smaller images are enlarged


class Sidetune(TunedModel):
    """Mixes the backbone's features with those of an AlexNet that is trained (VPT paper, Sec. 4.1).

    The head reads a * backbone(x) + (1 - a) * W side(x), where side gives AlexNet's 9216
    convolutional features, and a is the sigmoid of a number that is trained and starts at 0.

    Args:
        backbone: a timm model, a vision model of Hugging Face, or a vision tower of open_clip.
        pretrained: whether AlexNet starts from torchvision's weights for ImageNet, as published;
            they are loaded from the network once.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Raises:
        ValueError: an argument is out of range, the backbone has several heads, torchvision is
            missing, or its weights cannot be loaded.

    Example:
        >>> model = pcx.Sidetune(timm.create_model("vit_base_patch16_224"), num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.01)
    """

    method = "sidetune"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pretrained: bool = True,
        num_classes: int | None = None,
        head_init: str = HEAD_INITS[0],
    ):
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        if len(self.heads) > 1 or self.spec.reads_map:
            has = "a decoder of maps" if self.spec.reads_map else f"{len(self.heads)} heads"
            raise ValueError(
                f"backbone: {self.spec.family} has {has}, and side-tuning mixes the features that "
                "one head reads; give another backbone"
            )
        self.backbone = Mixed(self.backbone, self.spec.heads, self.spec.dim, pretrained)
        for part in ("side_network", "side_projection", "side_share", "side_head"):
            if part != "side_head" or self.heads:
                self.own(part)
        self.train(backbone.training)

    @property
    def heads(self) -> list[Any]:
        """The classifier head behind the mixed features, none where it was removed."""
        if not isinstance(self.backbone, Mixed):
            return super().heads
        return [self.backbone.side_head] if self.spec.heads else []

    def plain_backbone(self) -> Any:
        """The backbone, whose head stands behind the mixed features."""
        return self.backbone.inner if isinstance(self.backbone, Mixed) else self.backbone

    @classmethod
    def from_config(cls, backbone: nn.Module, config: Any) -> Any:
        """A model of this configuration; the side network's weights are to be set."""
        return super().from_config(backbone, {"pretrained": False, **config})


class Mixed(Wrapper):
    """A backbone and a side network, and the head that reads both.

    Args:
        inner: the backbone; its head is moved behind the mixture.
        heads: dotted names of its heads, one or none.
        dim: width of its features.
        pretrained: whether the side network starts from torchvision's weights.
    """

    def __init__(self, inner: nn.Module, heads: tuple[str, ...], dim: int, pretrained: bool):
        super().__init__(inner)
        like = next(inner.parameters())
        self.side_network = _alexnet(pretrained)
        self.side_projection = nn.Linear(9216, dim, bias=False)
        self.side_share = nn.Parameter(torch.zeros(()))
        for part in (self.side_network, self.side_projection):
            part.to(like.device, trained_dtype(like.dtype))
        self.side_share.data = self.side_share.data.to(like.device, trained_dtype(like.dtype))
        self.side_head: nn.Module = nn.Identity()
        for name in heads:
            self.side_head = inner.get_submodule(name)
            inner.set_submodule(name, nn.Identity())

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, C], or features [B, D]."""
        features = logits_of(self.inner(x, **inputs))
        images = x.to(self.side_share.dtype)
        if min(x.shape[-2:]) < LEAST:
            images = F.interpolate(images, (LEAST, LEAST), mode="bilinear", antialias=True)
        side = self.side_projection(self.side_network(images).flatten(1))
        share = self.side_share.sigmoid()
        return self.side_head(share * features + (1 - share) * side)


def _alexnet(pretrained: bool) -> nn.Module:
    """AlexNet's convolutions and its pooling: images [B, 3, H, W] -> [B, 256, 6, 6]."""
    try:
        from torchvision.models import AlexNet_Weights, alexnet
    except ImportError:
        raise ValueError("method: side-tuning needs AlexNet; pip install torchvision") from None
    try:
        whole = alexnet(weights=AlexNet_Weights.DEFAULT if pretrained else None)
    except OSError as error:
        raise ValueError(
            f"pretrained: AlexNet's weights could not be loaded ({error}); give pretrained=False, "
            "or load them into torchvision's cache"
        ) from error
    return nn.Sequential(whole.features, whole.avgpool)
