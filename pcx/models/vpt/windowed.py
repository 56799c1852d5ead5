"""A block that attends within windows, or over rows and columns, with prompts folded into it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pcx.backbones import attention
from pcx.backbones.residual import Wrapper
from pcx.backbones.timm_swin import Residual, merge_alone, residual_of
from pcx.models.block_forward import Carried
from pcx.models.vpt.block import PromptedBlock
from pcx.models.vpt.calls import check_call
from pcx.models.vpt.probes import Probe
from pcx.models.vpt.prompts import per_sample
from pcx.ops.reference.attention import additive


class Travel(NamedTuple):
    """How prompts of kind "shallow" go through a block.

    Attributes:
        residual: what the block does with them behind its attention.
        goes_on: whether they go on behind the block: not behind a stage where they are dropped.
    """

    residual: Residual
    goes_on: bool


class WindowedBlock(PromptedBlock):
    """Runs a frozen block whose attention calls are of windows, each with the layer's prompts.

    Every window of an image attends to the prompts too. Prompts have no relative position, are not
    masked in shifted windows, and do not take part in padding, rolling or merging (VPT paper,
    Sec. 4.3 and App. B; its code). Their outputs are dropped behind the layer.

    Prompts of kind "shallow" travel from block to block beside the image, each image's own. What a
    prompt's attention gives is averaged over the image's windows (VPT's code).

    Args:
        arguments: of `PromptedBlock`.
    """

    travel: Travel | None = None  # of kind "shallow"

    def _is_small(self, x: Tensor) -> bool:
        """Never: prompts cannot be among the tokens of an image."""
        return False

    def _leaves_out(self, x: Tensor) -> bool:
        """Never: the head reads all tokens."""
        return False

    def _folded(self, watch: attention.Watch | None, x: Tensor, *args, **kwargs) -> Tensor:
        if self.token_path is None:  # no prompts, and maybe no call either
            return super()._folded(watch, x, *args, **kwargs)

        def checked(call: attention.Call) -> attention.Call:
            self._check_windows(call, len(x))
            return call if watch is None else watch(call)

        return super()._folded(checked, x, *args, **kwargs)

    def _check_windows(self, call: attention.Call, images: int) -> None:
        """Raises a ValueError where a shift mask is for other windows than the image has."""
        form: Any = self.token_path
        if form.form == "BWHND" and call.q.dim() == 5 and call.q.shape[0] != images:
            raise ValueError(
                f"x: a shift mask for {call.q.shape[1]} windows an image, which has "
                f"{call.q.shape[0] * call.q.shape[1] // images}; timm before 1.0.31 builds such "
                "masks for maps that windows do not divide: update timm, or build the backbone "
                "with strict_img_size=False"
            )

    def _attend(
        self, call: attention.Call, key: Tensor, value: Tensor, sets: Tensor | None
    ) -> Tensor:
        form: Any = self.token_path
        call = form.by_window(call)
        if key.dim() == 4:
            images = torch.arange(len(key), device=key.device) if sets is None else sets
            sets = _of_windows(images, call.q.shape[:-3])
        return form.as_called(super()._attend(call, key, value, sets))

    def _concat(self, start: int, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Kind "shallow": the image's tokens, and the prompts beside them where they go on."""
        assert self.travel is not None
        tokens, prompts = x if isinstance(x, Carried) else (x, None)
        if self.index == 0:
            own = self.prompt_sets(tokens.shape[0])
            sets = self._sets(own, tokens.shape[0])
            prompts = per_sample(own, sets, (tokens.shape[0], *own.shape[-2:]))
        if prompts is None or not prompts.shape[1]:
            return self.block(tokens, *args, **kwargs)
        out, prompts = self._travelled(tokens, self.as_block(prompts), args, kwargs)
        return Carried(out, prompts) if self.travel.goes_on else out

    def _travelled(
        self, tokens: Tensor, prompts: Tensor, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        form: Any = self.token_path
        (own,) = form.capture(self.block, prompts)
        averaged: list[Tensor] = []

        def attend(_: int, call: attention.Call) -> Tensor:
            self._check_windows(call, len(tokens))
            call = form.by_window(call)
            out, of_prompts = self._attend_beside(call, own)
            averaged.append(of_prompts)
            return form.as_called(out)

        out = attention.run(self.block, self.calls, attend, tokens, *args, **kwargs)
        attended = form.attended(self.block, prompts, averaged[0])
        return out, self.travel.residual(self.block, prompts, attended)  # type: ignore[union-attr]

    def _attend_beside(self, call: attention.Call, own: attention.Call) -> tuple[Tensor, Tensor]:
        """What tokens attend to [B, W, H, N, dv], and what prompts do, the mean [B, H, m, dv]."""
        check_call(call)
        images = torch.arange(len(own.k), device=own.k.device)
        sets = _of_windows(images, call.q.shape[:-3])
        q, k, v = (t.to(call.k.dtype)[sets] for t in (own.q, own.k, own.v))
        keys, values = torch.cat([k, call.k], -2), torch.cat([v, call.v], -2)
        m, bias = own.k.shape[-2], call.bias
        if bias is not None:
            bias = F.pad(additive(bias, call.q.dtype), (m, 0))
        gate = None if self.probe is None else self.probe.gate
        if gate is not None:
            after = call.k.shape[-2]
            gate = F.pad(gate, (0, after)).to(call.q.dtype)[sets][..., None, None, :]
            bias = gate if bias is None else bias + gate
        out = F.scaled_dot_product_attention(call.q, keys, values, attn_mask=bias, scale=call.scale)
        found = F.scaled_dot_product_attention(q, keys, values, attn_mask=gate, scale=call.scale)
        return out, found.reshape(len(own.k), -1, *found.shape[-3:]).mean(1)

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


class MergingPrompts(Wrapper):
    """Merges patches, and each prompt beside them with copies of itself."""

    def forward(self, x: Any) -> Any:
        """The merged map, and the prompts where there are some."""
        if not isinstance(x, Carried):
            return self.inner(x)
        return Carried(self.inner(x.tokens), merge_alone(self.inner, x.known))


def set_up_travelling(model: Any) -> None:
    """Prepares a VPT of kind "shallow" over Swin, whose blocks are wrapped."""
    blocks, merges = model.spec.blocks, model.variant.merging == "merge"
    for i, layer in enumerate(model.layers):
        ends_stage = layer.last or blocks[i + 1].stage != blocks[i].stage
        residual = residual_of(layer.block)
        assert residual is not None  # checked before
        layer.travel = Travel(residual, not layer.last and (merges or not ends_stage))
        if merges and i and blocks[i - 1].stage != blocks[i].stage:
            name = blocks[i].name.rpartition(".blocks.")[0] + ".downsample"
            model.backbone.set_submodule(name, MergingPrompts(model.backbone.get_submodule(name)))
