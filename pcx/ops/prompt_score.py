"""Scores of prompts from per-sample gradients, taken at the prompts or behind their LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from pcx.ops import hardware
from pcx.ops.dispatch import Backend, Dispatch
from pcx.ops.library import LIBRARY, wide
from pcx.ops.reference import prompt_score as reference


def prompt_score(
    gradient: Tensor,
    prompts: Tensor,
    *,
    layer_norm: bool = False,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Scores ||g * p||_2 and |<g, p>| of each sample and prompt (Prompt Condensation, Eq. 16).

    g is the gradient of a sample's loss by prompt p. With `layer_norm`, `gradient` is the gradient
    by the output of a LayerNorm over the prompts, and g is computed by its backward pass.

    Args:
        gradient: [B, m, D], one gradient per sample.
        prompts: [m, D].
        layer_norm: whether `gradient` was taken behind a LayerNorm over D.
        weight: weight [D] of the LayerNorm, or None if it has none.
        eps: epsilon of the LayerNorm.
        backend: "triton" (on CUDA), "cpu" (C++) or "reference" (torch). "auto" is the first of
            these that can run.

    Returns:
        [2, B, m], float32 (float64 for float64): the norms, then the absolute inner products. They
        are not differentiable.

    Raises:
        TypeError: an argument is not of floating point.
        ValueError: a shape or device does not fit, or the backend asked for cannot run; the message
            names the argument.
    """
    _check(gradient, prompts, weight)
    run = DISPATCH.own_run(backend, gradient) or torch.ops.pcx.prompt_score.default
    with torch.no_grad():
        return run(gradient, prompts, layer_norm, weight, eps)


def _check(gradient: Tensor, prompts: Tensor, weight: Tensor | None) -> None:
    named = {"gradient": gradient, "prompts": prompts, "weight": weight}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {tensor.dtype}, expected floating point")
        if tensor.device != gradient.device:
            raise ValueError(
                f"{name}: on {tensor.device}, gradient on {gradient.device}; move them to one "
                "device"
            )
    if gradient.dim() != 3 or prompts.shape != gradient.shape[1:]:
        raise ValueError(
            f"prompts: shape {tuple(prompts.shape)}, expected [m, D] of gradient [B, m, D], which "
            f"has {tuple(gradient.shape)}"
        )
    if weight is not None and weight.shape != prompts.shape[1:]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected [{prompts.shape[1]}]")


def _triton_cannot(gradient: Tensor) -> str | None:
    if gradient.dtype == torch.float64:
        return "it computes bfloat16, float16 and float32, gradient has torch.float64"
    return None


def _cpu_cannot(gradient: Tensor) -> str | None:
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if gradient.dtype not in types:
        return f"it computes float32, float64, bfloat16 and float16, gradient has {gradient.dtype}"
    return None


DISPATCH = Dispatch(
    "gradient",
    Backend("triton", "cuda", ("triton",), can_run=_triton_cannot),
    Backend("cpu", "cpu", ("cpu extension",), can_run=_cpu_cannot),
    Backend("reference", run=reference.prompt_score),
)

LIBRARY.define(
    "prompt_score(Tensor gradient, Tensor prompts, bool layer_norm, Tensor? weight, float eps) "
    "-> Tensor"
)


@torch.library.register_fake("pcx::prompt_score", lib=LIBRARY)
def _fake(gradient, prompts, layer_norm, weight, eps):
    return gradient.new_empty(2, *gradient.shape[:2], dtype=wide(gradient.dtype))


@torch.library.impl(LIBRARY, "prompt_score", "CompositeExplicitAutograd")
def _anywhere(*arguments):
    return reference.prompt_score(*arguments)


@torch.library.impl(LIBRARY, "prompt_score", "CUDA")
def _on_cuda(gradient, *arguments):
    run = reference.prompt_score
    if hardware.TRITON and not _triton_cannot(gradient):
        from pcx.kernels.prompt_score import prompt_score as run
    return run(gradient, *arguments)
