"""The operation alone: attention over a learned prefix, in an attention module of your own.

`pcx.prefix_attention` gives what `F.scaled_dot_product_attention` gives over concatenated keys and
values. It does not need them concatenated, so the prefix is stored once for the whole batch.

    python examples/prefix_attention.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcx


class Attention(nn.Module):
    """Multi-head self-attention with m learned keys and values for every head."""

    def __init__(self, dim: int, heads: int, m: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.prefix_k = nn.Parameter(torch.randn(heads, m, dim // heads))
        self.prefix_v = nn.Parameter(torch.randn(heads, m, dim // heads))

    def forward(self, x: Tensor, concatenate: bool = False) -> Tensor:
        batch, tokens, dim = x.shape
        shape = (batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        if concatenate:
            prefix_k, prefix_v = (
                p.expand(batch, -1, -1, -1) for p in (self.prefix_k, self.prefix_v)
            )
            keys, values = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
            attended = F.scaled_dot_product_attention(q, keys, values)
        else:
            attended = pcx.prefix_attention(q, k, v, self.prefix_k, self.prefix_v)
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, dim))


def main() -> None:
    torch.manual_seed(0)
    attention = Attention(dim=192, heads=3, m=50).double()
    x = torch.randn(4, 197, 192, dtype=torch.float64)
    results = []
    for concatenate in (False, True):
        attention.zero_grad()
        out = attention(x, concatenate)
        out.square().sum().backward()
        results.append((out.detach(), attention.prefix_k.grad.clone()))
    (out, gradient), (expected, expected_gradient) = results
    print(f"largest difference of the outputs: {(out - expected).abs().max():.1e}")
    print(f"largest difference of the gradients: {(gradient - expected_gradient).abs().max():.1e}")


if __name__ == "__main__":
    main()
