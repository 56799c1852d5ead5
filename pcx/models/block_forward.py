"""Objects that stand in for the forwards of a model's blocks, and the models that can have them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.models.vpt.block import PromptedBlock


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
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.install()

    def install(self) -> None:
        self.block.forward = self  # type: ignore[assignment]

    def remove(self) -> None:
        if self.block.__dict__.get("forward") is self:
            del self.block.forward

    def before(self, call: attention.Call, known: Any) -> attention.Call:
        """The call to make in place of the block's; `known` is None where nothing was carried."""
        return call

    def after(self, tokens: Tensor, call: attention.Call, known: Any) -> Tensor | Carried:
        """What goes on in place of the block's output [B, N, D], by the call it attended with."""
        raise NotImplementedError

    def __call__(self, x: Tensor | Carried, *args, **kwargs) -> Any:
        if isinstance(self.block, PromptedBlock) and self.block.replay is not None:
            return self.block.replay  # what this gave before
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

        out = self._run(watch, tokens, *args, **kwargs)
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

    def _run(self, watch: attention.Watch, x: Tensor, *args, **kwargs) -> Any:
        forward: Any = type(self.block).forward
        if isinstance(self.block, PromptedBlock):
            if self.block.path != "folded":
                raise RuntimeError("model: path 'concat' has prompts among the tokens; fold them")
            return forward(self.block, x, *args, watch=watch, **kwargs)
        with attention.intercept(lambda _, call: watch(call).output(), []):
            return forward(self.block, x, *args, **kwargs)


def read_tokens_of(block: PromptedBlock) -> int | None:
    """How many tokens a VPT's last block computes, but for what a stand-in has set meanwhile."""
    forward = block.__dict__.get("forward")
    return getattr(forward, "read_tokens", block.read_tokens)


def found_on(model: nn.Module) -> list[StandIn]:
    """What stands in on a model."""
    found = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in found if isinstance(forward, StandIn)]
