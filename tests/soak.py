"""Kills training, scoring, condensing, searching and saving at random, and looks at what is left.

`python tests/soak.py --kills 500` (`make soak`) does it for long; test_kills.py does it briefly. A
job runs in a forked process, which gets SIGKILL at a random time. After each kill nothing that was
finished may be lost, and in the end the result must be that of a job that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import timm
import torch
from tiny_tasks import tiny_backbone, tiny_task
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.checkpoints.torch_file import read_torch
from pcx.experiments.grids import Grid
from pcx.experiments.ledger import Ledger, read_config
from pcx.experiments.protocol import Rung
from pcx.experiments.request import Request
from pcx.experiments.results import read_results
from pcx.experiments.suites.prompts import Plan, PromptSuite
from pcx.experiments.trials import Recipe
from pcx.token_pruning import search
from pcx.training.checkpoint import LAST, read_checkpoint

QUIET: Any = {"progress": False}


def backbone() -> Any:
    torch.manual_seed(0)
    small = {"img_size": 32, "depth": 5, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", patch_size=8, **small).eval()


def data(samples: int = 24) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    order = torch.Generator().manual_seed(2)
    return DataLoader(
        TensorDataset(images, torch.arange(samples) % 3), 8, shuffle=True, generator=order
    )


def vpt(prompts: int = 3, seed: int = 3) -> pcx.VPT:
    model = pcx.VPT(backbone(), prompts)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.normal_(std=0.1)
    return model.eval()


class Job:
    """What is done in a folder, again and again until it is finished; a subclass says what."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self) -> Any:
        """Does the rest of the work and gives the result, by which runs are compared."""
        raise NotImplementedError

    def progress(self) -> int:
        """How much of the work is finished and whole; an error where what is there is not."""
        raise NotImplementedError


class Train(Job):
    def run(self) -> Any:
        model = vpt()
        options = {"lr": 0.05, "checkpoint_dir": self.folder, "resume": True, **QUIET}
        history = pcx.fit(model, data(), epochs=6, **options)
        rows = (self.folder / "history.csv").read_text().splitlines()
        assert len(rows) == 1 + len(history) == 7
        return [row["loss"] for row in history], model.trainable()

    def progress(self) -> int:
        file = self.folder / LAST
        return len(read_checkpoint(file)["history"]) if file.exists() else 0


class Condense(Train):
    def run(self) -> Any:
        model = vpt()
        model.trained_lr = 0.5
        options = {"checkpoint_dir": self.folder, "resume": True, **QUIET}
        small = pcx.condense(model, data(), 0.5, epochs=4, **options)
        assert small.condensation is not None
        return [k.tolist() for k in small.condensation.kept], small.trainable()


class Score(Job):
    def run(self) -> Any:
        options = {"method": "exact", "checkpoint_dir": self.folder, "resume": True, **QUIET}
        return pcx.score(vpt(2), data(), **options)

    def progress(self) -> int:
        file = self.folder / "exact.pt"
        return read_torch(file)["batches"] if file.exists() else 0


class Search(Job):
    @property
    def storage(self) -> str:
        return f"sqlite:///{self.folder}/study.db"

    def run(self) -> Any:
        options = {"storage": self.storage, **QUIET}
        found = search(vpt(), data(), budget=0.7, trials=4, **options)
        done = [t for t in found.study.trials if t.state.name == "COMPLETE"]
        return sorted((t.user_attrs["slot"], str(t.user_attrs["setting"]), t.value) for t in done)

    def progress(self) -> int:
        with contextlib.suppress(KeyError):  # no study yet
            study = optuna.load_study(study_name="zero_tprune", storage=self.storage)
            return sum(t.state.name == "COMPLETE" for t in study.trials)
        return 0


class Save(Job):
    """Saves two models in turns; the file is one of them at any time."""

    def run(self) -> Any:
        models = [vpt(3, seed) for seed in (3, 4)]
        for _ in range(10):
            for model in models:
                pcx.save(model, self.folder / "m")
        return models[1].trainable()

    def progress(self) -> int:
        if not (self.folder / "m").exists():
            return 0
        found = pcx.load(self.folder / "m", backbone()).trainable()
        return int(any(same(found, vpt(3, seed).trainable()) for seed in (3, 4)))


TINY = PromptSuite(
    "tiny",
    "A tiny study",
    ("tiny:a", "tiny:b"),
    Plan(
        prompts=4,
        shallow=4,
        keeps=(0.25, 0.5),
        score_keeps=(0.25,),
        tune_epochs=1,
        other_epochs=(),
        shallow_keeps=(0.5,),
        grid=Grid((0.01, 0.1), (0.0,), (1.0,)),
        rungs=(Rung(0.5, 1.0), Rung(1.0, 0.5)),
        seeds=1,
    ),
    Recipe(epochs=2, batch_size=6),
    Plan(),
    Recipe(),
)


class Study(Job):
    """A study of tiny tasks, of whose results all but times are compared."""

    storage: str | None = None

    def run(self) -> Any:
        found = self.worked()
        found.write(self.folder)
        assert read_results(self.folder).findings == found.findings
        return found.rows

    def worked(self) -> Any:
        def silent(line: str) -> None:
            pass

        found = TINY.run(
            Request(self.folder, tiny_backbone, tiny_task, storage=self.storage, say=silent)
        )
        assert not found.failures, found.failures
        return found

    def progress(self) -> int:
        if not (self.folder / "config.json").exists():
            return 0
        return len(Ledger(self.folder, read_config(self.folder), "cpu", self.storage)._results)


class Shared(Study):
    """The same by two workers, of which one is killed."""

    def run(self) -> Any:
        self.storage = f"sqlite:///{self.folder}/shared.db"
        second = in_a_fork(self.beside)
        threading.Timer(random.uniform(0, 3), os.kill, (second, signal.SIGKILL)).start()
        found = super().run()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(second, 0)
        return found

    def beside(self) -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it is to end with the first
        self.worked()


JOBS: dict[str, type[Job]] = {
    "train": Train,
    "condense": Condense,
    "score": Score,
    "search": Search,
    "save": Save,
    "study": Study,
    "shared": Shared,
}


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def in_a_fork(work: Callable[[], Any]) -> int:
    """Starts work in a process of its own and gives its number."""
    process = os.fork()
    if not process:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def killed(kind: type[Job], kills: int, chance: random.Random, say: Callable[[str], None]) -> None:
    """Kills a job so many times; an AssertionError says what was lost."""
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place, "whole")
        whole.mkdir()
        start = time.perf_counter()
        expected = kind(whole).run()
        seconds = time.perf_counter() - start
        folder, done, left = Path(place, "killed"), 0, kills
        while left:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = 0
            while left:
                process = in_a_fork(kind(folder).run)
                time.sleep(chance.uniform(0, 1.2 * seconds))
                ended = os.waitpid(process, os.WNOHANG)
                if ended[0]:
                    assert os.waitstatus_to_exitcode(ended[1]) == 0, "a run failed by itself"
                    break
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                left -= 1
                found = kind(folder).progress()
                assert found >= done, f"{done} were finished, {found} are left"
                done = found
            found = kind(folder).run()
            assert same(found, expected), f"the result is another: {found}, expected {expected}"
            parts = [p.name for p in folder.rglob("*.part")]
            assert not parts, f"left behind: {parts}"
            say(f"{kind.__name__.lower()}: {kills - left} of {kills} kills, nothing lost")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=500, help="of all kinds together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kind", choices=JOBS, nargs="*", default=list(JOBS))
    chosen = options.parse_args()
    torch.set_num_threads(1)  # a fork takes no threads along
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chance = random.Random(chosen.seed)
    for name in chosen.kind:
        each = chosen.kills // len(chosen.kind)
        killed(JOBS[name], each, chance, lambda said: print(said, flush=True))


if __name__ == "__main__":
    main()
