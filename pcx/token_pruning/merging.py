"""ToMe: merges image tokens that are alike after each layer, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec, pools_by_token
from pcx.models.block_forward import Carried, StandIn
from pcx.ops.dispatch import exporting
from pcx.ops.reference.attention import without_autocast
from pcx.ops.reference.token_choice import pick, ranked
from pcx.token_pruning.handles import (
    Handle,
    backbone_of,
    biased,
    blocks_of,
    clear,
    of_last_batch,
    one_each,
    spec_of,
)


class Merged(NamedTuple):
    """How an image's N tokens were merged into n."""

    sizes: Tensor  # [B, n], number of original tokens that each token stands for
    places: Tensor  # [B, N] int64, index of the token that each original token is part of


class Merging(Handle):
    """The handle of `tome`; `remove` takes the merging away again.

    Attributes:
        r: number of pairs asked for after each layer; that of the last is 0.
    """

    def __init__(self, r: Sequence[int], layers: Sequence[_MergedForward], spec: BackboneSpec):
        super().__init__(layers, spec, "tome", {"r": list(r)})
        self.r = tuple(r)
        self._merging = tuple(layer for layer in layers if layer.r)

    @property
    def merged(self) -> list[Merged]:
        """How the tokens of the last batch were merged, one `Merged` per layer that merges.

        `places` is indexed by the tokens before the first layer that merges.
        """
        return of_last_batch("merged", [layer.merged for layer in self._merging])


def tome(model: nn.Module, *, r: int | Sequence[int]) -> Merging:
    """Merges r pairs of image tokens after each layer (ToMe, Bolya et al., ICLR 2023, Sec. 3).

    The tokens of each layer are split alternately into A and B. A token's features are its keys'
    mean over heads. The r tokens of A with the highest cosine to a token of B are merged into it,
    by the mean weighted by sizes. Later layers attend in proportion to the sizes s:
    softmax(q k^T / sqrt(d) + log s) (Eq. 1). [CLS], registers and prompts are never merged and have
    size 1.

    Tokens are merged after the whole layer. The paper merges between a layer's attention and its
    MLP; here the MLP still sees all tokens that came. If the head reads all tokens (average or
    attention pooling), each merged token goes to it once for every token it stands for.

    All samples lose equally many tokens, so shapes are static: the model compiles and exports as
    before. Its weights and `state_dict` do not change. Between blocks the tokens travel as a pair
    with their sizes, and hooks on blocks see this pair. A second call of any token reduction
    replaces the first.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification, or a pcx.VPT on
            the path "folded", without rotary positions. It is changed in place until `remove`.
        r: number of pairs to merge, 0 or more; one for all layers, or one each. As published, a
            layer merges at most half of its patches, rounded down. The last layer merges none,
            since nothing after it would be cheaper.

    Returns:
        A handle: `remove()`, and `merged` after a forward.

    Raises:
        ValueError: r is not a whole number of 0 or more, or has another length than there are
            layers, or the backbone is not supported.

    Example:
        >>> merging = pcx.token_pruning.tome(model, r=8)
        >>> logits = model(images)
        >>> merging.remove()
    """
    spec = spec_of(model)
    blocks = blocks_of(model, spec)
    pairs = _pairs(r, len(blocks))
    first = next((i for i, pair in enumerate(pairs) if pair), len(blocks))
    clear(model, blocks, range(first + 1, len(blocks) + 1))
    return Merging(
        pairs,
        [
            _MergedForward(
                blocks[i],
                pairs[i],
                spec.prefix_tokens,
                backbone_of(model),
                last=i == len(blocks) - 1,
                restores=spec.read_tokens is None,
            )
            for i in range(first, len(blocks))
        ],
        spec,
    )


def match(features: Tensor, r: int, *, protected: int) -> Tensor:
    """Bipartite soft matching (Sec. 3, Appendix D): decides which tokens merge into which.

    Tokens at even places are group A, tokens at odd places group B. Protected tokens are in
    neither. Each token of A has a best match in B. The r tokens of A that are most like their best
    match merge into it.

    Args:
        features: [B, N, F]; the paper uses the keys' mean over heads.
        r: number of tokens to merge away, 0 to (N - protected) / 2; the first among equals.
        protected: number of tokens at the front.

    Returns:
        [B, N] int64: the place of each token among the N - r that are left. The order is: protected
        tokens, the rest of A, all of B.

    Raises:
        ValueError: r is out of range.
    """
    batch, tokens, _ = features.shape
    most = (tokens - protected) // 2
    if not 0 <= r <= most:
        raise ValueError(f"r: {r}, expected 0 to {most} of {tokens - protected} tokens")
    new = torch.arange(tokens, device=features.device).expand(batch, -1)
    if r == 0:
        return new
    # 16 bits would round different likenesses to ties.
    wide = torch.promote_types(features.dtype, torch.float32)
    unit = F.normalize(features.to(wide), dim=-1)
    a, b = (slice(protected + (protected + odd) % 2, None, 2) for odd in (0, 1))
    with without_autocast(unit):
        alike, best = (unit[:, a] @ unit[:, b].transpose(1, 2)).max(2)  # [B, |A|]
    order = ranked(alike)
    goes, stays = order[:, :r], order[:, r:].sort(1).values
    start = protected + stays.shape[1]  # where B begins
    places = new.clone()  # protected tokens keep their places
    places[:, a] = (
        torch.zeros_like(order)
        .scatter(1, stays, new[:, protected:start])
        .scatter(1, goes, start + best.gather(1, goes))
    )
    places[:, b] = new[:, start : tokens - r]
    return places


def merge(x: Tensor, sizes: Tensor, places: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Merges tokens: each one left is the mean of those placed there, weighted by their sizes.

    Args:
        x: tokens [B, N, D].
        sizes: [B, N], above 0.
        places: [B, N] int64, as `match` gives them.
        left: number of tokens left, n.

    Returns:
        Tokens [B, n, D] of x's dtype, and sizes [B, n]. A token merged with none keeps its bits.
    """
    batch, _, dim = x.shape
    summed = sizes.new_zeros(batch, left).scatter_add(1, places, sizes)
    share = sizes / summed.gather(1, places)  # [B, N], of each token in the one it merges into
    weighted = share[..., None] * x  # [B, N, D]
    mean = weighted.new_zeros(batch, left, dim)
    mean = mean.scatter_add(1, places[..., None].expand(-1, -1, dim), weighted)
    return mean.to(x.dtype), summed


def size_bias(sizes: Tensor) -> Tensor:
    """The bias of proportional attention on the logits, log of the keys' sizes; [B, 1, 1, n]."""
    return sizes.log()[:, None, None]


class _MergedForward(StandIn):
    """Stands in for a block's forward and merges tokens of its output."""

    def __init__(
        self,
        block: nn.Module,
        r: int,
        protected: int,
        backbone: nn.Module,
        *,
        last: bool,
        restores: bool,
    ):
        super().__init__(block)
        self.r, self.protected, self.last, self.restores = r, protected, last, restores
        self.backbone = backbone  # whose head may be given another pooling later
        self.merged: Merged | None = None

    def before(self, call: attention.Call, known: Merged | None) -> attention.Call:
        return call if known is None else biased(call, size_bias(known.sizes))

    def after(self, tokens: Tensor, call: attention.Call, known: Merged | None) -> Tensor | Carried:
        if self.last:
            restores = self.restores or not pools_by_token(self.backbone)
            return pick(tokens, known.places) if known and restores else tokens
        r = min(self.r, (tokens.shape[1] - self.protected) // 2)
        with torch.no_grad():
            places = self._places(call.k, r)
        if known is None:
            wide = torch.promote_types(tokens.dtype, torch.float32)
            known = Merged(tokens.new_ones(tokens.shape[:2], dtype=wide), places)
        else:
            known = Merged(known.sizes, places.gather(1, known.places))
        tokens, sizes = merge(tokens, known.sizes, places, tokens.shape[1] - r)
        known = Merged(sizes, known.places)
        self.merged = None if exporting() else known  # an exported program keeps no state
        return Carried(tokens, known)

    def _places(self, k: Tensor, r: int) -> Tensor:
        if k.device.type == "meta":  # meta tensors have shapes alone, so any places do
            return k.new_empty(k.shape[0], k.shape[2], dtype=torch.int64)
        return match(k.mean(1), r, protected=self.protected)


def _pairs(r: Any, layers: int) -> list[int]:
    checked = [whole_number("r", pair) for pair in one_each("r", r, layers)]
    return [*checked[:-1], 0]
