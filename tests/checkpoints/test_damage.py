"""Damaged, cut and foreign files are refused by name, and writing leaves nothing half done."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pcx
from pcx.checkpoints.files import DAY, written_whole
from pcx.checkpoints.torch_file import read_torch, write_torch

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLACES = st.floats(0, 1, exclude_max=True)


def changed(whole, place, bit):
    """A copy of bytes with one bit flipped."""
    broken = bytearray(whole)
    broken[int(place * len(whole))] ^= 1 << bit
    return bytes(broken)


@pytest.fixture
def saved(backbone, tmp_path):
    """A saved model's bytes, and a function that loads bytes in its place."""
    model = pcx.VPT(backbone, 2)
    model.record.class_names = ["cat", "dog", "owl"]
    pcx.save(model, tmp_path / "m")

    def load(content):
        (tmp_path / "b").write_bytes(content)
        return pcx.load(tmp_path / "b", backbone)

    return (tmp_path / "m").read_bytes(), load


@FUZZ
@given(place=PLACES, bit=st.integers(0, 7))
@example(place=0.0, bit=0)
def test_one_flipped_bit_of_a_saved_model_is_an_error(saved, place, bit):
    whole, load = saved
    header = (8 + int.from_bytes(whole[:8], "little")) / len(whole)
    for at in (place, place * header):  # anywhere, and in the header
        with pytest.raises(ValueError, match=r"^(path|backbone): "):
            load(changed(whole, at, bit))


@FUZZ
@given(place=PLACES)
def test_a_model_cut_short_is_an_error(saved, place):
    whole, load = saved
    with pytest.raises(ValueError, match="^path: .* is not a whole safetensors file"):
        load(whole[: int(place * len(whole))])


@FUZZ
@given(content=st.binary(max_size=200))
def test_a_foreign_file_is_an_error(saved, content):
    with pytest.raises(ValueError, match="^path: "):
        saved[1](content)


@FUZZ
@given(place=PLACES, bit=st.integers(0, 7))
def test_one_flipped_bit_of_a_torch_file_changes_nothing_unseen(tmp_path, place, bit):
    content = {"a": torch.arange(50.0), "lr": 0.05, "rows": [{"epoch": 1, "loss": 0.5}]}
    write_torch(content, tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "b").write_bytes(changed(whole, place, bit))
    try:
        found = read_torch(tmp_path / "b")
    except ValueError:
        return
    assert torch.equal(found.pop("a"), content.pop("a"))  # the bit was one that nothing reads
    assert found == content


def test_a_pickle_that_runs_code_is_not_read(tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    write_torch({"pcx_fit": Runs()}, tmp_path / "t")
    with pytest.raises(ValueError, match="UnpicklingError"):
        read_torch(tmp_path / "t")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign"])
def test_a_damaged_checkpoint_is_named_and_stays(backbone, loader, tmp_path, damage):
    arguments = {"epochs": 2, "lr": 0.05, "checkpoint_dir": tmp_path, "progress": False}
    trained = pcx.VPT(backbone, 2)
    pcx.fit(trained, loader, **arguments)
    whole = (tmp_path / "last.pt").read_bytes()
    at = whole.index(trained.prompts[1].detach().numpy().tobytes()) + 9
    broken = {"flip": changed(whole, at / len(whole), 3), "cut": whole[:-99], "foreign": b"hello"}
    (tmp_path / "last.pt").write_bytes(broken[damage])
    model = pcx.VPT(backbone, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="checkpoint_dir: .*damaged.* remove it to start anew"):
        pcx.fit(model, loader, resume=True, **arguments)
    assert (tmp_path / "last.pt").read_bytes() == broken[damage]
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def parts(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".part"))


def test_part_files_of_dead_processes_go_away_and_others_stay(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from pcx.checkpoints.files import written_whole\n"
        "with written_whole(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half'); os._exit(9)\n"
    )
    for name in ("m", "other"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    assert len(parts(tmp_path)) == 2
    with written_whole(tmp_path / "m") as first:
        first.write_text("first")
        with written_whole(tmp_path / "m") as second:  # of this process: it is not swept
            second.write_text("second")
        assert (tmp_path / "m").read_text() == "second"
        first.write_text("first")
    assert (tmp_path / "m").read_text() == "first"
    (left,) = parts(tmp_path)
    assert left.startswith("other.")
    far, old = tmp_path / "m.elsewhere.1-1.part", tmp_path / "m.elsewhere.2-2.part"
    for each in (far, old):
        each.touch()
    os.utime(old, (time.time() - 2 * DAY,) * 2)
    with written_whole(tmp_path / "m") as part:
        part.write_text("third")
    assert far.exists()
    assert not old.exists()


def test_what_a_link_names_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "m").write_text("old")
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    with written_whole(tmp_path / "m") as part:
        part.write_text("new")
    assert (tmp_path / "m").is_symlink()
    assert (tmp_path / "disk" / "m").read_text() == "new"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["m"]


def test_threads_that_save_to_one_file_leave_one_of_their_models(backbone, tmp_path):
    models = [pcx.VPT(backbone, 2) for _ in range(4)]
    threads = [threading.Thread(target=pcx.save, args=(model, tmp_path / "m")) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = pcx.load(tmp_path / "m", backbone).prompts[0]
    assert sum(torch.equal(found, model.prompts[0]) for model in models) == 1
    assert not parts(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full disk to try")
def test_a_full_disk_is_an_error_and_keeps_the_old_file(tmp_path):
    (tmp_path / "m").write_text("old")
    message = r"m cannot be written, and is as it was \(.*No space left.*; make room on its disk"

    def fill():
        with written_whole(tmp_path / "m") as part:
            part.write_text("half")
            with open("/dev/full", "w") as full:
                full.write("new" * 10_000)

    with pytest.raises(OSError, match=message):
        fill()
    assert (tmp_path / "m").read_text() == "old"
    assert not parts(tmp_path)
