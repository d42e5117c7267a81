"""Reads a log of any size in bounded memory and time: its beginning, its end, and what surrounds errors in between."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections import deque
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import UsageError
from ..units import MIB
from .regular_file import unreadable

HEAD_BYTES = MIB
TAIL_BYTES = 3 * MIB
AROUND_BYTES = 128 * 1024
"""Kept of a block of the middle that holds an error: more than the longest traceback."""
MAX_AROUND = 16
"""Blocks kept of the middle."""
MAX_READ_BYTES = 8 * 2**30
"""Where reading stops: a pipe may never end."""
MAX_SEARCHED_BYTES = 2**30
"""Of the beginning of a file that are searched for errors, some seconds long; then its end is looked at."""
_BLOCK_BYTES = MIB
_SIGNS = (b"Traceback (most recent call last)", b"out of memory", b"NVRM: Xid", b"NCCL WARN", b"CUDA error")
"""What an error in the middle of a huge log looks like; a search for fixed bytes runs at gigabytes a second."""


class LogFile(NamedTuple):
    """A log, whole or in parts."""

    text: str
    skipped_bytes: int


def read_log(name: str) -> LogFile:
    """Read a log.

    Args:
        name: A path, or ``-`` for standard input.

    Raises:
        UsageError: It cannot be read, or is empty.
    """
    where = "standard input" if name == "-" else name
    if not name.strip():
        raise UsageError("The name of the log is empty; name one, or - for standard input.")
    try:
        if name == "-":
            if sys.stdin is None:
                raise UsageError("There is no standard input; name a file.")
            log = _read(sys.stdin.buffer)
        else:
            if Path(name).is_dir():
                raise UsageError(f"{name} is a folder; name the log in it.")
            with Path(name).open("rb") as file:
                kind = os.fstat(file.fileno()).st_mode
                if (stat.S_ISCHR(kind) or stat.S_ISBLK(kind)) and not file.isatty():
                    # A pipe is read to its end; such a device has none.
                    raise UsageError(f"{name} is a device; name a log, or - for standard input.")
                log = _read(file)
    except FileNotFoundError:
        raise UsageError(f"{name}: no such file; name a log, or - for standard input.") from None
    except OSError as error:
        raise UsageError(f"{where} {unreadable(error, again='name a log, or - for standard input')}.") from error
    except ValueError as error:
        raise UsageError(f"{where} cannot be read ({error}); name a log, or - for standard input.") from error
    if not log.text.strip():
        raise UsageError(f"{where} is empty; paste a log or a traceback.")
    return log


def _read(file: BinaryIO) -> LogFile:
    head = file.read(HEAD_BYTES + TAIL_BYTES)
    total = len(head)
    if total < HEAD_BYTES + TAIL_BYTES:
        return LogFile(_decoded(head), 0)
    kept: list[bytes] = [head[:HEAD_BYTES]]
    blocks = deque([head[HEAD_BYTES:]])
    pending, found = len(blocks[0]), 0
    tail_start = _tail_start(file)
    while total < max(MAX_READ_BYTES, tail_start + TAIL_BYTES):
        if MAX_SEARCHED_BYTES <= total < tail_start:
            file.seek(tail_start)
            total = tail_start
        block = file.read(_BLOCK_BYTES)
        if not block:
            break
        total += len(block)
        pending += len(block)
        blocks.append(block)
        while pending - len(blocks[0]) >= TAIL_BYTES:
            leaving = blocks.popleft()
            pending -= len(leaving)
            if found < MAX_AROUND:
                part = _around_error(leaving, blocks[0])
                kept += [part] if part else []
                found += bool(part)
    kept.append(b"".join(blocks))
    text = "\n".join(_decoded(part) for part in kept)
    return LogFile(text, max(0, total - sum(map(len, kept))))


def _tail_start(file: BinaryIO) -> int:
    """Where the last bytes of a file begin; 0 in a pipe."""
    if not file.seekable():
        return 0
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    return end - TAIL_BYTES


def _around_error(block: bytes, following: bytes) -> bytes:
    """The part of a block around its first error, from the beginning of a line."""
    places = [place for place in (block.find(sign) for sign in _SIGNS) if place >= 0]
    if not places:
        return b""
    start = block.rfind(b"\n", 0, min(places)) + 1
    # One line of many MiB: its beginning says nothing about the error.
    start = max(start, min(places) - AROUND_BYTES // 4)
    return (block[start:] + following[:AROUND_BYTES])[:AROUND_BYTES]


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        # PowerShell's redirection writes UTF-16.
        return data.decode("utf-16", "replace")
    return data.decode("utf-8", "replace").removeprefix("\ufeff")
