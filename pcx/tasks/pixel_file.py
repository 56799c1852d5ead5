"""A memory-mapped file of images, which several processes read and write."""

from __future__ import annotations

import logging
import os
import struct
import weakref
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

LOG = logging.getLogger("pcx.cache")
STAMP = 16  # bytes
_HEAD = struct.Struct(f"<{STAMP}s4I")  # stamp, three sides, checksum
_PAGE = 4096


class PixelFile:
    """One slot for each image, in a file that grows as slots are filled.

    A slot holds a head (stamp, shape, checksum) and the pixels. The head is written last, and its
    checksum covers the pixels. A slot that another process is writing, that a killed process left
    half written, or that is damaged thus reads as empty. Slots that are empty take no room on the
    disk, where the file system has sparse files.

    Nothing here raises where the file cannot be used: slots then read as empty, writes do nothing,
    and the log `pcx.cache` says once what is the matter.

    Args:
        path: the file; made where it is missing.
        count: number of images.
        limit: bytes of the largest image.
    """

    def __init__(self, path: Path, count: int, limit: int):
        self.path = path
        self.count = count
        self.limit = limit
        self.slot = -(-(_HEAD.size + limit) // _PAGE) * _PAGE
        # Shared with the workers of a loader, so that one of them says it for all.
        self._writable = torch.ones(1, dtype=torch.bool).share_memory_()
        self._opened = False
        self._file = -1  # to read heads from
        self._map: np.ndarray | None = None
        self._open()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": False, "_file": -1, "_map": None}

    def read(self, index: int, stamp: bytes) -> np.ndarray | None:
        """The pixels in a slot, uint8 of three sides; None unless they were written with `stamp`.

        Returns:
            A copy, which no other process can change.
        """
        self._open()
        if self._map is None:
            return None
        try:  # not through the map: touching a page that was never written may kill the process
            head = os.pread(self._file, _HEAD.size, index * self.slot)
        except OSError:
            return None
        if len(head) < _HEAD.size or not head.startswith(stamp):
            return None
        _, *shape, checksum = _HEAD.unpack(head)
        size = shape[0] * shape[1] * shape[2]
        if size > self.limit:
            return None
        # Copied before it is checked: another process may write to the slot.
        pixels = np.array(self._map[index, _HEAD.size : _HEAD.size + size])
        return pixels.reshape(shape) if _checksum(stamp, shape, pixels) == checksum else None

    def write(self, index: int, stamp: bytes, pixels: np.ndarray) -> None:
        """Fills a slot; pixels uint8 of three sides. Images over the limit are left out."""
        self._open()
        if self._map is None or pixels.nbytes > self.limit or not self._writable:
            return
        pixels = np.ascontiguousarray(pixels)
        head = _HEAD.pack(stamp, *pixels.shape, _checksum(stamp, pixels.shape, pixels))
        try:
            file = os.open(self.path, os.O_WRONLY)
            try:
                _write_all(file, pixels.data.cast("B"), index * self.slot + _HEAD.size)
                _write_all(file, memoryview(head), index * self.slot)
            finally:
                os.close(file)
        except OSError as error:
            self._give_up(error)

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        try:
            self._grow()
        except OSError as error:
            self._give_up(error)
        shape = (self.count, self.slot)
        try:  # also what cannot be written to may be read
            self._map = np.asarray(np.memmap(self.path, np.uint8, "r", shape=shape))
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
        except (OSError, ValueError) as error:  # no file, or a shorter one
            self._give_up(error)

    def _grow(self) -> None:
        """Makes the file, or gives it its full length; what it holds stays."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(file).st_size < self.count * self.slot:
                os.ftruncate(file, self.count * self.slot)
        finally:
            os.close(file)

    def _give_up(self, error: OSError | ValueError) -> None:
        if self._writable:
            self._writable.fill_(False)
            _say(
                f"cache: {self.path.parent} cannot be written to "
                f"({getattr(error, 'strerror', None) or error}); images that are not in it are "
                "read from their files"
            )


@cache
def _say(text: str) -> None:
    LOG.warning(text)


def _checksum(stamp: bytes, shape: tuple[int, ...] | list[int], pixels: np.ndarray) -> int:
    return zlib.crc32(pixels.data, zlib.crc32(stamp + struct.pack("<3I", *shape)))


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
