"""torch's own files: written whole, and read without running code and without taking damage."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from pcx.checkpoints.files import written_whole


def write_torch(content: Any, path: Path) -> None:
    """Writes tensors, numbers, text and containers of these, whole or not at all."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # a program may have turned them off
    try:
        with written_whole(path) as part:
            torch.save(content, part)
    finally:
        torch.serialization.set_crc32_options(before)


def read_torch(path: Path, device: torch.device | str = "cpu") -> Any:
    """Reads what `torch.save` wrote: data alone, of which every byte is as it was written.

    torch does not compare the checksums that it writes, so a damaged file could give other numbers.
    A pickle that would run code is refused.

    Raises:
        ValueError: the file is damaged, cut short, not of torch, or holds more than data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} is not what was written")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch and zipfile raise errors of many types
        raise ValueError(f"{type(error).__name__}: {error}") from error
