"""Writes the files that a run was asked for: whole or not at all, and never lost when the disk is full."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..verdicts import UNWRITABLE


def write(path: Path, text: str, option: str) -> str:
    """Write a file, its folders included, in place of the one before.

    Args:
        path: Where.
        text: All of it.
        option: What asked for it, for the message.

    Returns:
        Empty, or one sentence with code: what could not be written, and why. The file before is untouched then.
    """
    from vlm_doctor.delivery import write_file
    from vlm_doctor.errors import UsageError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text, option=option)
    except OSError as error:
        return f"{UNWRITABLE}: {option} {path}: its folder cannot be made: {error.strerror or error}."
    except UsageError as error:
        return f"{UNWRITABLE}: {error}"
    return ""


def rescue(path: Path, text: str) -> str:
    """Keep what could not be written where it belongs in the folder for temporary files; say where, or that it failed."""
    try:
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=path.suffix or ".json")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        return f"It could not be kept elsewhere either ({error.strerror or error})."
    return f"It was kept as {name}."
