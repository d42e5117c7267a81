"""What was seen of the machine, as terminal text."""

from __future__ import annotations

from collections.abc import Sequence

from ..findings import SEVERITIES, Diagnosis
from ..machine import Gpu, Libraries, Machine, TorchView
from ..units import format_gib
from ..visibility import counts
from .finding_text import STYLES
from .page import Column, Page, Piece, inert

MAX_NAME_CHARS = 26
_LABEL_COLUMNS = 9
_SHOWN_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes")
_NVML_STATES = {
    "no_binding": "nvidia-ml-py is missing",
    "no_library": "library not found",
    "error": "answers with an error",
    "crashed": "crashed",
    "timed_out": "did not answer in time",
}
"""What stands for NVML's own words where it had none."""


def write_machine(page: Page, machine: Machine, diagnosis: Diagnosis | None) -> None:
    """Write the GPUs, how many each step sees, what runs on them, and how they are joined.

    What the links mean is a finding (VLM401), so it is not said again here.
    """
    page.gap()
    if machine.gpus:
        _write_gpus(page, machine, diagnosis)
        page.gap()
    _write_fact(page, "Counts", _counts_line(machine))
    _write_fact(page, "Driver", _driver_line(machine))
    _write_fact(page, "Python", _libraries_line(machine.libraries))
    _write_fact(page, "Host", _host_line(machine))
    if len(machine.gpus) > 1:
        _write_link_matrix(page, machine)


def write_torch(page: Page, torch: TorchView) -> None:
    """Write what torch said, for a report whose first part was printed before torch had answered."""
    page.gap()
    _write_fact(page, "torch", torch_line(torch))


def torch_line(torch: TorchView) -> str:
    """Say in one phrase what torch sees, or why that is not known."""
    if torch.state != "ok":
        if torch.state == "absent":
            return "not installed"
        if torch.state == "not_asked":
            return torch.message or "not asked"
        why = f": {torch.message}" if torch.message else ""
        return ("did not answer in time" if torch.state == "timed_out" else torch.state) + why
    seen = "?" if torch.device_count is None else str(torch.device_count)
    took = f", {torch.seconds:.1f} s" if torch.seconds is not None else ""
    origin = ", remembered from an earlier run" if torch.is_cached else took
    build = "CPU build" if torch.cuda is None else f"CUDA {torch.cuda}"
    return f"{torch.version or '?'} ({build}) sees {seen} GPU{'' if torch.device_count == 1 else 's'}{origin}"


def _write_fact(page: Page, label: str, words: str | None) -> None:
    if words is not None:
        page.item((label, "dim"), words, indent=2, marker_width=_LABEL_COLUMNS)


def _write_gpus(page: Page, machine: Machine, diagnosis: Diagnosis | None) -> None:
    columns = [
        Column("GPU", "right"),
        Column("name", is_flexible=True),
        Column("free", "right"),
        Column("total", "right"),
        Column("in use", "right"),
        Column("verdict", is_flexible=True),
    ]
    hidden = counts(machine).hidden
    rows: list[Sequence[Piece]] = [
        (
            str(gpu.index),
            short_name(gpu.name) + (" (MIG)" if gpu.mig_enabled else ""),
            _size(gpu.memory_free_bytes),
            _size(gpu.memory_total_bytes),
            _size(gpu.memory_used_bytes),
            ("hidden", "dim") if gpu.index in hidden else _gpu_verdict(gpu, diagnosis),
        )
        for gpu in machine.gpus
    ]
    page.table(columns, rows)


def short_name(name: str) -> str:
    """Name of a GPU for a table: without the maker, short enough to leave room."""
    return inert(name.removeprefix("NVIDIA "), limit=MAX_NAME_CHARS)


def _size(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else format_gib(size_bytes)


def _gpu_verdict(gpu: Gpu, diagnosis: Diagnosis | None) -> Piece:
    """Worst severity and the codes of that severity that name this GPU."""
    if diagnosis is None:
        return "?"
    about = [finding for finding in diagnosis.findings if gpu.index in finding.gpus]
    for severity in SEVERITIES[:2]:
        codes = dict.fromkeys(finding.code for finding in about if finding.severity == severity)
        if codes:
            return (f"{severity} {' '.join(codes)}", STYLES[severity])
    return ("ok" if gpu.error is None else gpu.error, "")


def _counts_line(machine: Machine) -> str:
    seen = counts(machine)
    steps = (
        ("PCI bus", seen.pci),
        ("driver", seen.driver),
        ("CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in machine.environment else "visible", seen.visible),
        ("torch", seen.torch),
    )
    line = " → ".join(f"{name} {'?' if number is None else number}" for name, number in steps)
    return f"{line} ({torch_line(machine.torch)})" if seen.torch is None else line


def _driver_line(machine: Machine) -> str | None:
    driver = machine.driver
    version = driver.driver_version or driver.kernel_module_version
    if version is None:
        return None
    cuda = f", up to CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}" if driver.cuda_version else ""
    trouble = "" if driver.nvml_state == "ok" else f", NVML: {driver.nvml_message or _NVML_STATES[driver.nvml_state]}"
    return f"{version}{cuda}{trouble}"


def _libraries_line(libraries: Libraries | None) -> str | None:
    if libraries is None:
        return None
    build = libraries.torch_build
    parts = [libraries.python]
    for name in _SHOWN_PACKAGES:
        version = libraries.version(name)
        if version is None:
            continue
        flavor = "" if name != "torch" or build is None else f" (CUDA {build.cuda})" if build.cuda else " (no CUDA)"
        parts.append(f"{name} {version}{flavor}")
    if libraries.version("torch") is None:
        parts.append("no torch")
    return ", ".join(parts)


def _host_line(machine: Machine) -> str | None:
    host = machine.host
    if host is None:
        return None
    parts = [f"{host.os} {host.kernel}"]
    if host.cpu_count is not None:
        parts.append(f"{host.cpu_count} CPUs")
    if host.memory_available_bytes is not None:
        parts.append(f"{format_gib(host.memory_available_bytes)} memory available")
    if host.shm_total_bytes is not None:
        parts.append(f"/dev/shm {format_gib(host.shm_total_bytes)}")
    if host.container is not None:
        parts.append(f"container ({host.container})")
    return ", ".join(parts)


def _write_link_matrix(page: Page, machine: Machine) -> None:
    """Write the matrix of ``nvidia-smi topo -m``; where it would not fit, the sentence above has to do."""
    indices = [gpu.index for gpu in machine.gpus]
    labels = {(link.a, link.b): link.label for link in machine.links}
    heads = [f"GPU{index}" for index in indices]
    cell = max(map(len, [*heads, *labels.values()]))
    if not labels or 2 + (cell + 2) * (len(indices) + 1) > page.width:
        return
    page.gap()
    rows: list[Sequence[Piece]] = [
        [(head, "dim"), *("X" if a == b else labels.get((min(a, b), max(a, b)), "?") for b in indices)]
        for a, head in zip(indices, heads, strict=True)
    ]
    page.table([Column(""), *(Column(head, "right") for head in heads)], rows)
