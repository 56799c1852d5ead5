"""A file of finished trials, from which an interrupted comparison goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pcx.training.run_folder import environment_of, writable_folder, write_json

CONFIG, ENVIRONMENT, TRIALS = "config.json", "environment.json", "trials.jsonl"


class Journal:
    """The finished trials of a comparison: one line of JSON each, on disk once it is added.

    Args:
        folder: it and its parents are made. It also gets config.json and environment.json.
        settings: what all trials share, as JSON.
        device: where they run.

    Raises:
        ValueError: the folder cannot be written to, is of other settings, or holds something else.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], device: str):
        try:
            self.folder = writable_folder(folder)
        except ValueError as error:
            raise ValueError(str(error).replace("checkpoint_dir", "out", 1)) from None
        self.file = self.folder / TRIALS
        self._check_same(settings)
        self.found = self._read()
        if not (self.folder / CONFIG).exists():
            write_json(self.folder / CONFIG, settings)
        if not (self.folder / ENVIRONMENT).exists():
            write_json(self.folder / ENVIRONMENT, environment_of(device))

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        place = self.folder / CONFIG
        if not place.exists():
            if any(self.folder.iterdir()):
                raise ValueError(
                    f"out: {self.folder} has files and no {CONFIG} of a comparison; give an empty "
                    "folder, or a new one"
                )
            return
        try:
            before = json.loads(place.read_text())
        except ValueError:
            raise ValueError(f"out: {place} is not JSON; give another folder") from None
        names = [n for n in {**before, **settings} if before.get(n) != settings.get(n)]
        if names:
            said = ", ".join(f"{n} {before.get(n)!r} (now {settings.get(n)!r})" for n in names)
            raise ValueError(
                f"out: {self.folder} is of a comparison with {said}; use the same, or give another "
                "folder"
            )

    def _read(self) -> dict[str, dict[str, Any]]:
        """The results by key; a last line that a killed process left unfinished goes away."""
        if not self.file.exists():
            return {}
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(self.file, "rb+") as opened:
                opened.truncate(len(whole))
        found = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                found[_key(entry["trial"])] = entry["result"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"out: {self.file}, line {number}: not a trial; mend or remove the line"
                ) from None
        return found

    def result_of(self, trial: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a trial, None where it is not finished."""
        return self.found.get(_key(trial))

    def add(self, trial: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Writes a finished trial and its result, both JSON."""
        with open(self.file, "a") as opened:
            opened.write(json.dumps({"trial": trial, "result": result}) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        self.found[_key(trial)] = dict(result)


def _key(trial: Mapping[str, Any]) -> str:
    return json.dumps(trial, sort_keys=True)
