"""While a model loads for long: which one, how far, how fast. One line that renews itself on a terminal, few in a log.

pytest has the output of tests captured while models load, so this writes to the terminal itself, from a thread that only
reads counters. Nothing is shown for quick loads.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import pytest

from vlm_doctor.units import GB, GIB

from ..watching.meter import allocated_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vlm_doctor.placement import Plan, Stage

QUIET_S = 2.0
"""Loads that are done by then show nothing."""
TICK_S = 0.5
LOG_FIRST_S = 10.0
"""Before the first line in a log."""
LOG_S = 30.0
"""Between the lines in a log."""
_OUTPUT: pytest.StashKey[int] = pytest.StashKey()
"""File descriptor of what the run prints to, from before pytest captures the output of tests."""
_BELOW = "\x1bD\x1b[A\x1b7\x1b[B\r"
"""Make room for a line below the cursor, remember where the cursor is, go there. pytest's own line stays whole."""
_BACK = "\x1b[K\x1b8"


class Share(NamedTuple):
    """One GPU's part of a load, in bytes."""

    name: str
    done: int
    total: int


def keep_output(config: pytest.Config) -> None:
    """Remember where the run prints to; called while pytest captures nothing."""
    if _OUTPUT in config.stash or hasattr(config, "workerinput"):
        return
    with suppress(OSError):
        descriptor = os.dup(1)
        config.stash[_OUTPUT] = descriptor
        config.add_cleanup(lambda: os.close(descriptor))


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
    output = _find_output(config)
    if output is None:
        yield
        return
    descriptor, is_ours = output
    stages = plan.stages if plan is not None else ()
    poll = _poller(stages, ordinals or {}, is_planned=is_planned)
    done = threading.Event()
    thread = threading.Thread(target=_run, args=(descriptor, label, poll, done), name="vlmgpu-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        if is_ours:
            os.close(descriptor)


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


def _find_output(config: pytest.Config) -> tuple[int, bool] | None:
    """Where to write, and whether it has to be closed; ``None`` where nobody would see it."""
    if config.get_verbosity() < -1:
        return None
    if not hasattr(config, "workerinput"):
        return (config.stash[_OUTPUT], False) if _OUTPUT in config.stash else None
    # A worker of pytest-xdist has no output of its own; in a log its lines would come from nowhere.
    try:
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        is_in_front = os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        is_in_front = False
    if is_in_front:
        return terminal, True
    os.close(terminal)
    return None


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
            total = sum(item.size_bytes for item in stage.ledger if item.kind == "weights")
            loaded = grown.get(ordinals.get(stage.uuid, position), 0)
            shares.append(Share(f"GPU {stage.gpu}", min(loaded, total), total))
        if stages and not is_planned:
            whole = sum(share.total for share in shares)
            shares = [Share("all GPUs", min(sum(grown.values()), whole), whole)]
        return shares, 0 if stages else _resident_bytes() - host_before

    return poll


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _run(descriptor: int, label: str, poll: Callable[[], tuple[list[Share], int]], done: threading.Event) -> None:
    started = time.monotonic()
    if done.wait(QUIET_S):
        return
    next_line = started + LOG_FIRST_S
    # Whatever goes wrong with the output or what is read for it: the load matters, this does not.
    with suppress(OSError, RuntimeError):
        is_terminal = os.isatty(descriptor)
        # A line that wraps could not be written over.
        width = max(20, (os.get_terminal_size(descriptor).columns or 80) - 1) if is_terminal else 0
        while True:
            now = time.monotonic()
            if is_terminal:
                _write(descriptor, f"{_BELOW}{line(label, now - started, *poll())[:width]}{_BACK}")
            elif now >= next_line:
                _write(descriptor, f"\n{line(label, now - started, *poll())}\n")
                next_line = now + LOG_S
            if done.wait(TICK_S):
                break
        if is_terminal:
            _write(descriptor, f"{_BELOW}{_BACK}")
        elif next_line > started + LOG_FIRST_S:
            _write(descriptor, f"\nvlmgpu: loading {label} ended after {time.monotonic() - started:.0f} s\n")


def _write(descriptor: int, text: str) -> None:
    data = text.encode("utf-8", "replace")
    while data:
        data = data[os.write(descriptor, data) :]
