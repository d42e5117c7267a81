"""Reads a report that ``--save`` or ``--json --output`` wrote, or a snapshot of ``collect``, to compare with."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..changes import Saved
from ..codec import MAX_SNAPSHOT_BYTES, machine_from_json
from ..errors import MachineError, UsageError
from ..findings import Diagnosis
from .regular_file import read_given


class _Parts(msgspec.Struct):
    """Of a report only what is compared, so that reports of other versions can be read."""

    machine: msgspec.Raw = msgspec.Raw(b"")
    diagnosis: Diagnosis | None = None
    exit_status: int | None = None


def read_saved(path: Path) -> Saved:
    """Read a saved report or snapshot.

    Raises:
        UsageError: There is no such file, or it is neither; one sentence says which.
    """
    where = f"--since {path}"
    data = read_given(
        path,
        2 * MAX_SNAPSHOT_BYTES,
        where=where,
        what="a report of vlm-doctor",
        advice="write one with vlm-doctor --save FILE",
    )
    try:
        parts = msgspec.json.decode(data, type=_Parts)
        machine = machine_from_json(bytes(parts.machine) or data, where=where)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MachineError) as error:
        raise UsageError(f"{where}: not a report of vlm-doctor; write one with vlm-doctor --save FILE.") from error
    return Saved(where=str(path), machine=machine, diagnosis=parts.diagnosis, exit_status=parts.exit_status)
