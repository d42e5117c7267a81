"""Reads a file that somebody named: never a pipe, which would be waited for, nor a device, which never ends."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def read_given(path: Path, most_bytes: int) -> bytes:
    """The beginning of a file.

    Args:
        path: The file.
        most_bytes: Read no more of it.

    Raises:
        OSError: It is not there, not regular, or cannot be read; ``strerror`` says which.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is not a regular file")
    with path.open("rb") as file:
        return file.read(most_bytes)
