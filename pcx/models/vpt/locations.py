"""Where a VPT's prompts enter: among the tokens, added to them, or as pixels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.inputs import input_size
from pcx.backbones.positions import grid_of
from pcx.backbones.residual import Wrapper
from pcx.models.heads import trained_dtype
from pcx.models.vpt.sources import SharedPrompts


class Location:
    """Where prompts enter; a subclass says how a VPT is changed for it.

    Attributes:
        among: whether the prompts are among the tokens, so that `num_prompts` counts them.
    """

    among: ClassVar[bool] = True

    def set_up(self, model: Any) -> None:
        """Changes the model's own copy of the backbone, whose blocks are wrapped already."""


class Prepend(Location):
    """Among the tokens of a layer, the published default."""


class Add(Location):
    """One prompt for each patch token, added to it (Fig. 5, "Add")."""

    among = False

    def count(self, model: Any) -> int:
        """How many prompts a layer has."""
        rows, columns = grid_of(model.backbone, model.spec, input_size(model.backbone)[1:])
        return rows * columns

    def set_up(self, model: Any) -> None:
        like, dim = next(model.backbone.parameters()), model.spec.blocks[0].dim
        bound = math.sqrt(6 / ((model.spec.patch_elements or 0) + dim))
        options: dict[str, Any] = {"device": like.device, "dtype": trained_dtype(like.dtype)}
        layers = model.spec.blocks[:1] if model.kind == "shallow" else model.spec.blocks
        shape = (self.count(model), dim)
        model.added = nn.ParameterList(
            nn.Parameter(torch.empty(shape, **options).uniform_(-bound, bound)) for _ in layers
        )
        for i in range(len(layers)):
            layer = model.layers[i]
            layer.block = AddingBlock(layer.block, model.added[i], model.spec.prefix_tokens)


class AddOne(Add):
    """One prompt, added to every patch token."""

    def count(self, model: Any) -> int:
        """One."""
        return 1


class PrependPixel(Location):
    """Patches of pixels, which the backbone's own embedding makes prompts (Fig. 5)."""


class ConcatChannel(Location):
    """A further channel of the image, and weights of the patch embedding for it (Fig. 5).

    The embedding's own weights are trained too, in a copy.
    """

    among = False

    def set_up(self, model: Any) -> None:
        name = projection_name(model)
        convolution = model.backbone.get_submodule(name)
        size = input_size(model.backbone)[1:]
        model.own(name)
        model.channel = Channel(convolution, size)
        model.backbone.set_submodule(name, ChannelConvolution(convolution, model.channel))


LOCATIONS: dict[str, Location] = {
    "prepend": Prepend(),
    "add": Add(),
    "add-one": AddOne(),
    "prepend-pixel": PrependPixel(),
    "concat-channel": ConcatChannel(),
}


class AddingBlock(Wrapper):
    """Adds prompts to the patch tokens before a block.

    Args:
        block: the backbone's block.
        prompts: [N, D], or [1, D] for all tokens; registered by the model.
        prefix_tokens: tokens before the patches, to which nothing is added.
    """

    holds = "block"
    block: Any

    def __init__(self, block: nn.Module, prompts: nn.Parameter, prefix_tokens: int):
        super().__init__(block)
        self._prompts: tuple[Any] = (prompts,)
        self.prefix_tokens = prefix_tokens
        setattr(self, attention.ROUTED, getattr(block, attention.ROUTED, False))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output for [B, N, D] tokens."""
        patches = x[:, self.prefix_tokens :]
        if patches.shape[1]:  # [CLS] alone may be computed in the last block
            added = patches + self._prompts[0].to(x.dtype)
            x = torch.cat([x[:, : self.prefix_tokens], added], 1)
        return self.block(x, *args, **kwargs)

    def take_in(self) -> None:
        """Registers the prompts here, for a backbone that goes on without its tuned model."""
        self.register_buffer("added", self._prompts[0].detach())
        self._prompts = (self.added,)


class Channel(nn.Module):
    """A further channel of an image, the same for all, and weights of a convolution for it."""

    def __init__(self, convolution: Any, size: tuple[int, ...]):
        super().__init__()
        weight = convolution.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": trained_dtype(weight.dtype)}
        self.pixels = nn.Parameter(torch.zeros(1, 1, *size, **options))
        self.weight = nn.Parameter(torch.empty(len(weight), 1, *weight.shape[2:], **options))
        bound = 1 / math.sqrt(4 * weight[0, 0].numel())  # nn.Conv2d's own start, of 4 channels
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.pixels, -1, 1)


class ChannelConvolution(Wrapper):
    """A patch embedding's convolution of an image with one channel more.

    Args:
        inner: the convolution of the image's own channels.
        channel: registered by the model.
    """

    def __init__(self, inner: nn.Module, channel: Channel):
        super().__init__(inner)
        self._channel = (channel,)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> [B, D, h, w]."""
        channel, inner = self._channel[0], self.inner
        pixels, weight = (t.to(inner.weight.dtype) for t in (channel.pixels, channel.weight))
        added = F.conv2d(pixels, weight, None, inner.stride, inner.padding, inner.dilation)
        return inner(x) + added

    def take_in(self) -> None:
        """Registers the channel here, for a backbone that goes on without its tuned model."""
        self.channel = self._channel[0]


class Embedding(nn.Module):
    """The patch embedding's convolution as a function of patches of pixels [m, 3, h, w].

    Args:
        convolution: the backbone's; it is registered there.
    """

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self._convolution: Any = (convolution,)

    def forward(self, patches: Tensor) -> Tensor:
        """Prompts [m, D]."""
        convolution = self._convolution[0]
        return convolution(patches.to(convolution.weight.dtype)).flatten(1)


def pixel_prompts(model: Any, counts: list[int]) -> SharedPrompts:
    """Prompts of the first layer that are patches of pixels, U(-1, 1)."""
    convolution = model.backbone.get_submodule(projection_name(model))
    dtype = trained_dtype(convolution.weight.dtype)
    shape = convolution.weight.shape[1:]
    sources = [
        torch.empty(m, *shape, device=convolution.weight.device, dtype=dtype).uniform_(-1, 1)
        for m in counts
    ]
    return SharedPrompts(
        counts, sources, len(convolution.weight), projection=Embedding(convolution)
    )


def projection_name(model: Any) -> str:
    """Dotted name of the convolution that embeds patches.

    Raises:
        ValueError: the backbone has none.
    """
    if model.spec.patch_projection is None:
        raise ValueError(
            f"location: {model.spec.family} embeds patches by no convolution of its own; use "
            "'prepend' or 'add'"
        )
    return model.spec.patch_projection
