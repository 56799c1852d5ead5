"""Attention over [keys and values shared by the batch; own keys and values].

With pcx._C, C++ (csrc/) computes the gradient and chooses the kernel on CUDA, because Python would
take longer than the GPU. Without pcx._C, the Python in this file does both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pcx.arguments import real_number
from pcx.ops import hardware, second_derivative  # noqa: F401, which registers an op
from pcx.ops.bias import batches_of, five_dimensions, four_dimensions
from pcx.ops.checks import broadcasts, transformed, triton_cannot_attend
from pcx.ops.dispatch import Backend, Dispatch, exporting
from pcx.ops.library import EXTENSION, LIBRARY, autocast_dtype, token_major, wide
from pcx.ops.prefix_attention_checks import check_prefix_attention
from pcx.ops.reference import prefix_attention as reference


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attends to a prefix shared by the batch and to each sample's own keys.

    It computes softmax([q K_P^T * scale, q k^T * scale + bias]) [V_P; v], which is VPT-Deep's
    attention seen from the image tokens (VPT paper, Eq. 7). The result equals
    `F.scaled_dot_product_attention` over the concatenated keys and values.

    Args:
        q: [B, H, N, d]; several batch dimensions may stand in the place of B.
        k: [B, H, S, d].
        v: [B, H, S, dv].
        prefix_k: [H, m, d], one prefix for the whole batch, or [G, H, m, d], G prefix sets; m may
            be 0.
        prefix_v: [H, m, dv] or [G, H, m, dv].
        prefix_index: [B] int64, the set of each sample; needed with G sets unless G = B.
        prefix_lengths: [G] int64, the valid length of each set, 0 to m; m by default.
        bias: as SDPA's attn_mask, additive or boolean (True attends), broadcastable to [B, H, N,
            S]. The prefix has no bias. A row that attends to nothing gives zeros.
        scale: factor on the logits, 1 / sqrt(d) by default; a number, or a tensor that broadcasts
            to q, which keeps its gradient.
        return_lse: whether to return the log-sum-exp of the logits too, [B, H, N] in float32
            (float64 for float64), differentiable.
        backend: "cuda", "triton", "cpu" (C++), "reference" (torch, by concatenation) or "auto".
            "cuda" needs Hopper, 16 bits, d = 64 and no bias; Triton computes its gradients of
            prefix sets that samples share. "triton" runs every other call on CUDA. On CUDA "auto"
            is the first that can run, and "cuda" only where it is faster. Elsewhere "auto" is
            "reference", which is faster there unless the LSE is asked for. All but "reference"
            give the same bits on every run. Their second derivatives come from "reference". Under
            torch.func's transforms and in forward mode torch's own functions compute every call.

    Returns:
        [B, H, N, dv], and the LSE as a second item if `return_lse`.

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: a shape, device, index or backend does not fit, or the backend asked for cannot
            run; the message names the argument.
    """
    q, k, v, prefix_k, prefix_v, bias = _autocast(q, k, v, prefix_k, prefix_v, bias)
    check_prefix_attention(q, k, v, prefix_k, prefix_v, prefix_index, prefix_lengths, bias)
    q, scale = scaled(q, scale)
    lead = q.shape[:-3]
    if bias is not None:
        bias = five_dimensions(bias, lead)
    if prefix_index is not None:
        prefix_index = prefix_index.reshape(-1)
    if len(lead) != 1:
        q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)
    tensors = (q, k, v, prefix_k, prefix_v)
    if transformed():
        DISPATCH.check_name(backend)
        out, lse = _by_reference(tensors, prefix_index, prefix_lengths, bias, scale, True)
        return _unflattened(out, lse if return_lse else None, lead)
    own = DISPATCH.own_run(backend, *tensors, bias, scale)
    if backend == "auto":
        backend = automatic(q, k, v, scale)
    if own is not None:
        out, lse = own(*tensors, prefix_index, prefix_lengths, bias, scale)
    elif backend == "reference":
        found = _by_reference(tensors, prefix_index, prefix_lengths, bias, scale, return_lse)
        out, lse = found if return_lse else (found, None)
    else:
        _assert_later(prefix_index, prefix_lengths, prefix_k)
        out, lse = torch.ops.pcx.prefix_attention.default(
            *tensors, prefix_index, prefix_lengths, bias, scale, backend
        )
    return _unflattened(out, lse if return_lse else None, lead)


def _unflattened(out: Tensor, lse: Tensor | None, lead: torch.Size) -> Any:
    """What the call returns: the output in the form of q, and the LSE where it is asked for."""
    if len(lead) != 1:
        out, lse = out.unflatten(0, lead), None if lse is None else lse.unflatten(0, lead)
    return out if lse is None else (out, lse)


def scaled(q: Tensor, scale: Any) -> tuple[Tensor, float]:
    """Queries and the number to multiply the logits by, 1 / sqrt(d) by default.

    A tensor, such as a learned temperature, goes into the queries, so that it keeps its gradient.

    Raises:
        TypeError: the scale is neither a number nor a tensor.
        ValueError: the scale is no number, or does not broadcast to the queries.
    """
    if isinstance(scale, Tensor):
        if not broadcasts(scale, tuple(q.shape)):
            raise ValueError(
                f"scale: shape {tuple(scale.shape)}, expected one that broadcasts to q's "
                f"{tuple(q.shape)}, such as () or [H, 1, 1]"
            )
        return q * scale.to(q), 1.0
    known = not (torch.compiler.is_compiling() or isinstance(scale, torch.SymFloat))
    if scale is not None and known:
        return q, real_number("scale", scale)
    return q, scale_of(q, scale)


def scale_of(q: Tensor, scale: Any) -> float:
    """A number to multiply the logits by that needs no check, 1 / sqrt(d) by default."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def automatic(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str:
    """The backend that "auto" stands for: "reference", or "auto" for CUDA kernels.

    With "auto" the op chooses between "cuda" and "triton" itself.
    """
    if exporting() or q.device.type != "cuda":
        return "reference"  # an exported program then needs torch alone
    if not hardware.TRITON or triton_cannot_attend(q, k, v, scale):
        return "reference"
    return "auto"


def _by_reference(tensors: tuple, index, lengths, bias, scale: float, return_lse: bool) -> Any:
    return reference.prefix_attention(
        *tensors,
        prefix_index=index,
        prefix_lengths=lengths,
        bias=None if bias is None else four_dimensions(bias, tensors[0].shape[0]),
        scale=scale,
        return_lse=return_lse,
    )


def _autocast(*tensors: Tensor | None) -> tuple:
    """Casts floating tensors to the autocast dtype, as SDPA's own autocast does."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    dtype = autocast_dtype(device)
    if dtype is None:
        return tensors
    if all(t is None or (isinstance(t, Tensor) and t.dtype is dtype) for t in tensors):
        return tensors
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _assert_later(index: Tensor | None, lengths: Tensor | None, prefix: Tensor) -> None:
    """Checks values on a GPU without waiting for them.

    A wrong value raises later; until then the kernels clamp it.
    """
    named = {
        "prefix_index": (index, prefix.shape[0] - 1, "0..G-1"),
        "prefix_lengths": (lengths, prefix.shape[-2], "0..m"),
    }
    for name, (values, last, allowed) in named.items():
        if values is not None and values.is_cuda:
            fits = ((values >= 0) & (values <= last)).all()
            torch._assert_async(fits, f"{name}: a value lies outside of {allowed}")


# The arguments of these two are q, k, v, prefix_k, prefix_v, bias and scale, after the checks.
def _triton_cannot(q, k, v, prefix_k, prefix_v, bias, scale) -> str | None:
    return triton_cannot_attend(q, k, v, scale)


def _cpu_cannot(q, k, *_) -> str | None:
    if q.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"it computes float32, float64 and bfloat16, q has {q.dtype}"
    if k.shape[-2] == 0:
        return "it needs own keys, S is 0"
    return None


DISPATCH = Dispatch(
    "q",
    # The further limits of the "cuda" kernels are checked in csrc/cuda/prefix_attention.cpp.
    Backend("cuda", "cuda", ("triton", "cuda extension"), (9,), can_run=_triton_cannot),
    Backend("triton", "cuda", ("triton",), can_run=_triton_cannot),
    Backend("cpu", "cpu", ("cpu extension",), auto=False, can_run=_cpu_cannot),
    Backend("reference"),
)


def cpu_cannot(q: Tensor, k: Tensor) -> str | None:
    """The reason why backend="cpu" cannot run with these queries and keys, or None if it can."""
    return DISPATCH.cannot("cpu", q, k)


LIBRARY.define(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor? prefix_index, Tensor? prefix_lengths, Tensor? bias, float scale, str backend) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "prefix_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor prefix_k, Tensor prefix_v, Tensor? prefix_index, Tensor? prefix_lengths, "
    "Tensor? bias, Tensor out, Tensor lse, float scale, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The two ops above call these two on CUDA; these have no gradient of their own. `hopper` says for
# queries, own keys and prefix whether the Hopper ops below compute that gradient instead.
LIBRARY.define(
    "prefix_attention_triton(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor? prefix_index, Tensor? prefix_lengths, Tensor? bias, float scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "prefix_attention_backward_triton(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
    "Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_index, Tensor? prefix_lengths, "
    "Tensor? bias, Tensor out, Tensor lse, float scale, bool[] needs, bool[] hopper) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The first op returns the gradient of q, and delta [B, H, N], which the other gradients use. The
# second op returns the gradients of a sample's own keys and values, or of a prefix [H, m, d].
LIBRARY.define(
    "prefix_attention_query_gradient_hopper(Tensor q, Tensor k, Tensor v, Tensor prefix_k, "
    "Tensor prefix_v, Tensor? prefix_index, Tensor? prefix_lengths, Tensor out, Tensor lse, "
    "Tensor grad_out, Tensor? grad_lse, float scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "prefix_attention_key_gradients_hopper(Tensor q, Tensor grad_out, Tensor keys, Tensor values, "
    "Tensor lse, Tensor delta, float scale) -> (Tensor, Tensor)"
)


def _like_prefix(prefix: Tensor) -> Tensor:
    """An empty gradient of a prefix: [H, m, d], or [G, H, m, d] with memory [G, m, H, d]."""
    if prefix.dim() == 3:
        return prefix.new_empty(prefix.shape)
    return token_major(prefix, *prefix.shape[2:])


@torch.library.register_fake("pcx::prefix_attention", lib=LIBRARY)
def _fake(q, k, v, prefix_k, prefix_v, prefix_index, prefix_lengths, bias, scale, backend):
    batch, heads, n, _ = q.shape
    lse = q.new_empty(heads, batch, n, dtype=wide(q.dtype)).transpose(0, 1)
    return token_major(q, n, v.shape[3]), lse


@torch.library.register_fake("pcx::prefix_attention_backward", lib=LIBRARY)
def _fake_backward(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    prefix_index,
    prefix_lengths,
    bias,
    out,
    lse,
    scale,
    needs,
    backend,
):
    need_q, need_own, need_prefix, need_bias = needs
    own, bias_shape = k.shape[2], (*q.shape[:3], k.shape[2])
    return (
        token_major(q, q.shape[2], q.shape[3]) if need_q else q.new_empty(0),
        token_major(q, own, k.shape[3]) if need_own else q.new_empty(0),
        token_major(q, own, v.shape[3]) if need_own else q.new_empty(0),
        _like_prefix(prefix_k) if need_prefix else q.new_empty(0),
        _like_prefix(prefix_v) if need_prefix else q.new_empty(0),
        q.new_empty(bias_shape, dtype=wide(q.dtype)) if need_bias else q.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    bias = tensors[7]
    q, k, v, prefix_k, prefix_v, _, _, bias_too, _, _ = ctx.needs_input_grad
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dprefix_k, dprefix_v, dbias = torch.ops.pcx.prefix_attention_backward(
        grad_out,
        grad_lse,
        *tensors,
        out,
        lse,
        ctx.scale,
        [q, k or v, prefix_k or prefix_v, bias_too],
        ctx.backend,
    )
    if bias_too:
        dbias = dbias.unflatten(0, batches_of(bias, out.shape[0])).sum_to_size(bias.shape)
    return (
        dq if q else None,
        dk if k else None,
        dv if v else None,
        dprefix_k if prefix_k else None,
        dprefix_v if prefix_v else None,
        None,
        None,
        dbias.to(bias.dtype) if bias_too else None,
        None,
        None,
    )


def _setup_second(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_out, grad_lse, q, k, v, prefix_k, prefix_v, index, lengths, bias, _, _, scale, *_ = inputs
    ctx.save_for_backward(grad_out, grad_lse, q, k, v, prefix_k, prefix_v, index, lengths, bias)
    ctx.scale = scale


def _second_derivatives(ctx: Any, *grads: Tensor) -> tuple:
    second = torch.ops.pcx.prefix_attention_second
    found = second(list(grads), *ctx.saved_tensors, ctx.scale)
    to_out, to_lse, *to_tensors, to_bias = (x if x.numel() else None for x in found)
    return (to_out, to_lse, *to_tensors, None, None, to_bias, None, None, None, None, None)


@torch.library.impl(LIBRARY, "prefix_attention_triton", "CUDA")
def _triton(*arguments):
    from pcx.kernels.prefix_attention.forward import forward

    return forward(*arguments)


@torch.library.impl(LIBRARY, "prefix_attention_backward_triton", "CUDA")
def _triton_backward(grad_out, grad_lse, q, *arguments):
    from pcx.kernels.prefix_attention.backward import backward

    *tensors, needs, hopper = arguments
    run: Any = backward
    found = run(grad_out, grad_lse, q, *tensors, tuple(needs), hopper=tuple(hopper))
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in found)


def _on_cuda(*arguments):
    *tensors, _ = arguments
    return torch.ops.pcx.prefix_attention_triton(*tensors)


def _backward_on_cuda(*arguments):
    *tensors, _ = arguments
    return torch.ops.pcx.prefix_attention_backward_triton(*tensors, [False, False, False])


if not EXTENSION:
    torch.library.register_autograd(
        "pcx::prefix_attention", _gradients, setup_context=_setup_context, lib=LIBRARY
    )
    torch.library.register_autograd(
        "pcx::prefix_attention_backward",
        _second_derivatives,
        setup_context=_setup_second,
        lib=LIBRARY,
    )
if "cuda" not in EXTENSION:
    LIBRARY.impl("prefix_attention", _on_cuda, "CUDA")
    LIBRARY.impl("prefix_attention_backward", _backward_on_cuda, "CUDA")
