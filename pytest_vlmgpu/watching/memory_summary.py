"""What the measured memory of tests says at the end of a run: notes, declarations that are far off, markers to paste."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ..state import SETTINGS
from .properties import DECLARED, NOTE, PEAK_EACH, RESERVED_EACH

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTEXT_GIB = 0.75
"""One CUDA context with kernels and libraries; measured 0.68 GiB on H200. Source: benchmarks/README.md."""
SLACK = 1.05
"""A limit to paste is this much above the peak: the allocator's rounding, and one more token here or there."""
_MUCH = 1.25
_MUCH_GIB = 1.0
"""A declaration is far off from a quarter and 1 GiB above what is needed."""
_SHOWN = 5


class Measured(NamedTuple):
    """One test's memory of the GPU on which it took most, in GiB."""

    peak: float
    reserved: float
    declared: float | None

    @property
    def needed(self) -> int:
        """Free memory that a GPU must have for it, in whole GiB."""
        return math.ceil(self.reserved + CONTEXT_GIB)

    @property
    def hint(self) -> str:
        """Why the declaration should be changed; empty where it is close, or there is none."""
        if self.declared is None:
            return ""
        if self.declared > _MUCH * self.needed and self.declared - self.needed > _MUCH_GIB:
            return f"declares {self.declared:g} GiB, peaked at {self.reserved:.1f}"
        if self.declared < self.reserved:
            return f"declares {self.declared:g} GiB only, and peaked at {self.reserved:.1f}"
        return ""


class MemorySummary:
    """Collects on the controller what tests reported; silent when there is nothing to say."""

    def __init__(self, config: pytest.Config) -> None:
        self._suggests = SETTINGS in config.stash and config.stash[SETTINGS].suggest
        self._notes: dict[str, list[str]] = {}
        self._measured: dict[str, Measured] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take over what the last phase of a test carries: properties of all phases."""
        if report.when != "teardown":
            return
        found = dict(report.user_properties)
        notes = [str(value) for name, value in report.user_properties if name == NOTE]
        if notes:
            self._notes[report.nodeid] = notes
        peak, reserved, declared = found.get(PEAK_EACH), found.get(RESERVED_EACH), found.get(DECLARED)
        if isinstance(peak, float) and isinstance(reserved, float):
            self._measured[report.nodeid] = Measured(peak, reserved, declared if isinstance(declared, float) else None)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print below the plugin's other lines."""
        for nodeid, notes in self._notes.items():
            for note in notes:
                terminalreporter.line(f"{nodeid}: {note}", yellow=True)
        if self._suggests:
            for line in self._suggestions():
                terminalreporter.line(line)
            return
        hints = [f"hint: {nodeid} {test.hint} (--vlm-suggest)" for nodeid, test in self._measured.items() if test.hint]
        for line in hints[:_SHOWN]:
            terminalreporter.line(line)
        if len(hints) > _SHOWN:
            terminalreporter.line(f"hint: and {len(hints) - _SHOWN} more tests (--vlm-suggest)")

    def _suggestions(self) -> Iterator[str]:
        if not self._measured:
            yield "no test's GPU memory was measured, so no marker can be suggested."
            return
        yield "markers by what was measured in this run (each GPU; vram_gib counts the CUDA context too):"
        for nodeid, test in self._measured.items():
            limit = max(1, math.ceil(test.peak * SLACK * 10)) / 10
            yield f"{nodeid}{f'  # {test.hint}' if test.hint else ''}"
            yield f"    @pytest.mark.vlm_requires(vram_gib={test.needed})"
            yield f"    @pytest.mark.vlm_limit_vram({limit:g})"
