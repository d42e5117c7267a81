"""A ``device_map`` that somebody wrote, and what was found in it."""

from __future__ import annotations

import msgspec

from .findings import Finding
from .placement import Plan
from .workload import Workload


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a map puts on one device."""

    device: str
    """``cuda:0`` as the process numbers it, ``cpu`` or ``disk``."""
    gpu: int | None = None
    """GPU index (NVML order); ``None`` off the GPUs, or where there is no such GPU."""
    name: str = ""
    """Of the GPU."""
    layers: int
    """Text layers whose keys and values are kept here."""
    parts: tuple[str, ...]
    """What it holds, in words: ``vision tower``, ``embedding``, ``head`` ..."""
    weights_bytes: int
    need_bytes: int | None = None
    """Predicted need at the worst moment, weights included; ``None`` where no GPU gives it."""
    available_bytes: int | None = None
    """What the GPU can give: free, less CUDA context, workspace and headroom."""


class MapCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one map, model, machine and workload."""

    model: str
    """Hub id or folder."""
    machine: str
    """``Machine.description``."""
    workload: Workload
    device_map: dict[str, int | str]
    """As it was given, devices in one spelling: a number, ``cpu``, ``disk``, or the text as it stands where it is none."""
    gpus: tuple[int, ...]
    """GPU index behind each number of the map, by position."""
    findings: tuple[Finding, ...]
    """Worst first."""
    devices: tuple[DeviceUse, ...]
    """In the order in which the prompt meets them."""
    corrected: dict[str, int | str] | None = None
    """One key a unit, in the numbers of the map; ``None`` when nothing has to change, or when no map would do."""
    changes: tuple[str, ...] = ()
    """What the corrected map does differently, one sentence each."""
    best: Plan | None = None
    """The planner's own answer for the same question, to compare with."""
    notes: tuple[str, ...] = ()
    """What was assumed."""

    @property
    def is_clean(self) -> bool:
        """True when the map loads, runs and fits."""
        return not any(finding.severity == "error" for finding in self.findings)
