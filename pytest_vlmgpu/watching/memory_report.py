"""The report of a test that ran out of GPU memory: read the figures, put them into pytest's report, let the memory go."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.placing import ordinals_in
from . import out_of_memory
from .meter import allocators
from .vram import collect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

_OUR_FOLDER = str(Path(__file__).parent)
_LAST = ("last_type", "last_value", "last_traceback", "last_exc")
"""What pytest leaves in :mod:`sys` of the last exception."""
SECTION = "vlmgpu: planned and found"


def explain(
    report: pytest.TestReport,
    error: BaseException,
    loaded: Any,
    machine: Callable[[], Machine | None],
    *,
    is_verbose: bool = False,
) -> bool:
    """Where a test ran out of GPU memory, say so with the ledger; anything else is left as it is.

    Args:
        report: Of the phase that failed; changed in place.
        error: What was raised.
        loaded: Value of ``vlm``, or ``None``.
        machine: Gives it as it is now, for the memory of other processes, or ``None``; called only when memory ran out.

        is_verbose: Add the traceback as pytest would have shown it.

    Returns:
        True when memory was the reason, so that it has to be given back.
    """
    found = out_of_memory.find(error)
    if found is None:
        return False
    reason, is_reason = found
    plan: Plan | None = getattr(loaded, "plan", None)
    gpus = facts(loaded, plan, machine())
    text = out_of_memory.describe(plan, gpus)
    headline = out_of_memory.headline(reason, plan, gpus)
    if not is_reason or report.outcome != "failed":
        # Something else failed because of it, or this was expected: that report stays, with the figures beside it.
        report.sections.append((SECTION, f"{headline}\n\n{text}"))
        return True
    full = str(report.longrepr) if is_verbose else ""
    _retell(report, headline, text, str(reason))
    if full:
        report.sections.append(("vlmgpu: the whole traceback", full))
    return True


def facts(loaded: Any, plan: Plan | None, machine: Machine | None) -> list[out_of_memory.GpuFacts]:
    """What is known of each GPU of the plan, or of each that this process uses without one."""
    readings = allocators()
    ordinals = ordinals_in(getattr(loaded, "device_map", None))
    stages = dict(zip(ordinals, plan.stages, strict=False)) if plan is not None else {}
    if plan is not None and not stages:
        stages = dict(enumerate(plan.stages))
    weights = _weights_bytes(getattr(loaded, "model", None))
    return [
        out_of_memory.GpuFacts(
            ordinal=ordinal,
            stage=stages.get(ordinal),
            allocator=readings.get(ordinal),
            weights_bytes=weights.get(ordinal, 0),
            processes=_others(machine, stages[ordinal].uuid if ordinal in stages else None),
        )
        for ordinal in sorted({*stages, *readings})
    ]


def clear_frames(error: BaseException, *, is_memory_short: bool) -> None:
    """Let go what the frames of an exception refer to: pytest keeps it until the next test, and half a model with it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        for frame, _ in traceback.walk_tb(one.__traceback__):
            # pytest has looked at it: until Python 3.13 that leaves a copy with the frame, renewed when looked at again.
            _ = frame.f_locals
        # A frame keeps its function too, and with it what that encloses.
        one.__traceback__ = None
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    if getattr(sys, "last_value", None) is error:
        # For a debugger after the run, and until the next test: there is nothing left to look at.
        for name in _LAST:
            if hasattr(sys, name):
                delattr(sys, name)
    if is_memory_short:
        collect()


def _weights_bytes(model: Any) -> dict[int, int]:
    """CUDA ordinal to the bytes of a module's tensors there."""
    sizes: dict[int, int] = {}
    if not hasattr(model, "parameters") or not hasattr(model, "buffers"):
        return sizes
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        if tensor.device.type == "cuda":
            ordinal = tensor.device.index or 0
            sizes[ordinal] = sizes.get(ordinal, 0) + tensor.nbytes
    return sizes


def _others(machine: Machine | None, uuid: str | None) -> tuple[Any, ...]:
    gpus = [gpu for gpu in machine.gpus if gpu.uuid == uuid] if machine is not None else []
    return tuple(process for gpu in gpus for process in gpu.processes if process.pid != os.getpid())


def _retell(report: pytest.TestReport, headline: str, text: str, said: str) -> None:
    """Keep where in the project's own code it happened; the library's frames go, the ledger comes."""
    longrepr: Any = report.longrepr
    crash = getattr(longrepr, "reprcrash", None)
    trace = getattr(longrepr, "reprtraceback", None)
    if crash is None or trace is None or not hasattr(longrepr, "addsection"):
        report.longrepr = f"{headline}\n\n{text}"
        return
    for element in getattr(longrepr, "chain", [(trace,)]):
        own = _own_entries(element[0].reprentries)
        if own and element[0] is trace:
            # Marked as pytest marks what was raised.
            own[-1].lines = [line for line in own[-1].lines if not line.startswith("E ")] + [f"E   {headline}"]
        element[0].reprentries = own or element[0].reprentries
    crash.message = headline
    first = next(iter(said.splitlines()), "")
    longrepr.addsection(SECTION, f"{text}\n\nwhat torch said: {first}")


def _own_entries(entries: Sequence[Any]) -> list[Any]:
    """Entries of a traceback that are no installed library's."""
    paths = [str(getattr(getattr(entry, "reprfileloc", None), "path", "")) for entry in entries]
    return [
        entry
        for entry, path in zip(entries, paths, strict=True)
        if path and "site-packages" not in path and not path.startswith(("<", _OUR_FOLDER))
    ]
