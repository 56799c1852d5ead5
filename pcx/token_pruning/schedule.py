"""The steps of a pruning: after which layers tokens are dropped, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pcx.arguments import real_number, whole_number
from pcx.backbones.spec import BackboneSpec
from pcx.models.block_forward import read_tokens_of
from pcx.token_pruning import stages
from pcx.token_pruning.handles import listed, one_each


@dataclass(frozen=True)
class Step:
    """The settings of one pruning step, after one layer."""

    layer: int  # counted from 1
    keep: float  # share of the patches left by the S-stage that stay, in (0, 1]
    iters: int  # PageRank iterations, 1 or more
    similar: int  # patches that the S-stage drops, 0 or more

    def left(self, patches: int) -> int:
        """Number of patches that stay of those that come; halves are rounded up.

        Raises:
            ValueError: no patch would stay.
        """
        stay = int(round((patches - self.similar) * self.keep, 9) + 0.5)
        if stay < 1:
            raise ValueError(
                f"keep: {self.keep} after layer {self.layer} leaves none of {patches} patches, of "
                f"which {self.similar} are similar; raise keep or lower similar"
            )
        return stay


def steps_of(layers: Any, keep: Any, iters: Any, similar: Any) -> list[Step]:
    """The steps that the arguments of `zero_tprune` describe.

    Raises:
        ValueError: lengths differ or a number is out of range.
    """
    layers = listed("layers", given := layers)
    if layers is None:
        raise ValueError(f"layers: {given!r}, expected a sequence of layers, counted from 1")
    if not layers:
        raise ValueError("layers: none; name the layers after which to prune, counted from 1")
    given = {"keep": keep, "iters": iters, "similar": similar}
    settings = [one_each(name, value, len(layers)) for name, value in given.items()]
    return [_step(*each) for each in zip(layers, *settings, strict=True)]


def _step(layer: Any, keep: Any, iters: Any, similar: Any) -> Step:
    layer = whole_number("layers", layer, 1)
    share = real_number(
        "keep", keep, above=0, most=1, expected=f"0 < keep <= 1 after layer {layer}"
    )
    return Step(layer, share, whole_number("iters", iters, 1), whole_number("similar", similar))


def check_layers(blocks: list, spec: BackboneSpec, steps: list[Step], *, needs_cls: bool) -> None:
    """Checks that tokens can be dropped after the layers of these steps.

    Raises:
        ValueError: a layer is out of range, they do not ascend, or [CLS] is needed and missing.
    """
    if needs_cls and not spec.has_cls:
        raise ValueError(
            "cls_boost: the model has no [CLS] token; give cls_boost=False, and no ranking 'cls'"
        )
    layers = [step.layer for step in steps]
    if any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"layers: {layers}, expected ascending ones, none twice")
    last = len(blocks)
    if read_tokens_of(blocks[-1]) is not None:
        last -= 1  # the last block computes the head's tokens alone, so nothing is left to drop
    if layers[-1] > last:
        raise ValueError(f"layers: {layers}, expected 1 to {last} of {len(blocks)}")


def check_counts(steps: list[Step], patches: int, partition: str) -> None:
    """Checks that an image of that many patches has enough of them for every step.

    Raises:
        ValueError: a step drops more patches than its partition offers, or leaves none.
    """
    for step in steps:
        most = stages.offered(patches, partition)
        if step.similar > most:
            raise ValueError(
                f"similar: {step.similar} after layer {step.layer}, where {patches} patches are "
                f"left, of which {most} could be dropped; give {most} or fewer"
            )
        patches = step.left(patches)


def arguments_of(steps: Sequence[Step]) -> dict[str, Any]:
    """The arguments layers, keep, iters and similar that give these steps, as JSON."""
    return {
        "layers": [step.layer for step in steps],
        "keep": [step.keep for step in steps],
        "iters": [step.iters for step in steps],
        "similar": [step.similar for step in steps],
    }
