"""A transformer block with prompts: folded into its attention, or concatenated as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.ops.logit_gate import logit_gate
from pcx.ops.prefix_attention import cpu_cannot, prefix_attention
from pcx.ops.reference.attention import additive, cls_attention

PATHS = ("folded", "concat")


@dataclass
class Observer:
    """What scoring needs from inside one block's attention, for the length of one forward."""

    gate: Tensor | None = None  # [B, m] zeros, as if added to the prompts' attention logits
    cls_attention: list[Tensor] = field(default_factory=list)  # [B, m], one item per attention call
    watch_cls: bool = False

    def see_prefix(
        self, call: attention.Call, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor
    ) -> Tensor:
        """Of attention over a prefix, [H, m, d] or [B, H, m, d], and own keys; returns `out`."""
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        if self.watch_cls:
            logits = (call.q[:, :, :1] @ keys.transpose(-2, -1)).to(lse.dtype) * scale
            weights = (logits - lse[:, :, :1, None]).exp()[:, :, 0].mean(1)  # [B, m]
            self.cls_attention.append(weights.detach())
        if self.gate is None:
            return out
        return logit_gate(out, self.gate, call.q, keys, values, lse, scale)

    def watch_columns(self, call: attention.Call, columns: slice) -> None:
        """Records the attention of [CLS] to prompts among the keys, mean over heads."""
        weights = cls_attention(call.q, call.k, call.bias, call.scale)[:, columns]
        self.cls_attention.append(weights.detach())


class PromptedBlock(nn.Module):
    """Runs a frozen block on [prefix tokens, prompts, patch tokens].

    Args:
        block: the backbone's block.
        index: its place, which is its prompts' place in `prompts`.
        prompts: the owner's list, per layer [m, D], or [2, m, H*d] of kind "prefix". Anything that
            swaps a tensor in the list for one with a set dimension in front ([G, m, D]) gets one
            set of prompts per sample (G = B) or per group of B/G neighbours.
        kind: "deep", "shallow" or "prefix".
        dropout_groups: prompt-dropout masks per batch, None for one per sample.
        calls: attention calls the block makes.
        head_dims: (H, d, dv) of them.
        prefix_tokens: tokens before the prompts.
        read_tokens: of the last block, the tokens to compute, None for all.
        last: whether this is the last block.
    """

    lengths: Tensor | None

    def __init__(
        self,
        block: nn.Module,
        index: int,
        prompts: nn.ParameterList,
        *,
        kind: str,
        dropout_groups: int | None,
        calls: int,
        head_dims: tuple[int, int, int],
        prefix_tokens: int,
        read_tokens: int | None,
        last: bool,
    ):
        super().__init__()
        self.block = block
        self.index = index
        self.kind = kind
        self.dropout = 0.0  # share of prompt elements dropped in training
        self.dropout_groups = dropout_groups
        self.calls = calls
        self.head_dims = head_dims
        self.prefix_tokens = prefix_tokens
        self.read_tokens = read_tokens
        self.last = last
        self.path = "folded"
        self.checkpoint = False
        self.observer: Observer | None = None
        # Keys and values for each attention call, one set per sample, in place of the prompts'.
        self.given: list[tuple[Tensor, Tensor]] | None = None
        self.replay: Any = None  # what to give again in place of computing it
        self.register_buffer("lengths", None)  # of constant prefix sets where they differ, [G]
        self.constants = 0  # attention calls whose prompts' keys and values are buffers
        # In a tuple, so that the list is registered once, by the owner.
        self._owner: tuple[nn.ParameterList, ...] = (prompts,)
        self._positions: Any = tuple(
            (module, module.num_prefix_tokens)
            for module in block.modules()
            if hasattr(module, "num_prefix_tokens")
        )

    def forward(self, x: Tensor, *args, watch: attention.Watch | None = None, **kwargs) -> Tensor:
        """The block's output; `watch` sees, and may change, the folded path's attention calls."""
        if self.replay is not None:
            return self.replay
        form: Any = self._concat if self.path == "concat" else partial(self._folded, watch)
        if self.checkpoint and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(form, x, *args, use_reentrant=False, **kwargs)
        return form(x, *args, **kwargs)

    def _place(self, width: int) -> None:
        """Makes rotations start behind `width` prompts among the tokens."""
        for module, base in self._positions:
            if module.num_prefix_tokens != base + width:
                module.num_prefix_tokens = base + width

    def make_constant(
        self, prefixes: Sequence[tuple[Tensor, Tensor]], lengths: Tensor | None = None
    ) -> None:
        """Keys and values for each attention call in place of the prompts, for inference alone.

        [H, m, d] for all samples, or G sets [G, H, m, d] (of `lengths` [G]) for as many equal
        parts of a batch.
        """
        for n, (key, value) in enumerate(prefixes):
            self.register_buffer(f"prefix_k{n}", key)
            self.register_buffer(f"prefix_v{n}", value)
        self.lengths = lengths
        self.constants = len(prefixes)
        self._owner = ()

    def _this_step(self, batch: int) -> tuple[list[tuple[Tensor, Tensor]] | None, Tensor | None]:
        """Keys and values for each attention call, None without prompts, and each sample's set."""
        if self.given is not None:
            return self.given, None
        if self.constants:
            pairs = [
                (self.get_buffer(f"prefix_k{n}"), self.get_buffer(f"prefix_v{n}"))
                for n in range(self.constants)
            ]
            keys = pairs[0][0]
            return (pairs if keys.shape[-2] else None), _neighbours(keys, 4, batch)
        prompts = self.prompt_sets(batch)
        if not prompts.shape[-2]:
            return None, None
        return self.prefixes(prompts), self._sets(prompts, batch)

    def prompt_sets(self, batch: int) -> Tensor:
        """This step's prompts after dropout: [m, D] ([2, m, D]), or with G sets in front."""
        prompts = self._owner[0][self.index]
        if not (self.training and self.dropout and prompts.numel()):
            return prompts
        groups = min(self.dropout_groups or batch, batch)
        return F.dropout(prompts.expand(groups, *prompts.shape), self.dropout)

    # Folded: prompts act through their keys and values alone, computed once for the batch.

    def _folded(self, watch: attention.Watch | None, x: Tensor, *args, **kwargs) -> Tensor:
        self._place(0)
        prefixes, sets = self._this_step(x.shape[0])
        full = None
        if self.read_tokens is not None and self.last:
            full = attention.capture(self.block, self.calls, x, *args, **kwargs)
            x, args, kwargs = x[:, : self.read_tokens], (), {}
        elif prefixes is None and watch is None:
            return self.block(x, *args, **kwargs)

        def attend(n: int, call: attention.Call) -> Tensor:
            if full is not None:  # the read tokens' queries over every token's keys and values
                call = _read_rows(call, full[n])
            if watch is not None:
                call = watch(call)
            if prefixes is None:
                return call.output()
            return self._attend(call, *prefixes[n], sets)

        return attention.run(self.block, self.calls, attend, x, *args, **kwargs)

    def prefixes(self, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prompts for each attention call: [H, m, d] or [G, H, m, d]."""
        if self.kind == "prefix":
            heads = self.head_dims[0]
            keys, values = prompts.unflatten(-1, (heads, -1)).transpose(-3, -2).unbind(-4)
            return [(keys, values)]
        tokens = prompts if prompts.dim() == 3 else prompts[None]
        calls = attention.capture(self.block, self.calls, tokens)
        if prompts.dim() == 3:
            return [(call.k, call.v) for call in calls]
        return [(call.k[0], call.v[0]) for call in calls]

    def _sets(self, prompts: Tensor, batch: int) -> Tensor | None:
        """The set of each sample, None for one set for all, or one for each."""
        return _neighbours(prompts, 4 if self.kind == "prefix" else 3, batch)

    def _attend(
        self, call: attention.Call, key: Tensor, value: Tensor, sets: Tensor | None
    ) -> Tensor:
        key, value = key.to(call.k.dtype), value.to(call.v.dtype)
        found = prefix_attention(
            call.q,
            call.k,
            call.v,
            key,
            value,
            prefix_index=sets,
            prefix_lengths=self.lengths,
            bias=call.bias,
            scale=call.scale,
            return_lse=self.observer is not None,
            backend="auto" if self.observer is None else _for_lse(call),
        )
        return (
            found if self.observer is None else self.observer.see_prefix(call, key, value, *found)
        )

    # Concatenated: the published form, prompts as tokens between [CLS] and the patches.

    def _concat(self, x: Tensor, *args, **kwargs) -> Tensor:
        first = self.index == 0
        prompts = self.prompt_sets(x.shape[0]) if first or self.kind == "deep" else None
        start = self.prefix_tokens
        if prompts is not None:
            sets = self._sets(prompts, x.shape[0])
            tokens = _per_sample(prompts, sets, (x.shape[0], *prompts.shape[-2:]))
            x = torch.cat([x[:, :start], tokens.to(x.dtype), x[:, start:]], 1)
        width = self._owner[0][0 if self.kind == "shallow" else self.index].shape[-2]

        self._place(width)

        def attend(_: int, call: attention.Call) -> Tensor:
            return self._attend_among(call, start, width)

        x = attention.run(self.block, self.calls, attend, x, *args, **kwargs)
        if self.kind == "deep" or self.last:
            x = torch.cat([x[:, :start], x[:, start + width :]], 1)
        return x

    def _attend_among(self, call: attention.Call, start: int, width: int) -> Tensor:
        bias = (
            call.bias if call.bias is None else _widened(call.bias, start, width, call.q.shape[-2])
        )
        call = attention.Call(call.q, call.k, call.v, bias, call.scale)
        if self.observer is not None:
            if self.observer.watch_cls:
                self.observer.watch_columns(call, slice(start, start + width))
            if self.observer.gate is not None:
                after = call.k.shape[-2] - start - width
                gate = F.pad(self.observer.gate, (start, after))[:, None, None]  # [B, 1, 1, N+m]
                bias = gate if bias is None else additive(bias, call.q.dtype) + gate
        if bias is not None and bias.is_floating_point():
            bias = bias.to(call.q.dtype)
        return attention.Call(call.q, call.k, call.v, bias, call.scale).output()


def _for_lse(call: attention.Call) -> str:
    """The backend where the LSE is wanted: on a CPU torch would write the attention out for it."""
    return "auto" if any(cpu_cannot(x, call.k) for x in (call.q, call.v)) else "cpu"


def _neighbours(x: Tensor, rank: int, batch: int) -> Tensor | None:
    """The set of each sample where a tensor of `rank` holds G sets for G parts of the batch."""
    if x.dim() < rank or x.shape[0] == batch:
        return None
    return torch.arange(batch, device=x.device) * x.shape[0] // max(batch, 1)


def _per_sample(x: Tensor, sets: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return x.expand(shape) if sets is None else x[sets]


def _read_rows(call: attention.Call, full: attention.Call) -> attention.Call:
    bias = full.bias
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., : call.q.shape[-2], :]
    return attention.Call(call.q, full.k, full.v, bias, call.scale)


def _pad(bias: Tensor, start: int, width: int) -> Tensor:
    """Puts `width` columns that change nothing at `start` of the last dimension."""
    if bias.shape[-1] == 1 or width == 0:
        return bias
    neutral = bias.new_full((*bias.shape[:-1], width), bias.dtype == torch.bool)
    return torch.cat([bias[..., :start], neutral, bias[..., start:]], -1)


def _widened(bias: Tensor, start: int, width: int, tokens: int) -> Tensor:
    """A bias made for the tokens without prompts, neutral on the prompts' rows and columns."""
    if bias.shape[-1] != tokens:
        bias = _pad(bias, start, width)
    if bias.shape[-2] not in (1, tokens):
        bias = _pad(bias.transpose(-2, -1), start, width).transpose(-2, -1)
    return bias
