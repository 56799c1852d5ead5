"""pcx.prefix_attention in code that is not ours, as the README shows it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcx


class Attention(nn.Module):
    """A plain ViT's attention with prefix tuning: one line differs."""

    def __init__(self, dim=24, heads=2, prefix=3):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.prefix = nn.Parameter(torch.randn(2, heads, prefix, dim // heads))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = pcx.prefix_attention(q, k, v, *self.prefix)
        return self.proj(x.transpose(1, 2).flatten(2))


def test_a_plain_vit():
    layer, x = Attention().double(), torch.randn(3, 7, 24, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    keys, values = (
        torch.cat([p.expand(3, *p.shape), own], 2)
        for p, own in zip(layer.prefix, (k, v), strict=True)
    )
    expected = layer.proj(
        F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
    )
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.prefix.grad.abs().sum() > 0


def test_hugging_face_s_attention_interface():
    transformers = pytest.importorskip("transformers")

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        prefix = module.prefix_k, module.prefix_v
        out = pcx.prefix_attention(query, key, value, *prefix, bias=attention_mask, scale=scaling)
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("pcx", attend)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 48, "image_size": 32}
    model, plain = (
        transformers.ViTForImageClassification(
            transformers.ViTConfig(**size, attn_implementation=implementation)
        )
        for implementation in ("pcx", "sdpa")
    )
    plain.load_state_dict(model.state_dict())
    model, plain = model.double().eval(), plain.double().eval()
    attention = [m for m in model.modules() if type(m).__name__ == "ViTAttention"]
    assert len(attention) == 2
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    difference = {}
    for m in (0, 3):
        for layer in attention:
            layer.prefix_k, layer.prefix_v = torch.randn(2, 2, m, 12, dtype=torch.float64)
        with torch.no_grad():
            difference[m] = float((model(x).logits - plain(x).logits).abs().max())
    assert difference[0] < 1e-12 < 1e-3 < difference[3]
