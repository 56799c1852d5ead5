"""The settings that a budget search draws from, and the multiply-adds of each (Sec. 4.1, G.5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn

from pcx.analysis.cost import WHOLE, multiply_adds_by_module
from pcx.backbones.inputs import input_size
from pcx.token_pruning.dropping import zero_tprune
from pcx.token_pruning.schedule import Step
from pcx.token_pruning.stages import offered

if TYPE_CHECKING:
    import optuna

FEWEST_LAYERS = 3  # the paper: pruning must not be left to one or two layers alone
RATIOS = (0.5, 0.99)  # range of the keep ratios that are drawn, before scaling to the budget
LEAST_KEEP = 0.3  # scaling brings no keep ratio below this, so that no layer drops everything
MOST_SIMILAR = (
    0.1  # largest share of the patches that S drops in a layer; the paper drops 10 of 196
)
# From this strength on (see `Space._steps`) every keep ratio is LEAST_KEEP.
STRONGEST = 1 + math.log(LEAST_KEEP) / math.log(RATIOS[1])


@dataclass(frozen=True)
class Draw:
    """A random setting before it is scaled to the budget. The dictionaries are keyed by layer."""

    count: int  # the fewest layers that prune
    order: Sequence[int]  # all layers; the first `count` of them prune, more if need be
    ratios: Mapping[int, float]
    similar: Mapping[int, int]
    iters: Mapping[int, int]


class Space:
    """All settings of `zero_tprune` that a search may try on a model, with the cost of each.

    Args:
        model: as `pcx.zero_tprune` takes it, not pruned.
        fixed: further arguments of `pcx.zero_tprune`, the same in all settings.

    Attributes:
        depth: number of blocks.
        layers: the layers after which tokens may be dropped, 1 to depth - 1.
        patches: number of patches of an image.
        whole: multiply-adds per image of the unpruned model.

    Raises:
        ValueError: the model has fewer than 2 blocks or fewer than 3 patches.
    """

    def __init__(self, model: nn.Module, fixed: Mapping[str, Any]):
        size = input_size(model)
        first = zero_tprune(model, layers=(1,), keep=1.0, iters=1, **fixed)
        first.remove()
        self.depth = len(first.blocks)
        self.layers = range(1, self.depth)  # after the last there is nothing left to save
        self.patches = size[1] * size[2] // first.patch_pixels
        if not self.layers or self.patches < FEWEST_LAYERS:
            raise ValueError(
                f"model: {self.depth} blocks and {self.patches} patches, expected 2 or more and "
                f"{FEWEST_LAYERS} or more"
            )
        self.partition = fixed.get("partition", "sequential-u")
        self.whole, self._costs_after = self._measured(model, first.blocks, fixed)

    def _measured(
        self, model: nn.Module, blocks: Sequence[str], fixed: Mapping[str, Any]
    ) -> tuple[float, dict[int, list[float]]]:
        """The unpruned model's multiply-adds, and the cost of everything after each layer.

        The second result maps a layer to a list. Its entry n is the multiply-adds of all that
        follows the layer when n patches are left, up to a constant.

        The cost of each block and of the head is a polynomial of degree 2 in the number of tokens.
        Counts at three numbers of patches therefore give all others, exactly in rational numbers.
        """
        points = (self.patches, (1 + self.patches) // 2, 1)
        counted = {}
        for patches in points:
            keep = patches / self.patches
            pruning = zero_tprune(model, layers=(1,), keep=keep, iters=1, **fixed)
            try:
                counted[patches] = multiply_adds_by_module(model)
            finally:
                pruning.remove()
        after = {n: Fraction(counts[WHOLE]) for n, counts in counted.items()}
        costs = {}
        for layer in self.layers:
            for n, counts in counted.items():
                (block,) = (name for name in counts if name.endswith(f".{blocks[layer - 1]}"))
                after[n] -= Fraction(counts[block])
            costs[layer] = [float(_interpolated(after, n)) for n in range(self.patches + 1)]
        return counted[self.patches][WHOLE], costs

    def cost(self, steps: Sequence[Step]) -> float:
        """Multiply-adds per image under these steps, as `pcx.multiply_adds` would count them."""
        total, patches = self.whole, self.patches
        for step in steps:
            left = step.left(patches)
            total += self._costs_after[step.layer][left] - self._costs_after[step.layer][patches]
            patches = left
        return total

    def limit(self, budget: float) -> float:
        """The budget in multiply-adds per image.

        Raises:
            ValueError: the unpruned model needs less, or no pruning reaches the budget.
        """
        limit = budget * self.whole if budget <= 1 else float(budget)
        if limit > self.whole:
            raise ValueError(
                f"budget: {budget}, but the unpruned model takes {self.whole:.0f} multiply-adds; "
                "give fewer, or a share of them in (0, 1]"
            )
        zero = dict.fromkeys(self.layers, 0)
        lowest = Draw(0, self.layers, dict.fromkeys(self.layers, RATIOS[0]), zero, zero)
        least = self.cost(self._steps(lowest, self.layers, STRONGEST))
        if least > limit:
            raise ValueError(
                f"budget: {budget} cannot be reached: {LEAST_KEEP} of the patches kept after each "
                f"of layers 1 to {self.depth - 1} leave {least:.0f} multiply-adds; give "
                f"{math.ceil(1000 * least / self.whole) / 1000} of the unpruned model's or more"
            )
        return limit

    def draw(self, trial: optuna.Trial) -> Draw:
        """The setting that a trial of Optuna suggests."""
        most = len(self.layers)
        similar = int(MOST_SIMILAR * self.patches)
        place = {i: trial.suggest_float(f"place_{i}", 0, 1) for i in self.layers}
        return Draw(
            count=trial.suggest_int("layers", min(FEWEST_LAYERS, most), most),
            order=sorted(self.layers, key=lambda layer: place[layer]),
            ratios={i: trial.suggest_float(f"ratio_{i}", *RATIOS) for i in self.layers},
            similar={i: trial.suggest_int(f"similar_{i}", 0, similar) for i in self.layers},
            iters={i: trial.suggest_int(f"iters_{i}", *self._iters(i)) for i in self.layers},
        )

    def _iters(self, layer: int) -> tuple[int, int]:
        """The paper's range of PageRank iterations for a layer (G.1)."""
        if layer <= 3:
            return (30, 50)
        return (1, 1) if layer > self.depth - 3 else (5, 10)

    def at_budget(self, draw: Draw, limit: float) -> list[Step]:
        """The drawn setting, scaled to the most multiply-adds that are not above the limit."""
        for count in range(draw.count, len(self.layers) + 1):
            layers = sorted(draw.order[:count])
            if self.cost(self._steps(draw, layers, STRONGEST)) <= limit:
                break
        too_weak, enough = 0.0, STRONGEST
        while enough - too_weak > 1e-4:
            strength = (too_weak + enough) / 2
            if self.cost(self._steps(draw, layers, strength)) <= limit:
                enough = strength
            else:
                too_weak = strength
        return self._steps(draw, layers, enough)

    def _steps(self, draw: Draw, layers: Sequence[int], strength: float) -> list[Step]:
        """The drawn setting at a strength. A higher strength leaves fewer patches after each layer.

        Strength 0 drops nothing. Strength 1 drops the similar patches alone. Above 1, a layer keeps
        r^(strength - 1) of the patches that are not similar, where r is its drawn ratio.
        """
        steps, patches = [], self.patches
        for layer in layers:
            similar = int(draw.similar[layer] * min(strength, 1))
            similar = min(similar, offered(patches, self.partition), patches - 1)
            keep = draw.ratios[layer] ** max(strength - 1, 0)
            keep = max(keep, LEAST_KEEP, 1 / (patches - similar))  # at least one patch stays
            steps.append(Step(layer, round(keep, 3), max(draw.iters[layer], 1), similar))
            patches = steps[-1].left(patches)
        return steps


def _interpolated(points: Mapping[int, Fraction], x: int) -> Fraction:
    """The value at x of the polynomial of least degree through the points (Lagrange)."""
    return sum(
        (
            y * math.prod((Fraction(x - b, a - b) for b in points if b != a), start=Fraction(1))
            for a, y in points.items()
        ),
        Fraction(0),
    )
