"""A residual sum, a linear map among a few of its channels, and the LayerNorm that reads it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pcx.ops.dispatch import Backend, Dispatch, exporting
from pcx.ops.library import LIBRARY, read_in
from pcx.ops.salient_linear import Norm, check_map, norm_parts, salient_linear


def salient_sum(
    x: Tensor,
    y: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float = 1.0,
    *,
    norm: Norm,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds y to x, changes K channels of the sum as `salient_linear` does, and norms its rows.

    It is for inference: a frozen SCT computes each block's attention branch so, in one pass over
    memory, which is what the plain backbone's sum and norm take too. Neither x nor y is changed.

    Args:
        x, y: [..., D] of the same shape, of one dtype or of two.
        index, weight, bias, scale: of the map, as `salient_linear` takes them.
        norm: (weight, bias, eps) of a LayerNorm over D; weight and bias may be None.
        dtype: of the normed rows; by default autocast's where it is on, else the sum's.
        backend: "cuda" (C++; bfloat16, float16, float32; no gradients) or "reference" (the sum in
            torch, and `salient_linear`). "auto" is the first of these that can run.

    Returns:
        The changed sum and its normed rows, [..., D] each.

    Raises:
        ValueError: a shape, dtype, device or index does not fit, or the backend asked for cannot
            run; the message names the argument.
    """
    check_map(x, index, weight, bias)
    if y.shape != x.shape or not y.dtype.is_floating_point or y.device != x.device:
        raise ValueError(
            f"y: {y.dtype} of shape {tuple(y.shape)} on {y.device}, expected floating-point "
            f"numbers of x's shape {tuple(x.shape)} on {x.device}"
        )
    if norm is None:
        raise ValueError("norm: None, expected a tuple (weight, bias, eps)")
    of_norm = norm_parts(norm, x, dtype)
    wide = torch.promote_types(x.dtype, y.dtype)
    dtype = read_in(x, wide) if dtype is None else dtype
    arguments = (x, y, index, weight, bias, scale, *of_norm, dtype, read_in(x, wide))
    run = DISPATCH.own_run(backend, *arguments)
    if run is None:
        plain = not x.is_cuda or torch.compiler.is_compiling() or exporting()
        run = partial(_in_two, "auto") if plain or _has_no_gradient(*arguments) else _OP
    return run(*arguments)


def _in_two(
    backend: str,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    product: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The sum in torch, and `salient_linear`, whose `product` follows from the other dtypes."""
    total = x + y
    norm = (norm_weight, norm_bias, eps)
    normed = salient_linear(
        total, index, weight, bias, scale, norm=norm, dtype=dtype, backend=backend
    )
    return total, normed


def _has_no_gradient(*arguments) -> str | None:
    """Why the kernel cannot run on tensors that are differentiated; None where none is."""
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in arguments):
        return "it has no gradient, and a tensor requires one"
    return None


# "_cuda" is the kernel alone. The op without a suffix calls it, and passes calls that the kernel
# cannot run to "_in_two", the sum in torch and salient_linear.
for _kernels in ("", "_cuda", "_in_two"):
    LIBRARY.define(
        f"salient_sum{_kernels}(Tensor x, Tensor y, Tensor index, Tensor weight, Tensor bias, "
        "float scale, Tensor? norm_weight, Tensor? norm_bias, float eps, ScalarType dtype, "
        "ScalarType product) -> (Tensor, Tensor)"
    )
_OP = torch.ops.pcx.salient_sum.default

# The limits of the CUDA kernel are checked in csrc/cuda/salient_linear_host.cpp.
DISPATCH = Dispatch(
    "x",
    Backend(
        "cuda",
        "cuda",
        ("cuda extension",),
        can_run=_has_no_gradient,
        run=torch.ops.pcx.salient_sum_cuda.default,
    ),
    Backend("reference", run=partial(_in_two, "reference")),
)


@torch.library.register_fake("pcx::salient_sum", lib=LIBRARY)
@torch.library.register_fake("pcx::salient_sum_cuda", lib=LIBRARY)
def _fake(x, y, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product):
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return total, x.new_empty(x.shape, dtype=dtype)


@torch.library.impl(LIBRARY, "salient_sum", "CompositeExplicitAutograd")
@torch.library.impl(LIBRARY, "salient_sum_in_two", "CompositeExplicitAutograd")
def _anywhere(*arguments):
    return _in_two("auto", *arguments)
