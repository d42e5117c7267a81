"""Records to JSON and back. Bytes in, bytes out: reading files is the job of ``sources``."""

from __future__ import annotations

import codecs
from typing import Any, TypeVar

import msgspec

from .errors import MachineError
from .machine import SCHEMA, Machine

__all__ = ["MAX_GPUS", "MAX_SNAPSHOT_BYTES", "from_json", "machine_from_json", "to_json"]

RecordT = TypeVar("RecordT", bound=msgspec.Struct)

MAX_SNAPSHOT_BYTES = 16 * 2**20
"""A snapshot of a 16-GPU machine has about 60 kB; anything near this bound is not a snapshot."""

MAX_GPUS = 256
"""More than any machine has; some of the arithmetic on pairs of GPUs is quadratic."""

_MOST = {
    "pci_devices": 1024,
    "gaps": 4096,
    "kernel_events": 1024,
    "nccl_settings": 1024,
    "checkpoints": 1024,
    "environment": 1024,
    "calibrations": 1024,
}
"""More than any source writes: what a check does with them stays short."""
_MOST_PROCESSES = 4096
_INDEX_END = 10_000
"""First GPU index that ``--gpus`` cannot name."""
_MAX_REASON_CHARS = 300
_AGAIN = "record it again with vlm-doctor collect"


def to_json(record: msgspec.Struct, *, indent: int = 2) -> str:
    """Write a record as JSON text, keys in the order of the fields, ending in a newline.

    Where the system gave bytes that are no text (the name of a process, of a folder), JSON cannot have them: they become
    replacement characters.
    """
    try:
        text = msgspec.json.encode(record)
    except UnicodeEncodeError:
        text = msgspec.json.encode(_as_text(msgspec.to_builtins(record)))
    return (msgspec.json.format(text, indent=indent) if indent else text).decode() + "\n"


def _as_text(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_json(data: bytes | str, record: type[RecordT], *, where: str) -> RecordT:
    """Read a record back.

    Args:
        data: JSON text.
        record: The type expected.
        where: File name or other origin, for the message of the error.

    Raises:
        MachineError: The text is not JSON, or not such a record; the message names the first wrong field.
    """
    if isinstance(data, bytes):
        # Windows editors write one.
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return msgspec.json.decode(data, type=record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # A wrong value is quoted in full: some of it is enough.
        reason = str(error)[:_MAX_REASON_CHARS]
        raise MachineError(f"{where}: not a readable {record.__name__.lower()}: {reason}; {_AGAIN}.") from error


def machine_from_json(data: bytes, *, where: str) -> Machine:
    """Read a snapshot of a machine. It is marked as recorded, so that nothing acts on it.

    Raises:
        MachineError: Too large, not JSON, of another schema, or inconsistent; one sentence says which.
    """
    if len(data) > MAX_SNAPSHOT_BYTES:
        raise MachineError(f"{where}: {len(data):,} bytes is too large for a snapshot (at most {MAX_SNAPSHOT_BYTES:,}).")
    machine = from_json(data, Machine, where=where)
    if machine.schema != SCHEMA:
        advice = "update vlm-doctor" if machine.schema > SCHEMA else _AGAIN
        raise MachineError(f"{where}: snapshot schema {machine.schema}, this version reads {SCHEMA}; {advice}.")
    _check_consistency(machine, where)
    if machine.origin == "live":
        machine = msgspec.structs.replace(machine, origin="recorded")
    return machine


def _check_consistency(machine: Machine, where: str) -> None:
    """Refuse what no source would write, since checks and planner rely on it."""
    problem = _inconsistency(machine)
    if problem is not None:
        raise MachineError(f"{where}: {problem}; {_AGAIN}.")


def _inconsistency(machine: Machine) -> str | None:
    if len(machine.gpus) > MAX_GPUS:
        return f"{len(machine.gpus):,} GPUs are too many for one machine (at most {MAX_GPUS})"
    for name, most in _MOST.items():
        count = len(getattr(machine.driver if name == "kernel_events" else machine, name) or ())
        if count > most:
            return f"{count:,} {name} are too many for one machine (at most {most:,})"
    known: set[int] = set()
    for gpu in machine.gpus:
        if len(gpu.processes) > _MOST_PROCESSES or len(gpu.nvlinks) > _MOST_PROCESSES:
            return f"GPU {gpu.index} has more than {_MOST_PROCESSES:,} processes or NVLinks"
        if not 0 <= gpu.index < _INDEX_END or gpu.index in known:
            return f"GPU index {gpu.index} is given twice or out of range"
        known.add(gpu.index)
        sizes = (gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.memory_used_bytes, gpu.memory_reserved_bytes)
        if any(size is not None and not 0 <= size < 2**50 for size in sizes):
            return f"GPU {gpu.index} has a memory size out of range"
        if gpu.memory_total_bytes is not None and (gpu.memory_free_bytes or 0) > gpu.memory_total_bytes:
            return f"GPU {gpu.index} has more free memory than memory"
    joined: set[tuple[int, int]] = set()
    for link in machine.links:
        if link.a not in known or link.b not in known or link.a >= link.b:
            return f"link {link.a}-{link.b} does not join two of its GPUs in rising order"
        if (link.a, link.b) in joined:
            return f"link {link.a}-{link.b} is given twice"
        joined.add((link.a, link.b))
    return _wrong_reading(machine)


def _wrong_reading(machine: Machine) -> str | None:
    for reading in machine.calibrations:
        if not (0 <= reading.context_bytes < 2**50 and 0 <= reading.workspace_bytes < 2**50):
            return f"the calibration of {reading.gpu_name[:60]} has a size out of range"
    return None
