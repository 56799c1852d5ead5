"""The variants of VPT that its paper compares, and which of them go together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from pcx.arguments import whole_number
from pcx.backbones.spec import BackboneSpec
from pcx.backbones.timm_swin import residual_of
from pcx.models.base import check_choice
from pcx.models.vpt.locations import LOCATIONS
from pcx.models.vpt.pools import POOLS
from pcx.models.vpt.sources import SHARES

MERGINGS = ("drop", "merge")


@dataclass(frozen=True)
class Variant:
    """What a VPT has in place of the paper's default (VPT paper, Sec. 4.4 and App. D).

    Attributes:
        location: one of `LOCATIONS`: where prompts enter.
        share: one of `SHARES`: which prompts are the same.
        project: width of the numbers that a linear layer turns into prompts, None for none.
        pool: one of `POOLS`: what the head reads.
        freeze_prompts: whether the prompts stay as they were drawn.
        learn_cls: whether the backbone's [CLS] token is trained, in a copy.
        bias: whether the backbone's biases are trained, in copies.
        merging: one of `MERGINGS`: what becomes of travelling prompts where patches are merged.
    """

    location: str = "prepend"
    share: str | None = None
    project: int | None = None
    pool: str = "cls"
    freeze_prompts: bool = False
    learn_cls: bool = False
    bias: bool = False
    merging: str = "drop"

    def __post_init__(self) -> None:
        check_choice("location", self.location, tuple(LOCATIONS))
        check_choice("share", self.share, SHARES)
        check_choice("pool", self.pool, tuple(POOLS))
        check_choice("merging", self.merging, MERGINGS)
        if self.project is not None:
            whole_number("project", self.project, 1)
        for name in ("freeze_prompts", "learn_cls", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected True or False")

    def check(self, kind: str, init: str) -> None:
        """Raises a ValueError where parts have no meaning together; the message names both."""
        among = self.location == "prepend"
        refused = [
            ("share", self.share, not among, f"location={self.location!r} has no prompts to share"),
            ("share", self.share, kind == "prefix", "kind='prefix' learns keys and values"),
            (
                "share",
                self.share if self.share != "intra" else None,
                kind == "shallow",
                "kind='shallow' has prompts in one layer; use share='intra'",
            ),
            ("project", self.project, not among, f"location={self.location!r} has none"),
            ("project", self.project, kind == "prefix", "kind='prefix' learns keys and values"),
            ("location", None if among else self.location, kind == "prefix", "it has no tokens"),
            (
                "location",
                self.location if self.location in ("prepend-pixel", "concat-channel") else None,
                kind != "shallow",
                "pixels enter before the first layer; use kind='shallow'",
            ),
            (
                "pool",
                self.pool if self.pool in ("prompt", "global") else None,
                not LOCATIONS[self.location].among or kind == "prefix",
                "there are no prompts among the tokens",
            ),
            (
                "init",
                None if init == "published" else init,
                not among or kind == "prefix" or bool(self.share) or bool(self.project),
                "prototypes are tokens of each layer's own: use location='prepend' alone",
            ),
        ]
        for name, value, without_meaning, why in refused:
            if value is not None and without_meaning:
                raise ValueError(f"{name}: {value!r} has no meaning here: {why}")

    def as_json(self) -> dict[str, Any]:
        """The parts that are not the default."""
        usual = asdict(Variant())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}


def check_stages(
    backbone: nn.Module,
    spec: BackboneSpec,
    kind: str,
    path: str | None,
    variant: Variant,
    init: str,
) -> None:
    """Raises a ValueError where prompts would have to be tokens of one sequence of one width.

    Args:
        backbone: with or without stages and windows.
        spec: of the backbone.
        kind, path, variant, init: as `pcx.VPT` has them.
    """
    travels = kind == "shallow" and not spec.is_one_sequence
    if variant.merging != "drop" and not travels:
        raise ValueError(
            f"merging: {variant.merging!r} is for kind='shallow' over a backbone that merges "
            "patches, such as Swin; leave it out"
        )
    if spec.is_one_sequence:
        return
    if travels and residual_of(backbone.get_submodule(spec.blocks[0].name)) is None:
        raise ValueError(
            f"kind: 'shallow' needs one sequence of tokens of one width, or timm's Swin, and "
            f"{spec.family} is neither; use 'deep' or 'prefix'"
        )
    usual = Variant(
        freeze_prompts=variant.freeze_prompts, bias=variant.bias, merging=variant.merging
    ).as_json()
    asked = {name: value for name, value in variant.as_json().items() if name not in usual}
    if path == "concat" and not travels:
        asked["path"] = path
    if init != "published":
        asked["init"] = init
    if asked:
        name, value = next(iter(asked.items()))
        raise ValueError(
            f"{name}: {value!r} needs one sequence of tokens of one width, and {spec.family} has "
            "stages or windows; leave it out"
        )
