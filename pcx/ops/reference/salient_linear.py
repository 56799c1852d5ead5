"""`salient_linear` in plain torch, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcx.ops.checks import transformed
from pcx.ops.library import wide
from pcx.ops.reference.add_layer_norm import add_layer_norm


def salient_linear(
    x: Tensor,
    y: Tensor | None,
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
        x, y, index, weight, bias, scale: as there.
        norm_weight, norm_bias, eps: those of the LayerNorm.
        dtype: of the normed rows, or None where nothing is normed.
        product: dtype in which the matrix product is computed.
        keep: whether to return what the gradient needs.

    Returns:
        The normed rows [..., D], u [..., K] in `product`, mean [..., 1] and reciprocal standard
        deviation [..., 1]. What is not asked for is empty.
    """
    if y is not None:
        x.add_(y)
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


def gradients(
    grad_x: Tensor | None,
    grad_normed: Tensor | None,
    index: Tensor,
    weight: Tensor,
    u: Tensor,
    scale: float,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by x, the weight and the bias; `needs` says which of them are computed.

    Args:
        grad_x, grad_normed: those of the changed x and of its normed rows; None is zero.
        index, weight, scale: as given to `salient_linear`.
        u, x, mean, rstd: what `salient_linear` kept, and the changed x.
        norm_weight: that of the LayerNorm.
    """
    own = grad_normed is not None  # whether the sum is a new tensor
    total = grad_x
    if grad_normed is not None:
        total = _by_normed(grad_normed, x, mean, rstd, norm_weight).to(x.dtype)  # type: ignore
        if grad_x is not None:
            total += grad_x
    if total is None:
        return None, None, None
    part = total.index_select(-1, index) * scale  # [..., K]
    read = part.to(u.dtype).flatten(0, -2)  # [R, K]
    by_x = by_weight = by_bias = None
    if needs[0]:
        by_x = total if own else total.clone(memory_format=torch.contiguous_format)
        added = (read @ weight.to(u.dtype)).to(by_x.dtype).view(part.shape)
        by_x.index_copy_(-1, index, by_x.index_select(-1, index) + added)
    if needs[1]:
        by_weight = (read.T @ u.flatten(0, -2)).to(weight.dtype)
    if needs[2]:
        by_bias = part.flatten(0, -2).sum(0, dtype=wide(part.dtype))
    return by_x, by_weight, by_bias


def _by_normed(
    grad_normed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor | None
) -> Tensor:
    """The gradient of a LayerNorm by its input, a new tensor [..., D] of any dtype."""
    given = (grad_normed, x, norm_weight)
    if not x.is_cuda or any(t is not None and t.dtype != x.dtype for t in given):
        grad_normed, x, norm_weight = (None if t is None else t.to(mean.dtype) for t in given)  # type: ignore
    return torch.ops.aten.native_layer_norm_backward(
        grad_normed, x, x.shape[-1:], mean, rstd, norm_weight, None, [True, False, False]
    )[0]
