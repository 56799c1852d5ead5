"""The folder of a run: what was run, where, and how it goes."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence, Sized
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcx import __version__
from pcx.checkpoints.files import written_whole
from pcx.checkpoints.fingerprint import backbone_name

CONFIG, ENVIRONMENT, HISTORY = "config.json", "environment.json", "history.csv"
PROBE = ".pcx-probe"
PACKAGES = ("timm", "triton")
# An absolute path, or one in a home: from a / or ~ that follows no name, to its last separator.
_PATH = re.compile(r"(?<![\w.-])(?:[/~]|[A-Za-z]:\\)[^=,;:'\"]*")


class RunFolder:
    """Writes `config.json`, `environment.json` and `history.csv` beside a run's checkpoint.

    The JSON files appear whole or not at all. A line of history.csv is on disk once its epoch is
    over.

    Args:
        checkpoint_dir: the folder; it and its parents are made.

    Raises:
        ValueError: the folder cannot be made or written to.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike):
        self.path = writable_folder(checkpoint_dir)
        self._columns: list[str] = []

    def start(self, config: Mapping[str, Any], device: str, history: Sequence[dict]) -> None:
        """Writes what is known before the first epoch.

        Args:
            config: the recipe and the facts of the run; JSON.
            device: where it runs.
            history: a row for each epoch of the run that this one continues; empty for a new run.
        """
        write_json(self.path / CONFIG, config)
        write_json(self.path / ENVIRONMENT, self._environment(device, bool(history)))
        if history:
            self._write_whole(history)
        else:
            (self.path / HISTORY).unlink(missing_ok=True)

    def _environment(self, device: str, resumed: bool) -> dict[str, Any]:
        """The environment of the first start, which lists those of later starts under "resumed"."""
        now = environment_of(device)
        first = read_json(self.path / ENVIRONMENT) if resumed else {}
        return {**first, "resumed": [*first.get("resumed", []), now]} if first else now

    def add_epoch(self, history: Sequence[dict]) -> None:
        """Appends the last row of a run's history."""
        row = history[-1]
        if list(row) != self._columns:  # the first row, or one with other measures
            return self._write_whole(history)
        with open(self.path / HISTORY, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def _write_whole(self, history: Sequence[dict]) -> None:
        """All rows; those that an interrupted run wrote after its checkpoint go away."""
        columns = list(history[-1])
        others = {name: None for row in history for name in row if name not in columns}
        self._columns = [*columns, *others]
        with written_whole(self.path / HISTORY) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(history)


def writable_folder(checkpoint_dir: str | os.PathLike) -> Path:
    """Makes the folder, and proves that it can be written to.

    Raises:
        ValueError: a file is in the way, or the folder cannot be written to.
    """
    path = Path(checkpoint_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"checkpoint_dir: {path} is a file, expected a folder")
    try:
        _write_probe(path)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise ValueError(
            f"checkpoint_dir: {path} cannot be written to ({cause.strerror}); "
            "give a folder that can"
        ) from error
    return path


def _write_probe(path: Path) -> None:
    """Writes a file and removes it: the folder's mode alone does not say whether that works."""
    probe = path / PROBE  # one name for all, so that what a killed process left is swept
    with written_whole(probe) as part:
        part.touch()
    probe.unlink(missing_ok=True)  # another process may have done it


def facts_of(model: nn.Module, names: Sequence[str], loader, val_loader) -> dict[str, Any]:
    """The facts of a run that stand in config.json beside the recipe."""
    parameters = dict(model.named_parameters())
    backbone = getattr(model, "backbone", None)
    return {
        "model": type(model).__name__,
        "backbone": None if backbone is None else backbone_name(backbone),
        "trained": {name: "x".join(map(str, parameters[name].shape)) for name in names},
        "trained_parameters": sum(parameters[name].numel() for name in names),
        "parameters": sum(p.numel() for p in parameters.values()),
        "training_data": _described(loader),
        "validation_data": None if val_loader is None else _described(val_loader),
    }


def _described(loader) -> dict[str, int | None]:
    """How many samples a loader has, in batches of which size; None where it does not say."""
    dataset = getattr(loader, "dataset", None)
    samples = len(dataset) if isinstance(dataset, Sized) else None
    return {"samples": samples, "batch_size": getattr(loader, "batch_size", None)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that a person can read, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """A JSON file's content; {} where it is missing or not JSON."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def environment_of(device: str) -> dict[str, Any]:
    """The environment of a run; names of people, machines and folders are left out."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": str(device),
        "device_name": device_name(device),
        "platform": platform.platform(),
        "command": [Path(sys.argv[0]).name, *map(without_place, sys.argv[1:])],
    }


def versions() -> dict[str, str]:
    """Versions of Python, of pcx and of what computes for it; "not installed" where it is not."""
    found = {"pcx": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: str) -> str:
    """The name of a GPU, or the architecture and threads of a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    return kind


def without_place(argument: str) -> str:
    """An argument of a command line in which absolute paths have become names of files.

    A folder's name may be a person's, so that a path without a suffix becomes "<path>".
    """
    return _PATH.sub(lambda found: _file_name(found.group()), argument)


def _file_name(path: str) -> str:
    name = re.split(r"[/\\]", path)[-1]
    return name if "." in name[1:] and name != Path.home().name else "<path>"
