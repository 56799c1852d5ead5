"""ToMe: image tokens that are alike are merged after each layer, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec
from pcx.models.block_forward import Carried, StandIn
from pcx.ops.dispatch import exporting
from pcx.ops.reference.attention import without_autocast
from pcx.ops.reference.token_choice import pick
from pcx.token_pruning.handles import Handle, biased, blocks_of, clear, seen, spec_of


class Merged(NamedTuple):
    """What became of the image's tokens."""

    sizes: Tensor  # [B, n], how many of them each token left stands for
    places: Tensor  # [B, N] int64, the token left that each of them is in


class Merging(Handle):
    """What `tome` set up; `remove` takes it away again.

    Attributes:
        r: of each layer, as asked for; that of the last is 0.
    """

    def __init__(self, r: Sequence[int], layers: Sequence[_MergedForward], spec: BackboneSpec):
        super().__init__(layers, spec, "tome", {"r": list(r)})
        self.r = tuple(r)
        self._merging = tuple(layer for layer in layers if layer.r)

    @property
    def merged(self) -> list[Merged]:
        """Of the last batch, after each layer that merges: the sizes of the tokens left, and the
        place among them of each token that came to the first such layer."""
        return seen("merged", [layer.merged for layer in self._merging])


def tome(model: nn.Module, *, r: int | Sequence[int]) -> Merging:
    """Merges r pairs of image tokens after each layer (ToMe, Bolya et al., ICLR 2023, Sec. 3).

    Each layer's tokens are split by turns into A and B; the r of A that are most like one of B, by
    the cosine of their keys' mean over heads, are merged into it by the mean weighted by sizes.
    Later layers attend in proportion to the sizes s, softmax(q k^T / sqrt(d) + log s) (Eq. 1).
    [CLS], registers and prompts are never merged and have size 1.

    Tokens are merged after the whole layer; the paper merges between its attention and its MLP, so
    that here a layer's own MLP still sees all tokens that came. Where the head reads all tokens
    (average or attention pooling), each token left goes to it once for every token it stands for.

    All samples lose equally many tokens, so shapes are static: the model compiles and exports as
    before. Its weights and `state_dict` stay as they are. Between blocks the tokens travel as a
    pair with their sizes, which is what hooks on blocks see. Setting up any of these methods anew
    replaces what was.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification, or a pcx.VPT on
            the path "folded"; changed in place until `remove` is called. Without rotary positions.
        r: pairs to merge after every layer, or after each. As published, a layer merges at most
            half of the tokens that may be merged, rounded down. What is asked for after the last
            layer is left out, since nothing comes after it that fewer tokens would spare.

    Returns:
        A handle: `remove()`, and `merged` after a forward.

    Raises:
        ValueError: r is no whole number from 0, or of another length than there are layers, or the
            backbone is not supported.

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
                last=i == len(blocks) - 1,
                restores=spec.read_tokens is None,
            )
            for i in range(first, len(blocks))
        ],
        spec,
    )


def match(features: Tensor, r: int, *, protected: int) -> Tensor:
    """Bipartite soft matching (Sec. 3, Appendix D): which tokens to merge into which.

    Tokens at even places are A, at odd ones B; what is protected is in neither. Of A, the r tokens
    whose best match in B is the most like them go into that match.

    Args:
        features: [B, N, F]; the paper's are the keys' mean over heads.
        r: tokens to merge away, 0 to (N - protected) / 2; of equally alike ones the first.
        protected: tokens at the front.

    Returns:
        [B, N] int64: the place of each token among the N - r left, of which those protected are
        first, then come what is left of A and all of B.

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
    wide = torch.promote_types(features.dtype, torch.float32)  # 16 bits would see ties
    unit = F.normalize(features.to(wide), dim=-1)
    a, b = (slice(protected + (protected + odd) % 2, None, 2) for odd in (0, 1))
    with without_autocast(unit):
        alike, best = (unit[:, a] @ unit[:, b].transpose(1, 2)).max(2)  # [B, |A|]
    order = alike.sort(dim=1, descending=True, stable=True).indices
    goes, stays = order[:, :r], order[:, r:].sort(1).values
    start = protected + stays.shape[1]  # where B begins
    places = new.clone()  # of what is protected, as they are
    places[:, a] = (
        torch.zeros_like(order)
        .scatter(1, stays, new[:, protected:start])
        .scatter(1, goes, start + best.gather(1, goes))
    )
    places[:, b] = new[:, start : tokens - r]
    return places


def merge(x: Tensor, sizes: Tensor, places: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """The tokens left, each the mean of those that go there, weighted by their sizes.

    Args:
        x: [B, N, D].
        sizes: [B, N], above 0.
        places: [B, N] int64, as `match` gives them.
        left: how many are left, n.

    Returns:
        [B, n, D] of x's dtype, and the sizes [B, n]; a token merged with none keeps its bits.
    """
    batch, _, dim = x.shape
    summed = sizes.new_zeros(batch, left).scatter_add(1, places, sizes)
    share = sizes / summed.gather(1, places)  # [B, N], of the token that it goes into
    weighted = share[..., None] * x  # [B, N, D]
    mean = weighted.new_zeros(batch, left, dim)
    mean = mean.scatter_add(1, places[..., None].expand(-1, -1, dim), weighted)
    return mean.to(x.dtype), summed


def size_bias(sizes: Tensor) -> Tensor:
    """Proportional attention's bias of the logits by the keys' sizes (Eq. 1); [B, 1, 1, n]."""
    return sizes.log()[:, None, None]


class _MergedForward(StandIn):
    def __init__(self, block: nn.Module, r: int, protected: int, *, last: bool, restores: bool):
        super().__init__(block)
        self.r, self.protected, self.last, self.restores = r, protected, last, restores
        self.merged: Merged | None = None

    def before(self, call: attention.Call, known: Merged | None) -> attention.Call:
        return call if known is None else biased(call, size_bias(known.sizes))

    def after(self, tokens: Tensor, call: attention.Call, known: Merged | None) -> Tensor | Carried:
        if self.last:
            return pick(tokens, known.places) if known and self.restores else tokens
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
        self.merged = None if exporting() else known  # then nothing to look at
        return Carried(tokens, known)

    def _places(self, k: Tensor, r: int) -> Tensor:
        if k.device.type == "meta":  # shapes alone: there is nothing to match
            return k.new_empty(k.shape[0], k.shape[2], dtype=torch.int64)
        return match(k.mean(1), r, protected=self.protected)


def _pairs(r: Any, layers: int) -> list[int]:
    many = isinstance(r, Sequence) and not isinstance(r, str)
    pairs = list(r) if many else [r] * layers
    if len(pairs) != layers:
        raise ValueError(f"r: {len(pairs)} values for {layers} layers")
    for pair in pairs:
        if isinstance(pair, bool) or not isinstance(pair, int) or pair < 0:
            raise ValueError(f"r: {pair!r}, expected a whole number, 0 or more")
    return [*pairs[:-1], 0]
