"""Broken or absent? What the doctor's checks say about GPUs that are not there or cannot be used. Pure.

A fault is an error wherever a requirement is not met: it might be met once the fault is repaired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import verdicts
from ..verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from vlm_doctor.findings import Finding
    from vlm_doctor.machine import Gpu, Machine

_HIDES_GPUS = ("VLM102", "VLM103", "VLM104", "VLM105", "VLM106", "VLM107", "VLM202", "VLM205", "VLM310")
"""Checks whose findings of severity error mean that GPUs are there and cannot be seen."""
_HIDES_ALL = "VLM201"
_ABOUT_ONE_GPU = ("VLM108", "VLM109", "VLM110", "VLM111")
_ABOUT_TORCH = ("VLM205", "VLM301", "VLM302", "VLM303", "VLM304", "VLM305", "VLM306", "VLM307", "VLM316")
"""Why torch can use no GPU. A live machine tells what needs no import of torch: its files, and whether libcuda is there; a
recorded one also whether the import failed."""
_DRIVER_NOT_LOADED = 9
"""``NVML_ERROR_DRIVER_NOT_LOADED``: what NVML answers on a computer without a GPU. Source: nvml.h."""
_NO_GPU_ON_PURPOSE = ("", "-1", "NoDevFiles")
"""First entry of CUDA_VISIBLE_DEVICES when no GPU is wanted; the last is Slurm's for a job without any."""


class Losses:
    """GPUs that a run has seen: one that is gone later was lost, whatever the driver says then."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def see(self, machine: Machine) -> None:
        """Remember the GPUs of a reading."""
        self._seen |= {gpu.uuid: gpu.label for gpu in machine.gpus}

    def explain(self, verdict: Verdict, machine: Machine) -> Verdict:
        """Say that a GPU is gone which was there before, where a test is skipped or the choice of GPUs no longer holds."""
        here = {gpu.uuid for gpu in machine.gpus}
        gone = [f"{label} ({uuid})" for uuid, label in self._seen.items() if uuid not in here]
        if not gone or not (verdict.action == "skip" or verdict.code == verdicts.WRONG):
            return verdict
        was = "was" if len(gone) == 1 else "were"
        text = f"{verdict.reason} {', '.join(gone)} {was} there earlier in this run: look for Xid messages with dmesg."
        return Verdict("error", verdicts.FAULT, text)


def judge_absence(machine: Machine) -> Verdict:
    """Decide about a machine on which the driver lists no GPU: skip if nothing suggests one, else an error."""
    driver = machine.driver
    why = fault(machine)
    has_signs = bool(machine.pci_devices or driver.kernel_module_version)
    has_plain_answer = driver.nvml_state in ("ok", "no_binding", "no_library") or (
        driver.nvml_state == "error" and driver.nvml_error_code == _DRIVER_NOT_LOADED
    )
    if not why and has_plain_answer and not has_signs:
        return Verdict("skip", verdicts.NO_GPU, "this machine has no NVIDIA GPU.")
    if not why:
        said = f": {driver.nvml_message}" if driver.nvml_message else ""
        why = f"the driver lists no GPU (NVML {driver.nvml_state}{said})."
    advice = "Run vlm-doctor to see the fix; if no GPU is to be used here, say --vlm-gpus=none."
    return Verdict("error", verdicts.FAULT, f"{why} {advice}")


def is_ill(gpu: Gpu) -> bool:
    """True when no process can compute on the GPU."""
    has_no_slice = bool(gpu.mig_enabled) and not gpu.mig_devices
    needs_recovery = gpu.recovery_action in ("reset_gpu", "reboot_node")
    return gpu.error is not None or needs_recovery or gpu.compute_mode == "prohibited" or has_no_slice


def fault(machine: Machine) -> str:
    """Why GPUs may be missing that should be there, in the words of the doctor's checks; empty when nothing says so."""
    ill = {gpu.index for gpu in machine.gpus if is_ill(gpu)}
    first_entry = machine.environment.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    codes = {*_HIDES_GPUS} if first_entry in _NO_GPU_ON_PURPOSE else {*_HIDES_GPUS, _HIDES_ALL}
    return _told(
        finding
        for finding in _errors(machine)
        if finding.code in codes or (finding.code in _ABOUT_ONE_GPU and ill.intersection(finding.gpus))
    )


def torch_fault(machine: Machine, gpus: Collection[Gpu]) -> str:
    """Why torch can use none of these GPUs, as far as is known; empty when it can."""
    indices = {gpu.index for gpu in gpus}
    return _told(
        finding
        for finding in _errors(machine)
        if finding.code in _ABOUT_TORCH and (not finding.gpus or indices.issubset(finding.gpus))
    )


def _errors(machine: Machine) -> list[Finding]:
    from vlm_doctor.checks import diagnose

    return [finding for finding in diagnose(machine).findings if finding.severity == "error"]


def _told(findings: Iterable[Finding]) -> str:
    return " ".join(f"{finding.code} {finding.message}" for finding in findings)
