"""Tile sizes and optional arguments for the launches of prefix_attention's kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pcx.kernels.launch import products_of_warps
from pcx.ops.hardware import processors

# Not specialised, since they vary from call to call.
RUNTIME = ["N", "S", "m", "B1", "rows_per_chunk"]

Tiles = tuple[int, int, int, int]  # queries, keys, warps, stages

# Tuned on an H200. In 16 bits no kernel spills there at d = 64. float32 without TF32 runs on
# plain multiply-adds and spills. With head dims of two parts (d = 40 and 96) Triton 3.6 gave wrong
# gradients at 8 warps and in 64x64 tiles, so these use only tiles that passed the GPU tests.
_TILES: dict[str, dict[str, Tiles]] = {
    "16 bits": {
        "forward": (64, 32, 4, 3),
        "query": (64, 32, 4, 3),
        "own": (64, 64, 4, 3),
        "prefix": (16, 128, 4, 3),
    },
    "16 bits, other head dims": {
        "forward": (64, 32, 4, 2),
        "query": (64, 32, 4, 2),
        "own": (32, 64, 4, 2),
        "prefix": (32, 64, 4, 2),
    },
    "16 bits, 64 and 16": {  # parts of the head dim, such as 72 and 80; tuned on an H100
        "forward": (64, 32, 4, 3),
        "query": (64, 32, 4, 3),
        "own": (32, 64, 4, 3),
        "prefix": (32, 64, 4, 3),
    },
    "float32": {
        "forward": (64, 32, 8, 2),
        "query": (16, 32, 8, 2),
        "own": (32, 32, 8, 2),
        "prefix": (32, 32, 8, 2),
    },
}
# Replacements for tiles above that spill with Triton 3.8.
_BY_WARPS = {("16 bits", "own"): (32, 64, 4, 3)}


def configuration(kernel: str, q: Tensor, keys: int) -> Tiles:
    """The tiles of a kernel: "forward", "query", "own" or "prefix"."""
    dim = q.shape[-1]
    if q.dtype == torch.float32:
        group = "float32"
    elif dim in (16, 32, 64):
        group = "16 bits"
    elif 64 < dim <= 80:
        group = "16 bits, 64 and 16"
    else:
        group = "16 bits, other head dims"
    bm, bn, warps, stages = _TILES[group][kernel]
    if (group, kernel) in _BY_WARPS and products_of_warps(q):
        bm, bn, warps, stages = _BY_WARPS[group, kernel]
    if kernel in ("forward", "query") and q.shape[2] <= 16:  # few queries, such as [CLS] alone
        bm = 16
    if kernel == "prefix" and keys <= bn // 2:
        bm, bn = 32, max(32, triton.next_power_of_2(keys))
    return bm, bn, warps, stages


def tail(count: int, tile: int) -> int:
    """The size of the tile for the rows that whole tiles leave over."""
    rest = count % tile
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def chunk_count(q: Tensor, programs: int, rows: int) -> int:
    """The number of parts that the batch is cut into, so that programs fill the GPU four times."""
    cores = processors(q.device) if q.is_cuda else 2
    return max(1, min(4 * cores // max(programs, 1), rows // 256))


def dense(x: Tensor | None) -> Tensor | None:
    """An optional index or list of lengths, made contiguous."""
    return None if x is None else x.contiguous()


def given(x: Tensor | None, other: Tensor) -> Tensor:
    """An optional argument, or if it is None another tensor, which the kernel does not read."""
    return other if x is None else x


def set_count(prefix: Tensor) -> int:
    """The number of sets: G of a prefix [G, H, m, d], 1 of [H, m, d]."""
    return prefix.shape[0] if prefix.dim() == 4 else 1


def bias_arguments(bias: Tensor | None, q: Tensor) -> tuple[Tensor, tuple[int, ...], int, int]:
    """The bias as bytes or numbers, its five strides (0 along broadcast axes), B1, and its kind.

    The kind is 0 for none, 1 for an additive bias, 2 for a boolean one.
    """
    if bias is None:
        return q, (0, 0, 0, 0, 0), 1, 0
    steps = tuple(0 if size == 1 else s for size, s in zip(bias.shape, bias.stride(), strict=True))
    inner = bias.shape[1] if bias.shape[1] > 1 else q.shape[0] // max(bias.shape[0], 1)
    boolean = bias.dtype == torch.bool
    return bias.view(torch.uint8) if boolean else bias, steps, max(inner, 1), 1 + boolean
