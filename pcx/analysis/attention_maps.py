"""What every token of a VPT attends to, and how many dimensions that has."""

from __future__ import annotations

import torch
from torch import Tensor

from pcx.backbones.attention import Call, intercept
from pcx.models.vpt.model import VPT


@torch.no_grad()
def attention_maps(model: VPT, images: Tensor) -> list[Tensor]:
    """The attention matrix of each layer, mean over heads.

    The model runs in the published form, with its prompts among the tokens: [CLS] and other prefix
    tokens, then the layer's prompts, then the patches. In a VPT-Deep what prompts attend to is
    computed there and dropped; what tokens read of the prompts is what the logits depend on.

    Args:
        model: a VPT of a backbone whose blocks attend over all tokens at once; not changed.
        images: [B, 3, H, W], as the model takes them.

    Returns:
        Per layer [B, N + m_l, N + m_l], rows the queries; each row sums to 1.

    Raises:
        ValueError: a block attends within windows, or in several calls.
    """
    flat = all(block.is_flat for block in model.spec.blocks)
    if not flat or any(layer.calls != 1 for layer in model.layers):
        raise ValueError(
            f"model: {model.spec.family} attends within windows or in several calls a block, so "
            "that there is no one matrix; use a plain vision transformer"
        )
    literal = model.copy().eval()
    literal.path = "concat"
    found: list[Tensor] = []

    def attend(_: int, call: Call) -> Tensor:
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        logits = call.q.float() @ call.k.float().mT * scale
        if call.bias is not None:
            bias = call.bias
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, -torch.inf)
            logits = logits + bias
        found.append(logits.softmax(-1).mean(1))
        return call.output()

    for layer in literal.layers:
        layer.read_tokens = None
    with intercept(attend, []):
        literal(images)
    return found


def cumulative_eigenvalues(attention: Tensor) -> Tensor:
    """The share of the largest eigenvalues in their sum, by their number.

    (Prompt Condensation, Fig. 2.) An attention matrix is not symmetric, so that eigenvalues may be
    complex; their magnitudes are summed.

    Args:
        attention: [..., n, n].

    Returns:
        [..., n], which rises to 1.
    """
    values = torch.linalg.eigvals(attention.double()).abs().sort(-1, descending=True).values
    return values.cumsum(-1) / values.sum(-1, keepdim=True)
