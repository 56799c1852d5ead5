"""Attention that timm writes out, as one call of fused attention, which can be intercepted.

Swin-v2, Swin-v2-CR, LeViT and EfficientFormer have no fused form, and Swin's copies the mask of
shifted windows for every image of the batch. The classes here take their places in a model's own
copy, with its weights. In shifted windows the call has one bias for each window of an image,
[W, H, N, N], whatever the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import efficientformer, levit
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from timm.models import swin_transformer_v2_cr as cr
from torch import Tensor, nn


class WindowAttention(v1.WindowAttention):
    """timm's window attention of Swin, whose mask is not copied for every image."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows [B * W, N, C], and a mask [W, N, N] of shifted ones -> [B * W, N, C]."""
        q, k, v = _heads(self.qkv(x), self.num_heads)
        q, k, v, bias = _by_image(q, k, v, self._get_rel_pos_bias(), mask)
        dropped = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
        return self.proj_drop(self.proj(_tokens(out)))


class CosineWindowAttention(v2.WindowAttention):
    """timm's window attention of Swin-v2, whose logits are cosines, as a fused call.

    Queries are scaled by the learned factor and keys have length 1, so the call's own scale is 1.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows [B * W, N, C], and a mask [W, N, N] of shifted ones -> [B * W, N, C]."""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # type: ignore[arg-type]
        q, k, v = _heads(F.linear(x, self.qkv.weight, bias), self.num_heads)
        q, k = _cosines(q, k, self.logit_scale)
        q, k, v, bias = _by_image(q, k, v, self._positions(), mask)
        dropped = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped, scale=1.0)
        return self.proj_drop(self.proj(_tokens(out)))

    def _positions(self) -> Tensor:
        """The bias of relative positions, [1, H, N, N]."""
        area = self.window_size[0] * self.window_size[1]
        net: Any = self.cpb_mlp
        table: Any = net(self.relative_coords_table).view(-1, self.num_heads)
        index: Any = self.relative_position_index
        found = table[index.view(-1)].view(area, area, -1)
        return 16 * torch.sigmoid(found.permute(2, 0, 1).contiguous())[None]


class CrWindowAttention(cr.WindowMultiHeadAttention):
    """timm's window attention of Swin-v2-CR, as a fused call."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows [B * W, N, C], and a mask [W, N, N] of shifted ones -> [B * W, N, C]."""
        q, k, v = _heads(self.qkv(x), self.num_heads)
        q, k = _cosines(q, k, self.logit_scale.view(-1, 1, 1))
        q, k, v, bias = _by_image(q, k, v, self._relative_positional_encodings(), mask)
        dropped = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped, scale=1.0)
        return self.proj_drop(self.proj(_tokens(out)))


class _Biased:
    """The forward of LeViT's attention and of EfficientFormer's, as a fused call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Tokens [B, N, C] -> [B, N, C]; LeViT's form with convolutions is timm's own."""
        if getattr(self, "use_conv", False):
            return super().forward(x)  # type: ignore[misc]
        q, k, v = _split(self, self.qkv(x))
        bias = self.get_attention_biases(x.device)[None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(_tokens(out))


class LevitAttention(_Biased, levit.Attention):
    """timm's attention of LeViT, as a fused call."""


class EfficientFormerAttention(_Biased, efficientformer.Attention):
    """timm's attention of EfficientFormer, as a fused call."""


# The class of ours that computes what a module of timm's class does.
SWAPS: dict[type, type] = {
    v1.WindowAttention: WindowAttention,
    v2.WindowAttention: CosineWindowAttention,
    cr.WindowMultiHeadAttention: CrWindowAttention,
    levit.Attention: LevitAttention,
    efficientformer.Attention: EfficientFormerAttention,
}


def fuse_written_out(model: nn.Module) -> None:
    """Makes a model's own attention modules of these classes fused ones."""
    for module in model.modules():
        if type(module) in SWAPS:
            module.__class__ = SWAPS[type(module)]


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[B, N, 3 * H * d] -> queries, keys and values, [B, H, N, d]."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _split(module: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    """[B, N, H * (2 * d + dv)] -> queries and keys [B, H, N, d], values [B, H, N, dv]."""
    parts = [module.key_dim, module.key_dim, module.val_dim]
    return qkv.unflatten(-1, (module.num_heads, -1)).transpose(1, 2).split(parts, -1)


def _cosines(q: Tensor, k: Tensor, log_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are cosines times the learned factor, at most 100."""
    factor = log_factor.clamp(max=math.log(1 / 0.01)).exp()
    dtype = q.dtype  # under autocast normalize gives float32
    return (F.normalize(q, dim=-1) * factor).to(dtype), F.normalize(k, dim=-1).to(dtype)


def _by_image(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None
) -> tuple[Any, ...]:
    """Splits [B * W, H, N, d] into [B, W, H, N, d] where windows differ by their mask."""
    if mask is None:
        return q, k, v, positions.to(q.dtype)
    windows = mask.shape[0]
    if q.shape[0] % windows:
        raise ValueError(
            f"x: {q.shape[0]} windows of a batch, and a shift mask for {windows} windows an image; "
            "build the backbone for this image size, or with strict_img_size=False"
        )
    q, k, v = (t.unflatten(0, (-1, windows)) for t in (q, k, v))
    return q, k, v, (positions + mask[:, None]).to(q.dtype)


def _tokens(out: Tensor) -> Tensor:
    """[B, W, H, N, d] or [B * W, H, N, d] -> [B * W, N, H * d]."""
    return out.flatten(0, -4).transpose(1, 2).flatten(2)
