"""Prompts that start from what the backbone makes of images (VPT paper, App. D)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones.spec import BackboneSpec
from pcx.extras import need
from pcx.tasks.batches import check_images, check_loader, images_and_labels

INITS = ("published", "cls-prototype", "patch-prototype")
MOST = 20_000  # patch tokens of a layer that are clustered


@torch.no_grad()
def prototypes(
    backbone: nn.Module, spec: BackboneSpec, loader: Any, init: str, counts: list[int]
) -> list[Tensor]:
    """The prompts of each layer, by the tokens that come into it.

    Args:
        backbone: a model's own copy, in eval mode, without prompts.
        spec: of the backbone.
        loader: yields (images, labels), labels as one class per image.
        init: "cls-prototype": the mean [CLS] token of each class, as many as there are classes;
            "patch-prototype": the centres of clusters of patch tokens by k-means.
        counts: prompts of each layer.

    Returns:
        [m, D] of each layer, in the dtype of the backbone.

    Raises:
        ValueError: there is no [CLS], the counts are not the number of classes, or there are fewer
            patch tokens than prompts.
    """
    check_loader(loader, "images")
    if init == "cls-prototype" and not spec.has_cls:
        raise ValueError(f"init: {init!r}, and {spec.family} has no [CLS]; use 'patch-prototype'")
    seen, labels = _tokens(backbone, spec, loader, init == "cls-prototype")
    if init == "cls-prototype":
        return _by_class(seen, labels, counts)
    return [
        _centres(tokens, m) if m else tokens.new_empty(0, tokens.shape[-1])
        for tokens, m in zip(seen, counts, strict=True)
    ]


def _tokens(
    backbone: nn.Module, spec: BackboneSpec, loader: Any, cls: bool
) -> tuple[list[Tensor], list[Any]]:
    """What comes into each block, [CLS] or some patch tokens of all images, and the labels."""
    like, found, labels = next(backbone.parameters()), [], []
    with _inputs(backbone, spec) as seen:
        for batch in loader:
            images, classes = images_and_labels(batch)
            check_images(images)
            seen.clear()
            backbone(images.to(like.device, like.dtype))
            labels += classes.tolist() if isinstance(classes, Tensor) else list(classes)
            if cls:
                found.append([x[:, 0] for x in seen])
            else:
                found.append([x[:, spec.prefix_tokens :].flatten(0, 1) for x in seen])
    if not found:
        raise ValueError("images: the loader yields none; give one that does")
    return [torch.cat(parts) for parts in zip(*found, strict=True)], labels


@contextmanager
def _inputs(backbone: nn.Module, spec: BackboneSpec) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in spec.blocks_in(backbone)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _by_class(seen: list[Tensor], labels: list[Any], counts: list[int]) -> list[Tensor]:
    classes = sorted(set(labels), key=str)
    if any(m not in (0, len(classes)) for m in counts):
        raise ValueError(
            f"num_prompts: {max(counts)}, and init='cls-prototype' gives one prompt for each of "
            f"the {len(classes)} classes; give {len(classes)}"
        )
    places = torch.tensor([classes.index(label) for label in labels])
    return [
        torch.stack([x[(places == c).to(x.device)].mean(0) for c in range(len(classes))])[:m]
        for x, m in zip(seen, counts, strict=True)
    ]


def _centres(tokens: Tensor, m: int) -> Tensor:
    need("sklearn", "init='patch-prototype'")
    from sklearn.cluster import KMeans

    if len(tokens) < m:
        raise ValueError(
            f"images: {len(tokens)} patch tokens for {m} prompts; give more images, or fewer "
            "prompts"
        )
    some = tokens[torch.linspace(0, len(tokens) - 1, min(MOST, len(tokens))).long()]
    found = KMeans(m, n_init=1, random_state=0).fit(some.double().cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).to(tokens)
