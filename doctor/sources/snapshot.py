"""Reads a recorded machine from a file."""

from __future__ import annotations

from pathlib import Path

from ..codec import MAX_SNAPSHOT_BYTES, machine_from_json
from ..errors import MachineError
from ..machine import Machine


def read_snapshot(path: Path) -> Machine:
    """Read the snapshot that ``vlm-doctor collect`` wrote.

    Raises:
        MachineError: There is no such file, it cannot be read, or it is not a snapshot.
    """
    try:
        if path.is_dir():
            raise MachineError(f"{path} is a folder; name the snapshot file in it.")
        if not path.is_file() and path.exists():
            raise MachineError(f"{path} is not a regular file; name a snapshot that vlm-doctor collect wrote.")
        with path.open("rb") as file:
            data = file.read(MAX_SNAPSHOT_BYTES + 1)
    except FileNotFoundError:
        raise MachineError(f"{path}: no such file; record one with vlm-doctor collect.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(f"{path} cannot be read: {reason}.") from error
    if not data.strip():
        raise MachineError(f"{path} is empty; record the machine again with vlm-doctor collect.")
    return machine_from_json(data, where=str(path))
