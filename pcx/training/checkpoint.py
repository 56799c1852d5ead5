"""What `pcx.fit` writes after an epoch, and whether a run may go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pcx.backbones.architecture import architecture_of
from pcx.checkpoints.torch_file import read_torch
from pcx.models.base import TunedModel
from pcx.training.recipe import Recipe

LAST = "last.pt"
_ENTRIES = {"recipe", "parameters", "optimizer", "history", "updates", "generators"}
_ADDED = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
VERSION = 3  # of that file; 1 had no buffers, 2 no description of the model


def description_of(model: nn.Module) -> dict[str, Any] | None:
    """What a model computes besides its weights: method, configuration and architecture, as JSON.

    None of a model that is not tuned.
    """
    if not isinstance(model, TunedModel):
        return None
    facts = architecture_of(model.plain_backbone(), model.spec)
    return {"method": model.method, **model.config(), **facts}


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Reads last.pt.

    Raises:
        ValueError: it is damaged, no checkpoint of `pcx.fit`, or of a newer version.
    """
    try:
        state = read_torch(file)
        version = state["pcx_fit"]
        missing = _ENTRIES - set(state)
        if missing and version in range(1, VERSION + 1):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint_dir: {file} is not a checkpoint of pcx.fit, or it is damaged ({error}); "
            "remove it to start anew, or restore it"
        ) from error
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"checkpoint_dir: {file} is of version {version}, expected 1 to {VERSION}; install "
            "the pcx that wrote it"
        )
    return state


def check_place(
    checkpoint_dir: Any, *, resume: bool, overwrite: bool, within: Sequence[str] = ()
) -> None:
    """Checks that no finished epoch would be lost.

    Args:
        checkpoint_dir: a folder, or None.
        resume: whether the run in it is continued.
        overwrite: whether it may be replaced.
        within: names of folders in it that have runs of their own.

    Raises:
        ValueError: the folder holds the checkpoint of a run, damaged or not, which would be
            replaced; or there is no folder to resume from.
    """
    if checkpoint_dir is None and resume:
        raise ValueError("resume: needs checkpoint_dir")
    if checkpoint_dir is None or resume or overwrite:
        return
    for file in (Path(checkpoint_dir, name, LAST) for name in ("", *within)):
        if file.exists():
            try:
                said = f"{len(read_checkpoint(file)['history'])} finished epochs"
            except ValueError:
                said = "a checkpoint that cannot be read"
            raise ValueError(
                f"checkpoint_dir: {file} holds {said}; give resume=True to continue, "
                "overwrite=True to replace them, or another folder"
            )


def check_same_run(
    file: Path,
    state: Mapping[str, Any],
    recipe: Mapping[str, Any],
    model: nn.Module,
    parameters: Mapping[str, Tensor],
) -> None:
    """Raises a ValueError that says what differs where a checkpoint is of another run."""
    pairs = [({**_ADDED, **state["recipe"]}, dict(recipe))]
    mine, theirs = description_of(model), state.get("model")
    if theirs is not None:  # older files say nothing of it
        pairs.append((theirs, mine or {}))
    differ = [
        f"{name} {then.get(name)} (now {now[name]})"
        for then, now in pairs
        for name in now
        if now[name] != then.get(name)
    ]
    shapes, saved = _shapes(parameters), _shapes(state["parameters"])
    if shapes != saved:
        names = [n for n in {**saved, **shapes} if saved.get(n) != shapes.get(n)]
        differ += [f"{n} {saved.get(n)} (now {shapes.get(n)})" for n in names]
    if differ:
        raise ValueError(
            f"resume: {file} is of another run: {', '.join(differ)}. Use the same arguments and "
            "model, or another checkpoint_dir"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
