"""A linear map among a few channels, in place, and the LayerNorm that reads the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcx.arguments import real_number
from pcx.ops import hardware
from pcx.ops.add_layer_norm import add_layer_norm
from pcx.ops.checks import TRITON_TYPES, transformed, values_known
from pcx.ops.dispatch import Backend, Dispatch, exporting
from pcx.ops.library import EXTENSION, LIBRARY, read_in, wide
from pcx.ops.reference import salient_linear as reference

Norm = tuple[Tensor | None, Tensor | None, float]


def salient_linear(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float = 1.0,
    *,
    norm: Norm | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Changes K channels of x in place by a linear map among them (SCT, Salient Channel Tuning).

    With u = x[..., I] it computes x[..., I] = u + scale * (u W^T + b). With `norm` it also gives
    the LayerNorm of the changed x, in the same pass over memory.

    The product is computed in the dtype of a matrix product over x: autocast's where it is on, else
    x's. Sums are float32 (float64 for float64). What is added to x is rounded to x's dtype first.
    Gradients reach x, the weight and the bias, once: there is no second derivative.

    Args:
        x: [..., D], changed in place. It may not be a leaf that requires a gradient.
        index: I, [K] int64, the channels: distinct, from 0 to D - 1. On CUDA the caller sees to it.
        weight: W, [K, K] of any floating dtype.
        bias: b, [K].
        scale: factor on what is added.
        norm: (weight, bias, eps) of a LayerNorm over D, or None. Weight and bias may be None, and
            may not require gradients.
        dtype: of the normed rows; by default autocast's where it is on, else x's.
        backend: "cuda" (C++; bfloat16, float16, float32), "triton" (on CUDA) or "reference"
            (torch). "auto" is the first of these that can run. By name it learns within
            torch.compile from torch 2.12 on; torch 2.11's compiler raises.

    Returns:
        The normed rows [..., D] if `norm` is given, else x.

    Raises:
        ValueError: a shape, dtype, device, index or gradient does not fit, or the backend asked for
            cannot run; the message names the argument.
    """
    check_map(x, index, weight, bias)
    norm_weight, norm_bias, eps = norm_parts(norm, x, dtype)
    learns = _learns(x, weight, bias, norm_weight, norm_bias)
    if not torch.compiler.is_compiling():  # else its value is not known
        scale = real_number("scale", scale)
    if norm is not None and dtype is None:
        dtype = read_in(x, x.dtype)
    of_norm = (norm_weight, norm_bias, eps, dtype)
    call = (x, index, weight, bias, scale, *of_norm, read_in(x, x.dtype))
    run = _run_of(backend, *call, learns)
    if run is None:
        normed = reference.salient_linear(*call, False)[0]
    elif not learns:
        normed = run(*call, False)[0]
        _has_changed(x)
    elif norm is not None and (torch.compiler.is_compiling() or x._is_view()):
        # Autograd lets a function that changes a view have one result only.
        _InPlace.apply(run, x, *call[1:5], None, None, 0.0, None, call[-1])
        normed = add_layer_norm(x, None, *of_norm[:3], dtype=dtype)[1]
    else:
        found = _InPlace.apply(run, x, *call[1:])
        normed = found if norm is None else found[1]
    return x if norm is None else normed


def _run_of(backend: str, x: Tensor, *rest: Any) -> Any:
    """The function that computes a call; None where torch's own operations do, one by one.

    These are what a compiler, an exported program, torch.func's transforms and torch's counter of
    operations, which pcx runs on meta tensors, can read.
    """
    if transformed():
        DISPATCH.check_name(backend)
        return None
    run = DISPATCH.own_run(backend, x, *rest)
    compiled = torch.compiler.is_compiling() and (rest[-1] or not x.is_cuda)
    plain = compiled or exporting() or x.is_meta
    if run in (None, reference.salient_linear) and plain:
        return None
    return run or _OP


def _has_changed(x: Tensor) -> None:
    """Counts the change of x, so that autograd does not use it where it needs the old values."""
    if not (torch.compiler.is_compiling() or x.is_inference()):
        torch.autograd.graph.increment_version(x)


class _InPlace(torch.autograd.Function):
    """The op with its gradient, as (x, normed rows or None)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, run, x, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product
    ):
        normed, u, mean, rstd = run(
            x, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product, True
        )
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        has_norm = dtype is not None
        ctx.save_for_backward(index, weight, u, *((x, mean, rstd, norm_weight) if has_norm else ()))
        ctx.scale, ctx.product, ctx.bias_dtype = scale, product, bias.dtype
        plain = run is reference.salient_linear
        ctx.run = (
            reference.row_gradients if plain else torch.ops.pcx.salient_linear_gradient.default
        )
        return (x, normed) if has_norm else x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_normed: Tensor | None = None):
        index, weight, u, *of_norm = ctx.saved_tensors
        if grad_x is None and grad_normed is None:
            return (None,) * 11
        by_x, part = ctx.run(
            grad_x, grad_normed, index, weight, ctx.scale, *(of_norm or [None] * 4), ctx.product
        )
        part, u = (t.reshape(-1, len(index)) for t in (part, u))  # [R, K]
        by_weight = by_bias = None
        if ctx.needs_input_grad[3]:
            by_weight = (part.T @ u).to(weight.dtype)
        if ctx.needs_input_grad[4]:
            by_bias = part.sum(0, dtype=wide(part.dtype)).to(ctx.bias_dtype)
        return None, by_x, None, by_weight, by_bias, *[None] * 6


def check_map(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises a ValueError where a map does not fit x; the message names the argument."""
    if not x.dtype.is_floating_point or x.dim() == 0:
        raise ValueError(f"x: {_said(x)}, expected floating-point numbers [..., D]")
    for name, tensor in (("index", index), ("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(
                f"{name}: on {tensor.device}, x on {x.device}; move them to one device"
            )
    dim = x.shape[-1]
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"index: {_said(index)}, expected torch.int64 [K]")
    count = index.shape[0]
    if not 1 <= count <= dim:
        raise ValueError(f"index: {count} channels, expected 1 to D = {dim}")
    if weight.shape != (count, count) or not weight.dtype.is_floating_point:
        raise ValueError(
            f"weight: {_said(weight)}, expected floating-point numbers [K, K] = {(count, count)}"
        )
    if bias.shape != (count,) or not bias.dtype.is_floating_point:
        raise ValueError(f"bias: {_said(bias)}, expected floating-point numbers [K] = {(count,)}")
    if values_known(index):
        least, most = (int(t) for t in torch.aminmax(index))
        if least < 0 or most >= dim:
            raise ValueError(f"index: from {least} to {most}, expected channels 0 to {dim - 1}")


def _said(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def norm_parts(norm: Norm | None, x: Tensor, dtype: torch.dtype | None) -> Norm:
    """Weight, bias and epsilon of the LayerNorm after their checks; of none without one."""
    if norm is None:
        if dtype is not None:
            raise ValueError(f"dtype: {dtype} is that of the normed rows, but norm is None")
        return None, None, 0.0
    if not isinstance(norm, tuple) or len(norm) != 3:
        raise ValueError(f"norm: {type(norm).__name__}, expected a tuple (weight, bias, eps)")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype}, expected a floating-point dtype")
    for name, tensor in zip(("weight", "bias"), norm[:2], strict=True):
        if tensor is None:
            continue
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"norm: its {name} has shape {tuple(tensor.shape)}, expected [D] = "
                f"{tuple(x.shape[-1:])}"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"norm: its {name} is on {tensor.device}, x on {x.device}; move them to one device"
            )
    return norm


def _learns(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> bool:
    """Whether gradients are computed; refuses those that the op does not have."""
    if not torch.is_grad_enabled():
        return False
    for name, tensor in (("weight", norm_weight), ("bias", norm_bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"norm: its {name} requires a gradient, which this op does not compute; freeze it, "
                "or leave out norm and apply the LayerNorm to x afterwards"
            )
    learns = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if x.requires_grad and x.is_leaf and not torch.compiler.is_compiling():
        raise ValueError(
            "x: a leaf that requires a gradient, which cannot be changed in place; give x.clone()"
        )
    return learns


# "_cuda" and "_triton" are the kernels alone. The op without a suffix passes calls that the CUDA
# kernel cannot run to "_triton", and that passes calls that it cannot run to the reference. The
# results are the normed rows, u, mean and reciprocal standard deviation, see the reference.
for _kernels in ("", "_cuda", "_triton"):
    LIBRARY.define(
        f"salient_linear{_kernels}(Tensor(a!) x, Tensor index, Tensor weight, "
        "Tensor bias, float scale, Tensor? norm_weight, Tensor? norm_bias, float eps, "
        "ScalarType? dtype, ScalarType product, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
    )
_OP = torch.ops.pcx.salient_linear.default
# The gradients by x and by u W^T + b, see `reference.row_gradients`.
LIBRARY.define(
    "salient_linear_gradient(Tensor? grad_x, Tensor? grad_normed, Tensor index, Tensor weight, "
    "float scale, Tensor? x, Tensor? mean, Tensor? rstd, Tensor? norm_weight, "
    "ScalarType product) -> (Tensor, Tensor)"
)


def _triton_cannot(x: Tensor, index: Tensor, weight: Tensor, *rest) -> str | None:
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in TRITON_TYPES:
            return f"it computes bfloat16, float16 and float32, {name} has {tensor.dtype}"
    if not x.is_contiguous():
        return "x is not contiguous in memory"
    return None


DISPATCH = Dispatch(
    "x",
    # The limits of the "cuda" kernel are checked in csrc/cuda/salient_linear_host.cpp.
    Backend("cuda", "cuda", ("cuda extension",), run=torch.ops.pcx.salient_linear_cuda.default),
    Backend(
        "triton",
        "cuda",
        ("triton",),
        can_run=_triton_cannot,
        run=torch.ops.pcx.salient_linear_triton.default,
    ),
    Backend("reference", run=reference.salient_linear),
)


@torch.library.register_fake("pcx::salient_linear", lib=LIBRARY)
@torch.library.register_fake("pcx::salient_linear_cuda", lib=LIBRARY)
@torch.library.register_fake("pcx::salient_linear_triton", lib=LIBRARY)
def _fake(x, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product, keep):
    rows, statistics = x.shape[:-1], wide(x.dtype)
    kept = (*rows, 1) if keep and dtype is not None else (0,)
    return (
        x.new_empty((0,) if dtype is None else x.shape, dtype=dtype or x.dtype),
        x.new_empty((*rows, index.shape[0]) if keep else (0,), dtype=product),
        x.new_empty(kept, dtype=statistics),
        x.new_empty(kept, dtype=statistics),
    )


@torch.library.impl(LIBRARY, "salient_linear", "CompositeExplicitAutograd")
def _anywhere(*arguments):
    return reference.salient_linear(*arguments)


@torch.library.register_fake("pcx::salient_linear_gradient", lib=LIBRARY)
def _fake_gradient(grad_x, grad_normed, index, weight, scale, x, mean, rstd, norm_weight, product):
    like = grad_x if x is None else x
    return (
        like.new_empty(like.shape),
        like.new_empty((*like.shape[:-1], index.shape[0]), dtype=product),
    )


@torch.library.impl(LIBRARY, "salient_linear_gradient", "CompositeExplicitAutograd")
def _gradient_anywhere(*arguments):
    return reference.row_gradients(*arguments)


@torch.library.impl(LIBRARY, "salient_linear_gradient", "CUDA")
def _gradient_on_cuda(grad_x, grad_normed, index, weight, *rest):
    run = reference.row_gradients
    given = (grad_x, grad_normed, weight, rest[1])
    if hardware.TRITON and all(t is None or t.dtype in TRITON_TYPES for t in given):
        from pcx.kernels.salient_linear_gradient import row_gradients as run
    return run(grad_x, grad_normed, index, weight, *rest)


@torch.library.impl(LIBRARY, "salient_linear_triton", "CUDA")
def _in_triton(*arguments):
    if not hardware.TRITON or _triton_cannot(*arguments):
        return reference.salient_linear(*arguments)
    from pcx.kernels.salient_linear import salient_linear as run

    return run(*arguments)


if "cuda" not in EXTENSION:
    LIBRARY.impl("salient_linear", _in_triton, "CUDA")
