"""Measure what torch takes of each GPU, and remember it for the planner."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from ..calibration import Calibration
from ..machine import Gpu, Machine
from .cache_files import default_folder, load_record, store_record
from .calibration_child import LEAST_FREE_BYTES
from .child import Child

DEADLINE_S = 120.0
_IDLE_S = 20.0
_MAX_BYTES = 64 * 1024
_NOISE_BYTES = 32 * 2**20
"""A context smaller than this cannot be: other processes gave memory back meanwhile."""
_MOST_BYTES = 4 * 2**30
"""A context larger than this cannot be: other processes took memory meanwhile."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What came of measuring one GPU."""

    gpu: int
    """Its index."""
    name: str
    calibration: Calibration | None = None
    reason: str | None = None
    """Why it was not measured, as a phrase."""


def calibrate(
    machine: Machine,
    *,
    gpus: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
    cache_folder: Path | None = None,
) -> tuple[Reading, ...]:
    """Measure GPUs one after another, each in a child process, and keep what was measured.

    Makes a CUDA context on each of them for some seconds, and needs no special rights.

    Args:
        machine: A live one: what is free on each GPU is taken from it.
        gpus: GPU indices; ``None`` is all.
        environment: Of the children; ``None`` is that of this process.
        deadline_s: Seconds for each GPU.
        cache_folder: Where readings are kept; ``None`` is the user's cache folder.
    """
    environment = os.environ if environment is None else environment
    folder = cache_folder or default_folder()
    readings = []
    for gpu in machine.gpus:
        if gpus is not None and gpu.index not in gpus:
            continue
        reading = _measure(gpu, machine, environment, deadline_s)
        if reading.calibration is not None and folder is not None:
            _store(folder, reading.calibration)
        readings.append(reading)
    return tuple(readings)


def _measure(gpu: Gpu, machine: Machine, environment: Mapping[str, str], deadline_s: float) -> Reading:
    reason = _obstacle(gpu, machine)
    if reason is not None:
        return Reading(gpu=gpu.index, name=gpu.name, reason=reason)
    outcome = Child(
        "calibration_child",
        {"free_bytes": gpu.memory_free_bytes},
        environment={**environment, "CUDA_VISIBLE_DEVICES": gpu.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        deadline_s=deadline_s,
        idle_s=_IDLE_S,
    ).outcome()
    if outcome.state != "ok":
        reached = f", after {outcome.stage}" if outcome.stage and outcome.state != "failed" else ""
        return Reading(gpu=gpu.index, name=gpu.name, reason=f"{outcome.message}{reached}")
    fields = {
        **outcome.answer,
        "gpu_name": gpu.name,
        "driver_version": machine.driver.kernel_module_version or "",
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
    }
    try:
        calibration = msgspec.convert(fields, Calibration)
    except msgspec.ValidationError as error:
        return Reading(gpu=gpu.index, name=gpu.name, reason=f"unreadable answer: {error}")
    if not _NOISE_BYTES < calibration.bare_context_bytes <= calibration.context_bytes < _MOST_BYTES:
        reason = "its free memory changed while it was measured; try again when no other process works there"
        return Reading(gpu=gpu.index, name=gpu.name, reason=reason)
    return Reading(gpu=gpu.index, name=gpu.name, calibration=calibration)


def _obstacle(gpu: Gpu, machine: Machine) -> str | None:
    is_used = any(process.kind == "compute" for process in gpu.processes)
    if gpu.error is not None:
        return f"it fails when asked ({gpu.error})"
    if gpu.mig_enabled:
        return "MIG is enabled"
    if gpu.compute_mode == "prohibited" or (gpu.compute_mode not in (None, "default") and is_used):
        return f"its compute mode is {gpu.compute_mode}"
    if machine.driver.kernel_module_version is None:
        return "the driver's version is unknown"
    if gpu.memory_free_bytes is None:
        return "its free memory is unknown"
    if gpu.memory_free_bytes < LEAST_FREE_BYTES:
        return f"only {gpu.memory_free_bytes / 2**30:.1f} GiB are free, and {LEAST_FREE_BYTES / 2**30:.0f} GiB are needed"
    return None


def load_calibrations(cache_folder: Path | None = None) -> tuple[Calibration, ...]:
    """All readings that were taken with the torch that is installed; none where there are none."""
    folder = cache_folder or default_folder()
    paths: list[Path] = []
    with contextlib.suppress(OSError):
        paths = [] if folder is None else sorted(folder.glob("calibration-*.json"))
    if not paths:
        return ()
    try:
        installed = metadata.version("torch").partition("+")[0]
    except (metadata.PackageNotFoundError, ValueError, OSError):
        return ()
    found = (load_record(path, Calibration, most_bytes=_MAX_BYTES) for path in paths)
    return tuple(one for one in found if one is not None and one.torch_version.partition("+")[0] == installed)


def _store(folder: Path, calibration: Calibration) -> None:
    """Keep a reading, one for each card, driver and torch."""
    key = "\0".join((calibration.gpu_name, calibration.driver_version, calibration.torch_version))
    store_record(folder / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json", calibration)
