"""Saving a tuned model without its backbone, and putting it back onto one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pcx.backbones.architecture import architecture_of, differences
from pcx.backbones.building import arguments_of, build_backbone, with_decoder_of
from pcx.backbones.inputs import data_config, input_size
from pcx.backbones.positions import grid_of, resampled
from pcx.checkpoints.files import written_whole
from pcx.checkpoints.fingerprint import (
    backbone_fingerprint,
    backbone_name,
    buffers_fingerprint,
    checksum,
    fingerprint,
    text_checksum,
)
from pcx.checkpoints.format1 import read_format1
from pcx.models import METHODS
from pcx.models.base import TunedModel, check_module, copy_state
from pcx.models.block_forward import reduce_again, reduction_of
from pcx.models.peft_model import tuned
from pcx.models.record import Record

FORMAT = "2"
METADATA = {"pcx", "config", "checksum"}
OF_FILE = ("method", "settings", "backbone", "token_reduction", "checksums")


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes what a method added to a backbone, with its record, to one safetensors file.

    The backbone is recorded by its name, the facts of its architecture, and a fingerprint of its
    weights. The file appears whole or not at all.

    Args:
        model: a tuned model (`pcx.VPT` and the other methods of `pcx.METHODS`), or a model of peft.
        path: the file; folders are made.

    Raises:
        ValueError: the model is of another kind, or a folder is in the file's place.
        OSError: the file cannot be written; what was there is as it was.
    """
    path, model = _path(path), tuned(model)
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder, expected a file, such as model.safetensors")
    tensors = _apart({n: t.detach().cpu().contiguous() for n, t in model.own_state().items()})
    described = json.dumps(_description(model, tensors), sort_keys=True)
    with written_whole(path) as part:
        metadata = {"pcx": FORMAT, "config": described, "checksum": text_checksum(described)}
        save_file(tensors, part, metadata=metadata)
        _sort_metadata(part)


def load(path: str | os.PathLike, backbone: nn.Module | None = None) -> Any:
    """Reads what `pcx.save` wrote, onto the backbone that it was trained on.

    Args:
        path: the file.
        backbone: the backbone it was trained on, with any head or decoder; convert dtype or device
            afterwards.
            It may take images of another size, for which timm resampled its position embeddings.
            None builds the one that the file names.

    Returns:
        The tuned model, in eval mode, with its record. Token reduction that was set up on the model
        is set up again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, of a newer format or not of pcx, its method is
            not known, or the backbone is another one.
    """
    path = _path(path)
    if backbone is not None:
        check_module("backbone", backbone, "such as timm.create_model gives")
    described, tensors = _read(path)
    saved = described["backbone"]
    if described["method"] not in METHODS:
        raise ValueError(
            f"path: {path} is of a method that this pcx does not have. "
            f"{METHODS.unknown(described['method'])} `pcx.METHODS.add` adds your own"
        )
    cls = METHODS[described["method"]]
    given = _built(path, saved) if backbone is None else backbone
    try:
        backbone = with_decoder_of(given, saved.get("arguments") or {})
        model = cls.from_config(backbone, described["settings"])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"backbone: {path} was trained on {saved['name']}, whose place "
            f"{backbone_name(given)} cannot take: {error}"
        ) from error
    model.own(keep=lambda name: f"backbone.{name}" in tensors)  # what a user had set to be trained
    _check_backbone(path, saved, model)
    own = model.own_state()
    if _is_resized(saved, model):
        grid = grid_of(model.plain_backbone(), model.spec, input_size(model.plain_backbone())[1:])
        tensors = {n: resampled(n, t, own.get(n, t), grid) for n, t in tensors.items()}
    if _shapes(own) != _shapes(tensors):
        raise ValueError(f"backbone: it does not fit {path}: {_differ(own, tensors)}")
    copy_state(tensors, own)
    model.record = _record(path, described)
    model.record.backbone = {"name": saved["name"], "arguments": saved.get("arguments") or {}}
    if _is_resized(saved, model):
        plain = model.plain_backbone()
        model.record.backbone["arguments"] = arguments_of(plain)
        if model.record.transform is not None:
            model.record.transform |= {"input_size": list(input_size(plain))}
    if described.get("token_reduction") is not None:
        reduce_again(model, described["token_reduction"])
    return model.eval()


def _record(path: Path, described: dict[str, Any]) -> Record:
    try:
        return Record.from_json({k: v for k, v in described.items() if k not in OF_FILE})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path: {path} has no whole record ({type(error).__name__}: {error}); save it anew"
        ) from error


def _path(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise ValueError(f"path: {given!r}, expected the path of a file")
    return Path(given)


def backbone_in(path: str | os.PathLike) -> dict[str, Any]:
    """The backbone that a file was trained on: name, arguments, fingerprint and architecture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load` raises it of a file.
    """
    return _read(Path(path))[0]["backbone"]


def _description(model: TunedModel, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describes a model as a file's JSON: the record's entries stand beside the file's own."""
    plain, record = model.plain_backbone(), model.record.as_json()
    known = record["backbone"] or {"name": backbone_name(plain), "arguments": arguments_of(plain)}
    if record["transform"] is None and hasattr(plain, "pretrained_cfg"):
        record["transform"] = data_config(model)
    return {
        **record,
        "method": model.method,
        "settings": model.config(),
        "backbone": {
            **known,
            "fingerprint": backbone_fingerprint(model),
            "fingerprint_of_any_size": backbone_fingerprint(model, positions=False),
            "buffers": buffers_fingerprint(model),
            "architecture": architecture_of(plain, model.spec),
        },
        "token_reduction": reduction_of(model),
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }


def _sort_metadata(file: Path) -> None:
    """Writes the header of a safetensors file anew, so that alike models give the same bytes."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])


def _built(path: Path, saved: dict[str, Any]) -> nn.Module:
    nothing_frozen = saved["fingerprint"] == fingerprint([]) and saved.get("buffers") is None
    try:
        return build_backbone(
            saved["name"], pretrained=not nothing_frozen, **(saved.get("arguments") or {})
        )
    except Exception as error:  # of a hub, a constructor, a network
        raise ValueError(
            f"path: {path} was trained on {saved['name']}, which could not be built ({error}); "
            "build it yourself and give it as backbone"
        ) from error


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory that no two of them share, as the file format needs it."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _differ(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> str:
    mine, theirs = _shapes(own), _shapes(tensors)
    names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
    return ", ".join(f"{n} {theirs.get(n)} in the file, {mine.get(n)} in the model" for n in names)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a file of format 1 or 2: its description, as format 2 has it, and its tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"path: {path} is not a whole safetensors file ({error}); copy or save it anew"
        ) from error
    written = metadata.get("pcx")
    if written not in ("1", FORMAT):
        newer = written is not None and written.isdecimal()
        hint = "; install a newer pcx to read it" if newer else ""
        raise ValueError(
            f"path: {path} was not written by pcx.save of this version (format {written}, expected "
            f"1 or {FORMAT}){hint}"
        )
    if set(metadata) - METADATA or metadata.get("checksum") not in (
        None,  # of older files
        text_checksum(metadata.get("config", "")),
    ):
        raise ValueError(
            f"path: {path} is damaged: its configuration is not what was saved; copy it anew"
        )
    try:
        described = json.loads(metadata["config"])
        described = read_format1(described, tensors) if written == "1" else described
        complete = set(OF_FILE) <= set(described)
    except (KeyError, json.JSONDecodeError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"path: {path} has no whole configuration; save it anew")
    _check_tensors(path, described["checksums"], tensors)
    return described, tensors


def _check_tensors(path: Path, checksums: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, expected in checksums.items():
        if name not in tensors or checksum(tensors[name]) != expected:
            raise ValueError(
                f"path: {path} is damaged: its tensor {name!r} is not what was saved; copy it anew"
            )


def _is_resized(saved: dict[str, Any], model: TunedModel) -> bool:
    """Whether a file's backbone takes images of another size than the model's."""
    size = saved["architecture"].get("image_size")
    known = "fingerprint_of_any_size" in saved and size is not None
    return known and tuple(size) != input_size(model.plain_backbone())


def _check_backbone(path: Path, saved: dict[str, Any], model: TunedModel) -> None:
    plain = model.plain_backbone()
    found = backbone_fingerprint(model)
    if found != saved["fingerprint"] and not (
        _is_resized(saved, model)
        and saved["fingerprint_of_any_size"] == backbone_fingerprint(model, positions=False)
    ):
        raise ValueError(
            f"backbone: {path} was trained on {saved['name']} with weights "
            f"{saved['fingerprint'][:12]}, got {backbone_name(plain)} with weights "
            f"{found[:12]}: give the same pretrained weights in the dtype they were trained in"
        )
    # Older files say nothing of buffers.
    if "buffers" in saved and saved["buffers"] != buffers_fingerprint(model):
        raise ValueError(
            f"backbone: {path} was trained on {saved['name']} with other buffers, such as the "
            f"statistics of BatchNorm, than {backbone_name(plain)} has here; give the pretrained "
            "backbone, as it was before it was trained or evaluated in training mode"
        )
    other = differences(saved["architecture"], architecture_of(plain, model.spec))
    if other:
        raise ValueError(
            f"backbone: {path} was trained on {saved['name']} with {', '.join(other)}; build the "
            "backbone with the arguments that it was trained with"
        )
