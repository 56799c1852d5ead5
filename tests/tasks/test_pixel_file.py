"""The file of a cache, slot by slot."""

import os

import numpy as np
import pytest

from pcx.tasks import pixel_file
from pcx.tasks.pixel_file import PixelFile

A, B = b"a" * 16, b"b" * 16


def pixels(*shape, start=0):
    return (np.arange(np.prod(shape)) + start).astype(np.uint8).reshape(shape)


@pytest.fixture
def file(tmp_path):
    pixel_file._say.cache_clear()
    return PixelFile(tmp_path / "a.images", count=3, limit=5000)


def test_a_slot_gives_what_was_written_with_its_stamp(file):
    assert file.read(0, A) is None
    for shape in ((3, 30, 50), (30, 50, 3), (1, 1, 1)):
        file.write(1, A, pixels(*shape))
        found = file.read(1, A)
        assert found.shape == shape
        assert np.array_equal(found, pixels(*shape))
        found[:] = 0  # a copy
        assert np.array_equal(file.read(1, A), pixels(*shape))
        assert file.read(1, B) is file.read(0, A) is file.read(2, A) is None
    file.write(2, A, pixels(3, 40, 50))  # over the limit
    assert file.read(2, A) is None
    file.write(1, B, pixels(2, 2, 3, start=7).transpose(1, 0, 2))  # not contiguous
    assert np.array_equal(file.read(1, B), pixels(2, 2, 3, start=7).transpose(1, 0, 2))
    assert file.read(1, A) is None


def test_another_object_over_the_file_sees_what_is_written(file):
    other = PixelFile(file.path, 3, 5000)
    file.write(0, A, pixels(3, 4, 5))
    assert np.array_equal(other.read(0, A), pixels(3, 4, 5))
    other.write(0, B, pixels(3, 4, 5, start=1))
    assert np.array_equal(file.read(0, B), pixels(3, 4, 5, start=1))


def test_a_slot_whose_pixels_are_of_another_write_is_empty(file):
    """As when two processes write different images into it, one head over the other's pixels."""
    file.write(0, A, pixels(3, 4, 5))
    head = file.path.read_bytes()[:32]
    file.write(0, B, pixels(3, 4, 5, start=1))
    with open(file.path, "r+b") as raw:
        raw.write(head)
    assert file.read(0, A) is file.read(0, B) is None


def test_an_empty_slot_is_not_touched_through_the_map(file):
    """On a full tmpfs that would end the process by SIGBUS."""

    class Untouchable:
        def __getitem__(self, index):
            raise AssertionError

    file.write(0, A, pixels(3, 4, 5))
    file._map = Untouchable()
    assert file.read(1, A) is None
    with pytest.raises(AssertionError):
        file.read(0, A)


def test_empty_slots_take_no_room(tmp_path):
    file = PixelFile(tmp_path / "large.images", count=1000, limit=1_000_000)
    file.write(999, A, pixels(3, 10, 10))
    assert os.stat(file.path).st_size > 10**9
    assert os.stat(file.path).st_blocks * 512 < 10**6


def test_a_lost_folder_is_said_and_nothing_is_raised(tmp_path, caplog):
    pixel_file._say.cache_clear()
    file = PixelFile(tmp_path / "gone" / "a.images", 3, 5000)
    file.write(0, A, pixels(3, 4, 5))
    assert file.read(0, A) is None
    (record,) = caplog.records
    assert "gone cannot be written to (No such file or directory)" in record.message
