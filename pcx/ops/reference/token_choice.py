"""The choice of a pruning layer's tokens in plain torch (Zero-TPrune, Sec. 3).

The stages of `pcx.token_pruning.stages` use the same functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcx.ops.dispatch import exporting
from pcx.ops.reference.attention import without_autocast

VARIANCES = (0.01, 0.7)  # bounds on the variance of a head's scores, scaled to a mean of 1


def important_tokens(
    scores: Tensor, keep: int, protected: int, low: float, high: float, among: Tensor | None
) -> Tensor:
    """`pcx.ops.token_choice.important_tokens`: VHF and EIR, then the choice of the I-stage."""
    combined = combine_heads(scores, filter_heads(scores, low, high))
    best = most_important(combined, keep, protected=protected)
    return best if among is None else among.gather(1, best)


def dissimilar_tokens(
    votes: Tensor, k: Tensor, drop: int, protected: int, low: float, high: float
) -> Tensor:
    """`pcx.ops.token_choice.dissimilar_tokens`: VHF and EIR, then the paper's S-stage."""
    scores = combine_heads(votes, filter_heads(votes, low, high))[:, protected:]
    features = k.mean(1, dtype=torch.promote_types(k.dtype, torch.float32))[:, protected:]
    size = scores.shape[1] // 2  # of group A
    if not 0 <= drop <= size:
        raise ValueError(
            f"drop: {drop} similar patches, but partition 'sequential-u' of {scores.shape[1]} "
            f"offers {size}; give 0 to {size}"
        )
    order = ranked(scores)  # [B, P], the most important first
    b, a = order[:, : scores.shape[1] - size], order[:, scores.shape[1] - size :].sort(1).values
    left = least_alike(cosines(pick(features, a), pick(features, b)), a, drop)
    return with_protected(torch.cat([b, left], 1) + protected, protected)


def filter_heads(scores: Tensor, low: float = VARIANCES[0], high: float = VARIANCES[1]) -> Tensor:
    """VHF (Sec. 3.2): selects heads whose scores vary enough to tell tokens apart, not too much.

    Scores that sum to 1 over N tokens have a variance of 1/N at most. The paper's bounds would
    therefore reject every head of a small model. Here the variance is that of N times the scores,
    whose mean is 1. If all heads of a sample are rejected, all are kept.

    Args:
        scores: [B, H, N]; the scores of each head sum to 1.
        low, high: inclusive bounds on the variance.

    Returns:
        [B, H] boolean, True for the heads that are used.
    """
    variance = (scores * scores.shape[-1]).var(-1, correction=0)  # [B, H]
    return within(variance, low, high)


def within(variance: Tensor, low: float, high: float) -> Tensor:
    """Marks the heads whose variance [B, H] is within the bounds, or all of a sample if none is."""
    passed = (variance >= low) & (variance <= high)
    return passed | ~passed.any(-1, keepdim=True)


def combine_heads(scores: Tensor, heads: Tensor) -> Tensor:
    """EIR (Sec. 3.2, Eq. 2): sqrt(sum_h s_h^2 eta_h) / sum_h eta_h.

    A token that matters much to one head comes before one that matters a little to all.

    Args:
        scores: [B, H, N].
        heads: [B, H] boolean, eta; at least one head of each sample is True.

    Returns:
        [B, N].
    """
    used = heads[..., None].to(scores.dtype)  # [B, H, 1]
    return (scores.square() * used).sum(1).sqrt() / used.sum(1)


def most_important(scores: Tensor, keep: int, *, protected: int) -> Tensor:
    """The I-stage's choice: the protected tokens and the `keep` patches of the highest scores.

    Args:
        scores: [B, N].
        keep: number of patches, 0 to N - protected; the first among equals.
        protected: number of tokens at the front.

    Returns:
        [B, protected + keep] int64, ascending.

    Raises:
        ValueError: `keep` is more than there are patches.
    """
    check_keep(keep, scores.shape[1] - protected)
    best = ranked(scores[:, protected:])[:, :keep] + protected
    return with_protected(best, protected)


def check_keep(keep: int, patches: int) -> None:
    """Checks that there are `keep` patches or more; raises a ValueError."""
    if not 0 <= keep <= patches:
        raise ValueError(f"keep: {keep} of {patches} patches, expected 0 to {patches}")


def ranked(scores: Tensor) -> Tensor:
    """Indices [B, N] from the highest to the lowest score; equal scores keep their order.

    NaN comes before every number.
    """
    if not exporting():
        return scores.sort(dim=1, descending=True, stable=True).indices
    places = places_by_rank(scores)
    ascending = torch.arange(scores.shape[1], device=scores.device).expand_as(places)
    return torch.zeros_like(places).scatter(1, places, ascending)


def places_by_rank(scores: Tensor) -> Tensor:
    """The place [B, N] of each score in the order that `ranked` gives.

    It counts the scores that come before, since ONNX has no stable sort. The order of equal scores
    then depends on no runtime.
    """
    other, own = scores[:, :, None], scores[:, None]  # [B, N, 1] and [B, 1, N]
    n = torch.arange(scores.shape[1], device=scores.device)
    earlier = n[:, None] < n  # [N, N]
    higher = (other > own) | (other.isnan() & ~own.isnan())
    equal = (other == own) | (other.isnan() & own.isnan())
    return (higher | (equal & earlier)).sum(1)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x [B, N, F] at the places `index` [B, n]; [B, n, F]."""
    batch, tokens, features = x.shape
    first = torch.arange(batch, device=x.device)[:, None] * tokens
    rows = x.flatten(0, 1).index_select(0, (index + first).flatten())  # twice as fast as gather
    return rows.reshape(batch, index.shape[1], features)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of all pairs: [B, n, F] and [B, m, F] -> [B, n, m], not rounded by autocast."""
    return products(F.normalize(a, dim=-1), F.normalize(b, dim=-1))


def products(a: Tensor, b: Tensor) -> Tensor:
    """Products of all pairs: [B, n, F] and [B, m, F] -> [B, n, m], not rounded by autocast."""
    with without_autocast(a):
        return a @ b.transpose(1, 2)


def least_alike(likeness: Tensor, a: Tensor, drop: int) -> Tensor:
    """The patches of group A that stay when the `drop` most like one of group B are dropped.

    Args:
        likeness: [B, n, m], of each patch of A to each of B.
        a: [B, n], the patches of A.
        drop: number of patches to drop; the first among equals.

    Returns:
        [B, n - drop].
    """
    alike = likeness.amax(2) if likeness.shape[2] else likeness.new_zeros(a.shape)
    return a.gather(1, ranked(alike)[:, drop:])


def with_protected(patches: Tensor, protected: int) -> Tensor:
    """The `protected` tokens at the front, then the patches [B, n] in ascending order."""
    first = torch.arange(protected, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([first, patches.sort(1).values], 1)
