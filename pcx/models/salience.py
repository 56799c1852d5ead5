"""Which channels of a backbone matter for a task: SCT's class-aware importance score."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones.probing import BlockSpec
from pcx.backbones.spec import BackboneSpec
from pcx.tasks.batches import check_images, check_loader, images_and_labels

SELECTIONS = ("salient", "balanced", "class-agnostic", "least", "random")


def channel_importance(
    backbone: nn.Module,
    spec: BackboneSpec,
    loader: Any,
    position: str,
    layers: Sequence[int],
    *,
    selection: str = "salient",
) -> list[Tensor]:
    """The importance of every channel of some layers (SCT, Eq. 1 and 2).

    For each class, a channel's activations over all images and patch tokens of the class are
    gathered into one vector, whose L2 norm is the channel's activation; the importance is its mean
    over the classes that occur. Sums are float64, in one pass, so that neither the order nor the
    size of the batches matters. [CLS] and registers are left out.

    As published, a class of n images weighs by the root of n. "balanced" divides each class's sum
    by its number of images. "class-agnostic" takes all images as one class.

    Args:
        backbone: a model's own copy, in eval mode.
        spec: of the backbone.
        loader: yields (images, labels), or dicts of "pixel_values" and "labels"; labels are one
            class per image, numbers or text.
        position: "attn": the channels of x + attention(x), which the block's second norm reads; or
            "mlp": those of the block's output.
        layers: indices of the blocks.
        selection: one of `SELECTIONS`; what it changes is said above.

    Returns:
        For each layer the importance of its channels, float64 [D] on the CPU.

    Raises:
        ValueError: the loader yields no images, or labels that are not one class per image.
    """
    positions = (position,)
    return channel_importances(backbone, spec, loader, positions, layers, selection)[position]


@torch.no_grad()
def channel_importances(
    backbone: nn.Module,
    spec: BackboneSpec,
    loader: Any,
    positions: Sequence[str],
    layers: Sequence[int],
    selection: str,
) -> dict[str, list[Tensor]]:
    """`channel_importance` at several positions, by one pass over the loader."""
    check_loader(loader, "channels")
    like = next(backbone.parameters())
    sums: dict[Any, Tensor] = {}  # of squares, [D] by class, position and layer
    counts: dict[Hashable, int] = {}
    blocks = [spec.blocks[i] for i in layers]
    with _activations(backbone, blocks, positions) as seen:
        for batch in loader:
            images, labels = images_and_labels(batch)
            check_images(images)
            classes = _classes(labels, len(images), aware=selection != "class-agnostic")
            for found in seen.values():
                found.clear()
            backbone(images.to(like.device, like.dtype))
            for label in classes:
                counts[label] = counts.get(label, 0) + 1
            for position, found in seen.items():
                for layer, (x, block) in enumerate(zip(found, blocks, strict=True)):
                    squares = _squares(x, block.layout, spec.prefix_tokens)
                    for label, of_image in zip(classes, squares, strict=True):
                        _add(sums, (label, position, layer), of_image)
    if not counts:
        raise ValueError("channels: the loader yields no images; give one that does")
    return {
        position: [_mean_norm(sums, counts, (position, i), selection) for i in range(len(blocks))]
        for position in positions
    }


def chosen(importance: Tensor, k: int, selection: str, generator: torch.Generator) -> Tensor:
    """The indices of K channels, ascending, int64 [K].

    Args:
        importance: of the channels, [D].
        k: how many.
        selection: "least" takes those of the lowest importance, "random" draws them; the others
            take those of the highest. Of equal channels the first are taken.
        generator: for "random".
    """
    if selection == "random":
        return torch.randperm(len(importance), generator=generator)[:k].sort().values
    order = importance.argsort(descending=selection != "least", stable=True)
    return order[:k].sort().values


@contextmanager
def _activations(
    backbone: nn.Module, blocks: Sequence[BlockSpec], positions: Sequence[str]
) -> Iterator[dict[str, list[Tensor]]]:
    """By position a list that each forward adds every block's tensor to, in order of the blocks."""
    seen: dict[str, list[Tensor]] = {position: [] for position in positions}
    hooks = []
    for block in blocks:
        if "attn" in seen:
            reader = backbone.get_submodule(str(block.reader))
            hooks.append(
                reader.register_forward_pre_hook(lambda _, args: seen["attn"].append(args[0]))
            )
        if "mlp" in seen:
            module = backbone.get_submodule(block.name)
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, out: seen["mlp"].append(
                        out[0] if isinstance(out, tuple) else out
                    )
                )
            )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _squares(x: Tensor, layout: str, prefix_tokens: int) -> Tensor:
    """Sums of squares over each image's patch tokens, float64 [B, D] on the CPU."""
    if layout == "BCHW":
        x = x.movedim(1, -1)
    tokens = x.flatten(1, -2)  # [B, N, D]
    if layout == "BNC":
        tokens = tokens[:, prefix_tokens:]
    return tokens.double().square().sum(1).cpu()


def _classes(labels: Any, images: int, *, aware: bool) -> list[Hashable]:
    """The class of each image; one for all where classes do not matter."""
    if not aware:
        return [0] * images
    if isinstance(labels, Tensor):
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"channels: labels of shape {tuple(labels.shape)} and {labels.dtype}, expected one "
                "class per image, integers [B]; selection='class-agnostic' or 'random' needs none"
            )
        labels = labels.tolist()
    if not isinstance(labels, list | tuple) or len(labels) != images:
        raise ValueError(
            f"channels: a batch of {images} images has labels {type(labels).__name__}, expected "
            "one class for each image"
        )
    return list(labels)


def _add(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _mean_norm(
    sums: dict[Any, Tensor], counts: dict[Hashable, int], place: tuple[str, int], selection: str
) -> Tensor:
    classes = sorted(counts, key=str)  # so that the order of batches does not change rounding
    position, layer = place
    rows = torch.stack([sums[label, position, layer] for label in classes])
    if selection == "balanced":
        rows = rows / torch.tensor([counts[label] for label in classes]).double()[:, None]
    return rows.sqrt().mean(0)
