"""A block that attends within windows, or over rows and columns, with prompts folded into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcx.backbones import attention
from pcx.models.vpt.block import PromptedBlock
from pcx.models.vpt.probes import Probe


class WindowedBlock(PromptedBlock):
    """Runs a frozen block whose attention calls are of windows, each with the layer's prompts.

    Every window of an image attends to the prompts too. Prompts have no relative position, are not
    masked in shifted windows, and do not take part in padding, rolling or merging (VPT paper,
    Sec. 4.3 and App. B; its code). Their outputs are dropped behind the layer.

    Args:
        arguments: of `PromptedBlock`.
    """

    def _is_small(self, x: Tensor) -> bool:
        """Never: prompts cannot be among the tokens of an image."""
        return False

    def _leaves_out(self, x: Tensor) -> bool:
        """Never: the head reads all tokens."""
        return False

    def _sets(self, prompts: Tensor, batch: int) -> Tensor | None:
        """The set of each image, None for one set for all."""
        if prompts.dim() < (4 if self.kind == "prefix" else 3):
            return None
        return torch.arange(batch, device=prompts.device) * prompts.shape[0] // max(batch, 1)

    def _attend(
        self, call: attention.Call, key: Tensor, value: Tensor, sets: Tensor | None
    ) -> Tensor:
        form: Any = self.token_path
        call = form.by_window(call)
        if key.dim() == 4:
            images = torch.arange(len(key), device=key.device) if sets is None else sets
            sets = _of_windows(images, call.q.shape[:-3])
        return form.as_called(super()._attend(call, key, value, sets))

    def _seen(self, probe: Probe, call: attention.Call, *found: Tensor) -> Tensor:
        """To a probe the queries of all windows of an image are those of one call."""
        key, value, out, lse = found
        images = len(key) if key.dim() == 4 else len(probe.gate)  # type: ignore[arg-type]
        q, joined = _joined(call.q, images), _joined(out, images)
        whole = attention.Call(q, call.k, call.v, None, call.scale)
        seen = probe.see_prefix(whole, key, value, joined, _joined(lse[..., None], images)[..., 0])
        split = seen.unflatten(2, (-1, out.shape[-2])).transpose(1, 2)  # [B, W, H, N, dv]
        return split.reshape(out.shape)


def _joined(x: Tensor, images: int) -> Tensor:
    """[B, W, H, N, d] or [B * W, H, N, d] -> [B, H, W * N, d]."""
    return x.reshape(images, -1, *x.shape[-3:]).transpose(1, 2).flatten(2, 3)


def _of_windows(images: Tensor, lead: torch.Size) -> Tensor:
    """The set of each window from that of each image: [B] -> [B, W] or [B * W]."""
    if len(lead) == 2:
        return images[:, None].expand(lead)
    return images.repeat_interleave(lead[0] // len(images))
