"""The stages of one Zero-TPrune pruning layer (paper, Sec. 3), each a function of its own.

I' ranks tokens by one vote. S drops tokens that are like more important ones. I keeps the most
important of the rest. The first tokens, [CLS] and registers, are `protected`: they vote and are
never dropped. All counts are of patches and the same for every sample, so shapes are static.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pcx.ops.dispatch import exporting
from pcx.ops.reference import attention
from pcx.ops.reference.token_choice import (
    VARIANCES,
    check_keep,
    combine_heads,
    cosines,
    filter_heads,
    least_alike,
    pick,
    products,
    ranked,
    with_protected,
)
from pcx.ops.token_choice import dissimilar_tokens, important_tokens
from pcx.ops.weighted_pagerank import weighted_pagerank

PARTITIONS = ("sequential-u", "sequential-i", "alternating", "random", "none")
RANKINGS = ("pagerank", "cls", "average", "random")
MEASURES = ("cosine", "dot")  # or a number, the p of a Minkowski distance


def importance(
    q: Tensor,
    k: Tensor,
    *,
    iters: int,
    cls_boost: bool = False,
    variances: tuple[float, float] = VARIANCES,
    scale: float | None = None,
    bias: Tensor | None = None,
    prefix_k: Tensor | None = None,
) -> Tensor:
    """The I-stage's scores: Weighted PageRank, VHF, EIR (Sec. 3.2).

    With `iters=1` and no boost these are the scores of the I'-stage (Sec. 3.1).

    Args:
        q, k: [B, H, N, d].
        iters: number of PageRank iterations, 0 or more.
        cls_boost: whether the first token, [CLS], starts sqrt(N) times above the others
            ("Zero-TPrune"), or all start alike ("Zero-TPrune-uni").
        variances: (low, high), the bounds of VHF.
        scale, bias, prefix_k: as `pcx.weighted_pagerank` takes them.

    Returns:
        [B, N] float32 (float64 for float64).
    """
    start = boosted(q, q.shape[2]) if cls_boost else None
    scores = weighted_pagerank(
        q, k, iters=iters, init=start, scale=scale, bias=bias, prefix_k=prefix_k
    )
    return combine_heads(scores, filter_heads(scores, *variances))


def boosted(like: Tensor, tokens: int) -> Tensor:
    """Initial scores [N] of PageRank, in which [CLS] has sqrt(N) times the others' (Sec. 3.2)."""
    start = like.new_ones(tokens, dtype=torch.promote_types(like.dtype, torch.float32))
    start[:1].fill_(tokens**0.5)  # assigning a Python number would copy it from the CPU
    return start


def cls_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """A baseline's scores [B, N]: attention of the first token, [CLS], to each, mean over heads."""
    return attention.cls_attention(q, k, bias, scale)


def average_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """A baseline's scores [B, N]: attention of all tokens to each, mean over tokens and heads."""
    return weighted_pagerank(q, k, iters=1, scale=scale, bias=bias).mean(1)


def without_similar(
    features: Tensor,
    scores: Tensor,
    drop: int,
    *,
    protected: int,
    partition: str = "sequential-u",
    measure: str | float = "cosine",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The S-stage (Sec. 3.3): drops the patches of group A that are most like one of group B.

    The patches are ranked by their scores and split into two halves:

    | partition      | group A                           | group B        |
    | -------------- | --------------------------------- | -------------- |
    | "sequential-u" | the less important half (paper)   | the other half |
    | "sequential-i" | the more important half           | the other half |
    | "alternating"  | every second patch of the ranking | the other half |
    | "random"       | a random half                     | the other half |
    | "none"         | all patches                       | all patches    |

    With "none" each patch is compared with all others.

    Args:
        features: [B, N, F]; the paper uses the keys.
        scores: [B, N], the scores of the I'-stage.
        drop: number of patches to drop, 0 to the size of A (half of the patches, rounded down).
        protected: number of tokens at the front, which are in neither group.
        partition: one of PARTITIONS.
        measure: likeness by "cosine", by "dot", or by a negated Minkowski distance, given as its p
            (1 or more, or inf).
        generator: source of the "random" partition, on the features' device.

    Returns:
        [B, N - drop] int64: the tokens that stay, ascending.

    Raises:
        ValueError: no such partition or measure exists, or `drop` is more than group A holds.
    """
    batch, tokens, _ = features.shape
    patches = tokens - protected
    check_choices(partition, measure)
    _check_drop(drop, patches, partition)
    size = offered(patches, partition)
    features = features[:, protected:]
    if partition == "random":
        chance = torch.rand(batch, patches, generator=generator, device=features.device)
        order = chance.argsort(1)
    else:
        order = ranked(scores[:, protected:])  # [B, P], the most important first
    a, b = {
        "sequential-u": (order[:, patches - size :], order[:, : patches - size]),
        "sequential-i": (order[:, :size], order[:, size:]),
        "alternating": (order[:, 1::2], order[:, ::2]),
        "random": (order[:, :size], order[:, size:]),
        "none": (order, order.sort(1).values),
    }[partition]
    a = a.sort(1).values
    likeness = _likeness(pick(features, a), pick(features, b), measure)  # [B, |A|, |B|]
    if partition == "none":
        same = torch.eye(patches, dtype=torch.bool, device=likeness.device)
        likeness = likeness.masked_fill(same, -torch.inf)
    left = least_alike(likeness, a, drop)
    stays = left if partition == "none" else torch.cat([b, left], 1)
    return with_protected(stays + protected, protected)


def check_choices(partition: str, measure: str | float, ranking: str = "pagerank") -> None:
    """Checks the names of partition, measure and ranking; raises a ValueError."""
    if ranking not in RANKINGS:
        raise ValueError(f"ranking: got {ranking!r}, expected one of {RANKINGS}")
    if partition not in PARTITIONS:
        raise ValueError(f"partition: got {partition!r}, expected one of {PARTITIONS}")
    if measure not in MEASURES and (isinstance(measure, str) or not measure >= 1):
        raise ValueError(
            f"measure: got {measure!r}, expected one of {MEASURES} or a Minkowski distance's p, "
            "1 or more"
        )


def check_variances(variances: tuple[float, float]) -> None:
    """Checks that the variances are bounds, 0 <= low <= high; raises a ValueError."""
    low, high = variances if len(variances) == 2 else (math.nan, math.nan)
    if not 0 <= low <= high:
        raise ValueError(f"variances: {variances!r}, expected (low, high) with 0 <= low <= high")


def _check_drop(drop: int, patches: int, partition: str) -> None:
    size = offered(patches, partition)
    if not 0 <= drop <= size:
        raise ValueError(
            f"drop: {drop} similar patches, but partition {partition!r} of {patches} offers "
            f"{size}; give 0 to {size}"
        )


def offered(patches: int, partition: str) -> int:
    """The most patches that S can drop under a partition: the size of group A."""
    return patches if partition == "none" else patches // 2


def prune(
    q: Tensor,
    k: Tensor,
    *,
    keep: int,
    similar: int,
    iters: int,
    protected: int,
    ranking: str = "pagerank",
    cls_boost: bool = True,
    partition: str = "sequential-u",
    measure: str | float = "cosine",
    variances: tuple[float, float] = VARIANCES,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One pruning layer: I', S on the keys' mean over heads, I among what S leaves (Sec. 3.1).

    In I, attention is a softmax over the tokens that S leaves.

    Args:
        q, k: [B, H, N, d], the queries and keys of the block's attention.
        keep: number of patches that stay in the end.
        similar: number of patches that S drops.
        iters: number of PageRank iterations in I.
        protected: number of tokens at the front, which always stay.
        ranking: how I ranks tokens, one of RANKINGS: "pagerank" is the paper's; its baselines are
            the attention of [CLS], the average attention, and a random order.
        cls_boost, variances: as `importance` takes them, in I.
        partition, measure: as `without_similar` takes them.
        scale: factor on the attention logits, 1/sqrt(d) by default.
        bias: as SDPA's attn_mask, broadcastable to [B, H, N, N].

    Returns:
        [B, protected + keep] int64: the tokens that stay, ascending.

    Raises:
        ValueError: `keep` or `similar` is more than there are patches, or no such ranking,
            partition or measure exists.
    """
    check_choices(partition, measure, ranking)
    patches = q.shape[2] - protected
    _check_drop(similar, patches, partition)
    check_keep(keep, patches - similar)
    stays = None
    if similar:
        votes = weighted_pagerank(q, k, iters=1, scale=scale, bias=bias)
        if partition == "sequential-u" and measure == "cosine":
            stays = dissimilar_tokens(votes, k, similar, protected=protected, variances=variances)
        else:
            stays = _without_similar(votes, k, similar, protected, variances, partition, measure)
        bias = None if bias is None else _among(bias, stays)
    if ranking == "pagerank":
        left = q.shape[2] - similar
        start = boosted(q, left) if cls_boost else None
        scores = weighted_pagerank(
            q, k, iters=iters, init=start, scale=scale, bias=bias, among=stays
        )
    elif ranking == "random":
        scores = torch.rand(q.shape[0], 1, q.shape[2] - similar, device=q.device)
    else:
        if stays is not None:
            q, k = attention.tokens(q, stays), attention.tokens(k, stays)
        baseline = cls_attention if ranking == "cls" else average_attention
        scores = baseline(q, k, scale=scale, bias=bias)[:, None]
    return important_tokens(scores, keep, protected=protected, variances=variances, among=stays)


def _without_similar(votes, k, drop, protected, variances, partition, measure) -> Tensor:
    wide = torch.promote_types(k.dtype, torch.float32)
    return without_similar(
        k.mean(1, dtype=wide),
        combine_heads(votes, filter_heads(votes, *variances)),
        drop,
        protected=protected,
        partition=partition,
        measure=measure,
    )


def _among(bias: Tensor, index: Tensor) -> Tensor:
    """The rows and columns of a bias at the tokens `index` [B, n].

    The bias is broadcastable to [B, H, N, N]; axes of size 1 stay as they are.
    """
    batch, n = index.shape
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    bias = bias.expand(batch, *bias.shape[1:])
    for axis, picked in ((2, index[:, None, :, None]), (3, index[:, None, None, :])):
        if bias.shape[axis] > 1:
            shape = [*bias.shape]
            shape[axis] = n
            bias = bias.gather(axis, picked.expand(shape))
    return bias


def _likeness(a: Tensor, b: Tensor, measure: str | float) -> Tensor:
    """How alike features are: [B, n, F] and [B, m, F] -> [B, n, m], higher is more alike."""
    if measure in MEASURES:
        return cosines(a, b) if measure == "cosine" else products(a, b)
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b, p = a.to(wide), b.to(wide), float(measure)
    if not exporting():
        return -torch.cdist(a, b, p=p)
    apart = (a[:, :, None] - b[:, None]).abs()  # [B, n, m, F]; ONNX has no cdist
    return -(apart.amax(-1) if math.isinf(p) else apart.pow(p).sum(-1).pow(1 / p))
