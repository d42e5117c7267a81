"""Which machine a name means: this one, one in a file, or one that was made up."""

from __future__ import annotations

from pathlib import Path

from ..errors import MachineError
from ..machine import Machine


def load_machine(spec: str) -> Machine:
    """A machine by name.

    Args:
        spec: ``live``, the path of a snapshot (a text with ``/`` or ending in ``.json``), or a made-up machine such as
            ``2xL4``, ``8xH100:nvswitch``, ``4x3090:nvlink=0-1,2-3``, ``L4+A10`` or ``24GiB,12GiB``.

    Raises:
        MachineError: It is none of these, or the file cannot be read.
    """
    if spec == "live":
        from .collection import collect

        return collect()
    from .snapshot import read_snapshot
    from .synthetic import parse_machine

    if not spec.strip():
        raise MachineError("--machine is empty; write live, the file of a snapshot, or a description such as 2xL4.")
    if "/" in spec or spec.endswith(".json"):
        return read_snapshot(Path(spec))
    try:
        return parse_machine(spec)
    except MachineError:
        if len(spec) < 256 and Path(spec.replace("\0", "")).exists():
            return read_snapshot(Path(spec))
        raise
