"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

DAY = 24 * 3600.0  # seconds after which a part file is old, whoever wrote it
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)  # of file systems that know no fsync


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write; it takes the place of `path` if the block ends well.

    What was written is on the disk before it takes that place, so that a power cut leaves the old
    file or the new one. Of a symbolic link, the file that it names is replaced. Part files of
    `path` that killed processes have left go away.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    part = path.with_name(f"{path.name}.{machine()}.{os.getpid()}-{threading.get_native_id()}.part")
    try:
        yield part
        _to_disk(part)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        code = getattr(error, "errno", None) or errno.EIO
        said = f"{error}; make room on its disk, or choose another" if _is_full(error) else error
        raise OSError(code, f"{path} cannot be written, and is as it was ({said})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    if os.name != "nt":  # folders cannot be opened there
        _to_disk(path.parent)


def _is_full(error: Exception) -> bool:
    """Whether a disk, a quota or a limit of the process is used up, as far as the error says."""
    used_up = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = [os.strerror(code) for code in used_up]
    return getattr(error, "errno", None) in used_up or any(word in str(error) for word in words)


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: the disk is full, or failed.
    """
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)


def _sweep(path: Path) -> None:
    """Removes part files of `path` whose process has ended, or that are older than a day.

    Of processes of other machines that share the folder nothing is known before that day is over.
    """
    of_path = re.compile(re.escape(path.name) + r"\.(.+)\.(\d+)-\d+\.part")
    for part in path.parent.iterdir():
        found = of_path.fullmatch(part.name)
        if found is None:
            continue
        ended = found[1] == machine() and not runs(int(found[2]))
        with suppress(OSError):  # another process may sweep as well
            if ended or time.time() - part.stat().st_mtime > DAY:
                part.unlink()


def machine() -> str:
    """A name of this machine, or of the container, within which processes have their numbers."""
    with suppress(OSError):
        return re.sub(r"\W", "_", f"{platform.node()}-{os.readlink('/proc/self/ns/pid')}")
    return re.sub(r"\W", "_", platform.node())


def runs(process: int) -> bool:
    """Whether a process of that number runs on this machine; Windows is not asked."""
    if os.name == "nt":  # os.kill would end it
        return True
    with suppress(OSError, IndexError):
        # A process that was killed stays until its parent has asked for it.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
