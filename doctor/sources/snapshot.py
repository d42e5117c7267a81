"""Reads a recorded machine from a file."""

from __future__ import annotations

from pathlib import Path

from ..codec import MAX_SNAPSHOT_BYTES, machine_from_json
from ..errors import MachineError
from ..machine import Machine
from .regular_file import read_given


def read_snapshot(path: Path) -> Machine:
    """Read the snapshot that ``vlm-doctor collect`` wrote.

    Raises:
        MachineError: There is no such file, it cannot be read, or it is not a snapshot.
    """
    data = read_given(
        path,
        MAX_SNAPSHOT_BYTES,
        where=str(path),
        what="a snapshot",
        advice="record one with vlm-doctor collect",
        error=MachineError,
    )
    if not data.strip():
        raise MachineError(f"{path} is empty; record the machine again with vlm-doctor collect.")
    return machine_from_json(data, where=str(path))
