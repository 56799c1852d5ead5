"""The option --cache, end to end on a folder of photos."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pcx
from pcx.cli import app
from pcx.tasks import images


@pytest.fixture
def root(tmp_path):
    """A task of VTAB's layout with 6 photos in each list."""
    folder = tmp_path / "data" / "vtab-1k" / "eurosat"
    generator = torch.Generator().manual_seed(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(18):
        pixels = torch.randint(0, 256, (40, 60, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"images/{i:06d}.jpg")
        lines.append(f"images/{i:06d}.jpg {i % 10}\n")
    lists = {"train800": lines[:6], "val200": lines[6:12], "train800val200": lines[:12]}
    for name, rows in {**lists, "test": lines[12:]}.items():
        (folder / f"{name}.txt").write_text("".join(rows))
    return tmp_path / "data"


def run(*arguments):
    found = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0
    return found.output


def test_commands_read_each_photo_once_and_find_the_same(root, tmp_path, monkeypatch):
    opened, decode = [], images.opened
    monkeypatch.setattr(images, "opened", lambda *a: opened.append(1) or decode(*a))
    common = ["--task", "vtab:eurosat", "--root", root, "--batch-size", 4, "--epochs", 2]
    cache, plain, trained = ["--cache", tmp_path / "cache"], tmp_path / "a", tmp_path / "b"
    rest = ["--prompts", 2, "--lr", "0.1"]
    said = run("train", *common, "--out", plain, *rest)
    assert len(opened) == 2 * 6 + 2 * 6 + 6
    assert "loader " in said
    del opened[:]
    assert run("train", *common, "--out", trained, *rest, *cache)
    assert len(opened) == 18
    weights = [pcx.load(file).trainable() for file in (plain, trained)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    del opened[:]
    lines = [run("eval", file, *common[:4], *cache) for file in (plain, trained)]
    assert lines[0] == lines[1]
    run("condense", trained, *common, "--out", tmp_path / "c", "--keep", "0.5", *cache)
    assert opened == []


def test_tokens_are_computed_once_and_photos_read_once(root, tmp_path, monkeypatch):
    opened, decode = [], images.opened
    monkeypatch.setattr(images, "opened", lambda *a: opened.append(a[1]) or decode(*a))
    common = ["--task", "vtab:eurosat", "--root", root, "--batch-size", 4, "--epochs", 3]
    rest = ["--prompts", 2, "--lr", "0.1", "--split", "trainval"]
    run("train", *common, "--out", tmp_path / "plain", *rest)
    del opened[:]
    run("train", *common, "--out", tmp_path / "kept", *rest, "--cache-tokens")
    assert max(opened.count(name) for name in opened) == 4  # two of them to see that it is the same
    assert len(opened) == 8 * 3 + 12 + 6
    plain, kept = (pcx.load(tmp_path / name).trainable() for name in ("plain", "kept"))
    for name, tensor in plain.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_file_in_the_way_is_named(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache: .*file is a file, expected a folder"):
        run("train", "--task", "digits", "--out", tmp_path / "a", "--cache", tmp_path / "file")
