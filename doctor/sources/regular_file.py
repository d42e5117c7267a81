"""Open files that somebody else made or named: of a checkpoint, or on the command line."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import ModelFileError, UsageError

_INSTEAD = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; fetch that with git lfs pull"),
    (b"<!doctype html", "is a web page, not the file itself; download it again"),
    (b"<html", "is a web page, not the file itself; download it again"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
)
"""How files begin that people have by mistake, in small letters, and what to say of them."""
HEAD_BYTES = 64
"""As much as tells them."""


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


def instead(data: bytes) -> str | None:
    """What a file is that is not what its name promises, and what to do: ``is a web page, not the file itself; ...``.

    Args:
        data: Its beginning, or all of it.
    """
    head = data[:HEAD_BYTES].lstrip().lower()
    return next((words for beginning, words in _INSTEAD if head.startswith(beginning)), None)


def read_given(
    path: Path, most_bytes: int, *, where: str, what: str, advice: str, error: type[UsageError] = UsageError
) -> bytes:
    """Read a text file that the user named.

    Args:
        path: The file.
        most_bytes: The largest that makes sense.
        where: How the user named it, for messages.
        what: What it should be: ``a snapshot``.
        advice: What to do where it is not there: ``record one with vlm-doctor collect``.
        error: Type of the error.

    Returns:
        Its text in UTF-8, also where an editor or a shell of Windows wrote UTF-16 or a mark of the order of bytes.

    Raises:
        UsageError: Of that type; one sentence says what, where and what to do.
    """
    try:
        if path.is_dir():
            raise error(f"{where} is a folder; name {what} in it.")
        if path.exists() and not path.is_file():
            # A pipe that nobody writes to would be waited for.
            raise error(f"{where} is not a regular file; {advice}.")
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise error(f"{where}: no such file; {advice}.") from None
    except (OSError, ValueError) as problem:
        wrong = (
            unreadable(problem, again=advice) if isinstance(problem, OSError) else f"cannot be read ({problem}); {advice}"
        )
        raise error(f"{where} {wrong}.") from problem
    if len(data) > most_bytes:
        raise error(f"{where} has more than {most_bytes:,} bytes, which is too large for {what}; {advice}.")
    other = instead(data)
    if other is not None:
        raise error(f"{where} {other}.")
    return in_utf8(data)


def in_utf8(data: bytes) -> bytes:
    """A text without the mark that tells its encoding; UTF-16, which PowerShell writes into files, becomes UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode("utf-16").encode("utf-8", "surrogatepass")
    return data.removeprefix(codecs.BOM_UTF8)


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
