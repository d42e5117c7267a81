"""Open files of a checkpoint that somebody else made."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import ModelFileError


@contextlib.contextmanager
def open_regular(path: Path, *, again: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file for reading, with its size in bytes.

    Args:
        path: The file.
        again: What to do about one that is damaged.

    Raises:
        ModelFileError: No regular file, or it cannot be opened or read.
    """
    try:
        # Not blocking: somebody's named pipe must be refused below, not waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(f"{path}: not a regular file; {again}.")
            yield file, status.st_size
    except OSError as error:
        raise ModelFileError(f"{path}: {unreadable(error, again=again)}.") from error


def unreadable(error: OSError, *, again: str) -> str:
    """What an error of a system call says of a file, and what to do: permissions are not always the reason.

    Args:
        error: Of opening or reading it.
        again: What to do about a file that is damaged.
    """
    if error.errno in (errno.EISDIR, errno.ENXIO):
        # A folder, or a socket.
        return f"not a regular file; {again}"
    advice = {
        errno.EACCES: "correct its permissions",
        errno.EPERM: "correct its permissions",
        # The link of a hub cache whose file was removed.
        errno.ENOENT: "complete the download",
        errno.ENAMETOOLONG: "correct the name",
    }
    return f"cannot be read ({error.strerror or error}); {advice.get(error.errno or 0, again)}"


def read_text(path: Path, most_bytes: int) -> str | None:
    """The beginning of a regular file; ``None`` when there is none, or it cannot be read. Never waits for a named pipe."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return file.read(most_bytes).decode("utf-8", "replace")
    except (OSError, ValueError):
        return None


def names_in(folder: Path) -> list[str]:
    """The first 500 names of what is in a folder, sorted; none where it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())[:500]
    except OSError:
        return []


def small_text(path: Path) -> str | None:
    """What a small file says, as the kernel writes them; ``None`` where it is empty, or cannot be read."""
    return (read_text(path, 65536) or "").strip() or None
