"""What a tuned model knows of itself besides its weights: saved with it and shown to its users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Condensation:
    """How `pcx.condense` made a model: scores, kept prompts, and the fine-tuning."""

    method: str
    scope: str
    keep: float | int  # as asked for, or as found by keep="auto"
    scores: list[Tensor]  # per layer, [m_l]
    kept: list[Tensor]  # per layer, indices into the model before
    history: list[dict] = field(default_factory=list)  # of the fine-tuning, as fit returns it
    curve: list[dict] = field(default_factory=list)  # of keep="auto", one row per keep

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON: lists of numbers in place of tensors."""
        tensors = {name: [t.tolist() for t in getattr(self, name)] for name in ("scores", "kept")}
        return {**asdict(self), **tensors}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Condensation:
        """Reads what `as_json` gave; unknown keys are left out."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in given.items() if k in known}
        values["scores"] = [torch.tensor(s, dtype=torch.float64) for s in given["scores"]]
        values["kept"] = [torch.tensor(s, dtype=torch.int64) for s in given["kept"]]
        return cls(**values)


@dataclass
class Record:
    """What `pcx.save` keeps of a tuned model besides its weights and its method's configuration.

    Attributes:
        recipe: the settings of the last `pcx.fit`, None before one.
        trained_lr: the learning rate of that training; `pcx.condense` takes a tenth of it.
        condensation: how `pcx.condense` made the model, None of one that it did not make.
        class_names: names of the classes in the order of the logits.
        task: name of the task that the model was trained on.
        split: of a folder of photos, the digest of which files were in which split.
        transform: what images must look like: input_size, mean, std, interpolation, crop_pct, ...
        backbone: {"name", "arguments"} by which the backbone can be built again, where known.
        unknown: entries of a file by a newer pcx, which saving keeps.
    """

    recipe: dict[str, Any] | None = None
    trained_lr: float | None = None
    condensation: Condensation | None = None
    class_names: list[str] | None = None
    task: str | None = None
    split: str | None = None
    transform: dict[str, Any] | None = None
    backbone: dict[str, Any] | None = None
    unknown: dict[str, Any] = field(default_factory=dict)

    def set_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Keeps the settings of a training, but for the fingerprint that its checkpoints have."""
        self.trained_lr = recipe["lr"]
        self.recipe = {k: v for k, v in recipe.items() if k != "frozen"}

    def as_json(self) -> dict[str, Any]:
        """One JSON object, unknown entries among the known ones."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        if self.condensation is not None:
            found["condensation"] = self.condensation.as_json()
        return {**self.unknown, **found}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Record:
        """Reads what `as_json` gave; unknown entries are kept."""
        known = {f.name for f in fields(cls)} - {"unknown"}
        values = {k: v for k, v in given.items() if k in known}
        if values.get("condensation") is not None:
            values["condensation"] = Condensation.from_json(values["condensation"])
        return cls(**values, unknown={k: v for k, v in given.items() if k not in known})
