"""The machine and what the doctor says of it, as ``--vlm-report`` writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from .evidence import FindingRecord, GpuRecord, MachineRecord, gib

if TYPE_CHECKING:
    from vlm_doctor.findings import Finding
    from vlm_doctor.machine import Machine


def examined(machine: Machine) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A :class:`MachineRecord` and :class:`FindingRecord` for all but remarks, as dicts that any process can carry."""
    found = [
        FindingRecord(code=finding.code, severity=finding.severity, message=finding.message) for finding in faults(machine)
    ]
    return msgspec.to_builtins(machine_record(machine)), msgspec.to_builtins(found)


def machine_record(machine: Machine) -> MachineRecord:
    """What a report says of a machine."""
    return MachineRecord(
        description=machine.description,
        origin=machine.origin,
        driver_version=machine.driver.driver_version,
        gpus=tuple(
            GpuRecord(
                index=gpu.index,
                uuid=gpu.uuid,
                name=gpu.name,
                total_gib=gib(gpu.memory_total_bytes) if gpu.memory_total_bytes is not None else None,
                free_gib=gib(gpu.memory_free_bytes) if gpu.memory_free_bytes is not None else None,
            )
            for gpu in machine.gpus
        ),
    )


def faults(machine: Machine) -> list[Finding]:
    """Errors and warnings of the doctor's checks, worst first."""
    from vlm_doctor.checks import diagnose

    return [finding for finding in diagnose(machine).findings if finding.severity in ("error", "warning")]


def told(finding: Finding) -> str:
    """One finding in a line, with who can repair it how."""
    steps = [finding.fix.text, *finding.fix.commands] if finding.fix is not None else []
    return f"{finding.code} {finding.severity}: {finding.message}{' Fix: ' if steps else ''}{' '.join(steps)}"
