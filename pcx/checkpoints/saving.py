"""Saving prompts and head, without the backbone, and putting them back onto it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pcx.checkpoints.files import written_whole
from pcx.checkpoints.fingerprint import fingerprint
from pcx.models.vpt.model import VPT

FORMAT = "1"
CONFIG = {
    "kind",
    "counts",
    "dropout",
    "dropout_groups",
    "path",
    "read_only",
    "trained_lr",
    "backbone",
    "fingerprint",
}


def save(model: VPT, path: str | os.PathLike) -> None:
    """Writes a VPT's prompts and head with its configuration to one safetensors file.

    The backbone is recorded by name and by a fingerprint of its weights. The file appears whole or
    not at all.

    Args:
        model: a VPT.
        path: the file; folders are made.
    """
    path = Path(path)
    config = {
        "kind": model.kind,
        "counts": model.counts,
        "dropout": model.dropout,
        "dropout_groups": model.dropout_groups,
        "path": model.path,
        "read_only": model.read_only,
        "trained_lr": model.trained_lr,
        "backbone": backbone_name(model.backbone),
        "fingerprint": backbone_fingerprint(model),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in _own(model).items()}
    with written_whole(path) as part:
        save_file(tensors, part, metadata={"pcx": FORMAT, "config": json.dumps(config)})


def load(path: str | os.PathLike, backbone: nn.Module) -> VPT:
    """Reads what `pcx.save` wrote, onto the same backbone.

    Args:
        path: the file.
        backbone: the backbone it was trained on, with any head; convert dtype or device afterwards.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not of pcx, or the backbone is another one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    config, tensors = _read(path)
    try:
        model = VPT(
            backbone,
            config["counts"],
            kind=config["kind"],
            dropout=config["dropout"],
            dropout_groups=config["dropout_groups"],
            path=config["path"],
            read_only=config["read_only"],
            num_classes=_other_head_size(backbone, tensors),
            head_init="keep",
        )
    except ValueError as error:
        raise ValueError(
            f"backbone: {path} was trained on {config['backbone']}, whose place "
            f"{backbone_name(backbone)} cannot take: {error}"
        ) from error
    _check_backbone(path, config, model)
    own = _own(model)
    if _shapes(own) != _shapes(tensors):
        raise ValueError(
            f"backbone: its head does not fit {path}: {_shapes(own)} against {_shapes(tensors)}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    model.trained_lr = config["trained_lr"]
    return model


def _other_head_size(backbone: Any, tensors: dict[str, Tensor]) -> int | None:
    """The number of classes to give a timm backbone, None where its own head fits."""
    if not hasattr(backbone, "reset_classifier"):
        return None
    heads = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone")}
    own = dict(backbone.named_parameters())
    if heads and all(n in own and own[n].shape == t.shape for n, t in heads.items()):
        return None
    sizes = [t.shape[0] for t in heads.values() if t.dim() == 2]
    return sizes[0] if sizes else 0


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def backbone_name(backbone: nn.Module) -> str:
    """timm's architecture and tag, Hugging Face's name of the checkpoint, or the class's name."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    if config.get("architecture"):
        return ".".join(filter(None, (config["architecture"], config.get("tag"))))
    checkpoint = getattr(getattr(backbone, "config", None), "_name_or_path", "")
    return checkpoint or type(backbone).__name__


def backbone_fingerprint(model: VPT) -> str:
    """Of the frozen weights, named as the backbone names them, without our wrappers."""
    own, blocks = _own(model), f"backbone.{model.anatomy.blocks}."
    return fingerprint(
        (name.replace(".block.", ".", 1) if name.startswith(blocks) else name, parameter)
        for name, parameter in model.named_parameters()
        if name not in own
    )


def _own(model: VPT) -> dict[str, Tensor]:
    heads = tuple(f"backbone.{name}." for name in model.anatomy.heads)
    return {
        name: p for name, p in model.named_parameters() if name.startswith(("prompts.", *heads))
    }


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"path: {path} is not a whole safetensors file ({error}); copy or save it anew"
        ) from error
    if metadata.get("pcx") != FORMAT:
        raise ValueError(
            f"path: {path} was not written by pcx.save (format {metadata.get('pcx')}, expected "
            f"{FORMAT})"
        )
    try:
        config = json.loads(metadata["config"])
        complete = set(config) >= CONFIG
    except (KeyError, json.JSONDecodeError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"path: {path} has no whole configuration; save it anew")
    return config, tensors


def _check_backbone(path: Path, config: dict, model: VPT) -> None:
    found = backbone_fingerprint(model)
    if found != config["fingerprint"]:
        raise ValueError(
            f"backbone: {path} was trained on {config['backbone']} with weights "
            f"{config['fingerprint'][:12]}, got {backbone_name(model.backbone)} with weights "
            f"{found[:12]}: give the same pretrained weights in the dtype they were trained in"
        )
