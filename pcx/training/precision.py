"""Automatic mixed precision: its names, and frozen weights cast once in place of in every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

AMP = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Replaced = list[tuple[nn.Module, str, nn.Parameter]]


@torch.no_grad()
def cast_weights(module: nn.Module, dtype: torch.dtype) -> Replaced:
    """Casts once the weights that autocast would cast in every call; the bits are the same.

    Those of torch's own linear and convolutional layers: a subclass may compute with its weight
    before it multiplies by it. And those of modules that say so by `autocasts`.

    Returns the parameters that were there before, each with its module and name; they are left as
    they are. The new ones require no gradient. All are cast before any is replaced.
    """
    before: Replaced = [
        (part, name, parameter)
        for part in module.modules()
        if type(part) in (nn.Linear, nn.Conv2d, nn.Conv3d) or getattr(part, "autocasts", False)
        for name, parameter in part.named_parameters(recurse=False)
        if name in ("weight", "bias") and parameter.dtype != torch.float64  # autocast's own rule
    ]
    cast = [nn.Parameter(p.to(dtype), requires_grad=False) for _, _, p in before]
    for (part, name, _), parameter in zip(before, cast, strict=True):
        setattr(part, name, parameter)
    return before


@contextmanager
def weights_cast(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Applies `cast_weights` within a context, in which no weight may be differentiated."""
    before = [] if dtype is None else cast_weights(module, dtype)
    try:
        yield
    finally:
        for part, name, parameter in before:
            setattr(part, name, parameter)
