"""Salient Channel Tuning: a linear map among a few channels of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pcx.arguments import real_number, whole_number
from pcx.backbones.probing import BlockSpec
from pcx.backbones.residual import Changing, OnOutput, SumReader, wrap
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel, check_choice
from pcx.models.folding import fold
from pcx.models.heads import trained_dtype
from pcx.models.salience import SELECTIONS, channel_importances, chosen
from pcx.ops.salient_linear import salient_linear
from pcx.ops.salient_sum import salient_sum

POSITIONS: dict[str, tuple[str, ...]] = {
    "attn": ("attn",),
    "mlp": ("mlp",),
    "both": ("attn", "mlp"),
}
K = 96  # the paper's number of channels


class SCT(TunedModel):
    """Salient Channel Tuning of a frozen vision transformer (SCT paper, Sec. 3).

    In each chosen layer K channels I of the stream are changed by a linear map among themselves,
    u = x_I, x_I <- u + scale * (W u + b). The channels are those that matter most for the task,
    which one pass over its images finds (`pcx.models.salience`). Position "attn" is the sum
    x + attention(x), "mlp" what the block's MLP gives. In training the backbone's drop path is on,
    as published: build it with drop_path_rate=0.1.

    Args:
        backbone: a vision transformer of timm, Hugging Face or open_clip, also a hierarchical one.
        channels: a loader of images and labels to find the channels by; or the channels themselves,
            for each of the layers a list of indices, for "both" a dict of such lists under "attn"
            and "mlp"; or None for selection "random".
        k: channels per layer, for all or one number each; 96 by default, as published. Of channels
            that are given themselves it is left out.
        position: "attn", "mlp" or "both".
        scale: factor on what is added.
        layers: indices of the blocks, negative ones from the end; None is all.
        selection: "salient" as published, whose classes weigh by the root of their size;
            "balanced", "class-agnostic", "least" or "random" (`channel_importance` says how).
        seed: of the random selection.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Attributes:
        salient: by position, the maps of the layers, each with its `index` [K], `weight` [K, K]
            and `bias` [K].

    Raises:
        ValueError: an argument is out of range, or a block has no such position, as blocks whose
            attention and MLP run in parallel have no "attn".

    Example:
        >>> model = pcx.SCT(backbone, train_loader, k=96, num_classes=196)
        >>> pcx.fit(model, train_loader, epochs=100, lr=0.005, opt="adamw")
    """

    method = "sct"
    backbone_mode = "drop-path"

    def __init__(
        self,
        backbone: nn.Module,
        channels: Any,
        *,
        k: int | Sequence[int] | None = None,
        position: str = "attn",
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
        selection: str = "salient",
        seed: int = 0,
        num_classes: int | None = None,
        head_init: str = HEAD_INITS[0],
    ):
        check_choice("position", position, tuple(POSITIONS))
        check_choice("selection", selection, SELECTIONS)
        scale = real_number("scale", scale)
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        self.position, self.scale, self.selection = position, scale, selection
        self.layers = _layers(layers, len(self.spec.blocks))
        self._check_positions()
        found = self._channels(channels, k, whole_number("seed", seed))
        like = next(self.backbone.parameters())
        self.salient = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    Salient(index, scale, like, block.layout == "BCHW")
                    for index, block in zip(of_layers, self.blocks, strict=True)
                )
                for name, of_layers in found.items()
            }
        )
        self._wrap()
        self.train(backbone.training)

    def _check_fits(self) -> None:
        if not self.spec.blocks:
            raise ValueError(
                f"backbone: {self.spec.family} has no blocks whose channels could be tuned: "
                f"{self.spec.no_blocks}"
            )

    def _check_positions(self) -> None:
        for block in self.blocks:
            for name in POSITIONS[self.position]:
                part = block.reader if name == "attn" else block.mlp
                if part in (None, block.name):
                    what = "reads x + attention(x)" if name == "attn" else "is its MLP"
                    raise ValueError(
                        f"position: {block.name} of {self.spec.family} has no module that {what}, "
                        f"as where attention and MLP run in parallel, so that {name!r} has no "
                        "place there; choose other layers or another position"
                    )

    @property
    def blocks(self) -> list[BlockSpec]:
        """The specs of the chosen layers."""
        return [self.spec.blocks[i] for i in self.layers]

    @property
    def k(self) -> tuple[int, ...]:
        """Channels of each chosen layer."""
        maps: Any = next(iter(self.salient.values()))
        return tuple(len(each.index) for each in maps)

    def _channels(self, given: Any, k: Any, seed: int) -> dict[str, list[Tensor]]:
        """The channels of each layer, by position."""
        names, blocks = POSITIONS[self.position], self.blocks
        if _are_indices(given):
            if k is not None:
                raise ValueError("k: the channels are given; leave k out, or give a loader")
            return {name: _checked_indices(given, name, names, blocks) for name in names}
        counts = _counts(k, self.layers, blocks)
        if given is None and self.selection != "random":
            raise ValueError(
                f"channels: None, and selection {self.selection!r} needs images; give a loader, "
                "the channels themselves, or selection='random'"
            )
        generator = torch.Generator().manual_seed(seed)
        importances = {name: [torch.zeros(block.dim) for block in blocks] for name in names}
        if self.selection != "random":
            importances = channel_importances(
                self.backbone, self.spec, given, names, self.layers, self.selection
            )
        return {
            name: [
                chosen(importance, count, self.selection, generator)
                for importance, count in zip(importances[name], counts, strict=True)
            ]
            for name in names
        }

    def _wrap(self) -> None:
        for name in POSITIONS[self.position]:
            maps: Any = self.salient[name]
            for block, salient in zip(self.blocks, maps, strict=True):
                if name == "attn":
                    wrap(self.backbone, block, "reader", lambda m, s=salient: SalientReader(m, s))
                else:
                    wrap(self.backbone, block, "mlp", lambda m, s=salient: OnOutput(m, s))

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """One group: as published, biases decay too."""
        return [{"params": list(self.trainable().values()), "weight_decay": weight_decay}]

    def config(self) -> dict[str, Any]:
        """What `from_config` needs besides the backbone and the weights, as JSON."""
        return {
            **super().config(),
            "k": list(self.k),
            "position": self.position,
            "scale": self.scale,
            "layers": list(self.layers),
            "selection": self.selection,
        }

    @classmethod
    def from_config(cls, backbone: nn.Module, config: Mapping[str, Any]) -> SCT:
        """An SCT of this configuration; its channels are to be set with its weights."""
        settings = dict(config)
        first = [list(range(count)) for count in settings.pop("k")]
        places = {name: first for name in POSITIONS[settings["position"]]}
        return super().from_config(backbone, {"channels": places, **settings})

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """A backbone for inference alone; position "mlp" is folded into the MLP's last layer."""
        copied = self.copy().eval()
        if "mlp" in copied.salient:
            for block, salient in zip(self.blocks, copied.salient["mlp"], strict=True):
                path = str(block.mlp)
                wrapper = copied.backbone.get_submodule(path)
                if isinstance(wrapper, OnOutput) and fold(wrapper.inner, salient, block.dim):
                    copied.backbone.set_submodule(path, wrapper.inner)
        for module in copied.backbone.modules():
            if isinstance(module, Changing):
                module.take_in()
        return copied.backbone.requires_grad_(False)


class Salient(nn.Module):
    """The map among a layer's channels; it changes a tensor [..., D] in place.

    Args:
        index: the channels, [K].
        scale: factor on what is added.
        like: a weight of the backbone, for device and dtype; the map is float32 over 16 bits.
        channels_first: whether channels are the second axis, as of a map [B, D, H, W].
    """

    autocasts: ClassVar[bool] = True  # autocast casts its weight and bias in every call
    index: Tensor

    def __init__(self, index: Tensor, scale: float, like: Tensor, channels_first: bool = False):
        super().__init__()
        self.scale, self.channels_first = scale, channels_first
        options: dict[str, Any] = {"device": like.device, "dtype": trained_dtype(like.dtype)}
        self.register_buffer("index", index.to(like.device))
        self.weight = nn.Parameter(torch.empty(len(index), len(index), **options))
        self.bias = nn.Parameter(torch.zeros(len(index), **options))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, norm: Any = None) -> Tensor:
        """x, changed in place; with a norm's (weight, bias, eps) the LayerNorm of it."""
        if self.channels_first:
            rows = x.movedim(1, -1).contiguous()
            changed = salient_linear(rows, self.index, self.weight, self.bias, self.scale)
            return x.copy_(changed.movedim(-1, 1))
        return salient_linear(x, self.index, self.weight, self.bias, self.scale, norm=norm)

    def of_sum(self, x: Tensor, y: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """The changed x + y, a new tensor, and the LayerNorm of it."""
        return salient_sum(x, y, self.index, self.weight, self.bias, self.scale, norm=norm)


class SalientReader(SumReader):
    """Changes what a module reads in place; a frozen LayerNorm is computed in the same pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for the changed tensor."""
        norm = _plain_norm(self.inner)
        if norm is None:
            return super().forward(x, *args, **kwargs)
        return self._change[0](x, norm)

    def read_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The changed sum, and its norm, in one pass."""
        norm = _plain_norm(self.inner)
        return super().read_sum(x, y) if norm is None else self._change[0].of_sum(x, y, norm)


def _plain_norm(module: Any) -> tuple[Tensor | None, Tensor | None, float] | None:
    """(weight, bias, eps) of a frozen LayerNorm over the last dimension, None of other modules."""
    named = type(module).__name__ == "LayerNorm" and isinstance(module, nn.LayerNorm)
    if not named or len(module.normalized_shape) != 1 or _has_hooks(module):
        return None
    affine = (module.weight, module.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in affine):
        return None
    return *affine, module.eps


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(depth))
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers: {layers!r}, expected a list of indices of blocks, or None")
    given = [whole_number("layers", i, -depth, depth - 1) for i in layers]
    places = [i % depth for i in given]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"layers: {list(layers)}, expected at least one index, and none twice")
    return tuple(sorted(places))


def _counts(k: Any, layers: Sequence[int], blocks: Sequence[BlockSpec]) -> list[int]:
    """Channels of each layer."""
    several = isinstance(k, Sequence) and not isinstance(k, str)
    given = list(k) if several else [K if k is None else k] * len(blocks)
    if len(given) != len(blocks):
        raise ValueError(f"k: {len(given)} numbers for {len(blocks)} layers; give one, or one each")
    counts = [whole_number("k", count, 1) for count in given]
    for count, layer, block in zip(counts, layers, blocks, strict=True):
        if count > block.dim:
            raise ValueError(
                f"k: {count} channels of layer {layer}, which has {block.dim}; give at most that, "
                "or choose wider layers"
            )
    return counts


def _are_indices(given: Any) -> bool:
    """Whether channels themselves are given, rather than a loader."""
    if isinstance(given, Mapping):
        return set(given) <= {"attn", "mlp"}
    first = given[0] if isinstance(given, list | tuple) and given else None
    if isinstance(first, Tensor):
        return not first.is_floating_point() and first.dim() == 1
    return isinstance(first, list | tuple | range) and all(isinstance(i, int) for i in first)


def _checked_indices(
    given: Any, name: str, names: Sequence[str], blocks: Sequence[BlockSpec]
) -> list[Tensor]:
    if isinstance(given, Mapping) != (len(names) > 1) and not (
        isinstance(given, Mapping) and set(given) == set(names)
    ):
        raise ValueError(
            f"channels: expected a list for each layer; for position 'both' a dict of {names}"
        )
    lists = given[name] if isinstance(given, Mapping) else given
    if len(lists) != len(blocks):
        raise ValueError(f"channels: {len(lists)} lists for {len(blocks)} layers; give one each")
    found = []
    for layer, (indices, block) in enumerate(zip(lists, blocks, strict=True)):
        values = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        rows = [whole_number(f"channels: layer {layer}", i, 0, block.dim - 1) for i in values]
        if not rows or len(set(rows)) < len(rows):
            raise ValueError(f"channels: layer {layer}: {rows[:8]}, expected distinct indices")
        found.append(torch.tensor(sorted(rows)))
    return found
