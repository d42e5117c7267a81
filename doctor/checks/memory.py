"""5xx, first half: who holds GPU memory?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ..findings import Finding, Fix
from ..machine import Gpu, GpuProcess
from ..units import GIB, MIB, format_age, format_gib
from ._check import Check, Facts, Result, alike, found, labels, plain, skipped

_MUCH_SHARE, _MUCH_BYTES = 0.1, GIB
"""From this share of a GPU on, and at least this much, held memory is a warning: a desktop with a browser stays below."""
_LITTLE_BYTES = 256 * MIB
"""Below this nothing is said: a display server on an idle screen."""
_HIDDEN_SHARE, _HIDDEN_BYTES = 0.05, GIB
"""Memory that no listed process accounts for. Contexts and rounding stay below: 618 MiB is one CUDA context on H200."""


def held_by_others(facts: Facts) -> Result:
    """Other processes hold memory of a visible GPU.

    ## What it checks
    The processes that NVML lists on each visible GPU, and what they hold.

    ## Why it matters
    A model that fits the card does not fit what is left. Plans count it as taken.

    ## Example
    `warning VLM501 GPU 1 (NVIDIA A10): 11.0 GiB of 22.5 GiB are held by pid 4711 (ana, python, 11.0 GiB, 3 h).`

    ## What to do
    Wait, take another GPU, or stop the process if it is yours: `ps -o pid,user,etime,args -p 4711`.

    ## When it is fine
    A display or a small service: below a tenth of the GPU it is only mentioned.

    ## Sources
    nvmlDeviceGetMemoryInfo (version 2, without the driver's own share), nvmlDeviceGetComputeRunningProcesses and the
    lists for graphics and MPS.
    """
    return tuple(_held(facts, gpus) for gpus in alike(facts.visible, _holders))


def _holders(gpu: Gpu) -> tuple[object, ...] | None:
    """Who holds the memory, and how bad that is: the processes of one job hold several GPUs."""
    held = _held_bytes(gpu)
    if gpu.has_unified_memory or held < _LITTLE_BYTES:
        return None
    pids = tuple(sorted(process.pid for process in gpu.processes))
    # WSL gives no numbers: two GPUs may have two holders.
    return gpu.name, _is_much(gpu, held), pids, gpu.index if min(pids) <= 0 else None


def _held_bytes(gpu: Gpu) -> int:
    if not gpu.processes:
        return 0
    listed = sum(process.used_bytes or 0 for process in gpu.processes)
    is_sized = all(process.used_bytes is not None for process in gpu.processes)
    return min(listed, gpu.memory_used_bytes or listed) if is_sized else gpu.memory_used_bytes or listed


def _is_much(gpu: Gpu, held: int) -> bool:
    return held >= max(_MUCH_BYTES, _MUCH_SHARE * (gpu.memory_total_bytes or 0))


def _held(facts: Facts, gpus: Sequence[Gpu]) -> Finding:
    gpu = gpus[0]
    total = gpu.memory_total_bytes or 0
    ordered = sorted(gpu.processes, key=lambda process: (-(process.used_bytes or 0), process.pid))
    if len(gpus) > 1:
        # What it holds stands in front, GPU by GPU.
        ordered = [msgspec.structs.replace(process, used_bytes=None) for process in ordered]
    shown = ", ".join(map(_process, ordered[:4])) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
    held = _amounts(map(_held_bytes, gpus))
    amount = f"{held} of {format_gib(total)}" if total else held
    pids = ",".join(str(process.pid) for process in ordered[:20] if process.pid > 0)
    whom, which = (f"process {ordered[0].pid}", "it if it is") if len(ordered) == 1 else ("the processes", "those that are")
    if pids and any(process.user or process.command for process in ordered):
        fix = Fix(
            text=f"Wait for {whom}, take another GPU, or stop {which} yours.",
            commands=(f"ps -o pid,user,etime,args -p {pids}",),
        )
    else:
        fix = Fix(
            text="Wait for it, or take another GPU; who uses the GPU can be seen outside this container or machine.",
            commands=("nvidia-smi",),
            place="host" if facts.container is not None else "here",
        )
    fields = ("memory_used_bytes", "memory_free_bytes", "processes[0].pid")
    return found(
        "warning" if _is_much(gpu, _held_bytes(gpu)) else "info",
        f"{labels(gpus)}: {amount} are held by {shown}.",
        evidence=facts.evidence(*(facts.path(one, name) for one in gpus for name in fields)),
        fix=fix,
        gpus=gpus,
    )


def _amounts(sizes: Iterable[int]) -> str:
    """``9.0 GiB``, ``9.0 GiB each``, or ``9.0 GiB, 8.0 GiB``: one for each GPU."""
    shown = [format_gib(size) for size in sizes]
    return f"{shown[0]} each" if len(shown) > 1 and len(set(shown)) == 1 else ", ".join(shown)


def _process(process: GpuProcess) -> str:
    """``pid 4711 (ana, python, 11.0 GiB, 3 h)``."""
    details = [plain(text)[:60] for text in (process.user, process.command) if text]
    if not details:
        details.append("not visible from here")
    if process.used_bytes is not None:
        details.append(format_gib(process.used_bytes))
    if process.started_s_ago is not None:
        details.append(format_age(process.started_s_ago))
    # WSL gives no numbers.
    who = f"pid {process.pid}" if process.pid > 0 else "a process"
    return f"{who} ({', '.join(details)})"


def held_by_nobody(facts: Facts) -> Result:
    """Memory of a GPU is in use, but no listed process accounts for it.

    ## What it checks
    Used memory of each visible GPU minus what the listed processes hold.

    ## Why it matters
    The memory is gone all the same. Outside containers it is often an orphan: a worker whose parent died, a process
    stuck in the kernel, an open file descriptor.

    ## Example
    `warning VLM502 GPU 0 (NVIDIA L4): 9.0 GiB are in use, but no process is listed that holds them.`

    ## What to do
    `sudo fuser -v /dev/nvidia*` lists processes that have the GPU open. In a container or virtual machine the holder is
    outside: look on the host.

    ## When it is fine
    In a container, where processes of other containers are not visible from here. GPUs that share the host's memory
    are not judged.

    ## Sources
    nvmlDeviceGetMemoryInfo (version 2), process lists of NVML.
    """
    if facts.machine.origin == "synthetic":
        return skipped("a made-up machine has no processes")
    return tuple(_orphaned(facts, gpus) for gpus in alike(facts.visible, lambda gpu: _why_hidden(facts, gpu)))


def _hidden_bytes(gpu: Gpu) -> int:
    """What no listed process holds; 0 where one of them does not tell its size: WSL and virtual GPUs do not."""
    if any(process.used_bytes is None for process in gpu.processes):
        return 0
    return (gpu.memory_used_bytes or 0) - sum(process.used_bytes or 0 for process in gpu.processes)


def _is_inside(facts: Facts) -> bool:
    host = facts.machine.host
    return host is not None and (host.container is not None or bool(host.is_virtual_machine))


def _why_hidden(facts: Facts, gpu: Gpu) -> tuple[str, str] | None:
    """Name of the GPU, and why its holder is not known; ``None`` where nothing is hidden."""
    if gpu.has_unified_memory:
        return None
    if _hidden_bytes(gpu) < max(_HIDDEN_BYTES, _HIDDEN_SHARE * (gpu.memory_total_bytes or 0)):
        return None
    gap = facts.machine.gap(facts.path(gpu, "processes"))
    if gap is not None:
        return gpu.name, f"who holds them could not be read ({plain(gap.reason)})"
    if _is_inside(facts):
        return gpu.name, "who holds them is not visible from here"
    return gpu.name, f"no process is listed that holds them{' all' if gpu.processes else ''}"


def _orphaned(facts: Facts, gpus: Sequence[Gpu]) -> Finding:
    is_inside = _is_inside(facts)
    _, why = _why_hidden(facts, gpus[0]) or ("", "")
    return found(
        "warning",
        f"{labels(gpus)}: {_amounts(map(_hidden_bytes, gpus))} are in use, but {why}.",
        cause="Processes outside this container or machine are not listed."
        if is_inside
        else "A dead process left it behind.",
        evidence=facts.evidence(
            *(facts.path(gpu, name) for gpu in gpus for name in ("memory_used_bytes", "memory_free_bytes"))
        ),
        fix=Fix(text="Find out who uses the GPU.", commands=("nvidia-smi",), who="administrator")
        if is_inside
        else Fix(
            text="Find who has the GPU open, and stop it.", commands=("sudo fuser -v /dev/nvidia*",), who="administrator"
        ),
        gpus=gpus,
    )


CHECKS = (
    Check(
        code="VLM501",
        title="GPU memory held by other processes",
        run=held_by_others,
        needs=("gpus[].processes",),
        explained_by=("VLM201",),
    ),
    Check(
        code="VLM502",
        title="GPU memory held by no visible process",
        run=held_by_nobody,
        needs=("gpus[].memory_used_bytes",),
        explained_by=("VLM201",),
    ),
)
