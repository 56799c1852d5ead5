"""ATS: samples image tokens after some layers by the attention of [CLS], without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec
from pcx.models.block_forward import Carried, StandIn
from pcx.ops.dispatch import exporting
from pcx.ops.reference.attention import cls_logits
from pcx.ops.reference.token_choice import pick
from pcx.token_pruning.handles import (
    Handle,
    backbone_of,
    biased,
    blocks_of,
    check_still_reads_cls,
    clear,
    listed,
    of_last_batch,
    one_each,
    patches_of,
    places_at_first_step,
    spec_of,
)


@dataclass(frozen=True)
class SamplingStep:
    """The settings of one sampling step, after one layer."""

    layer: int  # counted from 1
    tokens: int  # K, the number of patches to sample


class Sampling(Handle):
    """The handle of `ats`; `remove` takes the sampling away again.

    Attributes:
        steps: the sampling steps, in the order of their layers.
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
        """Places of the tokens in the slots after each step, in the last batch.

        One tensor [B, prefix tokens + K] int64 per step. A place counts in the sequence before the
        first step. A token that was sampled several times stands in several slots.
        """
        return places_at_first_step([layer.stays for layer in self._sampling])

    @property
    def distinct(self) -> list[Tensor]:
        """Number of different patches left after each step, in the last batch.

        One tensor [B] per step, of numbers from 1 to K.
        """
        found = of_last_batch("distinct", [layer.alive for layer in self._sampling])
        return [alive[:, self.prefix_tokens :].sum(1) for alive in found]


def ats(model: nn.Module, *, layers: Sequence[int], tokens: int | Sequence[int]) -> Sampling:
    """Samples image tokens after some layers (ATS, Fayyaz et al., ECCV 2022, Sec. 3).

    The significance of a patch is the attention of [CLS] to it times the length of its value,
    S_j = A_1j |V_j| / sum_i A_1i |V_i|, averaged over heads (Eq. 3). K patches are sampled, where
    the cumulative sum of S reaches the fixed points 1/2K, 3/2K to (2K-1)/2K. A patch that is
    sampled several times is kept once. The more a sample's significance gathers in few patches,
    the fewer it keeps. [CLS] and registers are always kept, and prompts are not sampled.

    The paper drops tokens as queries of the layer. Here they are dropped after the whole layer,
    which gives the tokens that stay the same values.

    Shapes are static: each sample has K slots. Slots of repeated patches are masked as keys in all
    later layers, with the same values as without them. Compute and time are therefore those of K
    tokens, not of the fewer different ones. The model compiles and exports as before; its weights
    and `state_dict` do not change. Between blocks the tokens travel as a pair with the mask, and
    hooks on blocks see this pair. A second call of any token reduction replaces the first.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification, or a pcx.VPT on
            the path "folded", without rotary positions. Its head reads [CLS] or other tokens before
            the patches, and no patches. It is changed in place until `remove`.
        layers: layers after which to sample, counted from 1, ascending, without the last.
        tokens: K, the number of patches to sample; one for all layers, or one each.

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
            "of the patches, in which repeated ones would count; use one that pools by [CLS]"
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
                backbone_of(model),
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
    """The significance of each patch to [CLS], S_j = A_1j |V_j| / sum_i A_1i |V_i| (Eq. 3).

    The sum is over patches, so the result does not depend on other tokens that [CLS] attends to.
    The paper sums the heads' significances. Their mean, used here, differs by a constant factor,
    which does not change the sampling.

    Args:
        q, k: [B, H, N, d].
        v: [B, H, N, dv].
        protected: number of tokens at the front, the first of which is [CLS].
        scale: factor on the attention logits, 1/sqrt(d) by default.
        bias: as SDPA's attn_mask, broadcastable to [B, H, N, N].

    Returns:
        [B, N - protected] float32 (float64 for float64); each sample sums to 1.
    """
    logits = cls_logits(q, k, bias, scale)  # [B, H, N]
    weights = logits[..., protected:].softmax(-1)  # [B, H, P]
    taken = weights * v[:, :, protected:].to(weights.dtype).norm(dim=-1)
    return (taken / taken.sum(-1, keepdim=True)).mean(1)


def sample(scores: Tensor, tokens: int) -> Tensor:
    """Inverse transform sampling at the fixed points 1/2K, 3/2K to (2K-1)/2K (Sec. 3.2).

    Let c_j be the sum of the scores of patches 1 to j, divided by the sum of all. Patch j is
    sampled once for every point in (c_(j-1), c_j]: K (c_j - c_(j-1)) times, rounded up or down.

    The paper differs in two points. It takes the patch nearest to an inverse, whose interpolation
    it leaves open. Its code also sorts patches by significance first.

    Args:
        scores: [B, P], 0 or more, of any sum above 0.
        tokens: K, 1 to P.

    Returns:
        [B, K] int64: indices of patches, ascending, so that repeated ones stand side by side.

    Raises:
        ValueError: K is out of range.
    """
    batch, patches = scores.shape
    if not 1 <= tokens <= patches:
        raise ValueError(f"tokens: {tokens}, expected 1 to {patches}, the patches that come")
    sums = scores.cumsum(1)
    sums = sums / sums[:, -1:]  # the last one is exactly 1, above all points
    points = (torch.arange(tokens, device=scores.device, dtype=scores.dtype) + 0.5) / tokens
    if exporting():  # ONNX has no searchsorted; this counts the sums below each point
        found = (~(sums[:, None] >= points[:, None])).sum(2)
    else:
        found = torch.searchsorted(sums, points.expand(batch, -1).contiguous())
    return found.clamp(max=patches - 1)  # NaN has no place, and stays in its sample so


def first_of_equal(sampled: Tensor) -> Tensor:
    """Marks the first of each run of equal entries; [B, K] int64 -> [B, K] boolean."""
    other = sampled[:, 1:] != sampled[:, :-1]
    return torch.cat([torch.ones_like(sampled[:, :1], dtype=torch.bool), other], 1)


class _SampledForward(StandIn):
    """Stands in for a block's forward, samples tokens of its output and masks repeated ones.

    What travels with the tokens, `known`, is a mask [B, N]: True where a token is no repetition.
    """

    def __init__(
        self,
        block: nn.Module,
        tokens: int | None,
        protected: int,
        backbone: nn.Module,
        *,
        last: bool,
    ):
        super().__init__(block)
        self.backbone = backbone  # whose head may be given another pooling later
        self.tokens, self.protected, self.last = tokens, protected, last
        self.stays: Tensor | None = None  # [B, prefix tokens + K], places before this step
        self.alive: Tensor | None = None  # [B, prefix tokens + K], False for repetitions

    def before(self, call: attention.Call, known: Tensor | None) -> attention.Call:
        return call if known is None else biased(call, known[:, None, None])

    def after(self, tokens: Tensor, call: attention.Call, known: Tensor | None) -> Tensor | Carried:
        if self.last:
            check_still_reads_cls(self.backbone)
            return tokens
        if self.tokens is None:
            return Carried(tokens, known)
        with torch.no_grad():
            stays = self._sampled(call, self.tokens)  # [B, prefix tokens + K]
            alive = first_of_equal(stays)
            if known is not None:  # rounding may sample a masked slot, of significance 0
                alive = alive & known.gather(1, stays)
        # An exported program keeps no state.
        self.stays, self.alive = (None, None) if exporting() else (stays, alive)
        return Carried(pick(tokens, stays), alive)

    def _sampled(self, call: attention.Call, tokens: int) -> Tensor:
        if call.q.device.type == "meta":  # meta tensors have shapes alone, so any tokens do
            return call.q.new_empty(len(call.q), self.protected + tokens, dtype=torch.int64)
        scores = significance(
            call.q, call.k, call.v, protected=self.protected, scale=call.scale, bias=call.bias
        )
        prefix = torch.arange(self.protected, device=scores.device).expand(scores.shape[0], -1)
        return torch.cat([prefix, sample(scores, tokens) + self.protected], 1)


def _steps(layers: Any, tokens: Any, depth: int, patches: int | None) -> list[SamplingStep]:
    given, chosen = layers, listed("layers", layers) or [None]
    if any(layer is None for layer in chosen) or len(chosen) != len(set(chosen)):
        raise ValueError(f"layers: {given!r}, expected layers from 1 to {depth - 1}, none twice")
    # The last layer cannot be one: nothing after it would take less time.
    chosen = [whole_number("layers", layer, 1, depth - 1) for layer in chosen]
    if chosen != sorted(chosen):
        raise ValueError(f"layers: {given!r}, expected ascending ones")
    counts = one_each("tokens", tokens, len(chosen))
    steps = []
    for layer, count in zip(chosen, counts, strict=True):
        steps.append(SamplingStep(layer, whole_number("tokens", count, 1, patches)))
        patches = steps[-1].tokens  # the patches that come to the next
    return steps
