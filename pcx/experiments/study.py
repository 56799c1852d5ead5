"""Studies: work that is done once each, by one process or several, and is never lost."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import torch

from pcx.experiments.ledger import Ledger, Result, text_of
from pcx.experiments.trials import Setup, seed_of
from pcx.training.evaluation import accelerator_for

MODELS = "models"
POLL = 0.2  # seconds between looks at what others are at
KILLS = 5  # of workers in one stage, after which the study ends


def check_alone(what: str) -> None:
    """Raises a ValueError in one of several processes that a launcher has started."""
    with accelerator_for() as accelerator:
        count = accelerator.num_processes
    if count > 1:
        raise ValueError(
            f"processes: a {what} was launched in {count} processes, which would each run all of "
            "it; start it without a launcher, and give processes= (--processes), or start it "
            "several times on one storage= (--storage)"
        )


class Unit(Protocol):
    """A piece of a study's work: JSON that names it, and what it does."""

    def as_json(self) -> dict[str, Any]:
        """What decides the result, besides what all work of the study shares."""
        ...

    def run(self, study: Study) -> Result:
        """Does it; the result is JSON."""
        ...

    def said(self, result: Result) -> str:
        """The result in a few words."""
        ...


class Study:
    """Does a study's work, each piece once.

    Args:
        setup: the tasks, the backbone and the recipe.
        ledger: of the finished work.
        say: called with a line for each piece that is finished.
        keep_going: whether a unit that raises an error is left out, and told in `failed`, while the
            rest goes on; an error ends the study otherwise.
        processes: how many do work at the same time. Further processes, on this machine or others,
            take part where they have the same setup and the same storage. Methods that
            `pcx.METHODS.add` has added are known in one process alone.
    """

    def __init__(
        self,
        setup: Setup,
        ledger: Ledger,
        say: Callable[[str], None] = print,
        processes: int = 1,
        *,
        keep_going: bool = False,
    ):
        self.setup, self.ledger, self.say, self.processes = setup, ledger, say, processes
        self.keep_going = keep_going
        self.failed: dict[str, str] = {}  # by a unit's text, why in one line
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def result_of(self, unit: Unit) -> Result:
        """The result of a unit that is finished."""
        found = self.ledger.result_of(unit.as_json())
        assert found is not None, unit
        return found

    def model_file(self, unit: Unit) -> Path:
        """Where the model is kept that a unit trains."""
        return self.ledger.folder / MODELS / f"{seed_of(unit.as_json()):08x}.safetensors"

    def why_failed(self, units: Sequence[Unit]) -> str | None:
        """Why the first of some units has failed; None where none has."""
        texts = [text_of(unit.as_json()) for unit in units]
        return next((self.failed[text] for text in texts if text in self.failed), None)

    def finish(self, units: Sequence[Unit], *, alone: bool = False) -> None:
        """Does what of some units nobody has done.

        Args:
            units: in any number; one that occurs twice is done once.
            alone: one after another, so that their times are not disturbed.
        """
        units = list({text_of(unit.as_json()): unit for unit in units}.values())
        self.ledger.refresh()
        left = [unit for unit in units if self.ledger.result_of(unit.as_json()) is None]
        if self.processes == 1 or alone or len(left) < 2:
            self.drain(left, alone=alone)
        else:
            self._share(left)

    def drain(self, units: Sequence[Unit], *, alone: bool = False) -> None:
        """Works in this process until all units are finished, by whomever."""
        news = _News(self, units)
        while news.tell():
            works = [unit.as_json() for unit in news.left.values()]
            claim = self.ledger.claim(works, alone=alone)
            if claim is None:
                time.sleep(POLL)
                continue
            text, result = text_of(claim.work), None
            with claim.held():
                try:
                    result = news.left[text].run(self)
                except Exception as error:
                    if not self.keep_going:
                        raise
                    self.failed[text] = _one_line(error)
            if result is None:
                claim.give_up()
            else:
                claim.finish(result)

    def _share(self, units: Sequence[Unit]) -> None:
        """Works in several processes; those that are killed are replaced."""
        news, kills = _News(self, units), 0
        while news.left:
            running = [self._submit(units) for _ in range(self.processes)]
            try:
                while not all(future.done() for future in running):
                    self.ledger.refresh()
                    news.tell()
                    if any(future.done() and future.exception() for future in running):
                        break
                    time.sleep(POLL)
                for future in running:
                    if future.done():
                        self.failed |= future.result()
                self.ledger.refresh()
                news.tell()
            except BrokenProcessPool:
                kills += 1
                self.__exit__()
                if kills > KILLS:
                    raise RuntimeError(
                        f"processes: workers were killed {kills} times, perhaps for want of "
                        f"memory; give fewer than {self.processes}. What is finished is kept"
                    ) from None
            except BaseException:
                self._end_workers()
                raise

    def _submit(self, units: Sequence[Unit]) -> Future:
        if self._pool is None:
            threads = max(1, torch.get_num_threads() // self.processes)
            ledger = self.ledger
            shared = (ledger.folder, ledger.settings, ledger.device, ledger.storage)
            self._pool = ProcessPoolExecutor(
                self.processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self.setup, shared, threads, self.keep_going),
            )
        return self._pool.submit(_drain, list(units))

    def _end_workers(self) -> None:
        """Ends the workers where they are; what they were at is free again."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self.__exit__()


class _News:
    """Says what was finished since it was asked last."""

    def __init__(self, study: Study, units: Sequence[Unit]):
        self.study, self.total = study, len(units)
        self.left = {text_of(unit.as_json()): unit for unit in units}

    def tell(self) -> bool:
        """Whether anything is left."""
        for text, unit in list(self.left.items()):
            result = self.study.ledger.result_of(unit.as_json())
            why = self.study.failed.get(text)
            if result is None and why is None:
                continue
            del self.left[text]
            said = f"failed: {why}" if result is None else unit.said(result)
            self.study.say(f"{self.total - len(self.left)}/{self.total}: {unit}: {said}")
        return bool(self.left)


_STUDY: list[Study] = []  # of a worker


def _start(setup: Setup, shared: tuple[Any, ...], threads: int, keep_going: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    study = Study(setup, Ledger(*shared), say=lambda line: None, keep_going=keep_going)
    _STUDY[:] = [study]


def _end_with_parent() -> None:
    """Ends this worker once the process is gone that started it, even where that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _drain(units: Sequence[Unit]) -> dict[str, str]:
    _STUDY[0].drain(units)
    return _STUDY[0].failed


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0]
