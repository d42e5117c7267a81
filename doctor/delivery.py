"""Puts text where it was asked for: on standard output, or in a file that is written whole or not at all."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from .errors import OutputError, UsageError
from .formats.inert import inert
from .formats.look import DEFAULT_WIDTH, Look


def look_of(
    stream: TextIO | None, *, environment: Mapping[str, str], verbose: bool = False, machine_option: str = ""
) -> Look:
    """Say how text has to look on a stream: color only on a terminal, ASCII where it is not UTF-8.

    Args:
        stream: Where the text goes; ``None`` is a file of our own (80 columns, UTF-8).
        environment: ``NO_COLOR``, ``TERM`` and ``COLUMNS`` are respected.
        verbose: Passed on.
        machine_option: Passed on.
    """
    if stream is None:
        return Look(verbose=verbose, machine_option=machine_option)
    has_color = stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
    width = _terminal_width() if stream.isatty() else DEFAULT_WIDTH
    return Look(width=width, color=has_color, is_unicode=is_utf8(stream), verbose=verbose, machine_option=machine_option)


def _terminal_width() -> int:
    # Late: it loads the archive formats.
    import shutil

    return shutil.get_terminal_size((DEFAULT_WIDTH, 25)).columns


def is_utf8(stream: TextIO) -> bool:
    """Tell whether a stream can show any character."""
    return codecs.lookup(stream.encoding or "ascii").name == "utf-8"


def write_stdout(text: str) -> None:
    """Write to standard output and flush. A reader that went away, such as ``head``, is no error.

    Raises:
        OutputError: Standard output cannot be written, such as on a full disk.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        raise OutputError(f"Standard output cannot be written: {error.strerror or error}.") from error


def write_stderr(line: str) -> None:
    """Write one line to standard error, made harmless. Where that fails, only the exit status is left to tell."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(f"{inert(line, is_unicode=is_utf8(sys.stderr))}\n")
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    """Let what is still buffered go nowhere, or Python complains about it when it exits."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


_WHAT_TO_DO = {
    errno.ENOENT: "make its folder first",
    errno.EISDIR: "name a file in it",
    errno.ENOSPC: "make room, or name a file elsewhere",
    errno.ENAMETOOLONG: "shorten the name",
}
"""About a file that cannot be written, by the error of the system."""


def write_file(path: Path, text: str, *, option: str = "--output") -> None:
    """Write a file in UTF-8 so that it never exists half written.

    A device or pipe is written as it stands: replacing ``/dev/null`` by a file would harm the machine.

    Args:
        path: The file.
        text: All of it.
        option: Where the file was named, for the message.

    Raises:
        UsageError: The file cannot be written there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            # Not its resolved name: that of /dev/stdout or of a shell's >(command) leads nowhere.
            _write_as_it_stands(path, text)
            return
        target = path.resolve()
        if target.is_symlink():
            # A loop of links, from Python 3.13 on; before, resolve() raises RuntimeError.
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with draft.open("x", encoding="utf-8") as file:
                file.write(text)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        advice = _WHAT_TO_DO.get(getattr(error, "errno", None) or 0, "name a file elsewhere")
        raise UsageError(f"{option} {path}: cannot be written: {why}; {advice}.") from error


def _write_as_it_stands(path: Path, text: str) -> None:
    """Write into a device or pipe. A pipe that nobody reads is an error: waiting for a reader may be for ever."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
