"""Zero-TPrune: image tokens dropped after some layers, without training."""

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
from pcx.token_pruning.handles import Handle, blocks_of, clear, composed, patches_of, spec_of
from pcx.token_pruning.schedule import Step, arguments_of, check_counts, check_layers, steps_of

# The paper's ablations on DeiT-S (Sec. 4.1): 4.55 to 3.08 GFLOPs.
TABLE_1: dict[str, Any] = {
    "layers": (1, 3, 6, 9, 11),
    "keep": (1.0, 0.9, 0.8, 0.7, 1.0),
    "iters": (30, 5, 5, 1, 1),
    "similar": 10,
}

# Settings of our own that come to the multiply-adds of the paper's variants on DeiT-S, 34.7, 45.1
# and 12.7% fewer (Table 2), whose settings it does not give: after a third and two thirds of the
# layers, one ratio for both, and 5 iterations, the paper's for layers in the middle (Sec. 4.2). On
# the embedded backbone such places lose least (benchmarks/results/zero_tprune_scenes.csv). "a"
# comes to 121 patches at once, whose attention kernels take in one tile of 128 queries.
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"layers": (4, 8), "keep": keep, "iters": 5, "similar": 10}
    for name, keep in {"a": 0.653, "b": 0.493, "c": 0.927}.items()
}


class Pruning(Handle):
    """What `zero_tprune` set up; `remove` takes it away again.

    Attributes:
        steps: what is dropped after which layer, in their order.
        prefix_tokens: tokens before the patches.
        patch_pixels: of one patch.
        blocks: names of all of the backbone's blocks.
        tokens: that came to the first step with the last batch.
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
        """Of the last batch, after each step: the places [B, n], in the sequence of tokens that
        came to the first step, of those that are left. A copy of the model has no handle."""
        return composed([pruned.stays for pruned in self._pruned])

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

    After each of `layers`, tokens are ranked by one vote (I'), those that are like a more important
    one are dropped (S), and of the rest those of the highest Weighted PageRank stay (I). [CLS],
    registers and prompts are never dropped; a layer's graph leaves its prompts out. All samples
    lose equally many tokens, so shapes are static: the model compiles and exports as before. Its
    weights and `state_dict` stay as they are. Setting it up anew replaces what was.

    Args:
        model: a timm vision transformer, Hugging Face's ...ForImageClassification, or a pcx.VPT on
            the path "folded"; changed in place until `remove` is called. Without rotary positions.
        layers: after which, counted from 1, ascending; not the last where only the head's tokens
            are computed there.
        keep: share of the patches, after S, that stay; one for all layers, or one each.
        iters: of PageRank; the paper has 30, 5 and 1 in the first three, the middle and the last
            three layers.
        similar: patches that S drops.
        ranking: of the tokens that S leaves: "pagerank", or a baseline to compare with: "cls" (the
            attention of [CLS]), "average" (that of all tokens), "random".
        cls_boost: let [CLS] start sqrt(N) times above the others ("Zero-TPrune"), or all alike
            ("Zero-TPrune-uni").
        partition, measure: of S, as `pcx.token_pruning.stages.without_similar` takes them.
        variances: bounds of the head filter.

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
    def __init__(self, block: nn.Module, step: Step, protected: int, choices: dict[str, Any]):
        super().__init__(block)
        self.step, self.protected, self.choices = step, protected, choices
        self.stays: Tensor | None = None  # [B, n], of the tokens that came
        self.came = 0

    def after(self, tokens: Tensor, call: attention.Call, known: None) -> Tensor:
        with torch.no_grad():
            stays = self._choose(call)
        self.stays = None if exporting() else stays  # then nothing to look at
        return pick(tokens, stays)

    def _choose(self, call: attention.Call) -> Tensor:
        self.came = call.q.shape[2]
        keep = self.step.left(self.came - self.protected)
        if call.q.device.type == "meta":  # shapes alone: there is nothing to rank
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
