"""Another user, for tests that root runs."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run as another user")


@contextmanager
def as_nobody(body: Callable[[], object]) -> Iterator[str]:
    """What that user gets, or is refused, in a process of their own that lives as long as this context."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setuid(NOBODY)
            answer = str(body())
        except Exception as error:  # noqa: BLE001 - told to the parent
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os.close(writing)
        signal.pause()
        os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as stream:
            yield stream.read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
