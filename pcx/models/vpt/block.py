"""A transformer block with prompts: folded into its attention, or concatenated as published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.residual import HOOKS, Wrapper
from pcx.backbones.token_path import TokenPath
from pcx.models.head_reads import is_head_alone, reading
from pcx.models.vpt.calls import backend_for_lse, check_call, read_rows
from pcx.models.vpt.probes import Probe
from pcx.models.vpt.prompts import Chosen, dropped, neighbours, per_sample
from pcx.models.vpt.sources import OwnPrompts, SharedPrompts
from pcx.ops.bias import widened
from pcx.ops.prefix_attention import prefix_attention
from pcx.ops.prepared import Prepared
from pcx.ops.recording import is_recorded
from pcx.ops.reference.attention import additive

PATHS = ("folded", "concat")
# Multiply-adds by device from which on leaving tokens out of the last block saves time: keys and
# values of all tokens then take a pass of their own, whose Python and launches take longer below.
WORTH = {"cpu": 1e7, "cuda": 1.5e10}
# Multiply-adds of a block that prompts among the tokens may add where they still take less time
# than prompts of their own, which go through the block's norm and projection in calls of their own.
# The keys are the device and whether grad mode is on. Without gradients the rule holds for calls
# outside of CUDA graphs. Compiled blocks always fold.
AMONG = {("cpu", False): 3e6, ("cuda", False): 2e10, ("cuda", True): 3.1e9}
# Multiply-adds, by the same keys, that take as long as copying one element of the tokens, which
# putting prompts among them does: once forward, and more often backward. So few prompts and a
# large batch fold.
COPIED = {("cpu", False): 30, ("cuda", False): 1000, ("cuda", True): 3000}
_hooks_of = itemgetter(*HOOKS)


class PromptedBlock(Wrapper):
    """Runs a frozen block on [prefix tokens, prompts, patch tokens].

    Args:
        block: the backbone's block.
        index: its place, which is its prompts' place in `prompts`.
        prompts: the owner's, per layer [m, D], or [2, m, H*d] of kind "prefix". Anything that
            swaps a tensor in the list for one with a set dimension in front ([G, m, D]) gets one
            set of prompts per sample (G = B) or per group of B/G neighbours.
        kind: "deep", "shallow" or "prefix".
        dropout_groups: prompt-dropout masks per batch, None for one per sample.
        calls: attention calls the block makes.
        head_dims: (H, d, dv) of them.
        token_path: the way of prompts alone to the block's keys and values, None where it has none.
        prefix_tokens: tokens before the prompts.
        read_tokens: of the last block, the tokens to compute where that saves time and nothing but
            the head's output is taken, None for all.
        last: whether this is the last block.
    """

    holds = "block"
    block: Any
    lengths: Tensor | None

    def __init__(
        self,
        block: nn.Module,
        index: int,
        prompts: OwnPrompts | SharedPrompts,
        *,
        kind: str,
        dropout_groups: int | None,
        calls: int,
        head_dims: tuple[int, int, int],
        token_path: TokenPath | None,
        prefix_tokens: int,
        read_tokens: int | None,
        last: bool,
    ):
        super().__init__(block)
        self.index = index
        self.kind = kind
        self.dropout = 0.0  # share of prompt elements dropped in training
        self.dropout_groups = dropout_groups
        self.calls = calls
        self.head_dims = head_dims
        self.token_path = token_path
        self.needs = getattr(token_path, "needs", ())
        self.prefix_tokens = prefix_tokens
        self.read_tokens = read_tokens
        self.last = last
        self.path = "folded"
        self.checkpoint = False
        self.probe: Probe | None = None  # what scoring puts in for the length of a forward
        self.register_buffer("lengths", None)  # of constant prefix sets where they differ, [G]
        self._chosen: Chosen | None = None
        self.constants = 0  # attention calls whose prompts' keys and values are buffers
        self.attention = Prepared()
        # In a tuple, so that the list is registered once, by the owner.
        self._owner: tuple[OwnPrompts | SharedPrompts, ...] = (prompts,)
        self.keeps_prompts = False  # whether the last block gives its prompts, for a pool of them
        self._positions: Any = tuple(
            (module, module.num_prefix_tokens)
            for module in block.modules()
            if hasattr(module, "num_prefix_tokens")
        )
        self.dtype = _dtype_of(block)
        self._inside: Any = tuple(block.modules())  # whose hooks see the block's tokens
        self._was_for_head = False
        self.seen_by: Any = ()  # modules around and behind the last block, whose hooks see them too

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The block's output."""
        if self.path == "folded" and not self.checkpoint:
            if self._is_small(x):  # prompts behind the tokens are cut off without a copy
                behind = self.prefix_tokens if self.needs else x.shape[1]
                found = self._concat(behind, x, *args, **kwargs)
                return found.contiguous() if self._forward_hooks else found
            return self._folded(None, x, *args, **kwargs)
        return self.run_watched(None, x, *args, **kwargs)

    def run_watched(self, watch: attention.Watch | None, x: Tensor, *args, **kwargs) -> Tensor:
        """The block's output; `watch` sees, and may change, the folded path's attention calls.

        Raises:
            RuntimeError: there is a `watch`, and prompts are among the tokens.
        """
        form: Any = partial(self._folded, watch)
        if self.path == "concat":
            if watch is not None:
                raise RuntimeError("model: path 'concat' has prompts among the tokens; fold them")
            form = partial(self._concat, self.prefix_tokens)
        if self.checkpoint and torch.is_grad_enabled():
            again = partial(_reading, bool(is_head_alone()), form)
            return torch.utils.checkpoint.checkpoint(again, x, *args, use_reentrant=False, **kwargs)
        return form(x, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> PromptedBlock:  # .to(), .half(), ...
        super()._apply(*args, **kwargs)
        self.dtype = _dtype_of(self.block)
        return self

    def _place(self, width: int) -> None:
        """Makes rotations start behind `width` prompts among the tokens."""
        for module, base in self._positions:
            if module.num_prefix_tokens != base + width:
                module.num_prefix_tokens = base + width

    def make_constant(
        self,
        prefixes: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        """Keys and values for each attention call in place of the prompts, for inference alone.

        [H, m, d] for all samples, or G sets [G, H, m, d] (of `lengths` [G]) for as many equal
        parts of a batch, or for the samples that `chosen` names.
        """
        self._chosen = chosen
        self._names_of_constants = [(f"prefix_k{n}", f"prefix_v{n}") for n in range(len(prefixes))]
        for names, tensors in zip(self._names_of_constants, prefixes, strict=True):
            for name, tensor in zip(names, tensors, strict=True):
                self.register_buffer(name, tensor)
        self.lengths = lengths
        self.constants = len(prefixes)
        self._owner = ()
        self._place(0)

    def constants_of_prompts(self) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of the prompts for each attention call, [H, m, d], in eval mode."""
        mode, self.training = self.training, False
        try:
            prompts = self.prompt_sets(1)
            if prompts.shape[-2]:
                pairs = self.prefixes(prompts)
            else:
                heads, dk, dv = self.head_dims
                empty = [prompts.new_empty(heads, 0, d) for d in (dk, dv)]
                pairs = [(empty[0], empty[1])] * self.calls
        finally:
            self.training = mode
        return [(key.detach().contiguous(), value.detach().contiguous()) for key, value in pairs]

    def _this_step(self, batch: int) -> tuple[list[tuple[Tensor, Tensor]] | None, Tensor | None]:
        """This step's keys and values for each attention call, and each sample's prefix set."""
        if self.probe is not None and self.probe.given is not None:
            return self.probe.given, None
        if self.constants:
            held = self._buffers
            pairs: Any = [(held[k], held[v]) for k, v in self._names_of_constants]
            keys = pairs[0][0]
            sets = None if keys.dim() == 3 else neighbours(keys, 4, batch)
            if self._chosen is not None:
                sets = self._chosen.sets
            return (pairs if keys.shape[-2] else None), sets
        prompts = self.prompt_sets(batch)
        if not prompts.shape[-2]:
            return None, None
        return self.prefixes(prompts), self._sets(prompts, batch)

    def prompt_sets(self, batch: int) -> Tensor:
        """This step's prompts after dropout: [m, D] ([2, m, D]), or with G sets in front."""
        prompts = self._owner[0][self.index]
        if not (self.training and self.dropout and prompts.numel()):
            return prompts
        return dropped(prompts, self.dropout, self.dropout_groups, batch)

    def _is_small(self, x: Tensor) -> bool:
        """Whether the concatenated form computes this folded block in less time."""
        if self.constants or self.probe is not None or self.kind != "deep":
            return False
        if self._positions:  # placing them is not for several threads at once
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        trained, device = torch.is_grad_enabled(), x.device.type
        most = AMONG.get((device, trained), 0)
        batch, tokens, dim = x.shape
        copied = COPIED.get((device, trained), 0) * batch * tokens * dim
        if copied >= most:  # whatever the prompts, which take a while to look up
            return False
        prompts = self._owner[0].count(self.index)
        if not prompts or copied + 12 * dim**2 * batch * prompts > most:
            return False
        if self._leaves_out(x):
            return False
        if _has_hooks(self._inside):
            return False  # a hook sees the block's tokens, whatever the batch
        return trained or not (x.is_cuda and is_recorded())

    def prompts_among(self) -> int:
        """How many prompts are among the block's tokens in the concatenated form."""
        return self._owner[0].count(0 if self.kind == "shallow" else self.index)

    # Folded: prompts act through their keys and values alone, computed once for the batch.

    def _folded(self, watch: attention.Watch | None, x: Tensor, *args, **kwargs) -> Tensor:
        if self._positions:
            self._place(0)
        if self.index == 0:
            # A patch embedding leaves tokens transposed where no [CLS] is put before them, and
            # every sum and norm of all blocks would then walk through them the slow way.
            x = x.contiguous()
        block = self.block
        prefixes, sets = self._this_step(x.shape[0])
        full = None
        if self._leaves_out(x):
            full = attention.capture(block, self.calls, x, *args, **kwargs)
            x, args = x[:, : self.read_tokens], ()
            kwargs = attention.placeless(self.needs, x)
        elif prefixes is None and watch is None:
            return block(x, *args, **kwargs)

        def attend(n: int, call: attention.Call) -> Tensor:
            if full is not None:  # the read tokens' queries over every token's keys and values
                call = read_rows(call, full[n])
            if watch is not None:
                call = watch(call)
            if prefixes is None:
                return call.output()
            return self._attend(call, *prefixes[n], sets)

        return attention.run(block, self.calls, attend, x, *args, **kwargs)

    def _leaves_out(self, x: Tensor) -> bool:
        """Whether the tokens that the head does not read are left out: where it saves time."""
        if self.read_tokens is None or not self.last or not self._is_for_head():
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # whatever the batch will be
            return True
        if _has_hooks(self.seen_by):
            return False
        batch, tokens, dim = x.shape
        saved = 9 * dim**2 * (tokens - self.read_tokens) * batch  # projection and MLP
        return saved >= WORTH.get(x.device.type, 0)

    def _is_for_head(self) -> bool:
        """Whether the head's output alone is taken; computed again for a backward pass, as then."""
        alone = is_head_alone()
        if torch.compiler.is_compiling():
            return bool(alone)
        if alone is None and torch._C._current_graph_task_id() != -1:  # in a backward pass
            return self._was_for_head
        self._was_for_head = bool(alone)
        return bool(alone)

    def prefixes(self, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prompts for each attention call: [H, m, d] or [G, H, m, d].

        Prompts of another dtype, such as float32 ones of a 16-bit block, are cast to the block's.
        """
        prompts = self.as_block(prompts)
        if self.kind == "prefix":
            heads = self.head_dims[0]
            keys, values = prompts.unflatten(-1, (heads, -1)).transpose(-3, -2).unbind(-4)
            return [(keys, values)]
        tokens = prompts if prompts.dim() == 3 else prompts[None]
        assert self.token_path is not None  # there are prompts
        calls = self.token_path.capture(self.block, tokens)
        if prompts.dim() == 3:
            return [(call.k, call.v) for call in calls]
        return [(call.k[0], call.v[0]) for call in calls]

    def as_block(self, prompts: Tensor) -> Tensor:
        """Prompts in the dtype of the block's weights."""
        return prompts if self.dtype in (None, prompts.dtype) else prompts.to(self.dtype)

    def _sets(self, prompts: Tensor, batch: int) -> Tensor | None:
        """The set of each sample, None for one set for all, or one for each."""
        return neighbours(prompts, 4 if self.kind == "prefix" else 3, batch)

    def _attend(
        self, call: attention.Call, key: Tensor, value: Tensor, sets: Tensor | None
    ) -> Tensor:
        check_call(call)
        if key.dtype != call.k.dtype or value.dtype != call.v.dtype:
            key, value = key.to(call.k.dtype), value.to(call.v.dtype)
        if self.probe is None and call.bias is None and sets is None and key.dim() == 3:
            return self.attention(call.q, call.k, call.v, key, value, call.scale)
        observes = self.probe is not None and self.probe.observes
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
            return_lse=observes,
            backend=backend_for_lse(call) if observes else "auto",
        )
        if self.probe is None or not observes:
            return found
        return self._seen(self.probe, call, key, value, *found)

    def _seen(self, probe: Probe, call: attention.Call, *found: Tensor) -> Tensor:
        return probe.see_prefix(call, *found)

    # Concatenated: prompts as tokens at `start`; the published form has them behind [CLS].

    def _concat(self, start: int, x: Tensor, *args, **kwargs) -> Tensor:
        first = self.index == 0
        prompts = self.prompt_sets(x.shape[0]) if first or self.kind == "deep" else None
        if prompts is not None:
            sets = self._sets(prompts, x.shape[0])
            tokens = per_sample(prompts, sets, (x.shape[0], *prompts.shape[-2:]))
            tokens = tokens.to(x.dtype)
            at_end = start == x.shape[1]
            x = torch.cat([x, tokens] if at_end else [x[:, :start], tokens, x[:, start:]], 1)
        width = self.prompts_among()
        self._place(width)

        def attend(_: int, call: attention.Call) -> Tensor:
            return self._attend_among(call, start, width)

        x = attention.run(self.block, self.calls, attend, x, *args, **kwargs)
        if (self.kind == "deep" or self.last) and not self.keeps_prompts:
            behind = start + width
            found = x[:, :start]
            x = found if behind == x.shape[1] else torch.cat([found, x[:, behind:]], 1)
        return x

    def _attend_among(self, call: attention.Call, start: int, width: int) -> Tensor:
        check_call(call)
        bias = call.bias
        if bias is not None:
            bias = widened(bias, start, width, call.q.shape[-2])
        call = attention.Call(call.q, call.k, call.v, bias, call.scale)
        if self.probe is not None:
            self.probe.see_columns(call, slice(start, start + width))
            if self.probe.gate is not None:
                after = call.k.shape[-2] - start - width
                gate = F.pad(self.probe.gate, (start, after))[:, None, None]  # [B, 1, 1, N+m]
                bias = gate if bias is None else additive(bias, call.q.dtype) + gate
        if bias is not None and bias.is_floating_point():
            bias = bias.to(call.q.dtype)
        return attention.Call(call.q, call.k, call.v, bias, call.scale).output()


def _has_hooks(modules: Iterable[nn.Module]) -> bool:
    return any(map(any, map(_hooks_of, map(vars, modules))))


def _dtype_of(block: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in block.parameters()), None)


def _reading(head_alone: bool, form: Any, *args: Any, **kwargs: Any) -> Tensor:
    with reading(head_alone):
        return form(*args, **kwargs)
