"""Small files in the doctor's own cache folder. What cannot be read or written is no cache, and never an error."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TypeVar

import msgspec

_Record = TypeVar("_Record")


def default_folder() -> Path | None:
    """The user's cache folder for this program; ``None`` when there is no home to put it in."""
    import platformdirs

    with contextlib.suppress(RuntimeError, OSError):
        return Path(platformdirs.user_cache_dir("vlm-doctor", appauthor=False))
    return None


def load_record(path: Path, kind: type[_Record], *, most_bytes: int, max_age_s: float | None = None) -> _Record | None:
    """A record that this user kept; ``None`` when there is none, or it is too old, unreadable or somebody else's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            state = os.fstat(file.fileno())
            if state.st_uid != os.getuid():
                return None
            if max_age_s is not None and not 0 <= time.time() - state.st_mtime <= max_age_s:
                return None
            return msgspec.json.decode(file.read(most_bytes), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def store_record(path: Path, record: object) -> None:
    """Keep a record, whole or not at all; the folder is made for this user alone."""
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(record))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
