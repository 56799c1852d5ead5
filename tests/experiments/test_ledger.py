"""The ledger: what is finished is never lost, and nobody does what another is at."""

import multiprocessing
import os
import signal
import time

import pytest

from pcx.experiments import ledger as ledgers
from pcx.experiments.ledger import Ledger

WORKS = [{"name": name} for name in "abcd"]


@pytest.fixture(params=["journal", "sqlite"])
def opened(request, tmp_path):
    """Opens the same ledger anew."""
    storage = None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"

    def open_it(settings=None, folder=tmp_path / "run"):
        return Ledger(folder, {"epochs": 1} if settings is None else settings, "cpu", storage)

    return open_it


def test_what_is_finished_is_there_for_all(opened):
    one, two = opened(), opened()
    claim = one.claim(WORKS[:1])
    assert claim.work == {"name": "a"}
    assert two.claim(WORKS[:1]) is None
    with claim.held():
        claim.finish({"accuracy": 0.1 + 0.2, "long": "x" * 150_000})
    two.refresh()
    for each in (one, two, opened()):
        assert each.result_of({"name": "a"}) == {"accuracy": 0.1 + 0.2, "long": "x" * 150_000}
        assert each.result_of({"name": "b"}) is None
        assert each.claim(WORKS[:1]) is None


def test_every_piece_is_claimed_once(opened):
    one, two = opened(), opened()
    claims = [each.claim(WORKS) for each in (one, two, one, two)]
    assert sorted(c.work["name"] for c in claims) == list("abcd")
    assert one.claim(WORKS) is None
    with pytest.raises(KeyboardInterrupt), claims[2].held():
        raise KeyboardInterrupt
    assert two.claim(WORKS).work == claims[2].work


def test_alone_means_that_nobody_else_on_the_machine_works(opened):
    one, two = opened(), opened()
    claim = one.claim(WORKS, alone=True)
    assert two.claim(WORKS, alone=True) is None
    claim.finish({})
    assert two.claim(WORKS, alone=True) is not None


def test_one_settings_work_is_not_anothers(opened, tmp_path):
    opened().claim(WORKS[:1]).finish({"accuracy": 1.0})
    other = opened({"epochs": 2}, tmp_path / "other")  # in the same storage, where it is a database
    assert other.result_of(WORKS[0]) is None


def claim_and_wait(folder, storage, claimed):
    assert Ledger(folder, {"epochs": 1}, "cpu", storage).claim(WORKS[:1]) is not None
    claimed.set()
    time.sleep(60)


def test_what_a_killed_worker_was_at_is_free(opened):
    ledger = opened()
    context = multiprocessing.get_context("spawn")
    claimed = context.Event()
    storage = ledger.storage
    worker = context.Process(target=claim_and_wait, args=(ledger.folder, storage, claimed))
    worker.start()
    assert claimed.wait(60)
    assert ledger.claim(WORKS[:1]) is None
    os.kill(worker.pid, signal.SIGKILL)  # and not asked for yet: it stays as a zombie
    deadline = time.monotonic() + 20
    while (claim := ledger.claim(WORKS[:1])) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert claim.work == WORKS[0]
    worker.join()


def test_a_worker_elsewhere_is_dead_once_it_is_silent(opened, monkeypatch):
    """Its signs of life are compared by this machine's clock alone."""
    monkeypatch.setattr("pcx.checkpoints.studies.machine", lambda: "elsewhere")
    far = opened()
    claim = far.claim(WORKS[:1])
    monkeypatch.undo()
    near, now = opened(), time.monotonic()
    assert near.claim(WORKS[:1]) is None
    for later, pulse in ((0.9, True), (1.8, False)):
        monkeypatch.setattr(ledgers.time, "monotonic", lambda t=later: now + t * ledgers.SILENCE)
        if pulse:
            claim._trial.set_user_attr(ledgers.PULSE, 1)
        assert near.claim(WORKS[:1]) is None
    monkeypatch.setattr(ledgers.time, "monotonic", lambda: now + 2 * ledgers.SILENCE)
    assert near.claim(WORKS[:1]) is not None


def test_long_work_gives_signs_of_life(opened, monkeypatch):
    monkeypatch.setattr(ledgers, "PULSES", 0.02)
    one = opened()
    with one.claim(WORKS[:1]).held():
        time.sleep(0.3)
        (trial,) = opened().refresh()
        assert trial.user_attrs[ledgers.PULSE] >= 1


class TestRefusals:
    def test_other_settings_and_other_folders(self, tmp_path):
        Ledger(tmp_path / "a", {"epochs": 1, "amp": "no"}, "cpu")
        Ledger(tmp_path / "a", {"epochs": 1, "amp": "no"}, "cpu")
        with pytest.raises(ValueError, match=r"^out: .*a is of a study .* epochs 1 \(now 2\)"):
            Ledger(tmp_path / "a", {"epochs": 2, "amp": "no"}, "cpu")
        (tmp_path / "mine.txt").write_text("hello")
        with pytest.raises(ValueError, match=r"^out: .* has files and no config.json"):
            Ledger(tmp_path, {}, "cpu")
        with pytest.raises(ValueError, match=r"^out: .*mine.txt is a file"):
            Ledger(tmp_path / "mine.txt", {}, "cpu")
        (tmp_path / "a" / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"^out: .*config.json is not JSON"):
            Ledger(tmp_path / "a", {}, "cpu")

    @pytest.mark.parametrize(
        "storage", ["sqlite:////nowhere/at/all.db", "/nowhere/at/all.log", "hello://there"]
    )
    def test_a_storage_that_cannot_be_used_is_one_line(self, tmp_path, storage):
        with pytest.raises(ValueError, match=r"^storage: .* cannot be used \([^\n]*\)") as caught:
            Ledger(tmp_path, {}, "cpu", storage)
        assert "\n" not in str(caught.value)

    def test_passwords_are_not_shown(self, tmp_path):
        with pytest.raises(ValueError, match=r"user:\*\*\*@host") as caught:
            Ledger(tmp_path, {}, "cpu", "nosuch://user:secret@host/db")
        assert "secret" not in str(caught.value)

    def test_a_line_that_a_kill_cut_short_goes_away(self, tmp_path):
        one = Ledger(tmp_path, {}, "cpu")
        one.claim(WORKS[:1]).finish({"accuracy": 1.0})
        with open(tmp_path / "work.log", "a") as file:
            file.write('{"op_code": 4, "wor')
        for _ in range(2):
            again = Ledger(tmp_path, {}, "cpu")
            assert again.result_of(WORKS[0]) == {"accuracy": 1.0}
        again.claim(WORKS[1:2]).finish({"accuracy": 2.0})
        assert Ledger(tmp_path, {}, "cpu").result_of(WORKS[1]) == {"accuracy": 2.0}
        with open(tmp_path / "work.log", "a") as file:
            file.write("hello\n")
        with pytest.raises(ValueError, match=r"^storage: .*work.log' cannot be used"):
            Ledger(tmp_path, {}, "cpu").claim(WORKS[2:])
