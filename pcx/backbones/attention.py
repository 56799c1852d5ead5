"""Interception of the attention call that a transformer block makes.

Nearly every attention module of timm, and the sdpa path of Hugging Face, ends in one call of
`F.scaled_dot_product_attention`. `intercept`, entered around a block's call, hands each such call
to a function of ours. Nothing is patched, so nothing stays behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Call:
    """The arguments of one attention call."""

    q: Tensor  # [B, H, N, d]
    k: Tensor  # [B, H, S, d]
    v: Tensor  # [B, H, S, dv]
    bias: Tensor | None  # broadcastable to [B, H, N, S]
    scale: float | None

    def output(self) -> Tensor:
        """What the call returns, [B, H, N, dv]."""
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=self.bias, scale=self.scale
        )

    def empty_output(self) -> Tensor:
        """What the call would return, as zeros; [B, H, N, dv]."""
        return self.v.new_zeros(*self.q.shape[:-1], self.v.shape[-1])


Attend = Callable[[int, Call], Tensor]
Watch = Callable[[Call], Call]  # sees a call, and gives the one to make in its place


class intercept(TorchFunctionMode):  # noqa: N801, used as `with intercept(...)`
    """Hands the nth attention call made inside it to `attend(n, call)`; `seen` counts them."""

    def __init__(self, attend: Attend, seen: list[int]):
        super().__init__()
        self.attend = attend
        self.seen = seen  # the caller's list: a compiled graph may not set or read our attributes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        number = len(self.seen)
        self.seen.append(number)
        return self.attend(number, _call(*args, **(kwargs or {})))


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    if dropout_p:
        raise ValueError(
            f"dropout_p: {dropout_p} in a block's attention; prompts need it at 0 (eval mode)"
        )
    if is_causal:
        raise ValueError(
            "is_causal: prompts have no place in a causal order; use bidirectional attention"
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    return Call(query, key, value, attn_mask, scale)


class MissedCall(RuntimeError):
    """A block did not make the attention calls it was expected to make."""


def run(block: nn.Module, expected: int, attend: Attend, x: Tensor, *args, **kwargs) -> Tensor:
    """Runs a block with its attention calls handed to `attend`.

    Raises:
        MissedCall: the block made another number of fused attention calls than expected, so that
            prompts would silently have been left out.
    """
    seen: list[int] = []
    with intercept(attend, seen):
        out = block(x, *args, **kwargs)
    if len(seen) != expected:
        raise MissedCall(
            f"{type(block).__name__} made {len(seen)} calls of F.scaled_dot_product_attention "
            f"where {expected} were expected: turn its fused attention on (fused_attn=True, "
            "attn_implementation='sdpa'); nn.MultiheadAttention and attention written out have none"
        )
    return out


class _Captured(Exception):
    """Leaves a block once its last attention call was seen."""


def capture(block: nn.Module, expected: int, x: Tensor, *args, **kwargs) -> list[Call]:
    """The attention calls a block makes on `x`; what follows the last of them is not computed.

    Raises:
        MissedCall: the block made fewer calls than expected.
    """
    calls: list[Call] = []

    def take(_: int, call: Call) -> Tensor:
        calls.append(call)
        # A compiled graph drops the unused rest by itself and cannot be left by an exception.
        if len(calls) == expected and not torch.compiler.is_compiling():
            raise _Captured
        return call.empty_output()

    with contextlib.suppress(_Captured):
        run(block, expected, take, x, *args, **kwargs)
    return calls


def fuse(backbone: Any) -> None:
    """Turns fused attention on wherever a model has a switch for it."""
    if hasattr(backbone, "set_attn_implementation"):
        backbone.set_attn_implementation("sdpa")
    for module in backbone.modules():
        if getattr(module, "fused_attn", True) is False:
            module.fused_attn = True


@torch.no_grad()
def probe(block: nn.Module, dim: int) -> list[Call]:
    """Finds the attention calls of a block and proves that prompts can be folded into them.

    Runs the block on a few made-up tokens [1, n, dim].

    Raises:
        ValueError: the block makes no such call, makes one whose keys depend on another's output,
            or mixes tokens outside of attention. The message says which.
    """
    parameter = next(block.parameters())
    ramp = torch.arange(6 * dim, device=parameter.device, dtype=torch.float32)
    tokens = torch.sin(ramp * 1.7).reshape(1, 6, dim).to(parameter.dtype)
    calls: list[Call] = []

    def poison(_: int, call: Call) -> Tensor:
        calls.append(call)
        return call.empty_output().fill_(float("nan"))

    with intercept(poison, []):
        block(tokens)
    if not calls:
        raise ValueError(
            "its block makes no call of F.scaled_dot_product_attention (nn.MultiheadAttention, or "
            "attention written out)"
        )
    if any(call.q.dim() != 4 for call in calls):
        raise ValueError("its attention call is not of the form [B, H, N, d]")
    if any(call.k.isnan().any() or call.v.isnan().any() for call in calls):
        raise ValueError("its attention calls follow one another within a block")
    other = tokens.clone()
    other[:, -1] += 1
    out, changed = (_without_attention(block, len(calls), t) for t in (tokens, other))
    if out.shape != tokens.shape or not torch.equal(out[:, :-1], changed[:, :-1]):
        raise ValueError("its block mixes tokens outside of attention")
    return calls


def _without_attention(block: nn.Module, expected: int, tokens: Tensor) -> Tensor:
    return run(block, expected, lambda _, call: call.empty_output(), tokens)
