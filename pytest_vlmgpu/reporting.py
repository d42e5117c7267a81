"""What a run says about its gated tests: header, report properties, summary.

Everything a report needs travels in ``user_properties``, which reach the controller of pytest-xdist and the JUnit file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from .state import GATE, GATED_TEST, VERDICT, gate_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlm_doctor.machine import Machine

    from .gate import Load
    from .verdicts import Verdict

PREFIX = "vlmgpu."
_OUTPUT = "vlmgpu"
"""Key of what a worker hands over (``config.workeroutput``)."""


def collected(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Count gated tests, and tests of each model; nothing when there are none."""
    tests = [item.stash[GATED_TEST] for item in items if GATED_TEST in item.stash]
    if not tests or config.get_verbosity() < 0:
        return None
    models = Counter(spec.label for test in tests for spec in test.specs)
    named = f"; {', '.join(f'{label} ({count})' for label, count in models.items())}" if models else ""
    return f"vlmgpu: {len(tests)} of {_plural(len(items), 'test')} gated{named}"


def attach(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Add ``vlmgpu.*`` properties to a gated test when its setup has ended, before its report is made."""
    verdict = _verdict(item)
    if call.when != "setup" or verdict is None:
        return
    test, gate = item.stash[GATED_TEST], gate_of(item.config)
    properties = {
        "verdict": verdict.action,
        "code": verdict.code,
        "model": ", ".join(spec.label for spec in test.specs) or None,
        "gpus": ",".join(gate.gpu_uuids(test, verdict)) if verdict.action == "run" else None,
    }
    kept = [(name, value) for name, value in item.user_properties if not name.startswith(PREFIX)]
    item.user_properties[:] = kept + [(f"{PREFIX}{name}", value) for name, value in properties.items() if value]


def correct(item: pytest.Item, report: pytest.TestReport) -> None:
    """Report a skip at the test's own line, and an error as an error even where the test is expected to fail."""
    verdict = _verdict(item)
    if report.when != "setup" or verdict is None:
        return
    if verdict.details and item.config.get_verbosity() > 0:
        report.sections.append(("vlmgpu: what the library raised", verdict.details))
    if verdict.action == "skip" and report.skipped:
        path, line, _ = item.reportinfo()
        report.longrepr = (str(path), (line or 0) + 1, f"Skipped: {verdict.text}")
    elif verdict.action == "error" and not report.failed:
        # pytest takes any failure of an xfail test as the expected one; a broken GPU is not what the test expects.
        report.outcome = "failed"
        report.longrepr = verdict.text
        vars(report).pop("wasxfail", None)


def hand_over(config: pytest.Config) -> None:
    """Leave what a worker loaded where the controller finds it."""
    output = getattr(config, "workeroutput", None)
    if output is not None and GATE in config.stash:
        gate = config.stash[GATE]
        machines = [_describe(gate.machine_used)] if gate.machine_used is not None else []
        output[_OUTPUT] = {"machines": machines, "loads": [asdict(load) for load in gate.loads]}


class Summary:
    """Collects what gated tests reported and prints it at the end; silent when there was none."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._verdicts: Counter[tuple[str, str]] = Counter()
        self._on_gpu = 0
        self._tests_of: Counter[str] = Counter()
        self._from_workers: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a gated test once, when its setup has ended."""
        found = {name: value for name, value in report.user_properties if name.startswith(PREFIX)}
        action = found.get(f"{PREFIX}verdict")
        if report.when != "setup" or action is None:
            return
        if action == "run":
            # A fixture of the project's own may still have skipped or failed.
            action = {"passed": "run", "skipped": "skip", "failed": "error"}[report.outcome]
        self._verdicts[str(action), str(found.get(f"{PREFIX}code", ""))] += 1
        if action == "run":
            self._on_gpu += bool(found.get(f"{PREFIX}gpus"))
            self._tests_of[str(found.get(f"{PREFIX}model", ""))] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take over what a worker of pytest-xdist loaded."""
        output = getattr(node, "workeroutput", {})
        if error is None and _OUTPUT in output:
            self._from_workers.append(output[_OUTPUT])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what ran, what did not and why, and what was loaded."""
        if not self._verdicts:
            return
        from .controller import account
        from .gate import Load

        gate = gate_of(self._config)
        machines = [_describe(gate.machine_used)] if gate.machine_used is not None else []
        machines += [line for output in self._from_workers for line in output["machines"]]
        loads = gate.loads + [Load(**load) for output in self._from_workers for load in output["loads"]]
        terminalreporter.section("vlmgpu")
        for line in dict.fromkeys(machines):
            terminalreporter.line(line)
        terminalreporter.line(self._counts())
        for load in loads:
            terminalreporter.line(_load_line(load, self._tests_of[load.model]))
        for line in account(self._config):
            terminalreporter.line(line)
        if not self._on_gpu:
            gated = _plural(sum(self._verdicts.values()), "gated test")
            terminalreporter.line(f"NO TEST RAN ON A GPU ({gated}).", red=True, bold=True)

    def _counts(self) -> str:
        from vlm_doctor.codes import all_codes

        titles = all_codes()
        parts = []
        for action, word in (("run", "ran"), ("skip", "skipped"), ("error", "error")):
            codes = {code: count for (of, code), count in sorted(self._verdicts.items()) if of == action}
            if codes:
                reasons = [f"{_title(code, titles)}: {number}" for code, number in codes.items() if code]
                why = f" ({', '.join(reasons)})" if reasons else ""
                count = sum(codes.values())
                parts.append(f"{_plural(count, word) if action == 'error' else f'{count} {word}'}{why}")
        return "; ".join(parts)


def _verdict(item: pytest.Item) -> Verdict | None:
    """What was decided about a test: by the gate, or later while its model was loaded."""
    verdict = item.stash.get(VERDICT, None)
    if verdict is not None and verdict.action == "run":
        test, gate = item.stash[GATED_TEST], gate_of(item.config)
        refused = [gate.refusals[spec] for spec in test.specs if test.loads and spec in gate.refusals]
        return refused[0] if refused else verdict
    return verdict


def _title(code: str, titles: Mapping[str, str]) -> str:
    """``VLM702 too few GPUs``; a code of the project's own (by the hook) alone."""
    return f"{code} {titles[code].rpartition(': ')[2]}" if code in titles else code


def _describe(machine: Machine) -> str:
    from vlm_doctor.units import format_gib

    free = [
        f"GPU {gpu.index} {format_gib(gpu.memory_free_bytes)}" for gpu in machine.gpus if gpu.memory_free_bytes is not None
    ]
    return f"{machine.description}; free: {', '.join(free)}" if free else machine.description


def _load_line(load: Load, tests: int) -> str:
    from vlm_doctor.units import format_gib

    line = f"{load.model}: loaded in {load.seconds:.1f} s on {load.where}"
    if load.weights_bytes:
        line += f", {format_gib(load.weights_bytes)} of weights, peak {format_gib(load.predicted_peak_bytes)} predicted"
    if load.measured_peak_bytes:
        line += f", {format_gib(load.measured_peak_bytes)} measured"
    if load.left_bytes:
        by = f" by {', '.join(load.held_by)}" if load.held_by else ""
        line += f"; {format_gib(load.left_bytes)} still held{by} after it was unloaded"
    elif load.missing_bytes:
        line += f"; {format_gib(load.missing_bytes)} of GPU memory did not come back after it was unloaded"
    return f"{line}; {_plural(tests, 'test')}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
