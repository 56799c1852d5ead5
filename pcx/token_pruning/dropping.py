"""Zero-TPrune: drops image tokens after some layers, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec
from pcx.models.block_forward import StandIn
from pcx.ops.dispatch import exporting
from pcx.ops.reference.token_choice import pick
from pcx.token_pruning import stages
from pcx.token_pruning.handles import (
    Handle,
    blocks_of,
    clear,
    patches_of,
    places_at_first_step,
    spec_of,
)
from pcx.token_pruning.schedule import Step, arguments_of, check_counts, check_layers, steps_of

# The setting of the paper's ablations on DeiT-S (Sec. 4.1): from 4.55 to 3.08 GFLOPs.
TABLE_1: dict[str, Any] = {
    "layers": (1, 3, 6, 9, 11),
    "keep": (1.0, 0.9, 0.8, 0.7, 1.0),
    "iters": (30, 5, 5, 1, 1),
    "similar": 10,
}

# Settings that come to the multiply-adds of the paper's variants a, b and c on DeiT-S, 34.7, 45.1
# and 12.7% fewer (Table 2). The paper does not give its settings; these are ours. They prune after
# a third and two thirds of the layers, by one keep ratio, with 5 iterations, the paper's number for
# layers in the middle (Sec. 4.2). On the embedded backbone these places lose least accuracy
# (benchmarks/results/zero_tprune_scenes.csv). "a" leaves 121 patches after its first step, which
# fit one tile of 128 queries of the attention kernels.
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"layers": (4, 8), "keep": keep, "iters": 5, "similar": 10}
    for name, keep in {"a": 0.653, "b": 0.493, "c": 0.927}.items()
}


class Pruning(Handle):
    """The handle of `zero_tprune`; `remove` takes the pruning away again.

    Attributes:
        steps: the pruning steps, in the order of their layers.
        prefix_tokens: number of tokens before the patches: [CLS] and registers.
        patch_pixels: number of pixels of one patch.
        blocks: names of all blocks of the backbone.
        tokens: number of tokens before the first step, in the last batch.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        pruned: Sequence[_PrunedForward],
        spec: BackboneSpec,
        choices: dict[str, Any],
    ):
        arguments = {**arguments_of(steps), **choices, "variances": list(choices["variances"])}
        super().__init__(pruned, spec, "zero_tprune", arguments)
        self.steps = tuple(steps)
        self.blocks = tuple(block.name for block in spec.blocks)
        self._pruned = tuple(pruned)

    @property
    def kept(self) -> list[Tensor]:
        """Places of the tokens left after each step, in the last batch.

        One tensor [B, n] int64 per step. A place counts in the sequence before the first step.
        """
        return places_at_first_step([pruned.stays for pruned in self._pruned])

    @property
    def tokens(self) -> int:
        return self._pruned[0].came


def zero_tprune(
    model: nn.Module,
    *,
    layers: Sequence[int],
    keep: float | Sequence[float],
    iters: int | Sequence[int],
    similar: int | Sequence[int] = 0,
    ranking: str = "pagerank",
    cls_boost: bool = True,
    partition: str = "sequential-u",
    measure: str | float = "cosine",
    variances: tuple[float, float] = stages.VARIANCES,
) -> Pruning:
    """Drops image tokens after some layers by their attention graph (Zero-TPrune, Sec. 3).

    Each step has three stages, after a layer. I' ranks all tokens by one vote. S drops `similar`
    patches that are like a more important one. I keeps the share `keep` of the rest that has the
    highest Weighted PageRank. [CLS], registers and prompts are never dropped, and prompts are not
    part of a layer's graph.

    All samples lose equally many tokens, so shapes are static: the model compiles and exports as
    before. Its weights and `state_dict` do not change. A second call replaces the first pruning.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification, or a pcx.VPT on
            the path "folded", without rotary positions. It is changed in place until `remove`.
        layers: layers after which to prune, counted from 1, ascending. The last one is excluded if
            it computes the head's tokens alone.
        keep: share in (0, 1] of the patches left by S that stay; one for all layers, or one each.
        iters: PageRank iterations, 1 or more; the paper uses 30, 5 and 1 in the first three, the
            middle and the last three layers.
        similar: number of patches that S drops, 0 or more.
        ranking: how I ranks tokens: "pagerank", or a baseline to compare with: "cls" (attention of
            [CLS]), "average" (attention of all tokens), "random".
        cls_boost: whether [CLS] starts sqrt(N) times above the others ("Zero-TPrune"), or all start
            alike ("Zero-TPrune-uni").
        partition, measure: as `pcx.token_pruning.stages.without_similar` takes them, for S.
        variances: (low, high), the bounds of the head filter.

    Returns:
        A handle: `remove()`, and `kept` after a forward.

    Raises:
        ValueError: an argument is out of range or of another length than `layers`, the backbone is
            not supported, or it has no [CLS] to boost.

    Example:
        >>> pruning = pcx.zero_tprune(model, **pcx.token_pruning.TABLE_1)
        >>> logits = model(images)
        >>> pruning.remove()
    """
    stages.check_choices(partition, measure, ranking)
    stages.check_variances(variances)
    spec = spec_of(model)
    steps = steps_of(layers, keep, iters, similar)
    blocks = blocks_of(model, spec)
    check_layers(blocks, spec, steps, needs_cls=cls_boost or ranking == "cls")
    patches = patches_of(model)
    if patches is not None:
        check_counts(steps, patches, partition)
    choices = {
        "ranking": ranking,
        "cls_boost": cls_boost,
        "partition": partition,
        "measure": measure,
        "variances": variances,
    }
    clear(model, blocks, [step.layer for step in steps])
    return Pruning(
        steps,
        [
            _PrunedForward(blocks[step.layer - 1], step, spec.prefix_tokens, choices)
            for step in steps
        ],
        spec,
        choices,
    )


class _PrunedForward(StandIn):
    """Stands in for a block's forward and drops tokens of its output."""

    def __init__(self, block: nn.Module, step: Step, protected: int, choices: dict[str, Any]):
        super().__init__(block)
        self.step, self.protected, self.choices = step, protected, choices
        self.stays: Tensor | None = None  # [B, n], places in the sequence before this step
        self.came = 0

    def after(self, tokens: Tensor, call: attention.Call, known: None) -> Tensor:
        with torch.no_grad():
            stays = self._choose(call)
        self.stays = None if exporting() else stays  # an exported program keeps no state
        return pick(tokens, stays)

    def _choose(self, call: attention.Call) -> Tensor:
        self.came = int(call.q.shape[2])  # tracing would make it a tensor
        keep = self.step.left(self.came - self.protected)
        if call.q.device.type == "meta":  # meta tensors have shapes alone, so any tokens do
            return call.q.new_empty(len(call.q), self.protected + keep, dtype=torch.int64)
        return stages.prune(
            call.q,
            call.k,
            keep=keep,
            similar=self.step.similar,
            iters=self.step.iters,
            protected=self.protected,
            scale=call.scale,
            bias=call.bias,
            **self.choices,
        )
