"""What scoring puts into the blocks of a VPT for the length of one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pcx.backbones import attention
from pcx.ops.logit_gate import logit_gate
from pcx.ops.reference.attention import cls_attention


@dataclass
class Probe:
    """What scoring gives one block in place of its prompts' keys and values, and sees there.

    Attributes:
        given: keys and values for each attention call, one set [B, H, m, d] per sample; None leaves
            the prompts' own.
        gate: [B, m] zeros, as if added to the prompts' attention logits; its gradient is the first-
            order effect of removing a prompt's key.
        watch_cls: whether the attention of [CLS] to the prompts is recorded.
        cls_attention: what was recorded, [B, m], one item per attention call.
    """

    given: list[tuple[Tensor, Tensor]] | None = None
    gate: Tensor | None = None
    watch_cls: bool = False
    cls_attention: list[Tensor] = field(default_factory=list)

    @property
    def observes(self) -> bool:
        """Whether anything is seen inside the attention, which takes the softmax's statistics."""
        return self.watch_cls or self.gate is not None

    def see_prefix(
        self, call: attention.Call, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor
    ) -> Tensor:
        """Observes attention over a prefix [H, m, d] or [B, H, m, d]; returns `out`."""
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        if self.watch_cls:
            logits = (call.q[:, :, :1] @ keys.transpose(-2, -1)).to(lse.dtype) * scale
            weights = (logits - lse[:, :, :1, None]).exp()[:, :, 0].mean(1)  # [B, m]
            self.cls_attention.append(weights.detach())
        if self.gate is None:
            return out
        return logit_gate(out, self.gate, call.q, keys, values, lse, scale)

    def see_columns(self, call: attention.Call, columns: slice) -> None:
        """Records the attention of [CLS] to prompts among the keys, mean over heads."""
        if self.watch_cls:
            weights = cls_attention(call.q, call.k, call.bias, call.scale)[:, columns]
            self.cls_attention.append(weights.detach())


@contextmanager
def probing(layers: Sequence[Any], probes: Mapping[int, Probe]) -> Iterator[None]:
    """Puts probes into blocks, by their places, for the length of a context."""
    try:
        for i, probe in probes.items():
            layers[i].probe = probe
        yield
    finally:
        for i in probes:
            layers[i].probe = None
