"""Folders of photos: classes, splits, and what is left out."""

import numpy as np
import pytest
import torch
from PIL import Image

from pcx.tasks import load_task
from pcx.tasks.images import opened
from pcx.tasks.photos import find_photos
from pcx.training.class_names import class_names_of

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
CONFIG |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


def photos(folder, count, shade=0):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((40, 48, 3), shade, np.uint8)).save(folder / f"{i}.jpg")


def test_class_folders_are_split_and_said(tmp_path):
    photos(tmp_path / "dog", 25)
    photos(tmp_path / "cat" / "indoors", 12)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    task = load_task(str(tmp_path), CONFIG)
    assert task.name == tmp_path.name
    assert task.num_classes == 2
    assert {k: len(v) for k, v in task.splits.items()} == {
        "train": 31,
        "val": 3,
        "test": 3,
        "trainval": 34,
    }
    assert task.found == (
        "2 classes, photos: train 31, val 3, test 3 (of each class a tenth is val and a tenth is "
        "test, chosen by a hash of the file's name)"
    )
    assert class_names_of(task.loader("train")) == ["cat", "dog"]
    files = {k: {p for p, _ in v.samples} for k, v in task.splits.items()}
    assert not files["train"] & files["val"]
    assert not files["trainval"] & files["test"]
    for path, label in task.splits["trainval"].samples:
        assert (path.relative_to(tmp_path).parts[0] == "dog") == (label == 1)
    again = load_task(str(tmp_path), CONFIG)
    assert again.digest == task.digest
    assert {k: v.samples for k, v in again.splits.items()} == {
        k: v.samples for k, v in task.splits.items()
    }
    photos(tmp_path / "emu", 3)
    assert load_task("folder", CONFIG, root=tmp_path).digest != task.digest


@pytest.mark.parametrize("val", ["val", "Validation"])
def test_a_folder_val_is_val(tmp_path, val):
    for name in ("cat", "dog"):
        photos(tmp_path / "train" / name, 9, shade=0)
        photos(tmp_path / val / name, 4, shade=255)
    task = load_task("folder", CONFIG, root=tmp_path)
    assert {k: len(v) for k, v in task.splits.items()} == {"train": 18, "val": 8, "trainval": 26}
    images = torch.stack([image for image, _ in task.splits["val"]])
    assert images.min() > 0.99
    assert task.held_out == "val"
    assert "split by folder; there is no test" in task.found


def test_a_folder_test_is_test_and_train_gives_val(tmp_path):
    for name in ("cat", "dog"):
        photos(tmp_path / "train" / name, 20)
        photos(tmp_path / "test" / name, 4, shade=255)
    task = load_task("folder", CONFIG, root=tmp_path)
    sizes = {k: len(v) for k, v in task.splits.items()}
    assert sizes == {"train": 36, "val": 4, "test": 8, "trainval": 40}
    for name in ("cat", "dog"):
        photos(tmp_path / "val" / name, 2, shade=255)
    whole = load_task("folder", CONFIG, root=tmp_path)
    sizes = {k: len(v) for k, v in whole.splits.items()}
    assert sizes == {"train": 40, "val": 4, "test": 8, "trainval": 44}
    assert whole.held_out == "test"


def test_few_photos_of_a_class_stay_in_train(tmp_path):
    photos(tmp_path / "cat", 2)
    photos(tmp_path / "dog", 3)
    found = find_photos(tmp_path)
    assert {k: [label for _, label in v] for k, v in found.samples.items()} == {
        "train": [0, 0, 1],
        "val": [1],
        "test": [1],
    }


def test_files_that_are_no_images_are_left_out_and_said(tmp_path):
    photos(tmp_path / "cat", 6)
    photos(tmp_path / "dog", 6)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cat" / "whole.png")
    whole = (tmp_path / "cat" / "whole.png").read_bytes()
    (tmp_path / "cat" / "whole.png").unlink()
    (tmp_path / "cat" / "cut.png").write_bytes(whole[:-20])
    jpeg = (tmp_path / "dog" / "0.jpg").read_bytes()
    (tmp_path / "dog" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "dog" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "dog" / "behind.jpg").write_bytes(jpeg + b"made by a camera")
    found = find_photos(tmp_path)
    assert sorted(path.name for path, _ in found.left_out) == ["cut.jpg", "cut.png", "page.jpg"]
    assert sum(map(len, found.samples.values())) == 13
    last = found.described().splitlines()[-1]
    assert last.startswith("left out 3 files that are no images: ")
    assert "page.jpg (not an image)" in last
    reasons = {path.name: why for path, why in found.left_out}
    assert "cut short" in reasons["cut.jpg"] or "Truncated" in reasons["cut.jpg"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "no photos in folders of .*; expected a folder for each class"),
        ({"cat": 3}, "a single class, 'cat'; put photos of another class"),
        ({"cat": 2, "dog": 2}, "too few photos to keep some for validation"),
        ({"val/cat": 2, "val/dog": 2}, "it has a folder 'val' and none named 'train'"),
        (
            {"train/cat": 3, "train/dog": 3, "val/emu": 1},
            "the class 'emu' of val has no photos in .*train",
        ),
        ({"train/cat": 3, "val/cat": 3}, "a single class"),
        ({"train": 3, "val": 3}, "no photos in folders of .*train"),
    ],
)
def test_folders_that_cannot_be_learnt_from_are_named(tmp_path, made, message):
    for place, count in made.items():
        photos(tmp_path / place, count)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path), CONFIG)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="photoz: no such folder"):
        load_task(str(tmp_path / "photoz"), CONFIG)
    with pytest.raises(FileNotFoundError, match=r"photoz: no such folder"):
        load_task("./photoz", CONFIG)


def test_a_path_that_is_not_there_does_not_read_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        photos(tmp_path / "data" / name, 6)
    with pytest.raises(FileNotFoundError, match="name: no folder photos/typo; expected"):
        load_task("photos/typo", CONFIG)


def test_what_lies_beside_the_classes_is_said(tmp_path):
    for name in ("cat", "dog"):
        photos(tmp_path / "train" / name, 6)
        photos(tmp_path / "val" / name, 3)
    photos(tmp_path / "emu", 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    found = find_photos(tmp_path)
    assert found.passed_over == ["emu", "loose.png"]
    assert "not in a class folder, so not used: emu, loose.png" in found.described()


def test_a_class_never_vanishes(tmp_path):
    photos(tmp_path / "cat", 6)
    photos(tmp_path / "dog", 6)
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "1.heic").write_bytes(b"no image that Pillow reads")
    with pytest.raises(ValueError, match=r"bird: none of its 1 files is an image .* 1\.heic"):
        find_photos(tmp_path)


def test_classes_may_be_named_as_splits_are(tmp_path):
    for name in ("train", "bus"):
        photos(tmp_path / name, 6)
    assert find_photos(tmp_path).classes == ["bus", "train"]


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tif", "webp"])
def test_files_of_other_formats_that_are_cut_short_are_left_out(tmp_path, suffix):
    photos(tmp_path / "cat", 6)
    photos(tmp_path / "dog", 6)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat" / f"whole.{suffix}")
    whole = (tmp_path / "cat" / f"whole.{suffix}").read_bytes()
    (tmp_path / "cat" / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    assert [path.name for path, _ in find_photos(tmp_path).left_out] == [f"cut.{suffix}"]


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10] = 255  # the left quarter is white
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    found = np.asarray(opened(tmp_path / "turned.png", "turned.png"))
    assert found.shape == (40, 20, 3)
    assert found[:10].min() == 255
    assert found[10:].max() == 0
