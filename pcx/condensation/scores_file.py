"""scores.json: the scores of a condensation and the prompts that it kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcx.checkpoints.files import written_whole

if TYPE_CHECKING:
    from pcx.condensation.condensing import Condensation

SCORES = "scores.json"


def write_scores(folder: Path, condensation: Condensation, *, resume: bool = False) -> None:
    """Writes scores.json, whole or not at all, with a line for each layer.

    Args:
        folder: where it goes; the folder is made.
        condensation: what is written; layers and prompts count from 0.
        resume: the file that is there, if any, must say that the same prompts were kept.

    Raises:
        ValueError: the file that is there is of another condensation.
    """
    file = folder / SCORES
    if resume and file.exists():
        _check_same(file, condensation)
    head = json.dumps(_choice(condensation) | {"curve": condensation.curve}, indent=2)
    rows = [
        json.dumps({"layer": layer, "kept": kept.tolist(), "scores": scores.tolist()})
        for layer, (kept, scores) in enumerate(
            zip(condensation.kept, condensation.scores, strict=True)
        )
    ]
    layers = ",\n    ".join(rows)
    with written_whole(file) as part:
        part.write_text(f'{head[:-2]},\n  "layers": [\n    {layers}\n  ]\n}}\n')


def _choice(condensation: Condensation) -> dict[str, Any]:
    return {
        "method": condensation.method,
        "scope": condensation.scope,
        "keep": condensation.keep,
    }


def _check_same(file: Path, condensation: Condensation) -> None:
    now = _choice(condensation) | {"kept": [kept.tolist() for kept in condensation.kept]}
    try:
        content = json.loads(file.read_text())
        then = {key: content[key] for key in _choice(condensation)}
        then["kept"] = [row["kept"] for row in content["layers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint_dir: {file} is no file of pcx.condense ({error!r})") from None
    differ = ", ".join(
        f"{key} {then[key]} (now {now[key]})" for key in now if now[key] != then[key]
    )
    if differ:
        raise ValueError(
            f"resume: {file} is of another condensation: {differ}. Use the same arguments and "
            "model, or another checkpoint_dir"
        )
