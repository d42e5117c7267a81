"""What each test and each worker says: header, properties of reports, what a worker hands over.

Everything a report needs travels in ``user_properties``, which reach the controller of pytest-xdist and the JUnit file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from ..output import keep_output
from ..state import GATE, GATED_TEST, REQUESTS, VERDICT, gate_of
from ..verdicts import OWN_SKIP
from ..wording import plural

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from vlm_doctor.machine import Machine

    from ..gating.gate import Gate
    from ..verdicts import Verdict

PREFIX = "vlmgpu."
"""What the names of our properties begin with."""
PHASES = ("setup", "call", "teardown")
"""Any other report is what pytest-xdist says of the test in which a worker died."""
OUTPUT = "vlmgpu"
"""Key of what a worker hands over (``config.workeroutput``)."""
_NAME = "vlmgpu-reports"


def collected(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Count gated tests, and tests of each model; nothing when there are none."""
    requests = config.stash.get(REQUESTS, ())
    if not requests or config.get_verbosity() < 0:
        return None
    counts = Counter(map(id, requests))
    gated = [(one.gated, counts[key]) for key, one in {id(one): one for one in requests}.items() if one and one.gated]
    if not gated:
        return None
    models: Counter[str] = Counter()
    for test, count in gated:
        for spec in test.specs:
            models[spec.label] += count
    named = f"; {', '.join(f'{label} ({count})' for label, count in models.items())}" if models else ""
    return f"vlmgpu: {sum(count for _, count in gated)} of {plural(len(items), 'test')} gated{named}"


class Reports:
    """Hook of runs with gated tests; other runs pay nothing for it."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach properties to the report of a gated test, and put a skip at the test's own line."""
        if GATED_TEST not in item.stash:
            return (yield)
        attach(item, call)
        report = yield
        correct(item, report)
        return report


def register(config: pytest.Config) -> None:
    """Have the reports of gated tests completed."""
    if not config.pluginmanager.has_plugin(_NAME):
        config.pluginmanager.register(Reports(), _NAME)
        keep_output(config)


def attach(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Add ``vlmgpu.*`` properties to a gated test when its setup has ended, before its report is made."""
    if call.when != "setup":
        return
    test, gate, verdict = item.stash[GATED_TEST], gate_of(item.config), _verdict(item)
    properties: dict[str, object] = {"model": ", ".join(spec.label for spec in test.specs) or None}
    if verdict is not None:
        runs = verdict.action == "run"
        need, is_about_gpus = gate.need_bytes(test), gate.is_machine_real or gate.settings.plan
        resident = gate.resident_of(test)
        if resident is not None and call.excinfo is None:
            resident.load.tests.append(item.nodeid)
        properties |= {
            "verdict": verdict.action,
            "code": verdict.code,
            "gpus": ",".join(gate.gpu_uuids(test, verdict)) if runs and is_about_gpus else None,
            "need_gib": round(need / 2**30, 3) if need else None,
            "offloaded_gib": round(resident.load.offloaded_bytes / 2**30, 3) if resident is not None else None,
        }
    elif call.excinfo is not None:
        # A marker (skip, xfail that is not to run), or a session fixture, came before the gate.
        is_skip = call.excinfo.errisinstance((pytest.skip.Exception, pytest.xfail.Exception))
        properties["verdict"] = "skip" if is_skip else "error"
    _set(item.user_properties, properties)


def correct(item: pytest.Item, report: pytest.TestReport) -> None:
    """Report a skip at the test's own line, and an error as an error even where the test is expected to fail."""
    if report.when == "setup":
        _correct_setup(item, report)
    settings = gate_of(item.config).settings
    if settings.strict == "all" and report.skipped and not hasattr(report, "wasxfail") and not settings.plan:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix(
            "Skipped: "
        )
        report.outcome = "failed"
        report.longrepr = f"{OWN_SKIP}: the test skipped itself: {reason} (An error because of --vlm-strict=all.)"
        for properties in (item.user_properties, report.user_properties):
            _set(properties, {"code": OWN_SKIP})


def _correct_setup(item: pytest.Item, report: pytest.TestReport) -> None:
    verdict = _verdict(item)
    if verdict is None:
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


def _set(properties: list[tuple[str, object]], values: Mapping[str, object]) -> None:
    """Write some of our properties anew; those without a value go."""
    names = {f"{PREFIX}{name}" for name in values}
    kept = [(name, value) for name, value in properties if name not in names]
    properties[:] = kept + [(f"{PREFIX}{name}", value) for name, value in values.items() if value]


def hand_over(session: pytest.Session) -> None:
    """Leave what a worker collected and loaded where the controller finds it."""
    config = session.config
    output = getattr(config, "workeroutput", None)
    if output is not None and GATE in config.stash:
        output[OUTPUT] = said_by(config.stash[GATE], [item.nodeid for item in session.items if GATED_TEST in item.stash])


def said_by(gate: Gate, nodeids: Sequence[str]) -> dict[str, Any]:
    """What one process knows, in the plain types that pytest-xdist carries."""
    machine = gate.machine_used
    said: dict[str, Any] = {"gated": list(nodeids), "loads": [asdict(load) for load in gate.loads]}
    said["machines"] = [describe(machine)] if machine is not None else []
    if gate.settings.report and machine is not None:
        from .examining import examined

        said["machine"], said["findings"] = examined(machine)
    return said


def _verdict(item: pytest.Item) -> Verdict | None:
    """What was decided about a test: by the gate, or later while its model was loaded."""
    verdict = item.stash.get(VERDICT, None)
    if verdict is not None and verdict.action == "run":
        test, gate = item.stash[GATED_TEST], gate_of(item.config)
        refused = [gate.refusals[spec] for spec in test.specs if test.loads and spec in gate.refusals]
        return refused[0] if refused else verdict
    return verdict


def describe(machine: Machine) -> str:
    """One line about a machine: what it is, and how much memory is free."""
    from vlm_doctor.units import format_gib

    free = [
        f"GPU {gpu.index} {format_gib(gpu.memory_free_bytes)}" for gpu in machine.gpus if gpu.memory_free_bytes is not None
    ]
    return f"{machine.description}; free: {', '.join(free)}" if free else machine.description
