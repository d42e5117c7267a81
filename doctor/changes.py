"""What is different since a report was saved: "it worked yesterday" is how half of the threads begin. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from .answers import Change, ChangeKind, Changes, worst_by_code
from .findings import Diagnosis, Finding
from .machine import Gpu, Host, Libraries, Machine
from .report import Report
from .units import GIB, format_gib

_ORDER: tuple[ChangeKind, ...] = ("finding", "gpu", "driver", "library", "environment", "link", "host", "memory")
"""Most telling first."""
_MEMORY_STEP_BYTES = GIB
"""Free memory that differs by less is the usual coming and going."""
_MAX_VALUE_CHARS = 120


class Saved(NamedTuple):
    """A report or a snapshot of an earlier time."""

    where: str
    machine: Machine
    diagnosis: Diagnosis | None = None
    exit_status: int | None = None


def compare(saved: Saved, now: Report) -> Changes:
    """List the differences from a saved report to one of now, most telling first."""
    before, after = saved.machine, now.machine
    found = [
        *_findings(saved.diagnosis, now.diagnosis),
        *_gpus(before, after),
        *_driver(before, after),
        *_libraries(before, after),
        *_each("environment", before.environment, after.environment),
        *_links(before, after),
        *_host(before, after),
    ]
    return Changes(
        where=saved.where,
        saved_at=before.collected_at,
        saved_exit_status=saved.exit_status,
        changes=tuple(sorted(found, key=lambda change: _ORDER.index(change.kind))),
        findings_before=None if saved.diagnosis is None else worst_by_code(saved.diagnosis.findings),
    )


def with_changes(report: Report, saved: Saved | None) -> Report:
    """A report that says what changed; as it is, when there is nothing to compare with."""
    return report if saved is None else msgspec.structs.replace(report, changes=compare(saved, report))


def _each(kind: ChangeKind, before: Mapping[str, str], after: Mapping[str, str]) -> Iterable[Change]:
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old != new:
            yield Change(kind=kind, subject=name, before=_short(old), after=_short(new))


def _short(value: str | None) -> str | None:
    if value is None or len(value) <= _MAX_VALUE_CHARS:
        return "''" if value == "" else value
    return f"{value[:_MAX_VALUE_CHARS]}..."


def _findings(before: Diagnosis | None, after: Diagnosis | None) -> Iterable[Change]:
    """Errors and warnings that came or went. Of one code only the first is named: its numbers change all the time."""
    if before is None or after is None:
        return ()
    return _each("finding", _worst(before.findings), _worst(after.findings))


def _worst(findings: Iterable[Finding]) -> dict[str, str]:
    worst: dict[str, str] = {}
    for finding in findings:
        severity = finding.demoted_from or finding.severity
        if severity != "info":
            worst.setdefault(f"{finding.title} ({finding.code})", severity)
    return worst


def _gpus(before: Machine, after: Machine) -> Iterable[Change]:
    pairs = _same_gpus(before, after)
    matched_before, matched_after = ({pair[number].index for pair in pairs} for number in (0, 1))
    gone = [gpu for gpu in before.gpus if gpu.index not in matched_before]
    new = [gpu for gpu in after.gpus if gpu.index not in matched_after]
    for gpu in gone:
        yield Change(kind="gpu", subject=gpu.label, before=gpu.uuid or "UUID unknown")
    for gpu in new:
        yield Change(kind="gpu", subject=gpu.label, after=gpu.uuid or "UUID unknown")
    for old, fresh in pairs:
        yield from _each("gpu", _gpu_facts(old, fresh.label), _gpu_facts(fresh, fresh.label))
        free = [gpu.memory_free_bytes for gpu in (old, fresh)]
        if free[0] is not None and free[1] is not None and abs(free[0] - free[1]) >= _MEMORY_STEP_BYTES:
            yield Change(
                kind="memory", subject=f"{fresh.label} free memory", before=format_gib(free[0]), after=format_gib(free[1])
            )


def _same_gpus(before: Machine, after: Machine) -> list[tuple[Gpu, Gpu]]:
    """Pairs of the same GPU then and now: by UUID, or where none is the same (a redacted file) by place and name."""
    by_uuid = {gpu.uuid.lower(): gpu for gpu in before.gpus}
    pairs = [(by_uuid[gpu.uuid.lower()], gpu) for gpu in after.gpus if gpu.uuid.lower() in by_uuid]
    if pairs:
        return pairs
    by_place = {(gpu.bus_id, gpu.name): gpu for gpu in before.gpus}
    return [(by_place[gpu.bus_id, gpu.name], gpu) for gpu in after.gpus if (gpu.bus_id, gpu.name) in by_place]


def _gpu_facts(gpu: Gpu, label: str) -> dict[str, str]:
    facts = {
        "index": str(gpu.index),
        "error": gpu.error,
        "total memory": None if gpu.memory_total_bytes is None else format_gib(gpu.memory_total_bytes),
        "compute mode": gpu.compute_mode,
        "MIG": _yes(gpu.mig_enabled),
        "PCIe width": None if gpu.pcie_width is None else f"x{gpu.pcie_width}",
        "active NVLinks": str(sum(link.is_active for link in gpu.nvlinks)) if gpu.nvlinks else None,
        "fabric": None if gpu.fabric is None else gpu.fabric.state,
        "row remapping failed": _yes(gpu.remap_failed),
        "recovery action": gpu.recovery_action,
    }
    return {f"{label} {name}": value for name, value in facts.items() if value is not None}


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _driver(before: Machine, after: Machine) -> Iterable[Change]:
    return _each("driver", _driver_facts(before), _driver_facts(after))


def _driver_facts(machine: Machine) -> dict[str, str]:
    driver = machine.driver
    facts = {
        "driver": driver.driver_version,
        "kernel module": driver.kernel_module_version,
        "newest CUDA of the driver": ".".join(map(str, driver.cuda_version)) if driver.cuda_version else None,
        "libcuda.so.1": driver.libcuda_path,
        "NVML": driver.nvml_state,
        "device files": str(len(driver.device_files)),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _libraries(before: Machine, after: Machine) -> Iterable[Change]:
    if before.libraries is None or after.libraries is None:
        return ()
    return _each("library", _library_facts(before.libraries), _library_facts(after.libraries))


def _library_facts(libraries: Libraries) -> dict[str, str]:
    facts = {package.name: package.version for package in libraries.packages}
    facts |= {"Python": libraries.python, "Python's path": libraries.executable}
    build = libraries.torch_build
    if build is not None:
        facts["CUDA of torch"] = build.cuda or "none"
    return facts


def _links(before: Machine, after: Machine) -> Iterable[Change]:
    """Between GPUs that are still there, by their numbers of now."""
    now_of = {old.index: fresh.index for old, fresh in _same_gpus(before, after)}
    then = {
        _pair(now_of[link.a], now_of[link.b]): _link_text(link.label, link.p2p_read)
        for link in before.links
        if link.a in now_of and link.b in now_of
    }
    still = set(now_of.values())
    fresh = {
        _pair(link.a, link.b): _link_text(link.label, link.p2p_read)
        for link in after.links
        if link.a in still and link.b in still
    }
    return _each("link", then, fresh)


def _pair(a: int, b: int) -> str:
    low, high = sorted((a, b))
    return f"GPU {low} to GPU {high}"


def _link_text(label: str, p2p_read: str | None) -> str:
    return label if p2p_read in (None, "ok") else f"{label}, peer access {p2p_read}"


def _host(before: Machine, after: Machine) -> Iterable[Change]:
    if before.host is None or after.host is None:
        return ()
    return _each("host", _host_facts(before.host), _host_facts(after.host))


def _host_facts(host: Host) -> dict[str, str]:
    facts = {
        "operating system": host.os,
        "Linux": host.kernel,
        "container": host.container,
        "CPUs": None if host.cpu_count is None else str(host.cpu_count),
        "memory": None if host.memory_total_bytes is None else format_gib(host.memory_total_bytes),
        "memory limit": None if host.cgroup_limit_bytes is None else format_gib(host.cgroup_limit_bytes),
        "/dev/shm": None if host.shm_total_bytes is None else format_gib(host.shm_total_bytes),
        "IOMMU": host.iommu,
    }
    return {name: value for name, value in facts.items() if value is not None}
