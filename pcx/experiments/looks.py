"""Pictures of what a condensed model attends to, and of the patches that token pruning drops."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from pcx.analysis.attention_maps import attention_maps
from pcx.analysis.kept_patches import kept_masks
from pcx.backbones.inputs import data_config
from pcx.condensation.condensing import condense
from pcx.experiments.prompt_work import Scored, given, trained_model
from pcx.token_pruning.dropping import zero_tprune

if TYPE_CHECKING:
    from pcx.experiments.study import Study

IMAGES, PROMPTS = 4, 24  # pictures, and prompts that are shown of each, by score
PRUNING_KEEP, PRUNING_ITERS = 0.7, 5  # of Zero-TPrune, after a third and two thirds of the layers
SIDE = 224  # pixels; larger images are made smaller


@dataclass(frozen=True)
class Looks:
    """What a condensed model looks at in some images of the test split.

    Attributes:
        scored: the scores, whose trial's model is kept.
        method: which of them selects.
        keep: the share of the prompts that is kept, not fine-tuned.
    """

    scored: Scored
    method: str
    keep: float

    def as_json(self) -> dict[str, Any]:
        """What decides the result."""
        rest = {"method": self.method, "keep": self.keep, "images": IMAGES, "prompts": PROMPTS}
        return {"kind": "looks", "scored": self.scored.as_json(), **rest}

    @torch.no_grad()
    def run(self, study: Study) -> dict[str, Any]:
        """{"task", "images": [{"picture", "label", "predicted", "cls", "prompts", "pruned"}]}.

        Pictures are PNG in base64. Maps are rows of numbers 0..255, each map's highest 255.
        """
        task = self.scored.trial.task
        rows = self.scored.by(study, self.method)
        model = trained_model(study, self.scored.trial)
        loader = study.setup.loader(task, "test")
        arguments = {"scores": rows, "epochs": 0, **given(study, task)}
        small = condense(model, loader, self.keep, **arguments).eval().float()
        images, labels = next(iter(loader))
        images = images[:IMAGES].to(study.setup.device).float()
        predicted = small(images).argmax(-1).tolist()
        maps = [each.cpu() for each in attention_maps(small, images)]
        shown = sorted(_surviving(rows, small), key=lambda each: -each["score"])[:PROMPTS]
        pictures, pruned = _pictures(small, images), _pruned(small, images)
        return {
            "task": task,
            "kept": f"{100 * self.keep:g}% of the prompts by {self.method}, not fine-tuned",
            "images": [
                {
                    "picture": pictures[i],
                    "label": int(labels[i]),
                    "predicted": predicted[i],
                    "cls": _grid(maps[-1][i, 0, _patches(small, -1)]),
                    "prompts": [_prompt(each, maps, i, small) for each in shown],
                    "pruned": [{"layer": layer, "kept": masks[i]} for layer, masks in pruned],
                }
                for i in range(len(images))
            ],
        }

    def said(self, result: Mapping[str, Any]) -> str:
        """How many pictures there are."""
        return f"{len(result['images'])} images"

    def __str__(self) -> str:
        return f"pictures of what {self.scored.trial.method} attends to on {self.scored.trial.task}"


def _surviving(rows: list[Tensor], small: Any) -> list[dict[str, Any]]:
    """Each kept prompt: its layer, its place before and after, its score."""
    kept = small.condensation.kept
    return [
        {"layer": layer, "index": int(i), "place": place, "score": float(rows[layer][i])}
        for layer, indices in enumerate(kept)
        for place, i in enumerate(indices)
    ]


def _patches(model: Any, layer: int) -> slice:
    """The places of the patches in a layer's attention."""
    return slice(model.spec.prefix_tokens + model.counts[layer], None)


def _prompt(each: dict[str, Any], maps: list[Tensor], image: int, model: Any) -> dict[str, Any]:
    """What a prompt attends to, and which patches read it."""
    own = model.spec.prefix_tokens + each["place"]
    matrix, patches = maps[each["layer"]][image], _patches(model, each["layer"])
    return {
        "layer": each["layer"] + 1,
        "index": each["index"] + 1,
        "attends": _grid(matrix[own, patches]),
        "read": _grid(matrix[patches, own]),
        "share_read": round(float(matrix[patches, own].mean()), 5),
    }


def _grid(values: Tensor) -> list[list[int]]:
    side = math.isqrt(len(values))
    scaled = (255 * values / values.max()).round().int()
    return scaled.reshape(side, side).tolist()


def _pictures(model: Any, images: Tensor) -> list[str]:
    """The images as they are seen, PNG in base64."""
    config = data_config(model)
    mean, std = (images.new_tensor(config[name])[:, None, None] for name in ("mean", "std"))
    pixels = (255 * (images * std + mean).clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu()
    found = []
    for each in pixels.numpy():
        picture, file = Image.fromarray(each), io.BytesIO()
        picture.thumbnail((SIDE, SIDE))
        picture.save(file, "PNG", optimize=True)
        found.append(base64.b64encode(file.getvalue()).decode())
    return found


def _pruned(model: Any, images: Tensor) -> list[tuple[int, list[list[list[int]]]]]:
    """(layer, for each image which patches are left after it) of Zero-TPrune."""
    copied, depth = model.copy().eval(), len(model.counts)
    layers = sorted({max(1, depth // 3), max(1, 2 * depth // 3)})
    pruning = zero_tprune(copied, layers=layers, keep=PRUNING_KEEP, iters=PRUNING_ITERS)
    copied(images)
    side = math.isqrt(pruning.patch_pixels)
    masks = kept_masks(pruning, *images.shape[-2:])
    return [
        (step.layer, mask[:, ::side, ::side].int().tolist())
        for step, mask in zip(pruning.steps, masks, strict=True)
    ]
