"""Another user on the machine, for tests that root runs."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run as another user")


class Nobody:
    """A child process of another user, which does one thing and lives until its answer is read.

    Args:
        body: What it does; the answer is what this returns, or the error, as text.
    """

    def __init__(self, body: Callable[[], object]) -> None:
        self._reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(writing)
            return
        os.setuid(NOBODY)
        try:
            answer = str(body())
        except Exception as error:  # noqa: BLE001 - told to the parent
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os.close(writing)
        signal.pause()
        os._exit(0)

    def answer(self) -> str:
        """Wait for it, and end the process."""
        with os.fdopen(self._reading) as stream:
            text = stream.read()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        return text
