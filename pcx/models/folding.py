"""A map among channels, folded into the linear layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones.attention import made_up


@torch.no_grad()
def fold(mlp: nn.Module, salient: Any, width: int) -> bool:
    """Puts a map of `pcx.SCT` behind an MLP into the MLP's last linear layer.

    The layer is a new one, so that weights that others share are not written. It is proven on
    made-up tokens that the MLP then computes what both did.

    Args:
        mlp: a backbone's MLP in eval mode; its last linear layer is exchanged.
        salient: the map, which changes a tensor in place.
        width: D of what the MLP gives.

    Returns:
        Whether it was folded; the MLP is as it was where not.
    """
    linears = [(n, m) for n, m in mlp.named_modules() if n and type(m) is nn.Linear]
    if not linears or linears[-1][1].out_features != width:
        return False
    name, last = linears[-1]
    x = made_up((1, 6, width), last.weight.dtype, last.weight.device)
    expected = salient(mlp(x).clone())
    mlp.set_submodule(name, _folded(last, salient))
    if _is_close(mlp(x), expected):
        return True
    mlp.set_submodule(name, last)
    return False


def _folded(linear: nn.Linear, salient: Any) -> nn.Linear:
    """(I + s E W E^T)(A x + c) + s E b as one linear layer, computed in float64."""
    index, scale, weight = salient.index, salient.scale, salient.weight.double()
    rows = linear.weight.double()  # A, [D, hidden]
    offset = rows.new_zeros(len(rows)) if linear.bias is None else linear.bias.double()  # c
    added = weight @ offset[index] + salient.bias.double()
    folded = nn.Linear(linear.in_features, len(rows)).to(linear.weight)
    folded.weight.copy_(rows.index_add(0, index, scale * (weight @ rows[index])))
    folded.bias.copy_(offset.index_add(0, index, scale * added))
    return folded.eval()


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Equal to the rounding of a matrix product."""
    info = torch.finfo(a.dtype)
    tolerance = (1000 if info.bits >= 32 else 8) * info.eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
