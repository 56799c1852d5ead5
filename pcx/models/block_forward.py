"""Objects that stand in for the forwards of a model's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.models import REDUCTIONS


class Carried(NamedTuple):
    """Tokens on their way to the next block, whose stand-in has to know more of them.

    What is known travels with the tokens and is kept nowhere, so that compiled graphs, scoring's
    replays, checkpointing around blocks and several forwards before a backward are all right.
    """

    tokens: Tensor  # [B, N, D]
    known: Any


class StandIn:
    """Stands in for a block's forward; an object, so that a copied model has its own.

    It may change the attention call that the block makes, and gives what goes on to the next block.

    Attributes:
        reduction: {"name", "arguments"} of what set it up, the name in `pcx.models.REDUCTIONS`, by
            which a saved model is set up again; None of one that files do not know.
    """

    reduction: dict[str, Any] | None = None
    changes: ClassVar[int] = 0  # of blocks anywhere; recordings made before the last are old

    def __init__(self, block: nn.Module):
        self.block = block
        self.install()

    def install(self) -> None:
        self.block.forward = self  # type: ignore[assignment]
        StandIn.changes += 1

    def remove(self) -> None:
        if self.block.__dict__.get("forward") is self:
            del self.block.forward
            StandIn.changes += 1

    def before(self, call: attention.Call, known: Any) -> attention.Call:
        """The call to make in place of the block's; `known` is None where nothing was carried."""
        return call

    def after(self, tokens: Tensor, call: attention.Call, known: Any) -> Tensor | Carried:
        """What goes on in place of the block's output [B, N, D], by the call it attended with."""
        raise NotImplementedError

    def __call__(self, x: Tensor | Carried, *args, **kwargs) -> Any:
        if isinstance(x, tuple) and not isinstance(x, Carried):
            raise RuntimeError(
                "model: what is known of the tokens was lost on the way to "
                f"{type(self.block).__name__}; checkpoint with use_reentrant=False"
            )
        if self.reduction is not None and any(
            isinstance(each, Tensor) for each in (*args, *kwargs.values())
        ):
            raise ValueError(
                f"model: {type(self.block).__name__} is given a mask, or another tensor of all "
                "tokens, of which some were dropped or merged; give images without padding, or "
                "call remove() of what set that up"
            )
        tokens, known = x if isinstance(x, Carried) else (x, None)
        calls: list[attention.Call] = []

        def watch(call: attention.Call) -> attention.Call:
            calls.append(self.before(call, known))
            if calls[-1] is not call and self._recomputes_within():
                raise RuntimeError(
                    f"model: {type(self.block).__name__} recomputes itself in the backward pass, "
                    "where its attention would not be changed; turn gradient checkpointing off"
                )
            return calls[-1]

        out = run_watched(self.block, watch, tokens, *args, **kwargs)
        if not calls:
            raise attention.MissedCall(
                f"{type(self.block).__name__} made no call of F.scaled_dot_product_attention: turn "
                "its fused attention on (fused_attn=True, attn_implementation='sdpa')"
            )
        call = calls[0]
        calls.clear()  # checkpointing holds on to `watch`, and need not to these tensors
        if isinstance(out, tuple):  # Hugging Face's older layers
            return (self.after(out[0], call, known), *out[1:])
        return self.after(out, call, known)

    def _recomputes_within(self) -> bool:
        """Whether the block's own forward is checkpointed, as Hugging Face's are."""
        on = getattr(self.block, "gradient_checkpointing", False)
        return bool(on) and self.block.training and torch.is_grad_enabled()


class Replay:
    """Stands in for a block's forward, over other stand-ins, and gives one output again.

    Args:
        block: the block.
        output: what it gives until `remove` is called.
    """

    def __init__(self, block: nn.Module, output: Any):
        self.block, self.output = block, output
        self.under = block.__dict__.get("forward")
        block.forward = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def remove(self) -> None:
        del self.block.forward
        if self.under is not None:
            self.block.forward = self.under


def run_watched(block: nn.Module, watch: attention.Watch, x: Tensor, *args, **kwargs) -> Any:
    """A block's own forward, whose attention calls `watch` sees and may change.

    A method's block that has its own way of showing its calls says so by a method `run_watched`.
    """
    own = getattr(type(block), "run_watched", None)
    if own is not None:
        return own(block, watch, x, *args, **kwargs)
    forward: Any = type(block).forward
    with attention.handed(block, lambda _, call: watch(call).output(), []):
        return forward(block, x, *args, **kwargs)


def read_tokens_of(block: nn.Module) -> int | None:
    """How many tokens a block computes, but for what a stand-in has set meanwhile; None for all."""
    forward = block.__dict__.get("forward")
    return getattr(forward, "read_tokens", getattr(block, "read_tokens", None))


def set_read_tokens(block: nn.Module, count: int | None) -> int | None:
    """Sets how many tokens a block computes, where it can leave some out; gives what was set."""
    before = getattr(block, "read_tokens", None)
    if hasattr(block, "read_tokens"):
        block.read_tokens = count  # type: ignore[assignment]
    return before


def found_on(model: nn.Module) -> list[StandIn]:
    """What stands in on a model."""
    found = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in found if isinstance(forward, StandIn)]


@contextmanager
def without_stand_ins(model: nn.Module) -> Iterator[list[StandIn]]:
    """Within it the blocks of a model are as they are by themselves.

    What stood in for them is put back afterwards, onto the `block` that each then names.
    """
    before = found_on(model)
    for stand_in in before:
        stand_in.remove()
    try:
        yield before
    finally:
        for stand_in in before:
            stand_in.install()


def reduction_of(model: nn.Module) -> dict[str, Any] | None:
    """The token reduction that is set up on a model: {"name", "arguments"}, or None."""
    return next((s.reduction for s in found_on(model) if s.reduction is not None), None)


def reduce_again(model: nn.Module, reduction: dict[str, Any]) -> Any:
    """Sets up on a model what `reduction_of` gave, and returns its handle.

    Raises:
        ValueError: there is no such reduction, or it does not fit the model.
    """
    return REDUCTIONS.get_checked(reduction["name"])(model, **reduction["arguments"])
