"""`nn.MultiheadAttention` as one call of fused attention, so that its call can be intercepted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedSelfAttention(nn.MultiheadAttention):
    """Self-attention whose heads meet in one call of `F.scaled_dot_product_attention`.

    It computes what `nn.MultiheadAttention` does, with the same weights. That one hides its call in
    a function of torch's own. Calls that need attention weights, other keys than queries, or a
    feature that fused attention has not, go there as before.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        alone = query is key and key is value and query.dim() == 3 and key_padding_mask is None
        if need_weights or not alone or (attn_mask is not None and attn_mask.dim() != 2):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        x = query if self.batch_first else query.transpose(0, 1)  # [B, N, D]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        heads = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # [B, H, N, d]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # torch's two functions mean opposite things by True
        dropped = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropped)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None


def fuse_multihead(model: nn.Module) -> None:
    """Makes a model's own `nn.MultiheadAttention` modules fused ones, where they can be."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and _can_be(module):
            module.__class__ = FusedSelfAttention


def _can_be(module: Any) -> bool:
    """Whether queries, keys and values have one matrix, and nothing is added to the keys."""
    added = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return module._qkv_same_embed_dim and not added
