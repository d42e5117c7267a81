"""How long loads took on this machine, kept in the doctor's cache, and how long the next one will take by that.

A machine is known by the UUIDs of its GPUs: names of hosts change from container to container.
"""

from __future__ import annotations

import hashlib
import statistics
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import msgspec

from vlm_doctor.sources.cache_files import default_folder, load_record, store_record
from vlm_doctor.units import GB, GIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan, Stage

    from .loads import Load

LEAST_BYTES = GIB
"""A smaller model says nothing of a rate: importing torch and transformers takes longer than its weights."""
MOST_BYTES_PER_S = 64 * GB
"""To one GPU: PCIe 5.0 with 16 lanes. Faster was no load from a disk or from host memory, but a stand-in's."""
_MAX_FILES = 200
_MAX_BYTES = 8192


class TimedLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One load, from the call of the loader to the last weight on a GPU."""

    model: str
    """Its label: name, dtype, who placed it."""
    uuids: tuple[str, ...]
    """Of its GPUs, in the order of the stages."""
    weights_bytes: int
    seconds: float
    date: str
    """ISO 8601, UTC."""


def keep(load: Load, stages: Sequence[Stage], folder: Path | None = None) -> None:
    """Remember a load, in place of the last one of this model on these GPUs.

    Args:
        load: As it went.
        stages: Its GPUs.
        folder: Of the cache; ``None`` is the user's.
    """
    folder = folder or default_folder()
    is_plausible = load.seconds > 0 and load.weights_bytes <= MOST_BYTES_PER_S * len(stages) * load.seconds
    if folder is None or not stages or not load.weights_bytes or load.offloaded_bytes or not is_plausible:
        return
    uuids = tuple(stage.uuid for stage in stages)
    key = hashlib.sha256("\0".join((load.model, *uuids)).encode()).hexdigest()[:32]
    record = TimedLoad(
        model=load.model,
        uuids=uuids,
        weights_bytes=load.weights_bytes,
        seconds=round(load.seconds, 2),
        date=datetime.now(timezone.utc).date().isoformat(),
    )
    store_record(folder / f"load-{key}.json", record)


def known(machine: Machine, folder: Path | None = None) -> list[TimedLoad]:
    """Loads onto GPUs of this machine, the latest first; none for a machine that is not this one."""
    folder = folder or default_folder()
    here = {gpu.uuid for gpu in machine.gpus}
    if folder is None or machine.origin != "live":
        return []
    try:
        paths = sorted(folder.glob("load-*.json"), key=lambda path: -path.stat().st_mtime)[:_MAX_FILES]
    except OSError:
        return []
    found = (load_record(path, TimedLoad, most_bytes=_MAX_BYTES) for path in paths)
    return [one for one in found if one is not None and one.seconds > 0 and here.issuperset(one.uuids)]


def expected(model: str, plan: Plan, loads: Iterable[TimedLoad]) -> str:
    """``about 8 s, as on 2026-01-02``, or by the rate of other loads here; empty where nothing is known.

    Args:
        model: Label of the model.
        plan: Where it goes.
        loads: From :func:`known`.
    """
    size = sum(stage.weights_bytes for stage in plan.stages)
    uuids = tuple(stage.uuid for stage in plan.stages)
    if not size or plan.offloaded is not None:
        return ""
    loads = list(loads)
    for load in loads:
        if (load.model, load.weights_bytes, len(load.uuids)) == (model, size, len(uuids)):
            return f"about {max(1.0, load.seconds):.0f} s, as on {load.date}"
    rates = [load.weights_bytes / load.seconds for load in loads if load.weights_bytes >= LEAST_BYTES]
    if not rates or size < LEAST_BYTES:
        return ""
    rate = statistics.median(rates)
    by = f"the median of {len(rates)} other loads here" if len(rates) > 1 else "as another load here"
    return f"about {max(1.0, size / rate):.0f} s at {rate / GB:.1f} GB/s, {by}"
