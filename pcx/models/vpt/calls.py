"""Attention calls as prompted blocks change them."""

from __future__ import annotations

from pcx.backbones import attention
from pcx.ops.prefix_attention import cpu_cannot


def check_call(call: attention.Call) -> None:
    """Raises a ValueError where a call drops attention weights."""
    if call.dropout:
        raise ValueError(
            f"model: dropout of {call.dropout} in a block's attention, which prompts need at 0; "
            "leave the backbone in eval mode"
        )


def backend_for_lse(call: attention.Call) -> str:
    """The backend that gives the LSE: on a CPU, torch would write attention out for it."""
    return "auto" if any(cpu_cannot(x, call.k) for x in (call.q, call.v)) else "cpu"


def read_rows(call: attention.Call, full: attention.Call) -> attention.Call:
    """The call of the tokens that the head reads, over every token's keys and values."""
    bias = full.bias
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., : call.q.shape[-2], :]
    return attention.Call(call.q, full.k, full.v, bias, call.scale)
