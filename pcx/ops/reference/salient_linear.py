"""`salient_linear` in plain torch, and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcx.ops.checks import transformed
from pcx.ops.library import wide
from pcx.ops.reference.add_layer_norm import add_layer_norm


def salient_linear(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    product: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pcx.ops.salient_linear.salient_linear` step by step.

    Args:
        x, index, weight, bias, scale: as there.
        norm_weight, norm_bias, eps: those of the LayerNorm.
        dtype: of the normed rows, or None where nothing is normed.
        product: dtype in which the matrix product is computed.
        keep: whether to return what the gradient needs.

    Returns:
        The normed rows [..., D], u [..., K] in `product`, mean [..., 1] and reciprocal standard
        deviation [..., 1]. What is not asked for is empty.
    """
    own = x.index_select(-1, index)  # [..., K]
    u = own.to(product)
    delta = F.linear(u, weight.to(product), bias.to(product)).to(x.dtype)
    if x.is_cuda and not transformed():  # without atomics, but vmap has no rule for it
        x.index_copy_(-1, index, torch.add(own, delta, alpha=scale))
    else:
        x.index_add_(-1, index, delta, alpha=scale)
    normed = x.new_empty(0)
    mean, rstd = (x.new_empty(0, dtype=wide(x.dtype)) for _ in range(2))
    if dtype is not None and not keep:
        normed = add_layer_norm(x, None, norm_weight, norm_bias, eps, dtype)[1]
    elif dtype is not None:
        rows, *affine = (
            None if t is None else t.to(mean.dtype) for t in (x, norm_weight, norm_bias)
        )
        shape = x.shape[-1:]
        normed, mean, rstd = torch.ops.aten.native_layer_norm(rows, shape, *affine, eps)
        normed = normed.to(dtype)
    return normed, (u if keep else x.new_empty(0, dtype=product)), mean, rstd


def row_gradients(
    grad_x: Tensor | None,
    grad_normed: Tensor | None,
    index: Tensor,
    weight: Tensor,
    scale: float,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    product: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients by x [..., D], and by u W^T + b [..., K] in `product`.

    Args:
        grad_x, grad_normed: those of the changed x and of its normed rows; None is zero, of one.
        index, weight, scale, product: as given to `salient_linear`.
        x, mean, rstd: the changed x and what `salient_linear` kept, where there is a norm.
        norm_weight: that of the LayerNorm.
    """
    if grad_normed is not None and x is not None:
        by_x = _by_normed(grad_normed, x, mean, rstd, norm_weight).to(x.dtype)
        if grad_x is not None:
            by_x += grad_x
    else:
        by_x = grad_x.clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
    own = by_x.index_select(-1, index)  # [..., K]
    part = (own * scale).to(product)
    added = (part.reshape(-1, len(index)) @ weight.to(product)).to(by_x.dtype).view(own.shape)
    by_x.index_copy_(-1, index, own + added)
    return by_x, part


def _by_normed(
    grad_normed: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
) -> Tensor:
    """The gradient of a LayerNorm by its input, a new tensor [..., D] of any dtype."""
    given: tuple[Tensor | None, ...] = (grad_normed, x, norm_weight)
    if not x.is_cuda or any(t is not None and t.dtype != x.dtype for t in given):
        given = tuple(None if t is None else t.to(wide(x.dtype)) for t in given)
    return torch.ops.aten.native_layer_norm_backward(
        *given[:2], x.shape[-1:], mean, rstd, given[2], None, [True, False, False]
    )[0]
