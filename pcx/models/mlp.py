"""A multilayer perceptron in the place of the linear head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones.residual import Wrapper
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel

DROPOUT = 0.1  # the published share


class MLP(TunedModel):
    """Trains an MLP of k layers as the head; the backbone is frozen (VPT paper, Sec. 4.1).

    Each of the k - 1 hidden layers is a linear layer of the features' width, ReLU, BatchNorm and
    dropout of 0.1, as published. In training a batch needs two images at least.

    Args:
        backbone: a timm model, a vision model of Hugging Face, or a vision tower of open_clip.
        num_layers: k, the linear layers, the last of which gives the logits.
        num_classes: size of a new head; None keeps the backbone's size.
        head_init: "trunc-normal" and "published" draw the last layer anew, "keep" starts from the
            backbone's own head.

    Raises:
        ValueError: an argument is out of range, or the backbone has no single linear head.

    Example:
        >>> model = pcx.MLP(timm.create_model("vit_base_patch16_224"), 3, num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.1)
    """

    method = "mlp"

    def __init__(
        self,
        backbone: nn.Module,
        num_layers: int = 3,
        *,
        num_classes: int | None = None,
        head_init: str = HEAD_INITS[0],
    ):
        num_layers = whole_number("num_layers", num_layers, 1)
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        if len(self.heads) != 1 or not isinstance(self.heads[0], nn.Linear):
            kinds = [type(head).__name__ for head in self.heads]
            raise ValueError(
                f"backbone: its heads are {kinds}, expected one linear layer; give num_classes, or "
                "another backbone"
            )
        self.num_layers = num_layers
        (name,) = self.spec.heads
        head = PerceptronHead(self.heads[0], num_layers - 1)
        self.backbone.set_submodule(name, head)
        self.own(name)
        self.train(backbone.training)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs besides the backbone and the weights, as JSON."""
        return {**super().config(), "num_layers": self.num_layers}


class PerceptronHead(Wrapper):
    """Hidden layers before a linear head.

    Args:
        inner: the linear head.
        layers: how many hidden layers.
    """

    def __init__(self, inner: nn.Linear, layers: int):
        super().__init__(inner)
        width, like = inner.in_features, inner.weight
        hidden: list[nn.Module] = []
        for _ in range(layers):
            hidden += [
                nn.Linear(width, width),
                nn.ReLU(),
                nn.BatchNorm1d(width),
                nn.Dropout(DROPOUT),
            ]
        self.hidden = nn.Sequential(*hidden).to(like.device, like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, C]."""
        if self.training and len(x) < 2 and len(self.hidden):
            raise ValueError(
                "loader: a batch of one image, and the head's BatchNorm needs two to train; use "
                "drop_last=True, or another batch_size"
            )
        return self.inner(self.hidden(x.to(self.inner.weight.dtype)))
