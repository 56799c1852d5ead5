"""Interception of the attention call that a transformer block makes.

Nearly every attention module of timm, and the sdpa path of Hugging Face, ends in one call of
`F.scaled_dot_product_attention`. Two ways hand such a call to a function of ours:

- `intercept`, a mode entered around a block's call, sees every function of torch within. It works
  for any block, compiles into one graph, and leaves nothing behind.
- `route` prepares an attention module whose own forward makes the call. The module then runs the
  same code, in which that one name means a function of ours. It takes no mode, whose Python costs
  more than a small block's kernels.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pcx.backbones.fused_forms import fuse_written_out
from pcx.backbones.multihead import fuse_multihead


@dataclass(slots=True)  # a frozen one takes four times as long to make
class Call:
    """The arguments of one attention call."""

    q: Tensor  # [B, H, N, d]
    k: Tensor  # [B, H, S, d]
    v: Tensor  # [B, H, S, dv]
    bias: Tensor | None  # broadcastable to [B, H, N, S]
    scale: float | None
    dropout: float = 0.0  # share of attention weights that the call drops

    def output(self) -> Tensor:
        """What the call returns, [B, H, N, dv]."""
        return F.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            attn_mask=self.bias,
            dropout_p=self.dropout,
            scale=self.scale,
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
    if is_causal:
        raise ValueError(
            "is_causal: a block's attention is causal, where prompts and dropped tokens have no "
            "place; use bidirectional attention"
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    return Call(query, key, value, attn_mask, scale, dropout_p)


class _Active(threading.local):
    """What the calls of routed modules are handed to in this thread."""

    attend: Attend | None = None
    seen: list[int]


_ACTIVE = _Active()


class _direct:  # noqa: N801, used as `with _direct(...)`
    """`intercept` for a block whose attention module is routed."""

    def __init__(self, attend: Attend, seen: list[int]):
        self.attend, self.seen = attend, seen

    def __enter__(self) -> None:
        self.before = _ACTIVE.attend, getattr(_ACTIVE, "seen", [])
        _ACTIVE.attend, _ACTIVE.seen = self.attend, self.seen

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.attend, _ACTIVE.seen = self.before


@contextlib.contextmanager
def unrouted() -> Iterator[None]:
    """Hands the calls of a module that is not routed on to where those of routed ones go."""
    attend = _ACTIVE.attend
    if attend is None:
        yield
        return
    _ACTIVE.attend = None
    try:
        with intercept(attend, _ACTIVE.seen):
            yield
    finally:
        _ACTIVE.attend = attend


def routed_call(*args: Any, **kwargs: Any) -> Tensor:
    """Stands for F.scaled_dot_product_attention in the forward of a routed module."""
    if _ACTIVE.attend is None:
        return F.scaled_dot_product_attention(*args, **kwargs)
    number = len(_ACTIVE.seen)
    _ACTIVE.seen.append(number)
    return _ACTIVE.attend(number, _call(*args, **kwargs))


_FUNCTIONAL = SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": routed_call})


class Routed:
    """Stands in for the forward of an attention module; an object, so that a copy has its own."""

    def __init__(self, module: nn.Module):
        self.module = module
        module.forward = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = type(self.module).forward
        if _ACTIVE.attend is not None:  # never while compiling, see `handed`
            forward = _rerouted(forward)
        return forward(self.module, *args, **kwargs)


@cache
def _rerouted(forward: FunctionType) -> FunctionType:
    """The same code, where torch.nn.functional is `_FUNCTIONAL`."""
    names = {name: _FUNCTIONAL for name in _names_of_functional(forward)}
    own = FunctionType(
        forward.__code__,
        {**forward.__globals__, **names},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _names_of_functional(forward: Any) -> list[str]:
    code = getattr(forward, "__code__", None)
    if code is None or "scaled_dot_product_attention" not in code.co_names:
        return []
    return [name for name in code.co_names if forward.__globals__.get(name) is F]


ROUTED = "_pcx_routed"  # the attribute of a block whose attention module is routed


Needs = Sequence[tuple[str, Any]]  # a block's arguments for tokens that have no place


def placeless(needs: Needs, like: Tensor) -> dict[str, Any]:
    """The arguments of a block for tokens that have no place in the image, such as prompts.

    Rotations are of no place, [0, d]; a mask is None.

    Args:
        needs: of the block's spec.
        like: a tensor of the dtype and on the device of the tokens.
    """
    return {
        name: tuple(like.new_empty(0, each.shape[-1]) for each in value)
        if isinstance(value, tuple)
        else None
        for name, value in needs
    }


@torch.no_grad()
def route(
    block: nn.Module, module: nn.Module, expected: int, tokens: Tensor, given: dict[str, Any]
) -> bool:
    """Prepares a block of a model's own copy, so that its calls are handed over without a mode.

    It is proven on made-up tokens that all calls of the block come that way and that the
    block computes the same bits. Where they do not, the block is left as it was.

    Args:
        block: changed: its attention module gets a forward of ours.
        module: the module in it, or itself, whose forward makes the calls.
        expected: how many calls the block makes.
        tokens: made up, that the block takes.
        given: its other arguments.

    Returns:
        Whether the block is routed now.
    """
    if "forward" in vars(module) or not _names_of_functional(type(module).forward):
        return False
    calls, routed = list[Call](), list[Call]()

    def keep(kept: list[Call]) -> Attend:
        def attend(_: int, call: Call) -> Tensor:
            kept.append(call)
            return call.empty_output()  # the call's bias may be one for other tokens

        return attend

    with intercept(keep(calls), []):
        expected_out = block(tokens, **given)
    Routed(module)
    for each in (block, module):
        setattr(each, ROUTED, True)
    missed: list[int] = []
    try:
        with intercept(keep(calls), missed):
            found = run(block, expected, keep(routed), tokens, **given)
        proven = not missed and torch.equal(found, expected_out)
        proven = proven and all(map(_same, calls, routed)) and len(calls) == len(routed)
    except (MissedCall, TypeError, NameError):
        proven = False
    if not proven:
        del module.forward
        for each in (block, module):
            setattr(each, ROUTED, False)
    return proven


def _same(a: Call, b: Call) -> bool:
    return all(map(torch.equal, (a.q, a.k, a.v), (b.q, b.k, b.v))) and a.scale == b.scale


def handed(block: nn.Module, attend: Attend, seen: list[int]) -> Any:
    """A context within which a block's attention calls are handed to `attend(n, call)`."""
    if getattr(block, ROUTED, False) and not torch.compiler.is_compiling():
        return _direct(attend, seen)
    return intercept(attend, seen)


class MissedCall(RuntimeError):
    """A block did not make the attention calls it was expected to make."""


def run(block: nn.Module, expected: int, attend: Attend, x: Tensor, *args, **kwargs) -> Tensor:
    """Runs a block with its attention calls handed to `attend`.

    Raises:
        MissedCall: the block made another number of fused attention calls than expected, so that
            prompts would silently have been left out.
    """
    seen: list[int] = []
    with handed(block, attend, seen):
        out = block(x, *args, **kwargs)
    if len(seen) != expected:
        raise MissedCall(
            f"{type(block).__name__} made {len(seen)} calls of F.scaled_dot_product_attention "
            f"where {expected} were expected: turn its fused attention on (fused_attn=True, "
            "attn_implementation='sdpa'); attention that is written out makes none"
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
    for module in backbone.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("sdpa")
            break  # the outermost one sets those within
    for module in backbone.modules():
        if getattr(module, "fused_attn", True) is False:
            module.fused_attn = True
    fuse_multihead(backbone)
    fuse_written_out(backbone)


@torch.no_grad()
def probe(block: nn.Module, dim: int, needs: Needs = ()) -> list[Call]:
    """Finds the attention calls of a block and proves that prompts can be folded into them.

    Runs the block on a few made-up tokens [1, n, dim], and what else it needs.

    Raises:
        ValueError: the block makes no such call, makes one whose keys depend on another's output,
            or mixes tokens outside of attention. The message says which.
    """
    tokens = made_up_tokens(block, dim)
    calls: list[Call] = []

    def poison(_: int, call: Call) -> Tensor:
        calls.append(call)
        return call.empty_output().fill_(float("nan"))

    given = placeless(needs, tokens)
    with intercept(poison, []):
        block(tokens, **given)
    if not calls:
        raise ValueError(
            "its block makes no call of F.scaled_dot_product_attention (its attention is written "
            "out, or hidden in a function of torch's, as nn.MultiheadAttention's with weights is)"
        )
    if any(call.q.dim() != 4 for call in calls):
        raise ValueError("its attention call is not of the form [B, H, N, d]")
    if any(call.k.isnan().any() or call.v.isnan().any() for call in calls):
        raise ValueError("its attention calls follow one another within a block")
    other = tokens.clone()
    other[:, -1] += 1
    out, changed = (_without_attention(block, len(calls), t, given) for t in (tokens, other))
    if out.shape != tokens.shape or not torch.equal(out[:, :-1], changed[:, :-1]):
        raise ValueError("its block mixes tokens outside of attention")
    return calls


def made_up_tokens(block: nn.Module, dim: int) -> Tensor:
    """Six tokens [1, 6, D] like the block's weights."""
    like = next(block.parameters())
    return made_up((1, 6, dim), like.dtype, like.device)


def made_up(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in -1..1 that differ from place to place and are the same on each call."""
    ramp = torch.arange(math.prod(shape), device=device, dtype=torch.float32)
    return torch.sin(ramp * 1.7).reshape(tuple(shape)).to(dtype)


def _without_attention(
    block: nn.Module, expected: int, tokens: Tensor, given: dict[str, Any]
) -> Tensor:
    return run(block, expected, lambda _, call: call.empty_output(), tokens, **given)
