"""A cached data set gives the bits of the plain one, whatever happens to files and processes."""

import copy
import errno
import logging
import multiprocessing
import os
import pickle
from functools import partial

import pytest
import torch
from families import CONFIG
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torchvision import transforms as t
from torchvision.datasets import ImageFolder

from pcx.tasks import FileImages, cached, image_cache, images, load_task, pixel_file
from pcx.tasks.images import MemoryImages
from pcx.training.loaders import plain_loader

NORMAL = t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = t.Compose([t.Resize(40), t.CenterCrop(32), t.ToTensor(), NORMAL])
CROPPED = t.Compose(
    [t.Resize(40), t.RandomCrop(32), t.RandomHorizontalFlip(), t.ToTensor(), NORMAL]
)
RANDOM = t.Compose([t.RandomResizedCrop(32), t.ToTensor()])


def draw(file, seed, size=(60, 50)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(file)
    return file


@pytest.fixture(autouse=True)
def says_things_anew():
    pixel_file._say.cache_clear()


@pytest.fixture
def samples(tmp_path):
    return [(draw(tmp_path / "images" / f"{i}.jpg", i, (50 + 9 * i, 50)), i % 3) for i in range(5)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "cache"


@pytest.fixture
def opened(monkeypatch):
    """The names of the image files that are decoded."""
    names, decode = [], images.opened

    def counting(file, name):
        names.append(os.path.basename(name))
        return decode(file, name)

    monkeypatch.setattr(images, "opened", counting)
    return names


def same(dataset, plain, seed=0):
    for i in range(len(plain)):
        torch.manual_seed(seed + i)
        image, label = dataset[i]
        torch.manual_seed(seed + i)
        expected, target = plain[i]
        if not (torch.equal(image, expected) and label == target):
            return False
    return len(dataset) == len(plain)


@pytest.mark.parametrize("transform", [PLAIN, CROPPED], ids=["plain", "cropped"])
def test_each_image_is_decoded_once_and_read_to_the_same_bits(samples, folder, opened, transform):
    plain = FileImages(samples, transform, PLAIN)
    dataset = cached(plain, folder)
    assert dataset.reason is None
    assert dataset.transform is transform
    assert dataset.eval_transform is PLAIN
    assert same(dataset, plain)
    del opened[:]
    again = cached(plain, folder)  # as another run does
    for seed in (1, 2):
        assert same(dataset, plain, seed)
        assert same(again, plain, seed)
    assert len(opened) == 4 * len(samples)  # by the plain data set alone
    assert torch.equal(dataset[-1][0], dataset[4][0]) or transform is CROPPED
    with pytest.raises(IndexError):
        dataset[5]


def test_a_file_that_changes_is_read_anew(samples, folder, opened):
    plain = FileImages(samples, PLAIN)
    dataset = cached(plain, folder)
    assert same(dataset, plain)
    path = samples[1][0]
    seen = path.stat()
    draw(path, 77)
    os.truncate(path, max(seen.st_size, path.stat().st_size))  # zeros behind a JPEG are no matter
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))  # one nanosecond later
    assert same(dataset, plain)
    changed = dataset[1][0]
    draw(path, 78)
    with open(path, "ab") as file:
        file.write(bytes(5000))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))  # another size
    assert same(dataset, plain)
    assert not torch.equal(dataset[1][0], changed)
    del opened[:]
    [dataset[i] for i in range(5)]
    assert opened == []
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.jpg: listed in the split, but there is no"):
        dataset[1]


def test_another_path_is_another_image(samples, folder):
    plain = FileImages(samples, PLAIN)
    assert same(cached(plain, folder), plain)
    moved = FileImages([(path, label) for path, label in samples[::-1]], PLAIN)
    for path, _ in samples:
        os.utime(path, ns=(0, 0))
    assert same(cached(moved, folder), moved)


def test_relative_paths_belong_to_their_folder(tmp_path, folder, monkeypatch):
    for number, name in enumerate(("a", "b")):
        path = draw(tmp_path / name / "0.png", number)
        os.utime(path, ns=(0, 0))
        monkeypatch.chdir(tmp_path / name)
        plain = FileImages([("0.png", 0)], PLAIN)
        assert same(cached(plain, folder), plain)


def test_another_transform_or_version_is_another_cache(samples, folder, opened, monkeypatch):
    assert same(cached(FileImages(samples, PLAIN), folder), FileImages(samples, PLAIN))
    for transform in (CROPPED, t.Compose([t.Resize(41), *PLAIN.transforms[1:]])):
        plain = FileImages(samples, transform)
        assert same(cached(plain, folder), plain)
    for change in (("timm", "__version__", "99"), ("PIL", "__version__", "99")):
        monkeypatch.setattr(".".join(change[:2]), change[2])
        dataset = cached(FileImages(samples, PLAIN), folder)
        del opened[:]
        [dataset[i] for i in range(5)]
        assert len(opened) == 5
    monkeypatch.setattr(image_cache, "FORMAT", 99)
    dataset = cached(FileImages(samples, PLAIN), folder)
    del opened[:]
    [dataset[i] for i in range(5)]
    assert len(opened) == 5


def test_normalisation_is_not_part_of_the_cache(samples, folder, opened):
    dataset = cached(FileImages(samples, PLAIN), folder)
    [dataset[i] for i in range(5)]
    del opened[:]
    other = t.Compose([*PLAIN.transforms[:3], t.Normalize(0.5, 0.25)])
    again = cached(FileImages(samples, other), folder)
    [again[i] for i in range(5)]
    assert opened == []
    assert same(again, FileImages(samples, other))


@pytest.mark.parametrize("at", [0, 20, 28, 32, 3000])
def test_a_damaged_file_is_mended_and_never_read(samples, folder, opened, at):
    plain = FileImages(samples, PLAIN)
    dataset = cached(plain, folder)
    assert same(dataset, plain)
    (file,) = folder.iterdir()
    slot = file.stat().st_size // 5
    with open(file, "r+b") as damaged:
        damaged.seek(2 * slot + at)
        byte = damaged.read(1)
        damaged.seek(2 * slot + at)
        damaged.write(bytes([byte[0] ^ 1]))
    del opened[:]
    found = dataset[2][0]
    assert opened == ["2.jpg"]
    assert torch.equal(found, plain[2][0])
    del opened[:]
    assert torch.equal(dataset[2][0], found)
    assert opened == []


def test_a_file_that_was_cut_short_is_filled_again(samples, folder):
    plain = FileImages(samples, PLAIN)
    assert same(cached(plain, folder), plain)
    (file,) = folder.iterdir()
    length = file.stat().st_size
    for size in (length // 2 + 100, 0):
        os.truncate(file, size)
        assert same(cached(plain, folder), plain)
        assert file.stat().st_size == length


@pytest.mark.parametrize(("call", "share"), [(1, 0.5), (2, 0.0), (2, 0.5), (2, 0.95)])
def test_a_killed_process_leaves_no_half_image(samples, folder, opened, monkeypatch, call, share):
    """It dies in the middle of the pixels, before the head, or in the middle of the head."""

    class Killed(BaseException):
        pass

    plain, calls = FileImages(samples, PLAIN), []
    write = os.pwrite

    def dies(file, data, offset):
        calls.append(1)
        if len(calls) < call:
            return write(file, data, offset)
        write(file, data[: int(share * len(data))], offset)
        raise Killed

    monkeypatch.setattr(os, "pwrite", dies)
    with pytest.raises(Killed):
        cached(plain, folder)[0]
    monkeypatch.setattr(os, "pwrite", write)
    del opened[:]
    assert torch.equal(cached(plain, folder)[0][0], plain[0][0])
    assert opened == ["0.jpg", "0.jpg"]


def test_a_full_disk_is_said_once_and_nothing_is_lost(samples, folder, monkeypatch, caplog):
    plain = FileImages(samples, PLAIN)
    dataset = cached(plain, folder)
    dataset[0]

    def full(file, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert same(dataset, plain)
    assert same(dataset, plain)
    (record,) = caplog.records
    assert "cannot be written to (No space left on device); images that are not" in record.message


def test_a_folder_that_cannot_be_written_to_is_read(samples, folder, opened, monkeypatch, caplog):
    plain = FileImages(samples, PLAIN)
    filled = cached(plain, folder)
    [filled[i] for i in range(3)]
    real = os.open

    def read_only(path, flags, *mode):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    dataset = cached(plain, folder)
    del opened[:]
    [dataset[i] for i in range(5)]
    assert opened == ["3.jpg", "4.jpg"]
    assert same(dataset, plain)
    assert len(caplog.records) == 1
    for file in folder.iterdir():
        file.unlink()
    assert same(cached(plain, folder), plain)
    assert len(caplog.records) == 1


def test_long_images_are_read_from_their_files(tmp_path, folder, opened):
    files = [(draw(tmp_path / f"{n}.png", n, (n, 20)), 0) for n in (80, 81)]  # 4:1, and longer
    dataset = cached(FileImages(files, CROPPED), folder)
    for _ in range(2):
        assert same(dataset, FileImages(files, CROPPED))
    del opened[:]
    [dataset[i] for i in range(2)]
    assert opened == ["81.png"]


def test_a_copy_with_another_transform_leaves_the_original(samples, folder):
    """As scoring does, which reads images without augmentation."""
    for transform in (CROPPED, RANDOM):
        plain = FileImages(samples, transform, PLAIN)
        dataset = cached(plain, folder)
        read = plain_loader(DataLoader(dataset, batch_size=2, shuffle=True), CONFIG)
        assert "with the data set's evaluation transform" in read.description
        for _ in range(2):
            images = torch.cat([batch for batch, _ in read.loader])
            evaluated = FileImages(samples, PLAIN)
            assert torch.equal(images, torch.stack([image for image, _ in evaluated]))
        assert dataset.transform is plain.transform is transform
        assert same(dataset, plain)
        other = copy.copy(dataset)
        other.transform = PLAIN
        assert other.reason is None


def test_a_random_transform_is_not_cached_and_the_log_says_why(samples, folder, caplog):
    plain = FileImages(samples, RANDOM)
    dataset = cached(plain, folder)
    assert same(dataset, plain)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pcx.cache", logging.WARNING)
    assert "FileImages is not cached: its transform begins with RandomResizedCrop" in record.message
    assert list(folder.iterdir()) == []


def _reads(samples, folder, start, queue):
    torch.set_num_threads(1)
    plain = FileImages(samples, PLAIN)
    dataset = cached(plain, folder)
    start.wait(60)
    results = [same(dataset, plain) for _ in range(20)]
    queue.put(all(results))


def test_two_processes_write_one_cache_at_once(samples, folder, opened):
    context = multiprocessing.get_context("spawn")
    queue, start = context.Queue(), context.Barrier(2)
    processes = [
        context.Process(target=_reads, args=(samples, folder, start, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found == [True, True]
    dataset = cached(FileImages(samples, PLAIN), folder)
    [dataset[i] for i in range(5)]
    assert opened == []
    assert len(list(folder.iterdir())) == 1


def test_workers_fill_the_cache_for_all(samples, folder, opened):
    plain = FileImages(samples, PLAIN)
    dataset = cached(plain, folder)
    loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context="spawn")
    images = torch.cat([batch for batch, _ in loader])
    assert [torch.equal(dataset[i][0], images[i]) for i in range(5)] == [True] * 5
    assert opened == []
    assert torch.equal(plain[3][0], images[3])


def test_it_is_pickled_without_the_images(samples, folder):
    plain = FileImages(samples, PLAIN)
    dataset = cached(plain, folder)
    assert same(dataset, plain)
    data = pickle.dumps(dataset)
    assert len(data) < 6000
    assert same(pickle.loads(data), plain)
    assert same(copy.deepcopy(dataset), plain)


def test_a_grey_image_of_ones_own_loader_is_left_alone(samples, folder):
    class Grey(FileImages):
        def __getitem__(self, i):
            path, label = self.samples[i]
            with Image.open(path) as image:
                return self.transform(image.convert("L")), label

    plain = Grey(samples, t.Compose(PLAIN.transforms[:3]))
    dataset = cached(plain, folder, key="grey")
    for _ in range(2):
        assert same(dataset, plain)


def test_data_sets_that_open_files_otherwise_are_told_apart_by_their_key(samples, folder):
    def opened(path, flip):
        image = Image.open(path)
        return t.functional.hflip(image) if flip else image

    root = samples[0][0].parent.parent
    for flip in (False, True):
        plain = ImageFolder(root, PLAIN, loader=partial(opened, flip=flip), allow_empty=True)
        dataset = cached(plain, folder, key=f"flip={flip}")
        for _ in range(2):
            assert same(dataset, plain)
        assert (dataset.classes, dataset.targets) == (plain.classes, plain.targets)


def test_a_transform_that_is_changed_in_place_harms_no_other_run(samples, folder):
    changed = t.Compose(list(copy.deepcopy(PLAIN.transforms)))
    dataset = cached(FileImages(samples, changed), folder)
    changed.transforms[0].size = 64
    assert dataset[0][0].shape == (3, 32, 32)
    plain = FileImages(samples, PLAIN)
    assert same(dataset, plain)
    assert same(cached(plain, folder), plain)


def test_torchvisions_folders_subsets_and_concatenations(tmp_path, samples, folder, opened):
    for name in ("ant", "bee"):
        draw(tmp_path / "set" / name / "0.png", ord(name[0]))
    found = ImageFolder(tmp_path / "set", PLAIN, target_transform=lambda label: 10 * label)
    plain = ConcatDataset([Subset(FileImages(samples, PLAIN), [3, 1]), found])
    dataset = cached(plain, folder)
    for _ in range(2):
        assert same(dataset, plain)
    assert [label for _, label in dataset] == [0, 1, 0, 10]
    del opened[:]
    [dataset[i] for i in range(4)]
    assert opened == []


def test_bad_input_is_named(tmp_path, samples, folder):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 32, 32), 0

    class Wrong(FileImages):
        def __getitem__(self, i):
            return super().__getitem__(i)[0], 9

    class Twice(FileImages):  # as torchvision's `transforms` beside `transform`
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return t.functional.vflip(image), label

    class Three(FileImages):
        def __getitem__(self, i):
            return *super().__getitem__(i), i

    class Normalised(Subset):
        def __getitems__(self, places):
            return [(NORMAL(image), label) for image, label in super().__getitems__(places)]

    plain = FileImages(samples, PLAIN)
    with pytest.raises(
        ValueError, match="dataset: Wrong opens its files in a way of its own.*key="
    ):
        cached(Wrong(samples, PLAIN), folder)
    folders = ImageFolder(tmp_path, PLAIN, loader=lambda path: None, allow_empty=True)
    with pytest.raises(ValueError, match="ImageFolder opens its files in a way of its own.*key="):
        cached(folders, folder)
    with pytest.raises(ValueError, match="dataset: Normalised may change what it gives"):
        cached(ConcatDataset([plain, Normalised(plain, [0])]), folder)
    with pytest.raises(ValueError, match=r"dataset\[0\] does not give what dataset.transform"):
        cached(Twice(samples, PLAIN), folder, key="twice")[0]
    with pytest.raises(ValueError, match=r"dataset\[0\] is a tuple of 3, expected \(image, label"):
        cached(Three(samples, PLAIN), folder, key="three")[0]
    with pytest.raises(ValueError, match="dataset: TensorDataset has no image files .*FileImages"):
        cached(TensorDataset(torch.zeros(2)), folder)
    with pytest.raises(ValueError, match="dataset: Stream is an IterableDataset"):
        cached(Stream(), folder)
    with pytest.raises(ValueError, match=r"samples\[0\] begins with a int, expected a file"):
        cached(FileImages([(1, 2)], PLAIN), folder)
    with pytest.raises(ValueError, match=r"samples\[0\] is 'a.jpg', expected \(file, label\)"):
        cached(FileImages(["a.jpg"], PLAIN), folder)
    with pytest.raises(ValueError, match=r"dataset: dataset\[0\] has the label 9, but .* gives 0"):
        cached(Wrong(samples, PLAIN), folder, key="wrong")[0]
    with pytest.raises(ValueError, match=r"cache: .*0\.jpg is a file, expected a folder"):
        cached(FileImages(samples, PLAIN), samples[0][0])
    with pytest.raises(ValueError, match=r"cache: .*0\.jpg/c cannot be made \(Not a directory\)"):
        cached(FileImages(samples, PLAIN), samples[0][0] / "c")
    with pytest.raises(ValueError, match=r"cache: .* is a file"):
        load_task("digits", CONFIG, cache=samples[0][0])


def test_a_task_of_folders_is_cached_where_it_can_be(tmp_path, folder, opened, caplog):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            for i in range(5):
                draw(tmp_path / split / name / f"{i}.png", i)
    plain = load_task("", CONFIG, root=tmp_path)
    task = load_task("", CONFIG, root=tmp_path, cache=folder)
    (record,) = caplog.records
    assert "the splits train, trainval: its transform begins with RandomResized" in record.message
    for split in ("val", "test"):
        assert len(plain.splits[split]) > 0
        assert same(task.splits[split], plain.splits[split])
        del opened[:]
        assert len(list(task.splits[split])) == len(plain.splits[split])
        assert opened == []


def test_a_task_in_memory_says_that_there_is_nothing_to_cache(folder, caplog):
    task = load_task("digits", CONFIG, cache=folder)
    assert type(task.splits["test"]) is MemoryImages
    (record,) = caplog.records
    assert "train, val, test, trainval: MemoryImages has no image files" in record.message


def test_loaders_of_tasks(monkeypatch):
    task = load_task("digits", CONFIG)
    assert not task.loader("val").pin_memory
    assert not task.loader("val").persistent_workers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert task.loader("val").pin_memory
    assert task.loader("val", num_workers=1).persistent_workers
    assert not task.loader("trainval", num_workers=1).persistent_workers
