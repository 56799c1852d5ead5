"""A residual sum and the LayerNorm that reads it, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcx.ops.dispatch import Backend, Dispatch
from pcx.ops.library import LIBRARY, read_in
from pcx.ops.reference import add_layer_norm as reference


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds y to x, and normalises the rows of the sum as LayerNorm does.

    The normed rows come in the dtype of the matrix product that reads them, so that autocast has
    nothing to cast. Mean and variance are computed in float32 (float64 for float64). Tensors that
    require gradients, and compiled graphs, take torch's own operations.

    Args:
        x: [..., D].
        y: [..., D] of the same shape, or None where there is nothing to add.
        weight, bias: [D], or None.
        eps: what is added to the variance.
        dtype: of the normed rows; by default autocast's where it is on, else the sum's.
        backend: "cuda" (bfloat16, float16, float32; D to 2048, a multiple of 4) or "reference"
            (torch). "auto" is the first of these that can run.

    Returns:
        The sum and its normed rows, [..., D] each. Without y the sum is x itself.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend asked for cannot run; the
            message names the argument.
    """
    if dtype is None:
        dtype = read_in(x, x.dtype if y is None else torch.promote_types(x.dtype, y.dtype))
    arguments = (x, y, weight, bias, eps, dtype)
    _check(x, y, weight, bias)
    run = None
    if backend != "auto" or DISPATCH.extended:
        run = DISPATCH.own_run(backend, *arguments)
    if run is None:
        run = reference.add_layer_norm if _is_plain(arguments) else _OP
    total, normed = run(*arguments)
    return (x if y is None else total), normed


def _is_plain(arguments: tuple) -> bool:
    """Whether torch's own operations run: the kernel has no gradient, and a compiler can fuse."""
    if not arguments[0].is_cuda:
        return True
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _has_no_gradient(*arguments) is not None


def _has_no_gradient(*arguments: Any) -> str | None:
    """Why the kernel cannot run on tensors that are differentiated; None where none is."""
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in arguments):
        return "it has no gradient, and a tensor requires one"
    return None


def _check(x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: {x.dtype}, expected floating-point numbers")
    for name, tensor, shape in (
        ("y", y, x.shape),
        ("weight", weight, x.shape[-1:]),
        ("bias", bias, x.shape[-1:]),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(
                f"{name}: on {tensor.device}, x on {x.device}; move them to one device"
            )


# "_cuda" is the kernel alone. The op without a suffix calls it, and passes calls that the kernel
# cannot run to "_written_out", the reference in plain torch.
for _kernels in ("", "_cuda", "_written_out"):
    LIBRARY.define(
        f"add_layer_norm{_kernels}(Tensor x, Tensor? y, Tensor? weight, Tensor? bias, float eps, "
        "ScalarType dtype) -> (Tensor, Tensor)"
    )
_OP = torch.ops.pcx.add_layer_norm.default

# The limits of the CUDA kernel are checked in the call (csrc/cuda/layer_norm_host.cpp).
DISPATCH = Dispatch(
    "x",
    Backend(
        "cuda",
        "cuda",
        ("cuda extension",),
        can_run=_has_no_gradient,
        run=torch.ops.pcx.add_layer_norm_cuda,
    ),
    Backend("reference", run=reference.add_layer_norm),
)


@torch.library.register_fake("pcx::add_layer_norm", lib=LIBRARY)
@torch.library.register_fake("pcx::add_layer_norm_cuda", lib=LIBRARY)
def _fake(x, y, weight, bias, eps, dtype):
    total = x.new_empty(0) if y is None else torch.empty_like(x + y)
    return total, torch.empty_like(x, dtype=dtype)


@torch.library.impl(LIBRARY, "add_layer_norm", "CompositeExplicitAutograd")
@torch.library.impl(LIBRARY, "add_layer_norm_written_out", "CompositeExplicitAutograd")
def _anywhere(*arguments):
    return reference.add_layer_norm(*arguments)
