"""How long a pass waits for its loader, and what a run says of it."""

import time

import pytest
import torch
from families import CONFIG
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import pcx
from pcx.tasks import FileImages, Task, cached
from pcx.tasks.images import MemoryImages
from pcx.training.batches import BatchCheck, LoaderWait, placed
from pcx.training.display import note_of
from pcx.training.objectives import objective_for
from pcx.training.run import Run

QUIET = {"progress": False}
TIMES = ("seconds", "loader_share")


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow(self, batches, start, each, end):
        self.now += start
        for batch in batches:
            self.now += each
            yield batch
        self.now += end


def test_the_loaders_time_is_that_between_batches(monkeypatch):
    clock = Clock(monkeypatch)
    batches = [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))] * 3
    wait = LoaderWait()
    loader = clock.slow(batches, start=2.0, each=1.0, end=0.5)
    check = BatchCheck(objective_for("single-label", None), torch.nn.Linear(1, 1))
    for _ in placed(loader, torch.device("cpu"), check, wait):
        clock.now += 10
    assert wait.seconds == 2 + 3 * 1 + 0.5


def test_a_wait_counts_only_where_the_device_has_nothing_left(monkeypatch):
    clock, ends = Clock(monkeypatch), []
    wait = LoaderWait()

    def ended():
        return ends[-1] if ends[-1] <= clock.now else None

    ends.append(clock.now)
    for number in wait.timed(clock.slow(range(4), 0.0, 1.0, 0.0), ended):
        # Three steps take no time; one ends when 0.75 s of the loader's next 1 s are over; the
        # second one still runs when the third batch comes.
        ends.append(clock.now + {0: 0.0, 1: 1.5, 2: 0.75, 3: 0.0}[number])
    assert wait.seconds == 1 + 1 + 0 + 0.25


class Slow(Dataset):
    def __init__(self, dataset, seconds):
        self.dataset, self.seconds = dataset, seconds

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return self.dataset[i]


def test_rows_and_notes_say_whether_the_loader_limits_the_run(backbone, dataset):
    rows = {}
    for seconds in (0.0, 0.2):
        model = pcx.VPT(backbone, 3)
        loader = DataLoader(Slow(dataset, seconds), batch_size=5)
        (rows[seconds],) = pcx.fit(model, loader, epochs=1, lr=0.1, **QUIET)
    assert 0 <= rows[0.0]["loader_share"] < rows[0.2]["loader_share"] < 1
    assert rows[0.2]["loader_share"] > 0.5  # 2 s of waiting
    assert "  limited by the loader (" in note_of(rows[0.2])
    row = {"epoch": 1, "loss": 0.5, "accuracy": 50.0, "val_accuracy": 40.0}
    assert note_of({**row, "loader_share": 0.5}).endswith("validation 40.0  loader 50%")
    assert note_of({**row, "loader_share": 0.63}).endswith("  limited by the loader (63%)")
    assert note_of(row).endswith("validation 40.0")


@pytest.fixture
def photos(tmp_path):
    """A task of 8 JPEG files with random crops, as FGVC's."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(8):
        pixels = torch.randint(0, 256, (50, 60, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.jpg")
        samples.append((tmp_path / f"{i}.jpg", i % 3))
    parts = [transforms.RandomCrop(32), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return FileImages(samples, transforms.Compose([transforms.Resize(40), *parts]))


@pytest.mark.filterwarnings("ignore:.*use of fork")  # torch's workers, on Python 3.12 and later
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_draws_the_crops_of_the_whole_one_from_a_cache(
    backbone, photos, tmp_path, monkeypatch, workers
):
    model, labels = backbone.float(), torch.arange(6) % 3
    held_out = MemoryImages(torch.arange(6 * 3 * 32 * 32).byte().view(6, 3, 32, 32), labels, CONFIG)

    class Interrupted(Exception):
        pass

    def fitted(dataset, **arguments):
        torch.manual_seed(0)
        vpt = pcx.VPT(model, 3, head_init="keep")
        task = Task("photos", 3, {"train": dataset, "val": held_out})
        train, val = (task.loader(s, 4, num_workers=workers) for s in ("train", "val"))
        rows = pcx.fit(vpt, train, epochs=3, lr=0.1, val_loader=val, **arguments, **QUIET)
        found = {k: v.detach().clone() for k, v in vpt.trainable().items()}
        return found, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]

    def stops(self, file):
        save(self, file)
        if len(self.history) == 1:
            raise Interrupted

    weights, rows = fitted(photos)
    save = Run.save
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stops)
        with pytest.raises(Interrupted):
            fitted(cached(photos, tmp_path / "cache"), checkpoint_dir=tmp_path / "run")
    torch.manual_seed(99)
    again, resumed = fitted(
        cached(photos, tmp_path / "cache"), checkpoint_dir=tmp_path / "run", resume=True
    )
    assert resumed == rows
    assert all(torch.equal(again[name], value) for name, value in weights.items())
