"""Classifier heads: their size and their initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pcx.backbones.residual import unwrapped
from pcx.backbones.setr import Decoder


def place_heads(backbone: nn.Module, heads: Iterable[nn.Module]) -> None:
    """Moves heads to the device and dtype of the backbone.

    A new head of an older timm is float32 on the CPU, whatever its backbone is.
    """
    like = next(backbone.parameters())
    for head in heads:
        head.to(like.device, like.dtype)


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is trained over a backbone of a dtype: float32 over one of 16 bits.

    A 16-bit weight would round most updates of a small learning rate away.
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def train_in_full(head: nn.Module) -> None:
    """Makes a 16-bit head float32; it then casts what the backbone gives it."""
    dtype = next((p.dtype for p in head.parameters()), torch.float32)
    if trained_dtype(dtype) != dtype:
        head.to(trained_dtype(dtype)).register_forward_pre_hook(_cast)


def _cast(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(head.parameters()).dtype  # of now: the model may have been converted
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs)


def head_size(heads: list[Any]) -> int:
    """How many numbers the first head gives, of an image or a pixel; 0 without one."""
    for head in map(unwrapped, heads[:1]):
        if isinstance(head, Decoder):
            return head.num_classes
        for module in reversed(list(head.modules())):
            if isinstance(module, nn.Linear):
                return module.out_features
            if isinstance(module, nn.Conv2d):
                return module.out_channels
    return 0


def draw_head(head: nn.Module, init: str) -> None:
    """Draws a head anew, unless `init` is "keep".

    "trunc-normal" is timm's and BEiT's for a new head: a truncated normal of 0.02, bias zero. Its
    first loss is about log(classes), that of chance. "published" is that of the VPT paper's code:
    kaiming-normal by fan-out, bias -log 99. Its first loss is several times as high for few classes
    (benchmarks/results/head_inits*.csv). Of SETR's decoder this is the last convolution; the others
    are drawn as torch draws them.

    Raises:
        ValueError: the head is to be drawn and is neither one linear layer nor SETR's decoder.
    """
    if init == "keep":
        return
    if isinstance(head, Decoder):
        head.draw()
        if not head.num_classes:
            return
        head = head.classifier
    if not isinstance(head, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"head_init: the backbone's head is {type(head).__name__}, and {init!r} is for one "
            "linear layer; use head_init='keep'"
        )
    published = init == "published"
    if published:
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
    else:
        nn.init.trunc_normal_(head.weight, std=0.02)
    if head.bias is not None:
        nn.init.constant_(head.bias, -math.log(99) if published else 0.0)
