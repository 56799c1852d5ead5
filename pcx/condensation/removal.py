"""Scores by really leaving a prompt out, or setting it to zero."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcx.checkpoints.fingerprint import fingerprint
from pcx.checkpoints.torch_file import read_torch, write_torch
from pcx.condensation.reading import Reader, Scores
from pcx.condensation.score_methods import ByRemoval
from pcx.models.block_forward import Replay
from pcx.models.vpt.model import VPT


def _zeros(reader: Reader) -> list[Tensor]:
    return [torch.zeros(m, dtype=torch.float64, device=reader.device) for m in reader.model.counts]


class Sums:
    """The sums over the batches so far; a folder keeps them in a file."""

    def __init__(
        self,
        reader: Reader,
        name: str,
        data: str,
        folder: str | os.PathLike | None,
        resume: bool,
    ):
        self.totals, self.batches, self.samples = _zeros(reader), 0, 0
        self.file: Path | None = None
        if folder is None:
            return
        share = f"-{reader.rank}of{reader.processes}" if reader.processes > 1 else ""
        self.file = Path(folder) / f"{name}{share}.pt"
        self.run = {
            "data": data,
            "model": fingerprint(reader.model.state_dict().items()),
            "criterion": reader.objective.described,
        }
        if resume and self.file.exists():
            self._load(self.file, reader.device)

    def _load(self, file: Path, device: torch.device) -> None:
        try:
            state = read_torch(file, device)
            other = [key for key in self.run if state["run"][key] != self.run[key]]
            totals, self.batches, self.samples = (
                state[key] for key in ("totals", "batches", "samples")
            )
            if not all(total.isfinite().all() for total in totals):
                raise ValueError("its sums are not finite")
        except Exception as error:
            raise ValueError(
                f"checkpoint_dir: {file} is no file of pcx.score ({error!r})"
            ) from error
        if other:
            raise ValueError(
                f"resume: {file} is of another {' and '.join(other)}; give the same, or "
                "another checkpoint_dir"
            )
        self.totals = totals

    def save(self, batches: int, samples: int) -> None:
        if self.file is None:
            return
        state = {
            "run": self.run,
            "totals": self.totals,
            "batches": batches,
            "samples": samples,
        }
        write_torch(state, self.file)


@torch.no_grad()
def score_by_removal(reader: Reader, name: str, method: ByRemoval, sums: Sums) -> Scores:
    """Leaves out (or zeroes) one prompt at a time; layers below it are not computed again."""
    model = reader.model
    steps = 1 + sum(model.counts)
    for images, labels in reader.batches(name, steps, (sums.batches, sums.samples)):
        with _replayed(model) as replay:
            whole = reader.check(reader.losses({}, images, labels, precise=True))
            for layer, count in enumerate(model.counts):
                replay(layer)
                for i in range(count):
                    reader.step()
                    prompts = method.change(model.prompts[layer].detach(), i)
                    changed = {f"prompts.{layer}": prompts}
                    losses = reader.losses(changed, images, labels, precise=True)
                    difference = reader.check(losses) - whole
                    sums.totals[layer][i] += difference.abs().double().sum()
        sums.save(reader.number, reader.samples + len(labels))
    return reader.means(sums.totals)


@contextmanager
def _replayed(model: VPT) -> Iterator[Callable[[int], None]]:
    """Keeps what each layer gives in the first forward; yields a function after which the layers
    below a given one give that again without computing it."""
    outputs: dict[int, Any] = {}

    def keep(i: int, module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.setdefault(i, output)

    hooks = [layer.register_forward_hook(partial(keep, i)) for i, layer in enumerate(model.layers)]

    replays: list[Replay] = []

    def forget() -> None:
        while replays:
            replays.pop().remove()

    def replay(first: int) -> None:
        forget()
        replays.extend(Replay(model.layers[i], outputs[i]) for i in range(first))

    try:
        yield replay
    finally:
        for hook in hooks:
            hook.remove()
        forget()
