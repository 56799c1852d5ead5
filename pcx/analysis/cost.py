"""Counts the multiply-adds of a model, pruned or not, whole and by module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pcx.backbones.inputs import input_size
from pcx.backbones.probing import hollow
from pcx.models.base import check_module
from pcx.ops import salient_linear  # noqa: F401, which defines the op

BATCH = 64  # images per counted batch
WHOLE = "Global"  # the name under which torch's counter keeps the whole model's operations
# Names of the patch embedding in timm's models, in Hugging Face's, and in NaFlexViT.
EMBEDDINGS = ("patch_embed", "patch_embeddings", "embeds")


def multiply_adds(model: nn.Module, *, patch_embedding: bool = True) -> float:
    """Multiply-adds of one image: half the operations that torch's counter sees.

    Matrix products, convolutions and attention are counted, for an image of the model's own size
    in a batch of 64. What is computed once for the whole batch, such as the prompts' keys and
    values, counts for 1/64. Ranking the tokens of a pruned model is not counted, as in the paper
    (Zero-TPrune, Table 1). The count needs shapes alone. It runs in eval mode on a copy without
    weights.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification or a pcx.VPT,
            pruned or not. It is not changed.
        patch_embedding: whether turning patches into tokens is counted. The Zero-TPrune paper
            leaves it out (DeiT-S: 4.55 G, and 3.08 G for its Table 1).

    Returns:
        Multiply-adds per image.

    Raises:
        ValueError: `patch_embedding` is False and the patch embedding was not found.

    Example:
        >>> whole = pcx.multiply_adds(model)
        >>> pruning = pcx.zero_tprune(model, layers=(3, 6, 9), keep=0.7, iters=5)
        >>> share = pcx.multiply_adds(model) / whole
    """
    counts = multiply_adds_by_module(model)
    total = counts[WHOLE]
    if not patch_embedding:
        names = [n for n in counts if n.rpartition(".")[2] in EMBEDDINGS]
        if len(names) != 1:
            raise ValueError(
                f"patch_embedding: False, but {type(model).__name__} computes {len(names)} modules "
                f"of the names {EMBEDDINGS}, expected one; count it with True"
            )
        total -= counts[names[0]]
    return total


def multiply_adds_by_module(model: nn.Module) -> dict[str, float]:
    """Multiply-adds of one image by module, and of the whole model under the key `WHOLE`.

    Modules that compute none are left out. The names begin with the model's class:
    "VisionTransformer.blocks.0.attn".
    """
    check_module("model", model)
    counts = operations_of(hollow(model), input_size(model))
    return {name: operations / 2 / BATCH for name, operations in counts.items()}


@torch.no_grad()
def operations_of(hollow: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """Operations of one batch by module, and of the whole model under the key `WHOLE`.

    Torch's counter does not know every backend's attention, nor pcx's own ops. On meta tensors all
    attention is computed by matrix products, which it knows.

    Args:
        hollow: a model on the meta device, as `pcx.backbones.probing.hollow` gives it.
        size: channels, height and width of an image.
    """
    dtype = next(p.dtype for p in hollow.parameters() if p.is_floating_point())
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with sdpa_kernel(SDPBackend.MATH), counter:
        hollow(torch.empty(BATCH, *size, device="meta", dtype=dtype))
    return {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}


def _of_salient_linear(x: torch.Size, y: Any, index: torch.Size, *rest: Any, **more: Any) -> int:
    """Operations of `pcx.ops.salient_linear`, by the shapes of its arguments."""
    return 2 * x[:-1].numel() * index[0] ** 2


_FORMULAS = {torch.ops.pcx.salient_linear: _of_salient_linear}
