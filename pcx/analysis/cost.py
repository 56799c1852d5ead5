"""What a model computes: its multiply-adds, as a whole and by module."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pcx.backbones.inputs import input_size
from pcx.backbones.probing import hollow

BATCH = 64
WHOLE = "Global"  # the counter's name of it
EMBEDDINGS = ("patch_embed", "patch_embeddings", "embeds")  # timm's, Hugging Face's, NaFlexViT's


def multiply_adds(model: nn.Module, *, patch_embedding: bool = True) -> float:
    """Multiply-adds of one image: half the operations that torch's counter sees.

    Those of matrix products, convolutions and attention, of one image of a batch of 64 of the
    model's own image size; what is computed once for the whole batch, such as prompts' keys and
    values, counts for 1/64. What ranking the tokens of a pruned model takes is left out, as in the
    paper (Zero-TPrune, Table 1). Counted on shapes alone, in eval mode, on a copy without weights.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification or a pcx.VPT,
            pruned or not; not changed.
        patch_embedding: with that of turning patches into tokens. The Zero-TPrune paper's figures
            are without (DeiT-S: 4.55 G, and 3.08 G for its Table 1).

    Raises:
        ValueError: the patch embedding is to be left out and was not found.

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
    """`multiply_adds` of every module that computes any, by name, and of the `WHOLE`.

    The names begin with the model's class: "VisionTransformer.blocks.0.attn".
    """
    counts = operations_of(hollow(model), input_size(model))
    return {name: operations / 2 / BATCH for name, operations in counts.items()}


@torch.no_grad()
def operations_of(hollow: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """Of a batch, by the names of modules, and of the `WHOLE`.

    The counter knows neither every backend's attention nor pcx's own operations; on shapes alone
    all of attention is matrix products.
    """
    dtype = next(p.dtype for p in hollow.parameters() if p.is_floating_point())
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        hollow(torch.empty(BATCH, *size, device="meta", dtype=dtype))
    return {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
