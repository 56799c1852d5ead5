"""Optuna's studies: opened by several processes at once, and whole after kills."""

from __future__ import annotations

import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pcx.checkpoints.files import machine, runs

if TYPE_CHECKING:
    import optuna

TRIES, PAUSE = 8, 0.1  # of using a storage that others use, and seconds before the second
JOURNAL = ".log"  # how the name of a journal file ends
SLOT, PROCESS = "slot", "process"  # user attributes of trials
T = TypeVar("T")
_TOKEN = uuid.uuid4().hex


def open_study(
    storage: Any, name: str, sampler: optuna.samplers.BaseSampler | None, arguments: dict[str, Any]
) -> optuna.Study:
    """The study of that name in the storage, or a new one that records the search's arguments.

    Trials whose process was killed are marked as failed, so that their settings come again.

    Raises:
        ValueError: the storage cannot be used, or the stored study was made with other arguments.
    """
    import optuna

    study = created(
        storage,
        study_name=name,
        sampler=sampler or optuna.samplers.RandomSampler(),
        direction="maximize",
        load_if_exists=True,
    )
    arguments = json.loads(json.dumps(arguments))  # in the form in which they are read back
    before = {key: study.user_attrs.get(key) for key in arguments}
    if study.trials and before != arguments:
        raise ValueError(
            f"storage: its study {name!r} is of {before}, not of {arguments}; give another "
            "study_name"
        )
    for key, value in arguments.items():
        study.set_user_attr(key, value)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if has_ended(trial.user_attrs.get(PROCESS)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
    return study


def created(storage: Any, **arguments: Any) -> optuna.Study:
    """Creates or loads a study; processes that make a new file at once come one after another.

    Args:
        storage: Optuna's, or an address such as "sqlite:///study.db" or "postgresql://...", or the
            path of a journal file, which ends in ".log"; network disks lock it better than SQLite.
        arguments: of `optuna.create_study`.

    Raises:
        ValueError: the storage cannot be used.
    """
    import optuna

    def create() -> optuna.Study:
        return optuna.create_study(storage=_opened(storage), **arguments)

    return retried(create, storage)


def _opened(storage: Any) -> Any:
    """The storage; a path that ends in ".log" is that of a journal file."""
    path = isinstance(storage, str | os.PathLike) and "://" not in str(storage)
    if not path or not str(storage).endswith(JOURNAL):
        return storage
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    _mend(Path(storage))
    return JournalStorage(JournalFileBackend(str(storage)))


def _mend(file: Path) -> None:
    """Removes a last line that was not written to its end, which no reader gets past."""
    from optuna.storages.journal import JournalFileSymlinkLock

    if not file.is_file() or _ends_whole(file):
        return
    lock = JournalFileSymlinkLock(str(file))
    lock.acquire()
    try:
        if not _ends_whole(file):  # else it was another's line, under way
            content = file.read_bytes()
            os.truncate(file, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _ends_whole(file: Path) -> bool:
    with open(file, "rb") as opened:
        if not opened.seek(0, os.SEEK_END):
            return True
        opened.seek(-1, os.SEEK_END)
        return opened.read() == b"\n"


def retried(call: Callable[[], T], storage: Any) -> T:
    """What a call on a storage gives, tried again where others use the storage at the same time.

    Raises:
        ValueError: it fails all the same; the message is one line and names the storage.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:  # of SQLAlchemy, a driver, Optuna
            if attempt == TRIES - 1 or not _may_pass(error):
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(
                    f"storage: {_without_password(storage)!r} cannot be used ({said}); give an "
                    "address such as 'sqlite:///study.db', or a journal file such as study.log, "
                    "in a folder that exists"
                ) from error
            time.sleep(PAUSE * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable")


def _without_password(storage: Any) -> str:
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", str(storage))


def _may_pass(error: Exception) -> bool:
    """Whether an error comes of another process that makes the same tables at the same time."""
    said = f"{type(error).__name__} {error}".lower()
    return any(word in said for word in ("already exists", "locked", "unique", "duplicated"))


def completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that were evaluated to the end."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def ask(study: optuna.Study) -> tuple[optuna.trial.Trial, int]:
    """A new trial, and its place among the settings: the lowest that no other trial has.

    A place that a failed or killed trial had is given again, so that a search that was interrupted
    comes to the settings of one that was not.
    """
    from optuna.trial import TrialState

    trial = entered(study, {})
    taken, waiting = set(), 0
    for other in study.get_trials(deepcopy=False):
        if other.number == trial.number or other.state == TrialState.FAIL:
            continue
        if SLOT in other.user_attrs:
            taken.add(other.user_attrs[SLOT])
        elif other.state == TrialState.COMPLETE:  # of an older pcx
            taken.add(other.number)
        elif other.number < trial.number:  # it takes the first free place in a moment
            waiting += 1
    free = (slot for slot in range(trial.number + 1) if slot not in taken)
    slot = [next(free) for _ in range(waiting + 1)][-1]
    trial.set_user_attr(SLOT, slot)
    return trial, slot


def entered(study: optuna.Study, attributes: Mapping[str, Any]) -> optuna.trial.Trial:
    """A new trial that runs in this process.

    Args:
        study: that it belongs to.
        attributes: of it. It may be a trial that another process has entered, with other ones.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    mine = {**attributes, PROCESS: here()}
    while True:
        study.enqueue_trial({}, user_attrs=mine)  # so that no trial is ever without them
        trial = study.ask()
        try:
            trial.set_user_attr(PROCESS, mine[PROCESS])
            for name in set(mine) - set(trial.user_attrs):  # others were faster with ours
                trial.set_user_attr(name, mine[name])
            return trial
        except UpdateFinishedTrialError:  # of a worker that was killed, and freed by others
            continue


def here() -> list[Any]:
    """Names this process, also where its number is given to another one later."""
    return [machine(), os.getpid(), _TOKEN]


def has_ended(process: Any) -> bool:
    """Whether the process that ran a trial is one of this machine that ended."""
    if not process or process[0] != machine():
        return False
    if process[1] == os.getpid():
        return process[2] != _TOKEN
    return not runs(process[1])
