"""`prefix_attention` for calls that come again and again, checked once for each shape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pcx.ops.checks import transformed
from pcx.ops.prefix_attention import DISPATCH, automatic, prefix_attention, scale_of
from pcx.ops.recording import is_recorded
from pcx.ops.reference import prefix_attention as reference

Run = Callable[..., Tensor]


class Prepared:
    """Calls `prefix_attention` for one layer of a model again and again.

    A first call of a shape is checked. Further ones go straight to what `backend="auto"` has
    chosen for it, since the checks take longer than a small call.

    Without gradients the Hopper kernels also run batches of fewer heads than the GPU has
    processors, unless a CUDA graph is recorded. Triton's kernel takes 3 us less there, but its
    launch from Python takes 55 us more. The two differ in rounding.
    """

    def __init__(self) -> None:
        self._chosen: dict[tuple, Run] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: Any
    ) -> Tensor:
        """q [B, H, N, d], k, v [B, H, S, d], prefix [H, m, d], scale or None -> [B, H, N, d]."""
        kind = q.device.type
        plain = kind in ("cpu", "cuda") and not isinstance(scale, Tensor)
        if not plain or torch.compiler.is_compiling() or transformed():
            return prefix_attention(q, k, v, prefix_k, prefix_v, scale=scale)
        autocast = torch.is_autocast_enabled(kind)
        shapes = (q.shape, k.shape, prefix_k.shape)
        key = (shapes, q.dtype, v.dtype, prefix_k.dtype, kind, scale, autocast)
        run = self._chosen.get(key)
        if run is not None and not DISPATCH.extended:
            return run(q, k, v, prefix_k, prefix_v, scale)
        out = prefix_attention(q, k, v, prefix_k, prefix_v, scale=scale)
        alike = q.dtype == k.dtype == v.dtype == prefix_k.dtype == prefix_v.dtype == out.dtype
        # The sizes of a trace by torch.jit are tensors, which would stay in the table.
        if alike and type(q) is Tensor and q.dim() == 4 and not torch.jit.is_tracing():
            if len(self._chosen) >= 100:
                self._chosen.clear()
            self._chosen[key] = _choice(q, k, v, prefix_k, prefix_v, scale)
        return out


def _choice(q, k, v, prefix_k, prefix_v, scale) -> Run:
    if automatic(q, k, v, scale_of(q, scale)) == "reference":
        return _run_reference
    arguments = (q, k, v, prefix_k, prefix_v, None, scale_of(q, scale))
    if DISPATCH.cannot("cuda", *arguments) is None and not torch.cuda.is_current_stream_capturing():
        with torch.no_grad(), suppress(ValueError):  # the kernels have limits that they say in C++
            _run_hopper(q, k, v, prefix_k, prefix_v, scale)
            return _run_small
    return _run_op


def _run_reference(q, k, v, prefix_k, prefix_v, scale) -> Tensor:
    return reference.prefix_attention(q, k, v, prefix_k, prefix_v, scale=scale_of(q, scale))


def _run_op(q, k, v, prefix_k, prefix_v, scale, backend: str = "auto") -> Tensor:
    op, scale = torch.ops.pcx.prefix_attention.default, scale_of(q, scale)
    return op(q, k, v, prefix_k, prefix_v, None, None, None, scale, backend)[0]


def _run_hopper(q, k, v, prefix_k, prefix_v, scale) -> Tensor:
    return _run_op(q, k, v, prefix_k, prefix_v, scale, "cuda")


def _run_small(q, k, v, prefix_k, prefix_v, scale) -> Tensor:
    differentiated = torch.is_grad_enabled()  # training gives the same bits recorded or not
    if not (differentiated or is_recorded()):
        with suppress(ValueError):  # of tensors of this shape that lie in memory otherwise
            return _run_hopper(q, k, v, prefix_k, prefix_v, scale)
    return _run_op(q, k, v, prefix_k, prefix_v, scale)
