"""A worker of pytest-xdist ends with its controller, which holds the leases: the memory goes with them.

By itself a worker notices that its pipe is closed, waits 5 s for what it is doing, interrupts it, and waits 10 s more
(execnet.gateway_base.WorkerGateway); a test that holds on to the interpreter keeps it longer.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG``. Source: sys/prctl.h."""


def end_with(controller: int) -> None:
    """Let the kernel end this process as soon as its parent is gone; on Linux alone.

    Args:
        controller: Pid of the process that started this worker. If it is gone already, so is this one.
    """
    import ctypes
    import signal

    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        # An interpreter behind a program of its own (popen//python=...) has another parent, as long as that lives.
        if os.getppid() != controller and Path("/proc/self").exists() and not Path(f"/proc/{controller}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
