"""ATS: image tokens sampled after some layers by the attention of [CLS], without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec
from pcx.models.block_forward import Carried, StandIn
from pcx.ops.dispatch import exporting
from pcx.ops.reference.attention import cls_logits
from pcx.ops.reference.token_choice import pick
from pcx.token_pruning.handles import (
    Handle,
    biased,
    blocks_of,
    clear,
    composed,
    patches_of,
    seen,
    spec_of,
)


@dataclass(frozen=True)
class SamplingStep:
    """What is sampled after one layer."""

    layer: int  # counted from 1
    tokens: int


class Sampling(Handle):
    """What `ats` set up; `remove` takes it away again.

    Attributes:
        steps: how many are sampled after which layer, in their order.
    """

    def __init__(
        self, steps: Sequence[SamplingStep], layers: Sequence[_SampledForward], spec: BackboneSpec
    ):
        arguments = {
            "layers": [step.layer for step in steps],
            "tokens": [step.tokens for step in steps],
        }
        super().__init__(layers, spec, "ats", arguments)
        self.steps = tuple(steps)
        self._sampling = tuple(layer for layer in layers if layer.tokens is not None)

    @property
    def kept(self) -> list[Tensor]:
        """Of the last batch, after each step: the places [B, prefix tokens + K], in the sequence
        that came to the first step, of the tokens in the slots; some stand in several."""
        return composed([layer.stays for layer in self._sampling])

    @property
    def distinct(self) -> list[Tensor]:
        """Of the last batch, after each step: the patches left of each sample, [B], at most K."""
        found = seen("distinct", [layer.alive for layer in self._sampling])
        return [alive[:, self.prefix_tokens :].sum(1) for alive in found]


def ats(model: nn.Module, *, layers: Sequence[int], tokens: int | Sequence[int]) -> Sampling:
    """Samples image tokens after some layers (ATS, Fayyaz et al., ECCV 2022, Sec. 3).

    A patch's significance is the attention of [CLS] to it times the length of its value,
    S_j = A_1j |V_j| / sum_i A_1i |V_i|, the mean over heads (Eq. 3). K patches are sampled where
    the sum of S up to a patch reaches the fixed points 1/2K, 3/2K to (2K-1)/2K. A patch that is
    sampled several times is kept once, so samples keep fewer patches the more their significance
    gathers in some. [CLS] and registers are kept; prompts are not sampled.

    The paper leaves out what is not sampled as the layer's queries; here it is dropped after the
    whole layer, which gives the tokens that stay the same values. Shapes are static: each sample
    has K slots, and those of repeated patches are masked as keys of all later layers, to the same
    values as without them. What is computed, and the time it takes, is therefore that of K tokens,
    and not of the fewer distinct ones. The model compiles and exports as before; its weights and
    `state_dict` stay as they are. Between blocks the tokens travel as a pair with the mask, which
    is what hooks on blocks see. Setting up any of these methods anew replaces what was.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification, or a pcx.VPT on
            the path "folded"; changed in place until `remove` is called. Its head reads [CLS] (and
            what else is before the patches) alone. Without rotary positions.
        layers: after which, counted from 1, ascending, without the last.
        tokens: K, patches to sample; one for all layers, or one each.

    Returns:
        A handle: `remove()`, and `kept` and `distinct` after a forward.

    Raises:
        ValueError: an argument is out of range or of another length than `layers`, the backbone is
            not supported, or its head reads patches, of which some would be repeated.

    Example:
        >>> sampling = pcx.token_pruning.ats(model, layers=(3, 6, 9), tokens=(160, 120, 80))
        >>> logits = model(images)
        >>> [int(count.float().mean()) for count in sampling.distinct]
    """
    spec = spec_of(model)
    blocks = blocks_of(model, spec)
    if not spec.has_cls or spec.read_tokens is None:
        raise ValueError(
            f"model: the head of this {spec.family} reads more than [CLS], such as an average "
            "of the patches, in which repeated ones would count; expected pooling by [CLS]"
        )
    steps = _steps(layers, tokens, len(blocks), patches_of(model))
    sizes = {step.layer: step.tokens for step in steps}
    after = range(steps[0].layer, len(blocks) + 1)
    clear(model, blocks, after)
    return Sampling(
        steps,
        [
            _SampledForward(
                blocks[layer - 1],
                sizes.get(layer),
                spec.prefix_tokens,
                last=layer == len(blocks),
            )
            for layer in after
        ],
        spec,
    )


def significance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    protected: int,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """How much [CLS] takes from each patch, S_j = A_1j |V_j| / sum_i A_1i |V_i| (Eq. 3).

    The sum is over patches, and so does not depend on what else [CLS] attends to. The paper adds
    up the heads' significances; their mean differs by a factor that sampling does not see.

    Args:
        q, k: [B, H, N, d].
        v: [B, H, N, dv].
        protected: tokens at the front, the first of which is [CLS].
        scale: of the attention, 1/sqrt(d) by default.
        bias: as SDPA's attn_mask, broadcastable to [B, H, N, N].

    Returns:
        [B, N - protected] float32 (float64 for float64), each sample's summing to 1.
    """
    logits = cls_logits(q, k, bias, scale)  # [B, H, N]
    weights = logits[..., protected:].softmax(-1)  # [B, H, P]
    taken = weights * v[:, :, protected:].to(weights.dtype).norm(dim=-1)
    return (taken / taken.sum(-1, keepdim=True)).mean(1)


def sample(scores: Tensor, tokens: int) -> Tensor:
    """Inverse transform sampling at the fixed points 1/2K, 3/2K to (2K-1)/2K (Sec. 3.2).

    Patch j is sampled once for every point above the sum of the scores before it and up to the
    sum with it: K S_j times, rounded up or down. (The paper takes the patch nearest to an inverse
    whose interpolation it leaves open; its code also sorts patches by significance before.)

    Args:
        scores: [B, P], not negative; of any sum.
        tokens: K, 1 to P.

    Returns:
        [B, K] int64, ascending; repeated patches stand side by side.

    Raises:
        ValueError: K is out of range.
    """
    batch, patches = scores.shape
    if not 1 <= tokens <= patches:
        raise ValueError(f"tokens: {tokens}, expected 1 to {patches}, the patches that come")
    sums = scores.cumsum(1)
    sums = sums / sums[:, -1:]  # of which the last is exactly 1, above all points
    points = (torch.arange(tokens, device=scores.device, dtype=scores.dtype) + 0.5) / tokens
    return torch.searchsorted(sums, points.expand(batch, -1).contiguous())


def first_of_equal(sampled: Tensor) -> Tensor:
    """Whether an entry of [B, K], whose equal ones stand side by side, is the first of them."""
    other = sampled[:, 1:] != sampled[:, :-1]
    return torch.cat([torch.ones_like(sampled[:, :1], dtype=torch.bool), other], 1)


class _SampledForward(StandIn):
    """`known` is which tokens are no repetitions, [B, N] boolean."""

    def __init__(self, block: nn.Module, tokens: int | None, protected: int, *, last: bool):
        super().__init__(block)
        self.tokens, self.protected, self.last = tokens, protected, last
        self.stays: Tensor | None = None  # [B, prefix tokens + K], of the tokens that came
        self.alive: Tensor | None = None

    def before(self, call: attention.Call, known: Tensor | None) -> attention.Call:
        return call if known is None else biased(call, known[:, None, None])

    def after(self, tokens: Tensor, call: attention.Call, known: Tensor | None) -> Tensor | Carried:
        if self.last:
            return tokens
        if self.tokens is None:
            return Carried(tokens, known)
        with torch.no_grad():
            stays = self._sampled(call, self.tokens)  # [B, prefix tokens + K]
            alive = first_of_equal(stays)
            if known is not None:  # rounding might have sampled a masked slot
                alive = alive & known.gather(1, stays)
        # Where a model is exported there is nothing to look at.
        self.stays, self.alive = (None, None) if exporting() else (stays, alive)
        return Carried(pick(tokens, stays), alive)

    def _sampled(self, call: attention.Call, tokens: int) -> Tensor:
        if call.q.device.type == "meta":  # shapes alone: there is nothing to sample
            return call.q.new_empty(len(call.q), self.protected + tokens, dtype=torch.int64)
        scores = significance(
            call.q, call.k, call.v, protected=self.protected, scale=call.scale, bias=call.bias
        )
        prefix = torch.arange(self.protected, device=scores.device).expand(len(scores), -1)
        return torch.cat([prefix, sample(scores, tokens) + self.protected], 1)


def _steps(layers: Any, tokens: Any, depth: int, patches: int | None) -> list[SamplingStep]:
    if not (
        isinstance(layers, Sequence)
        and layers
        and all(isinstance(layer, int) and 1 <= layer < depth for layer in layers)
        and list(layers) == sorted(set(layers))
    ):
        raise ValueError(
            f"layers: {layers!r}, expected whole numbers from 1 to {depth - 1}, ascending: the "
            "layers after which to sample, of which the last cannot be one"
        )
    counts = list(tokens) if isinstance(tokens, Sequence) else [tokens] * len(layers)
    if len(counts) != len(layers):
        raise ValueError(f"tokens: {len(counts)} values for {len(layers)} layers")
    steps = [SamplingStep(*each) for each in zip(layers, counts, strict=True)]
    for step in steps:
        whole = isinstance(step.tokens, int) and not isinstance(step.tokens, bool)
        if not whole or step.tokens < 1 or (patches is not None and step.tokens > patches):
            most = "as many as come" if patches is None else f"{patches}, which come"
            raise ValueError(
                f"tokens: {step.tokens!r} after layer {step.layer}, expected a whole number from "
                f"1 to {most}"
            )
        patches = step.tokens
    return steps
