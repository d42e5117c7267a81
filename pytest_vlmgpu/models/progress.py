"""While a model loads for long: which one, how far, how fast, told by a thread that only reads counters."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from vlm_doctor.units import GB, GIB

from ..output import open_line
from ..watching.meter import allocated_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pytest

    from vlm_doctor.placement import Plan, Stage

    from ..output import Line
    from ..warm.records import Progress

QUIET_S = 2.0
"""Loads that are done by then show nothing."""
TICK_S = 0.5
LOG_FIRST_S = 10.0
"""Before the first line in a log."""


class Share(NamedTuple):
    """One GPU's part of a load, in bytes."""

    name: str
    done: int
    total: int


@contextmanager
def shown(
    config: pytest.Config,
    label: str,
    plan: Plan | None,
    ordinals: Mapping[str, int] | None,
    *,
    is_planned: bool = True,
) -> Iterator[None]:
    """Show how a load goes, as long as it lasts.

    Args:
        config: Of the run.
        label: The model.
        plan: What is loaded where; ``None`` on the CPU.
        ordinals: GPU UUID to CUDA ordinal, as far as known.
        is_planned: False where the model goes to other GPUs than planned: then all are counted together.
    """
    stages = plan.stages if plan is not None else ()
    poll = _poller(stages, ordinals or {}, is_planned=is_planned)
    done = threading.Event()
    shown_line = open_line(config, first_s=LOG_FIRST_S)
    thread = threading.Thread(target=_run, args=(shown_line, label, poll, done), name="vlmgpu-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


@contextmanager
def told(config: pytest.Config, label: str, plan: Plan | None) -> Iterator[Callable[[Progress], None]]:
    """Show how a load goes that another process does, as it tells: what it gives takes its words."""
    shown_line = open_line(config, first_s=LOG_FIRST_S)
    stages = plan.stages if plan is not None else ()
    seconds = [0.0]

    def tell(progress: Progress) -> None:
        seconds[0] = progress.seconds
        if progress.seconds > QUIET_S:
            shares = [
                Share(f"GPU {stage.gpu}", min(progress.loaded.get(stage.uuid, 0), total), total)
                for stage in stages
                if (total := stage.weights_bytes)
            ]
            shown_line.show(lambda: line(label, progress.seconds, shares, progress.host_bytes))

    try:
        yield tell
    finally:
        shown_line.end(f"vlmgpu: loading {label} ended after {seconds[0]:.0f} s")


def line(label: str, seconds: float, shares: Sequence[Share], host_bytes: int = 0) -> str:
    """``loading org/model: 5.2 of 15.5 GiB (GPU 0 3.1 of 8.0, GPU 1 2.1 of 7.5), 1.9 GB/s, 12 s``."""
    loaded, total = sum(share.done for share in shares), sum(share.total for share in shares)
    if not shares:
        progress = f"{host_bytes / GIB:.1f} GiB in host memory" if host_bytes > GIB // 20 else "reading its files"
    elif loaded <= 0:
        progress = f"0 of {total / GIB:.1f} GiB, reading its files"
    else:
        progress = f"{loaded / GIB:.1f} of {total / GIB:.1f} GiB"
        if len(shares) > 1:
            progress += f" ({', '.join(f'{one.name} {one.done / GIB:.1f} of {one.total / GIB:.1f}' for one in shares)})"
        progress += f", {loaded / GB / seconds:.1f} GB/s"
    return f"vlmgpu: loading {label}: {progress}, {seconds:.0f} s"


def _poller(
    stages: Sequence[Stage], ordinals: Mapping[str, int], *, is_planned: bool = True
) -> Callable[[], tuple[list[Share], int]]:
    """Function that gives what is loaded now: shares of the GPUs, and the growth of the process without any."""
    before = allocated_bytes()
    host_before = _resident_bytes()

    def poll() -> tuple[list[Share], int]:
        now = allocated_bytes()
        grown = {ordinal: max(0, size - before.get(ordinal, 0)) for ordinal, size in now.items()}
        shares = []
        for position, stage in enumerate(stages):
            loaded = grown.get(ordinals.get(stage.uuid, position), 0)
            shares.append(Share(f"GPU {stage.gpu}", min(loaded, stage.weights_bytes), stage.weights_bytes))
        if stages and not is_planned:
            whole = sum(share.total for share in shares)
            shares = [Share("all GPUs", min(sum(grown.values()), whole), whole)]
        return shares, 0 if stages else _resident_bytes() - host_before

    return poll


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _run(line_: Line, label: str, poll: Callable[[], tuple[list[Share], int]], done: threading.Event) -> None:
    started = time.monotonic()
    is_over = done.wait(QUIET_S)
    # Whatever goes wrong with what is read for it: the load matters, this does not.
    with suppress(OSError, RuntimeError):
        while not is_over:
            line_.show(lambda: line(label, time.monotonic() - started, *poll()))
            is_over = done.wait(TICK_S)
    line_.end(f"vlmgpu: loading {label} ended after {time.monotonic() - started:.0f} s")
