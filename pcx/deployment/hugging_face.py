"""Tuned models in Hugging Face's tools: a folder or repository of the hub, and the pipeline.

Trainer takes a tuned model as it is, without this file: `transformers.Trainer(model, ...)` over
data of "pixel_values" and "labels".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperImageProcessor,
)

from pcx.checkpoints.files import written_whole
from pcx.checkpoints.fingerprint import backbone_name
from pcx.checkpoints.saving import load, save
from pcx.models.base import TunedModel
from pcx.models.peft_model import tuned
from pcx.training.objectives import MultiLabel, Regression, Segmentation, objective_of

FILE = "pcx.safetensors"
CARD = "README.md"


class PcxConfig(PretrainedConfig):
    """What Hugging Face's tools ask of a model's configuration: the names of its classes."""

    model_type = "pcx"


class PcxForImageClassification(PreTrainedModel):
    """A tuned model as one of Hugging Face's for image classification.

    `save_pretrained(folder)` writes what `pcx.save` does, the configuration of images and a model
    card; `push_to_hub(name)` sends them. Once this module is imported, `pipeline(model="folder")`
    and transformers' Auto classes read such a folder. The backbone's own weights are not in the
    folder: it names them. To train, give the tuned model itself to Trainer.

    Args:
        model: a tuned model, or a model of peft.

    The pipeline reads images by transformers' own functions, which show what lies under transparent
    pixels and cut 16 bits off; pcx shows white there, and scales.

    Raises:
        ValueError: the model is of another kind, gives no probabilities of several classes, or has
            two classes of one name, which Hugging Face's `label2id` cannot tell apart.

    Example:
        >>> classifier = PcxForImageClassification(pcx.load("cars.safetensors"))
        >>> pipe = transformers.pipeline(
        ...     "image-classification", model=classifier, image_processor=classifier.processor()
        ... )
    """

    config_class = PcxConfig
    main_input_name = "pixel_values"
    _no_split_modules: list[str] = []  # noqa: RUF012  # as transformers has it

    def __init__(self, model: nn.Module):
        known = tuned(model)
        if known.num_classes == 0:
            raise ValueError("model: it has no head, and so no classes; give it num_classes")
        if objective_of(known) in (Regression.name, Segmentation.name) or known.num_classes == 1:
            raise ValueError("model: it gives no probabilities of several classes; call it itself")
        names = known.class_names or [str(i) for i in range(known.num_classes)]
        _check_differ(names)
        super().__init__(
            PcxConfig(  # type: ignore[call-arg]  # it keeps whatever it is given
                id2label=dict(enumerate(names)),
                label2id={n: i for i, n in enumerate(names)},
                problem_type=_problem_of(known),
                pretrained_cfg=_prepared_by(known),  # by which AutoImageProcessor knows timm's
            )
        )
        self.model = known
        self.eval()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Images [B, 3, H, W] -> an output with `logits` [B, C], with labels the `loss` too."""
        return self.model(pixel_values=pixel_values, labels=labels)

    def processor(self) -> TimmWrapperImageProcessor:
        """Prepares PIL images as `model.transform()` does; for `pipeline(image_processor=...)`."""
        return TimmWrapperImageProcessor(pretrained_cfg=_prepared_by(self.model))

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:  # type: ignore[override]
        """Writes the model, its configuration, image processor and card into a folder.

        Args:
            save_directory: the folder; it is made.
            args, options: transformers' own, which are for other kinds of files and left out, but
                for `push_to_hub=True` and `repo_id`.
        """
        folder = Path(save_directory)
        save(self.model, folder / FILE)
        self.config.save_pretrained(folder)
        with written_whole(folder / CARD) as part:
            part.write_text(card_of(self.model), encoding="utf-8")
        if options.get("push_to_hub"):
            self.push_to_hub(options.get("repo_id") or folder.name)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        backbone: nn.Module | None = None,
        **options: Any,
    ) -> PcxForImageClassification:
        """Reads what `save_pretrained` wrote, from a folder or from a repository of the hub.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's name.
            args: none.
            backbone: as `pcx.load` takes it; None builds the one that the file names.
            options: of the hub: revision, token, cache_dir, local_files_only.

        Raises:
            FileNotFoundError: the folder has no such file.
            ValueError: as `pcx.load` raises it.
        """
        place = Path(pretrained_model_name_or_path)
        if place.is_dir():
            file = place / FILE
        else:
            from huggingface_hub import hf_hub_download

            known = ("revision", "token", "cache_dir", "local_files_only")
            chosen = {k: v for k, v in options.items() if k in known}
            file = Path(hf_hub_download(str(pretrained_model_name_or_path), FILE, **chosen))
        return cls(load(file, backbone))


def _check_differ(names: list[str]) -> None:
    """Raises a ValueError where two classes have one name."""
    places: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in places:
            raise ValueError(
                f"model: its classes {places[name]} and {i} are both named {name!r}, and Hugging "
                "Face's label2id would lose one; give each class a name of its own in "
                "model.record.class_names"
            )
        places[name] = i


def _problem_of(model: TunedModel) -> Any:
    """By which `pipeline` turns logits into probabilities, as `pcx.predict` does."""
    several = objective_of(model) == MultiLabel.name
    return "multi_label_classification" if several else "single_label_classification"


def _prepared_by(model: TunedModel) -> dict[str, Any]:
    """The configuration of timm by which images are prepared, as `model.transform()` does."""
    return {**model.image_config(), "num_classes": model.num_classes}


def card_of(model: TunedModel) -> str:
    """A model card in Markdown, written from what the model's record says."""
    record, plain = model.record, model.plain_backbone()
    name = (record.backbone or {}).get("name") or backbone_name(plain)
    own = sum(t.numel() for t in model.own_state().values())
    names = model.class_names
    rows = {
        "method": model.method,
        "settings": ", ".join(f"{k} {v}" for k, v in model.config().items()),
        "backbone": name,
        "task": record.task,
        "classes": len(names) if names else model.num_classes,
        "numbers in the file": f"{own:,}",
    }
    recipe = {k: v for k, v in (record.recipe or {}).items() if v is not None}
    condensed = record.condensation
    if condensed is not None:
        rows["condensed"] = f"by {condensed.method}, keep {condensed.keep}"
    listed = [f"| {k} | {_cell(v)} |" for k, v in rows.items() if v is not None]
    trained = [f"| {k} | {_cell(v)} |" for k, v in recipe.items()]
    return "\n".join(
        [
            "---",
            "library_name: pcx",
            "pipeline_tag: image-classification",
            "tags: [vision, image-classification, pcx]",
            "---",
            "",
            f"# {model.method} over {name}",
            "",
            "| | |",
            "| --- | --- |",
            *listed,
            "",
            *(["## Training", "", "| | |", "| --- | --- |", *trained, ""] if trained else []),
            *(["## Classes", "", ", ".join(names), ""] if names else []),
            "## Use",
            "",
            "```python",
            "from pcx.deployment.hugging_face import PcxForImageClassification",
            "",
            'model = PcxForImageClassification.from_pretrained("this folder")',
            "```",
            "",
        ]
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


AutoConfig.register(PcxConfig.model_type, PcxConfig)
AutoModelForImageClassification.register(PcxConfig, PcxForImageClassification)
AutoImageProcessor.register(PcxConfig, TimmWrapperImageProcessor)
