"""Registration with torch of the operations that have compiled backends.

Schemas and fakes are defined here, in Python, so that they exist without the compiled part; a
backend adds an implementation for its dispatch key: Triton for CUDA here, C++ for CPU, and CUDA C++
(of `prefix_attention` for Hopper), when `pcx._C` is loaded. Then the gradient of
`prefix_attention`, and what a call does on CUDA, are C++ too, since Python would take longer over
them than the GPU; else they are the Python below.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from pcx.ops import reference

LIBRARY = torch.library.Library("pcx", "FRAGMENT")
SCHEMAS = 11  # moves with every change of a schema below, as kSchemas in csrc/operations.h

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
# What the two call on CUDA; without gradients of their own. `hopper` says which of the gradients of
# queries, own keys and prefix the two below give.
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
# The gradient of q, and delta [B, H, N], which the other gradients use; those of a sample's own
# keys and values, or of a prefix [H, m, d].
LIBRARY.define(
    "prefix_attention_query_gradient_hopper(Tensor q, Tensor k, Tensor v, Tensor prefix_k, "
    "Tensor prefix_v, Tensor? prefix_index, Tensor? prefix_lengths, Tensor out, Tensor lse, "
    "Tensor grad_out, Tensor? grad_lse, float scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "prefix_attention_key_gradients_hopper(Tensor q, Tensor grad_out, Tensor keys, Tensor values, "
    "Tensor lse, Tensor delta, float scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "prefix_logit_gradient(Tensor grad_out, Tensor q, Tensor prefix_k, Tensor prefix_v, "
    "Tensor out, Tensor lse, float scale) -> Tensor"
)
LIBRARY.define(
    "prompt_score(Tensor gradient, Tensor prompts, bool layer_norm, Tensor? weight, float eps) "
    "-> Tensor"
)
# The second of each is what the CUDA kernels leave: PageRank's to Triton, and what that cannot take
# to torch. The two of tokens are Zero-TPrune's, whose stages implement them.
for _left in ("", "_triton"):
    LIBRARY.define(
        f"weighted_pagerank{_left}(Tensor q, Tensor k, Tensor init, Tensor? bias, "
        "Tensor? prefix_k, Tensor? among, int iters, float scale) -> Tensor"
    )
for _left in ("", "_written_out"):
    LIBRARY.define(
        f"important_tokens{_left}(Tensor scores, int keep, int protected, float low, "
        "float high, Tensor? among) -> Tensor"
    )
    LIBRARY.define(
        f"dissimilar_tokens{_left}(Tensor votes, Tensor k, int drop, int protected, "
        "float low, float high) -> Tensor"
    )


def _token_major(like: Tensor, tokens: int, dim: int) -> Tensor:
    """[B, H, tokens, dim] over memory [B, tokens, H, dim], as all backends give it."""
    return like.new_empty(like.shape[0], tokens, like.shape[1], dim).transpose(1, 2)


def _like_prefix(prefix: Tensor) -> Tensor:
    """[H, m, d], or [G, H, m, d] over memory [G, m, H, d]: one row for each prompt of a set."""
    if prefix.dim() == 3:
        return prefix.new_empty(prefix.shape)
    return _token_major(prefix, *prefix.shape[2:])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("pcx::prefix_attention", lib=LIBRARY)
def _fake(q, k, v, prefix_k, prefix_v, prefix_index, prefix_lengths, bias, scale, backend):
    batch, heads, n, _ = q.shape
    lse = q.new_empty(heads, batch, n, dtype=_wide(q.dtype)).transpose(0, 1)
    return _token_major(q, n, v.shape[3]), lse


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
        _token_major(q, q.shape[2], q.shape[3]) if need_q else q.new_empty(0),
        _token_major(q, own, k.shape[3]) if need_own else q.new_empty(0),
        _token_major(q, own, v.shape[3]) if need_own else q.new_empty(0),
        _like_prefix(prefix_k) if need_prefix else q.new_empty(0),
        _like_prefix(prefix_v) if need_prefix else q.new_empty(0),
        q.new_empty(bias_shape, dtype=_wide(q.dtype)) if need_bias else q.new_empty(0),
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
        dbias = dbias.unflatten(0, batches(bias, out.shape[0])).sum_to_size(bias.shape)
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


def batches(bias: Tensor, batch: int) -> tuple[int, int]:
    """(B0, B1) of a bias [B0 | 1, B1 | 1, H | 1, N | 1, S | 1] for a batch of B0 * B1."""
    inner = bias.shape[1] if bias.shape[1] > 1 else batch // bias.shape[0]
    return (batch // inner if inner else bias.shape[0]), inner  # inner is 0 for no samples


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "prefix_attention: has no second derivative; use backend='reference' under create_graph"
    )


@torch.library.impl(LIBRARY, "prefix_attention_triton", "CUDA")
def _triton(*arguments):
    from pcx.kernels import prefix_attention as kernel

    return kernel.forward(*arguments)


@torch.library.impl(LIBRARY, "prefix_attention_backward_triton", "CUDA")
def _triton_backward(grad_out, grad_lse, q, *arguments):
    from pcx.kernels import prefix_attention as kernel

    *tensors, needs, hopper = arguments
    run: Any = kernel.backward
    found = run(grad_out, grad_lse, q, *tensors, tuple(needs), hopper=tuple(hopper))
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in found)


def _on_cuda(*arguments):
    *tensors, _ = arguments
    return torch.ops.pcx.prefix_attention_triton(*tensors)


def _backward_on_cuda(*arguments):
    *tensors, _ = arguments
    return torch.ops.pcx.prefix_attention_backward_triton(*tensors, [False, False, False])


@torch.library.register_fake("pcx::prefix_logit_gradient", lib=LIBRARY)
def _fake_logit_gradient(grad_out, q, prefix_k, prefix_v, out, lse, scale):
    shape = (*q.shape[:2], prefix_k.shape[-2])
    return q.new_empty(shape, dtype=_wide(q.dtype))


@torch.library.impl(LIBRARY, "prefix_logit_gradient", "CompositeExplicitAutograd")
def _logit_gradient(grad_out, q, prefix_k, prefix_v, out, lse, scale):
    return reference.prefix_logit_gradient(grad_out, q, prefix_k, prefix_v, out, lse, scale)


@torch.library.impl(LIBRARY, "prefix_logit_gradient", "CUDA")
def _logit_gradient_on_cuda(grad_out, q, prefix_k, prefix_v, out, lse, scale):
    from pcx.ops.backends import cannot

    arguments = (grad_out, q, prefix_k, prefix_v, out, lse, scale)
    if cannot("triton", q, out, out, prefix_k, prefix_v, None, scale):
        return reference.prefix_logit_gradient(*arguments)
    from pcx.kernels import prompt_score as kernel

    return kernel.prefix_logit_gradient(*arguments)


@torch.library.register_fake("pcx::prompt_score", lib=LIBRARY)
def _fake_scores(gradient, prompts, layer_norm, weight, eps):
    return gradient.new_empty(2, *gradient.shape[:2], dtype=_wide(gradient.dtype))


@torch.library.impl(LIBRARY, "prompt_score", "CompositeExplicitAutograd")
def _scores(gradient, prompts, layer_norm, weight, eps):
    return reference.prompt_score(gradient, prompts, layer_norm, weight, eps)


@torch.library.impl(LIBRARY, "prompt_score", "CUDA")
def _scores_on_cuda(gradient, prompts, layer_norm, weight, eps):
    from pcx.ops.backends import TRITON

    if gradient.dtype == torch.float64 or not TRITON:
        return reference.prompt_score(gradient, prompts, layer_norm, weight, eps)
    from pcx.kernels import prompt_score as kernel

    return kernel.prompt_score(gradient, prompts, layer_norm, weight, eps)


@torch.library.register_fake("pcx::weighted_pagerank", lib=LIBRARY)
def _fake_pagerank(q, k, init, bias, prefix_k, among, iters, scale):
    return q.new_empty(init.shape, dtype=_wide(q.dtype))


@torch.library.impl(LIBRARY, "weighted_pagerank", "CompositeExplicitAutograd")
def _pagerank(q, k, init, bias, prefix_k, among, iters, scale):
    return reference.weighted_pagerank(q, k, init, bias, prefix_k, among, iters, scale)


@torch.library.impl(LIBRARY, "weighted_pagerank_triton", "CUDA")
def _pagerank_on_cuda(q, k, init, bias, prefix_k, among, iters, scale):
    from pcx.ops.backends import pagerank_in_triton

    if not pagerank_in_triton(q, k, bias, prefix_k):
        return reference.weighted_pagerank(q, k, init, bias, prefix_k, among, iters, scale)
    from pcx.kernels import weighted_pagerank as kernel

    if among is not None:
        q, k = reference.tokens(q, among), reference.tokens(k, among)
    return kernel.weighted_pagerank(q, k, init, bias, prefix_k, iters, scale)


@torch.library.register_fake("pcx::important_tokens", lib=LIBRARY)
def _fake_important(scores, keep, protected, low, high, among):
    return scores.new_empty(scores.shape[0], protected + keep, dtype=torch.int64)


@torch.library.register_fake("pcx::dissimilar_tokens", lib=LIBRARY)
def _fake_dissimilar(votes, k, drop, protected, low, high):
    return votes.new_empty(votes.shape[0], votes.shape[2] - drop, dtype=torch.int64)


def _load() -> frozenset[str]:
    """What the compiled part, where there is one, has kernels for: "cpu", "cuda"."""
    try:
        _C: Any = importlib.import_module("pcx._C")
    except ModuleNotFoundError:
        return frozenset()
    except ImportError as error:  # it is there, and built for another torch or CUDA
        warnings.warn(f"pcx._C does not load and is left out: {error}", stacklevel=2)
        return frozenset()
    info = _C.build_info()
    if info.get("schemas") != SCHEMAS:
        warnings.warn(
            f"{_C.__file__} is of another version of pcx and is left out: build it again with "
            "`pip install --no-build-isolation -e .`",
            stacklevel=2,
        )
        return frozenset()
    _C.register_operations()
    return frozenset({"cpu", "cuda"} if info["cuda"] else {"cpu"})


EXTENSION = _load()

if not EXTENSION:
    torch.library.register_autograd(
        "pcx::prefix_attention", _gradients, setup_context=_setup_context, lib=LIBRARY
    )
    torch.library.register_autograd(
        "pcx::prefix_attention_backward", _no_second_derivative, lib=LIBRARY
    )
if "cuda" not in EXTENSION:
    LIBRARY.impl("prefix_attention", _on_cuda, "CUDA")
    LIBRARY.impl("prefix_attention_backward", _backward_on_cuda, "CUDA")
    LIBRARY.impl("weighted_pagerank", _pagerank_on_cuda, "CUDA")
