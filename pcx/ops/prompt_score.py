"""Scores of prompts from per-sample gradients, behind their LayerNorm or without one."""

from __future__ import annotations

import torch
from torch import Tensor

from pcx.ops import registration  # noqa: F401  defines the operation


def prompt_score(
    gradient: Tensor,
    prompts: Tensor,
    *,
    layer_norm: bool = False,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """||g * p||_2 and |<g, p>| of each sample and prompt (Prompt Condensation, Eq. 16).

    g is the gradient of a sample's loss by prompt p. With `layer_norm`, what is given is the
    gradient by LayerNorm's output for the prompts, and its backward is part of the same pass.

    Args:
        gradient: [B, m, D].
        prompts: [m, D].
        layer_norm: whether a LayerNorm over D, whose input the prompts are, lies between.
        weight: its weight [D], None for none.
        eps: its epsilon.

    Returns:
        [2, B, m], float32 (float64 for float64): the norms, and the inner products. Not
        differentiable.

    Raises:
        TypeError: an argument is not of floating point.
        ValueError: a shape or device does not fit; the message names the argument.
    """
    named = {"gradient": gradient, "prompts": prompts, "weight": weight}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {tensor.dtype}, expected floating point")
        if tensor.device != gradient.device:
            raise ValueError(f"{name}: on {tensor.device}, gradient on {gradient.device}")
    if gradient.dim() != 3 or prompts.shape != gradient.shape[1:]:
        raise ValueError(
            f"prompts: shape {tuple(prompts.shape)}, expected [m, D] of gradient [B, m, D], which "
            f"has {tuple(gradient.shape)}"
        )
    if weight is not None and weight.shape != prompts.shape[1:]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected [{prompts.shape[1]}]")
    with torch.no_grad():
        return torch.ops.pcx.prompt_score.default(gradient, prompts, layer_norm, weight, eps)
