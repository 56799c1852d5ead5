"""The second derivative of `pcx.prefix_attention`, which torch's own functions compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcx.ops.bias import four_dimensions
from pcx.ops.library import LIBRARY
from pcx.ops.reference import prefix_attention as reference

# `grads` are those of the six gradients that prefix_attention_backward gives. The results are the
# gradients of grad_out, grad_lse, q, k, v, prefix_k, prefix_v and bias; empty where there is none.
LIBRARY.define(
    "prefix_attention_second(Tensor[] grads, Tensor grad_out, Tensor? grad_lse, Tensor q, "
    "Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_index, "
    "Tensor? prefix_lengths, Tensor? bias, float scale) -> Tensor[]"
)


@torch.library.impl(LIBRARY, "prefix_attention_second", "CompositeImplicitAutograd")
def _second_derivative(
    grads: Sequence[Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Differentiates the gradients of attention once more, through the reference.

    The arguments are those of the op, `bias` is [B0 | 1, B1 | 1, H | 1, N | 1, S | 1].

    Raises:
        RuntimeError: the result is to be differentiated again.
    """
    if torch.is_grad_enabled():  # under create_graph
        raise RuntimeError(
            "prefix_attention: has no third derivative; use backend='reference' and "
            "return_lse=True under create_graph"
        )
    with torch.enable_grad():
        given = {"grad_out": grad_out, "grad_lse": grad_lse, "q": q, "k": k, "v": v}
        given |= {"prefix_k": prefix_k, "prefix_v": prefix_v, "bias": bias}
        leaves = {
            name: x.detach().requires_grad_()
            for name, x in given.items()
            if x is not None and x.is_floating_point()
        }
        wide = leaves.get("bias", bias)
        if wide is not None:
            wide = four_dimensions(wide, q.shape[0]).expand(*q.shape[:3], k.shape[2])
        inputs = [leaves[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")]
        found = reference.prefix_attention(
            *inputs,
            prefix_index=prefix_index,
            prefix_lengths=prefix_lengths,
            bias=wide,
            scale=scale,
            return_lse=True,
        )
        outputs = [(found[0], leaves["grad_out"])]
        if grad_lse is not None:
            outputs.append((found[1], leaves["grad_lse"]))
        if "bias" in leaves and wide is not None:
            inputs.append(wide)
        first = torch.autograd.grad(
            [out for out, _ in outputs],
            inputs,
            [grad for _, grad in outputs],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [
            (gradient, grad.to(gradient.dtype))
            for gradient, grad in zip(first, grads, strict=False)
            if gradient is not None and gradient.shape == grad.shape and gradient.requires_grad
        ]
        second = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            list(leaves.values()),
            [grad for _, grad in pairs],
            allow_unused=True,
        )
    by_name = dict(zip(leaves, second, strict=True))
    empty = q.new_empty(0)
    return [empty if by_name.get(name) is None else by_name[name] for name in given]
