"""One line on a terminal while something takes long: what is waited for, and since when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

DELAY_S = 1.0
"""A healthy machine has answered by then, so that nothing flickers."""
_STEP_S = 0.5
_CLEAR = "\r\x1b[K"


class Progress:
    """Shows what is waited for, on a stream of its own, and leaves nothing behind.

    Args:
        waiting_for: Names the source that is being read now; empty is none.
        stream: Standard error; a stream that is no terminal, or ``None``, shows nothing.
        delay_s: Seconds before the line appears.
    """

    def __init__(self, waiting_for: Callable[[], str], stream: TextIO | None, *, delay_s: float = DELAY_S) -> None:
        self._waiting_for = waiting_for
        self._stream = stream if stream is not None and stream.isatty() else None
        self._delay_s = delay_s
        self._is_done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._stream is not None:
            self._thread = threading.Thread(target=self._show, args=(self._stream,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_done.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self, stream: TextIO) -> None:
        began_s = time.monotonic()
        wait_s, is_shown = self._delay_s, False
        try:
            while not self._is_done.wait(wait_s):
                name = self._waiting_for()
                since_s = time.monotonic() - began_s
                stream.write(f"{_CLEAR}waiting for {name} ... {since_s:.0f} s" if name else _CLEAR)
                stream.flush()
                wait_s, is_shown = _STEP_S, True
            if is_shown:
                stream.write(_CLEAR)
                stream.flush()
        except (OSError, ValueError):
            # The terminal has gone: there is nobody to tell.
            return
