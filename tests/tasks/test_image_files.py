"""Image files of unusual kinds: 16 bits, transparency, sizes beyond reason, lists that lead out."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pcx.tasks import load_task
from pcx.tasks.images import FileImages

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))


def read(file):
    return FileImages([(file, 0)], np.asarray)[0][0]


@pytest.mark.parametrize("name", ["16.png", "16.tif"])
def test_16_bits_are_scaled_to_8(tmp_path, name):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name), np.stack([RAMP] * 3, -1))


def test_numbers_without_a_range_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: its pixels are of mode 'F', 0\.0\.\.1\.0"):
        read(tmp_path / "float.tif")
    Image.fromarray(RAMP.astype(np.int32) * 10**6).save(tmp_path / "32.tif")
    with pytest.raises(ValueError, match=r"32\.tif: its pixels are of mode 'I'"):
        read(tmp_path / "32.tif")


def test_what_is_transparent_shows_white(tmp_path):
    layers = np.zeros((4, 4, 4), np.uint8)
    layers[..., 0] = 200  # red under it all
    layers[:2, :, 3] = 255
    Image.fromarray(layers, "RGBA").save(tmp_path / "a.png")
    found = read(tmp_path / "a.png")
    assert (found[:2] == (200, 0, 0)).all()
    assert (found[2:] == 255).all()
    layers[..., 3] = 255
    Image.fromarray(layers, "RGBA").save(tmp_path / "opaque.png")
    assert (read(tmp_path / "opaque.png") == (200, 0, 0)).all()
    grey = Image.fromarray(RAMP).convert("P")
    grey.save(tmp_path / "p.png", transparency=0)
    assert (read(tmp_path / "p.png")[RAMP == 0] == 255).all()


def test_a_bomb_is_named(tmp_path):
    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.png: Image size .* exceeds limit"):
        read(tmp_path / "b.png")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_lists_stay_within_their_folder(tmp_path, path):
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    (tmp_path / "birds").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "birds" / f"{split}.json").write_text(json.dumps({path: 1}))
    with pytest.raises(ValueError, match="leads out of"):
        load_task("fgvc:birds", config, root=tmp_path)
    folder = tmp_path / "vtab-1k" / "eurosat"
    folder.mkdir(parents=True)
    for name in ("train800", "val200", "train800val200", "test"):
        (folder / f"{name}.txt").write_text(f"{path} 0\n")
    with pytest.raises(ValueError, match=r"train800\.txt, line 1: .* leads out of"):
        load_task("vtab:eurosat", config, root=tmp_path)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_links_in_lists_stay_within_their_folder(tmp_path, link):
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    elsewhere, birds = tmp_path / "elsewhere", tmp_path / "birds"
    (birds / "images").mkdir(parents=True)
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "a.png")
    Image.new("RGB", (8, 8)).save(birds / "images" / "b.png")
    (birds / "within.png").symlink_to(birds / "images" / "b.png")
    for split in ("train", "val", "test"):
        (birds / f"{split}.json").write_text(json.dumps({"within.png": 1}))
    (tmp_path / "also").symlink_to(birds)  # the folder itself may be a link
    assert len(load_task("fgvc:also", config, root=tmp_path).splits["train"]) == 1
    if link == "file":
        (birds / "out").mkdir()
        (birds / "out" / "a.png").symlink_to(elsewhere / "a.png")
    else:
        (birds / "out").symlink_to(elsewhere)
    (birds / "val.json").write_text(json.dumps({"out/a.png": 1}))
    with pytest.raises(ValueError, match=r"val\.json: 'out/a\.png' leads out of .* symbolic link"):
        load_task("fgvc:birds", config, root=tmp_path)
