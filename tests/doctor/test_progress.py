from __future__ import annotations

import io
import threading

from vlm_doctor.progress import Progress

from ..until import LIMIT_S


class Terminal(io.StringIO):
    """Remembers what was written, and tells when there is something."""

    def __init__(self) -> None:
        super().__init__()
        self.has_text = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        written = super().write(text)
        self.has_text.set()
        return written


def test_what_takes_long_is_named_and_then_gone() -> None:
    terminal = Terminal()

    with Progress(lambda: "NVML", terminal, delay_s=0.0):
        assert terminal.has_text.wait(LIMIT_S)

    assert "waiting for NVML ... 0 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_is_quick_is_not_shown() -> None:
    terminal = Terminal()

    with Progress(lambda: "NVML", terminal):
        pass

    assert terminal.getvalue() == ""


def test_without_a_terminal_nothing_is_shown() -> None:
    pipe = io.StringIO()

    for stream in (pipe, None):
        with Progress(lambda: "NVML", stream, delay_s=0.0):
            threading.Event().wait(0.05)

    assert pipe.getvalue() == ""


def test_between_two_sources_there_is_no_name() -> None:
    terminal = Terminal()

    with Progress(lambda: "", terminal, delay_s=0.0):
        assert terminal.has_text.wait(LIMIT_S)

    assert "waiting" not in terminal.getvalue()


def test_a_terminal_that_has_gone_is_no_error() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            self.has_text.set()
            raise OSError

    terminal = Gone()

    with Progress(lambda: "NVML", terminal, delay_s=0.0):
        assert terminal.has_text.wait(LIMIT_S)
