"""The finished work of a study, which several processes and machines share.

Work is anything that JSON describes, such as the training of one cell of a grid. A storage of
Optuna's keeps a trial for each piece: claimed by one worker, then finished with its result. What a
killed worker had claimed is free again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcx.checkpoints.files import machine
from pcx.checkpoints.studies import PROCESS, created, entered, has_ended, here, retried
from pcx.extras import need
from pcx.training.run_folder import PROBE, environment_of, writable_folder, write_json

if TYPE_CHECKING:
    import optuna

CONFIG, ENVIRONMENT, WORK = "config.json", "environment.json", "work.log"
LABEL, RESULT, PULSE = "work", "result", "pulse"  # user attributes of trials
PART = 60_000  # characters of a user attribute, under the limit of every database
PULSES = 20.0  # seconds between a worker's signs of life
SILENCE = 300.0  # seconds without one, after which it is dead
SETTLED = timedelta(seconds=1)  # after which a trial has the name of the worker that is at it
SPREAD = 16  # claims are drawn from so many pieces, so that workers seldom want the same

Work = Mapping[str, Any]
Result = dict[str, Any]


class Ledger:
    """The finished work of a study, each piece with its result, on disk once it is added.

    Args:
        folder: it and its parents are made. It gets config.json and environment.json, and
            work.log where no other storage is given.
        settings: what all work shares, as JSON.
        device: where it is done.
        storage: Optuna's, as `pcx.checkpoints.studies.created` takes it; None for a journal file
            in the folder.

    Raises:
        ValueError: the folder cannot be written to, is of other settings, or holds something else;
            or the storage cannot be used.
        ImportError: optuna is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        device: str,
        storage: str | None = None,
    ):
        need("optuna", "a study")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.folder = writable_folder(folder)
        except ValueError as error:
            raise ValueError(str(error).replace("checkpoint_dir", "out", 1)) from None
        self._check_same(settings)
        if not (self.folder / CONFIG).exists():
            write_json(self.folder / CONFIG, settings)
        if not (self.folder / ENVIRONMENT).exists():
            write_json(self.folder / ENVIRONMENT, environment_of(device))
        self.settings, self.device = dict(settings), device
        self.storage = str(self.folder / WORK) if storage is None else storage
        name = hashlib.sha256(text_of(settings).encode()).hexdigest()[:16]
        self._study = created(
            self.storage,
            study_name=f"pcx-{name}",
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )
        self._results: dict[str, Result] = {}
        self._read: set[int] = set()  # numbers of the finished trials that are in _results
        self._signs: dict[int, tuple[Any, float]] = {}  # last pulse of a trial, and when it was new
        self._draw = random.Random(f"{here()}")
        self.refresh()

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        place = self.folder / CONFIG
        if not place.exists():
            # Another worker may be about to write it, which is the first that a study writes.
            mine = (PROBE, f"{CONFIG}.")
            if any(not name.name.startswith(mine) for name in self.folder.iterdir()):
                if place.exists():
                    return self._check_same(settings)
                raise ValueError(
                    f"out: {self.folder} has files and no {CONFIG} of a study; give an empty "
                    "folder, or a new one"
                )
            return
        before = read_config(self.folder)
        names = [n for n in {**before, **settings} if before.get(n) != settings.get(n)]
        if names:
            said = ", ".join(f"{n} {before.get(n)!r} (now {settings.get(n)!r})" for n in names)
            raise ValueError(
                f"out: {self.folder} is of a study with {said}; use the same, or give another "
                "folder"
            )

    def result_of(self, work: Work) -> Result | None:
        """The result of a piece of work; None where it is not finished, as far as was read."""
        return self._results.get(text_of(work))

    def refresh(self) -> list[optuna.trial.FrozenTrial]:
        """Reads what others have finished; the trials that still run."""
        from optuna.trial import TrialState

        states = TrialState.COMPLETE, TrialState.RUNNING
        trials = self._tried(lambda: self._study.get_trials(deepcopy=False, states=states))
        for trial in trials:
            if trial.state == TrialState.COMPLETE and trial.number not in self._read:
                self._read.add(trial.number)
                found = _result_in(trial.user_attrs)
                if found is not None:  # of two workers that did the same, the first claim counts
                    self._results.setdefault(str(trial.user_attrs.get(LABEL)), found)
        return [trial for trial in trials if trial.state == TrialState.RUNNING]

    def claim(self, works: Sequence[Work], *, alone: bool = False) -> Claim | None:
        """Claims one that nobody has finished or is at; None where there is none at present.

        Args:
            works: to choose from.
            alone: claim nothing while another worker of this machine is at something.
        """
        running = self._alive(self.refresh())
        if alone and any(map(_is_here, running)):
            return None
        taken = {trial.user_attrs.get(LABEL) for trial in running}
        texts = list(map(text_of, works))
        free = [text for text in texts if text not in self._results and text not in taken]
        if not free:
            return None
        label = self._draw.choice(free[:SPREAD]) if running and not alone else free[0]
        trial = self._tried(lambda: entered(self._study, {LABEL: label}))
        # It may be one that another worker has entered, and its work then is ours.
        label = trial.user_attrs[LABEL]
        before = [t for t in self._alive(self.refresh()) if t.number < trial.number]
        rivals = [t for t in before if t.user_attrs.get(LABEL) == label or (alone and _is_here(t))]
        if rivals or label in self._results or label not in texts:
            self.free(trial.number)
            return None
        return Claim(self, trial, json.loads(label))

    def free(self, number: int, *, done: bool = False) -> None:
        """Ends a claim."""
        from optuna.trial import TrialState

        state = TrialState.PRUNED if done else TrialState.FAIL
        self._tried(lambda: self._study.tell(number, state=state, skip_if_finished=True))

    def add(self, work: Work, result: Result) -> None:
        """Stores a result, whole or not at all."""
        from optuna.trial import TrialState, create_trial

        text, attributes = json.dumps(result), {LABEL: text_of(work)}
        for place in range(0, len(text), PART):
            attributes[f"{RESULT}.{place // PART}"] = text[place : place + PART]
        finished = create_trial(state=TrialState.COMPLETE, value=0.0, user_attrs=attributes)
        self._tried(lambda: self._study.add_trial(finished))
        self.refresh()

    def _alive(self, trials: Sequence[optuna.trial.FrozenTrial]) -> list[Any]:
        """Those whose worker lives; of the others the work is free again."""
        found = []
        for trial in trials:
            sign, now = trial.user_attrs.get(PULSE), time.monotonic()
            if self._signs.get(trial.number, (None, 0))[0] != (sign,):
                self._signs[trial.number] = (sign,), now
            silent = now - self._signs[trial.number][1] > SILENCE
            process = trial.user_attrs.get(PROCESS)
            # For a moment it has the name of the worker that entered it, which may be a dead one.
            begun = trial.datetime_start
            settled = begun is not None and datetime.now() - begun > SETTLED
            if (settled and has_ended(process)) or (silent and not _is_here(trial)):
                self.free(trial.number)
            else:
                found.append(trial)
        return found

    def _tried(self, call: Any) -> Any:
        return retried(call, self.storage)


class Claim:
    """A piece of work that this process is at.

    Attributes:
        work: as the ledger was given it.
    """

    def __init__(self, ledger: Ledger, trial: optuna.trial.Trial, work: Work):
        self._ledger, self._trial, self.work = ledger, trial, work

    @contextmanager
    def held(self) -> Iterator[None]:
        """Gives signs of life while the work is done; an error frees it for others."""
        over = threading.Event()
        thread = threading.Thread(target=self._give_signs, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self.give_up()
            raise
        finally:
            over.set()
            thread.join()

    def finish(self, result: Result) -> None:
        """Stores the result."""
        self._ledger.add(self.work, result)
        self._ledger.free(self._trial.number, done=True)

    def give_up(self) -> None:
        """Frees the work."""
        self._ledger.free(self._trial.number)

    def _give_signs(self, over: threading.Event) -> None:
        count = 0
        while not over.wait(PULSES):
            count += 1
            try:
                self._trial.set_user_attr(PULSE, count)
            except Exception as error:  # the work goes on; its result is stored by retries
                logging.getLogger("pcx.studies").warning("no sign of life: %s", error)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a study's folder.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        content = json.loads((folder / CONFIG).read_text())
    except ValueError:
        raise ValueError(f"out: {folder / CONFIG} is not JSON; give another folder") from None
    return content if isinstance(content, dict) else {}


def text_of(work: Work) -> str:
    """The one text of a piece of work."""
    return json.dumps(work, sort_keys=True)


def _is_here(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a worker of this machine is at it."""
    process = trial.user_attrs.get(PROCESS)
    return process is not None and process[0] == machine()


def _result_in(attributes: Mapping[str, Any]) -> Result | None:
    """The result that a finished trial holds; None where a part is missing."""
    parts = {
        int(name.partition(".")[2]): text
        for name, text in attributes.items()
        if name.startswith(f"{RESULT}.")
    }
    try:
        return json.loads("".join(parts[number] for number in range(len(parts))))
    except (KeyError, ValueError):
        return None
