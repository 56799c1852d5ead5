"""Soft pruning for training: masks that fade tokens out of attention instead of dropping them.

Zero-TPrune's supplement (Sec. C) replaces the choice of tokens by a differentiable mask and leaves
the S-stage out. It says that a masked token has little influence on later layers, but not how.

Scaling a token's features would do nothing, since a LayerNorm follows in every pre-norm block.
Here the logarithm of the mask is added to the logits of later attention, so that a mask of 0 takes
a token out of every softmax. As T -> 0, [CLS] then computes exactly what it computes where the
tokens are dropped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec
from pcx.models.block_forward import Carried, StandIn, set_read_tokens
from pcx.ops.reference import weighted_pagerank as reference
from pcx.ops.reference.attention import additive
from pcx.ops.reference.token_choice import within
from pcx.token_pruning import stages
from pcx.token_pruning.handles import (
    Handle,
    backbone_of,
    biased,
    blocks_of,
    check_still_reads_cls,
    clear,
    of_last_batch,
    patches_of,
    spec_of,
)
from pcx.token_pruning.schedule import Step, arguments_of, check_counts, check_layers, steps_of

TEMPERATURE = 0.1


def soft_prune(
    model: nn.Module,
    *,
    layers: Sequence[int],
    keep: float | Sequence[float],
    iters: int | Sequence[int],
    temperature: float = TEMPERATURE,
    cls_boost: bool = True,
    variances: tuple[float, float] = stages.VARIANCES,
) -> SoftPruning:
    """Fades image tokens out after some layers, differentiably (Zero-TPrune, Sec. C, Eq. 6).

    After each of `layers`, every token has an importance s and a mask sigmoid((s - theta) / T). The
    logarithm of the mask is added to the logits of the token's key in all later layers. The
    logarithms of several layers add up: the masks multiply. No token is dropped. As T -> 0 the
    model computes what it does under `pcx.zero_tprune` with the same arguments and no S-stage. Its
    weights and `state_dict` do not change.

    Args:
        model: as `pcx.zero_tprune` takes it, with a head that reads [CLS] alone. It is changed in
            place until `remove`, and any pruning on it is replaced. A VPT computes all tokens of
            its last layer until then.
        layers, keep, iters, cls_boost, variances: as `pcx.zero_tprune` takes them.
        temperature: T, above 0, for scores whose mean is 1.

    Returns:
        A handle: `remove()`, and `masks` and `tokens` after a forward.

    Raises:
        ValueError: an argument is out of range or of another length than `layers`, the backbone is
            not supported, or something that is not pcx's stands in for a layer's forward.
        RuntimeError: raised in training by a Hugging Face block that recomputes itself in the
            backward pass.
    """
    _check_temperature(temperature)
    stages.check_variances(variances)
    spec = spec_of(model)
    blocks = blocks_of(model, spec)
    steps = steps_of(layers, keep, iters, 0)
    check_layers(blocks, spec, steps, needs_cls=cls_boost)
    if spec.read_tokens is None:
        raise ValueError(
            f"model: the head of {spec.family} reads image tokens, of which soft pruning drops "
            "none; use one that reads [CLS] alone (timm: global_pool='token')"
        )
    patches = patches_of(model)
    if patches is not None:
        check_counts(steps, patches, "none")
    first, last = steps[0].layer, len(blocks)
    clear(model, blocks, range(first, last + 1))
    settings = _MaskSettings(
        spec.prefix_tokens, temperature, cls_boost, variances, backbone_of(model)
    )
    step_of_layer = {step.layer: step for step in steps}
    soft = [
        _SoftForward(blocks[i - 1], step_of_layer.get(i), settings, last=i == last)
        for i in range(first, last + 1)
    ]
    return SoftPruning(steps, soft, spec, settings)


class SoftPruning(Handle):
    """The handle of `soft_prune`; `remove` takes the soft pruning away again.

    Attributes:
        steps: the pruning steps, in the order of their layers.
        prefix_tokens: number of tokens before the patches: [CLS] and registers.
        patch_pixels: number of pixels of one patch.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        soft: Sequence[_SoftForward],
        spec: BackboneSpec,
        settings: _MaskSettings,
    ):
        arguments: dict[str, Any] = arguments_of(steps)
        del arguments["similar"]
        arguments |= {
            "temperature": settings.temperature,
            "cls_boost": settings.cls_boost,
            "variances": list(settings.variances),
        }
        super().__init__(soft, spec, "soft_prune", arguments)
        self.steps = tuple(steps)
        self._soft = tuple(soft)

    @property
    def masks(self) -> list[Tensor]:
        """The product of the masks so far after each step, in the last batch; [B, N] per step."""
        known = [soft.known for soft in self._soft if soft.step is not None]
        return [each.log_mask.exp() for each in of_last_batch("masks, tokens", known)]

    @property
    def tokens(self) -> Tensor:
        """The output of the last block for the last batch, [B, N, D]."""
        (tokens,) = of_last_batch("masks, tokens", [self._soft[-1].tokens])
        return tokens


def threshold(scores: Tensor, keep: int) -> Tensor:
    """theta of Eq. 6: midway between the lowest score that stays and the highest that does not.

    Exactly `keep` scores of a sample lie above theta unless these two are equal. Theta moves with
    the scores: adding a constant to all of them changes no mask.

    Args:
        scores: [B, P], the scores of the patches.
        keep: number of patches that stay, 1 to P - 1.

    Returns:
        [B, 1].
    """
    ranked = scores.sort(dim=1, descending=True).values
    return (ranked[:, keep - 1, None] + ranked[:, keep, None]) / 2


def log_soft_mask(scores: Tensor, keep: int, temperature: float, *, protected: int) -> Tensor:
    """The logarithm of a soft mask, log sigmoid((s - theta) / T) (Eq. 6).

    The mask itself would round to 0, whose logarithm has no gradient.

    Args:
        scores: [B, N], the importance s of each token.
        keep: number of patches that stay, 1 to N - protected. If all stay, no token is masked.
        temperature: T, above 0.
        protected: number of tokens at the front, which are never masked.

    Returns:
        [B, N], 0 or less.

    Raises:
        ValueError: `keep` or `temperature` is out of range.
    """
    _check_temperature(temperature)
    patches = scores[:, protected:]
    if not 1 <= keep <= patches.shape[1]:
        raise ValueError(f"keep: {keep} of {patches.shape[1]} patches, expected 1 to all of them")
    if keep == patches.shape[1]:
        return torch.zeros_like(scores)
    over = (patches - threshold(patches, keep)) / temperature
    return F.pad(F.logsigmoid(over), (protected, 0))


def importance(
    q: Tensor,
    k: Tensor,
    log_mask: Tensor,
    *,
    iters: int,
    cls_boost: bool = False,
    variances: tuple[float, float] = stages.VARIANCES,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The I-stage's scores of tokens with weights m = exp(log_mask), differentiable (Sec. 3.2).

    A token's first vote counts by its weight, s_0 = m. It is voted for by the attention
    softmax(q k^T scale + log m). The number of tokens N is sum(m) throughout. With weights of 0 and
    1 these are the scores of `stages.importance` among the tokens of weight 1.

    The scores are divided by their weighted mean, so that a temperature means the same for any N.

    Args:
        q, k: [B, H, N, d].
        log_mask: [B, N], 0 or less.
        iters: number of PageRank iterations.
        cls_boost: whether the first token, [CLS], starts sqrt(N) times above the others.
        variances: (low, high), the bounds of the head filter.
        scale: factor on the attention logits, 1/sqrt(d) by default.
        bias: as SDPA's attn_mask, broadcastable to [B, H, N, N].

    Returns:
        [B, N] float32 (float64 for float64), of weighted mean 1.
    """
    batch, heads, n, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    log_mask = log_mask.to(wide)
    weights = log_mask.exp()  # [B, N]
    total = weights.sum(1, keepdim=True)  # [B, 1]
    start = torch.cat([weights[:, :1] * total.sqrt(), weights[:, 1:]], 1) if cls_boost else weights
    start = start / start.sum(1, keepdim=True)
    columns = log_mask[:, None, None]  # [B, 1, 1, N]
    if bias is not None:
        columns = columns + additive(bias, wide)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    init = start[:, None].expand(batch, heads, n)
    # The reference, in plain torch, because the op has no gradient.
    scores = reference.weighted_pagerank(q, k, init, columns, None, None, iters, scale)  # [B, H, N]
    used = _filtered_heads(scores.detach(), weights.detach(), *variances)[..., None].to(wide)
    # A norm has a gradient where all heads' scores are 0; the root of a sum has none.
    combined = torch.linalg.vector_norm(scores * used, dim=1) / used.sum(1)  # Eq. 2, [B, N]
    return combined * total / (combined * weights).sum(1, keepdim=True)


def _filtered_heads(scores: Tensor, weights: Tensor, low: float, high: float) -> Tensor:
    """`stages.filter_heads` for tokens with weights [B, N]: scores [B, H, N] -> [B, H] boolean."""
    weights, total = weights[:, None], weights.sum(1)[:, None]  # [B, 1, N], [B, 1]
    scores = scores * total[..., None]
    mean = (scores * weights).sum(-1) / total
    variance = ((scores - mean[..., None]).square() * weights).sum(-1) / total
    return within(variance, low, high)


class Faded(NamedTuple):
    """The state that travels with tokens that fade out."""

    log_mask: Tensor  # [B, N], the sum over the steps so far
    left: int  # number of patches that pruning would have left so far


class _MaskSettings(NamedTuple):
    """The settings by which the masks of all steps are computed."""

    protected: int  # number of tokens at the front, which are never masked
    temperature: float
    cls_boost: bool
    variances: tuple[float, float]
    backbone: nn.Module  # whose head may be given another pooling later

    def next_mask(
        self, step: Step, call: attention.Call, bias: Tensor | None, known: Faded
    ) -> Faded:
        """The state after one more step, whose mask comes from a block's attention call.

        Args:
            step: the step.
            call: the block's attention call.
            bias: the block's own bias, without that of earlier masks.
            known: the state before the step.
        """
        stay = step.left(known.left)
        if stay == known.left or call.q.device.type == "meta":  # meta tensors have shapes alone
            return Faded(known.log_mask, stay)
        scores = importance(
            call.q,
            call.k,
            known.log_mask,
            iters=step.iters,
            cls_boost=self.cls_boost,
            variances=self.variances,
            scale=call.scale,
            bias=bias,
        )
        mask = log_soft_mask(scores, stay, self.temperature, protected=self.protected)
        return Faded(known.log_mask + mask, stay)


class _SoftForward(StandIn):
    """Stands in for a block's forward, biases its attention and computes a step's mask."""

    def __init__(self, block: nn.Module, step: Step | None, settings: _MaskSettings, *, last: bool):
        super().__init__(block)
        self.step, self.settings, self.last = step, settings, last
        self.known: Faded | None = None  # the state after this layer's step
        self.tokens: Tensor | None = None  # [B, N, D], kept by the last block
        self.own_bias: Tensor | None = None

    def install(self) -> None:
        super().install()
        self.read_tokens = set_read_tokens(self.block, None)  # the loss compares all tokens

    def remove(self) -> None:
        if self.block.__dict__.get("forward") is self:
            set_read_tokens(self.block, self.read_tokens)
        self.known = self.tokens = None
        super().remove()

    def __deepcopy__(self, memo: dict) -> _SoftForward:
        """Copies without the tensors of the last forward, which cannot be copied in training."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        kept = {**self.__dict__, "known": None, "tokens": None, "own_bias": None}
        other.__dict__.update(copy.deepcopy(kept, memo))
        return other

    def before(self, call: attention.Call, known: Faded | None) -> attention.Call:
        self.own_bias = call.bias
        return call if known is None else biased(call, known.log_mask[:, None, None])

    def after(self, tokens: Tensor, call: attention.Call, known: Faded | None) -> Tensor | Carried:
        if known is None:
            batch, _, n, _ = call.q.shape
            known = Faded(call.q.new_zeros(batch, n), n - self.settings.protected)
        if self.step is not None:
            known = self.known = self.settings.next_mask(self.step, call, self.own_bias, known)
        self.own_bias = None
        if not self.last:
            return Carried(tokens, known)
        check_still_reads_cls(self.settings.backbone)
        self.tokens = tokens
        return tokens


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature: {temperature}, expected a positive number; the smaller, the closer to "
            "dropping tokens"
        )
