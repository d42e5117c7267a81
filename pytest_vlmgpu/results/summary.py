"""What a run says at its end, what it is held to, and the file of ``--vlm-report``: on the controller only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..state import GATE, GATED_TEST, SETTINGS
from ..wording import plural
from .reporting import OUTPUT, PHASES, PREFIX, said_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..options import Settings
    from .evidence import Broken, GatedRecord
    from .fleet import Fate, Runner
    from .plan_run import Planned
    from .recorder import Recorder
    from .report_file import ReportFile, State

_UNAVAILABLE = 69
"""``EX_UNAVAILABLE`` of sysexits.h: not this machine, so another one may do. Outside pytest's 0 to 5."""
_JUDGED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
"""A run that was interrupted or went wrong keeps its status, and nobody expects of it that all tests ran."""


class Summary:
    """Collects what gated tests reported, judges the run and prints it; silent when there was nothing."""

    def __init__(self, config: pytest.Config) -> None:
        from ..options import Settings

        self._config = config
        self._settings: Settings = config.stash.get(SETTINGS, None) or Settings()
        self._recorder: Recorder | None = None
        self._said: list[tuple[str | None, dict[str, Any]]] = []
        """Worker to what it handed over."""
        self._broken: list[Broken] = []
        self._notes: list[str] = []
        self._baseline: tuple[str, ...] | None = None
        self._file: ReportFile | None = None
        self._planned: list[Planned] = []
        self._others = 0
        self._fleet: tuple[Runner, ...] = ()
        self._fates: list[Fate] = []
        self._forecast: list[str] = []

    def pytest_sessionstart(self) -> None:
        """Find out before anything is collected whether files can be written and the machine is what is expected."""
        option = self._config.option
        if self.is_plan:
            option.collectonly = False
        if option.collectonly or option.showfixtures or getattr(option, "show_fixtures_per_test", False):
            return
        settings = self._settings
        if settings.fleet is not None:
            from .fleet import read_fleet

            self._fleet = read_fleet(settings.fleet)
        if settings.report is not None:
            from .report_file import ReportFile

            self._file = ReportFile(settings.report, settings)
            problem = self._write("running", None)
            if problem:
                raise pytest.UsageError(problem)
        if self.is_plan:
            return
        if settings.baseline is not None and not settings.update_baseline:
            from . import baseline

            self._baseline = baseline.read(settings.baseline)
        if settings.expect_gpus or settings.expect_vram:
            self._expect()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note which gated tests there are; pytest-xdist collects in its workers."""
        gated = [item.nodeid for item in session.items if GATED_TEST in item.stash]
        if gated and not self._config.option.collectonly:
            self._record().expect(gated)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take over one phase of a gated test."""
        is_ours = any(name.startswith(PREFIX) for name, _ in report.user_properties)
        if self._recorder is not None or is_ours or report.when not in PHASES:
            self._record().add(report)
            if self._file is not None and report.when == "teardown" and self._file.is_stale:
                # A full disk is told once, at the end, when there may be room again.
                self._write("running", None)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take over what a worker of pytest-xdist collected and loaded."""
        output = getattr(node, "workeroutput", {})
        if error is None and OUTPUT in output:
            self._said.append((node.gateway.id, output[OUTPUT]))
            if output[OUTPUT]["gated"]:
                self._record().expect(output[OUTPUT]["gated"])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Judge the run as a whole, and write what it was asked to write."""
        if GATE in self._config.stash:
            self._said.append((None, said_by(self._config.stash[GATE], ())))
        if self._config.option.collectonly or self.is_plan:
            if self._broken and exitstatus in _JUDGED:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self._finish(session)
            return
        if exitstatus in _JUDGED:
            self._judge()
            if self._broken:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self._update_baseline(session)
        self._finish(session)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what ran, what did not and why, what was loaded, and what was not kept."""
        tests = self._tests
        if self.is_plan:
            self._print_plan(terminalreporter)
            return
        if not (tests or self._broken or self._notes):
            return
        terminalreporter.section("vlmgpu")
        if tests:
            from ..models.loads import Load
            from .summary_text import counts, load_line, offloaded_lines

            machines = [line for _, said in self._said for line in said["machines"]]
            for line in dict.fromkeys(machines):
                terminalreporter.line(line)
            terminalreporter.line(counts(tests))
            executed = {nodeid for nodeid, record in tests.items() if record.is_executed}
            for load in [Load(**load) for _, said in self._said for load in said["loads"]]:
                terminalreporter.line(load_line(load, len(executed.intersection(load.tests))))
            from ..workers.controller import account

            for line in account(self._config):
                terminalreporter.line(line)
            for line in offloaded_lines(tests):
                terminalreporter.line(line, red=True, bold=True)
        for note in self._notes:
            terminalreporter.line(note)
        for broken in self._broken:
            terminalreporter.line(f"{broken.code}: {broken.message}", red=True, bold=True)
        if tests and not any(record.is_executed and record.gpus for record in tests.values()):
            fake = (
                f"; the GPUs of --vlm-fake-gpus={self._settings.fake_gpus} are made up" if self._settings.fake_gpus else ""
            )
            gated = plural(len(tests), "gated test")
            terminalreporter.line(f"NO TEST RAN ON A GPU ({gated}{fake}).", red=True, bold=True)
        self._tell_github(terminalreporter, tests)

    @property
    def is_plan(self) -> bool:
        """True when nothing is to run (``--vlm-plan``)."""
        return self._settings.plan

    def plan(self, session: pytest.Session) -> None:
        """Decide about every gated test, for the summary and the report."""
        from msgspec.structs import replace

        from . import plan_run

        record = self._record()
        if self._fleet:
            self._plan_fleet(session, record)
            return
        for report, planned in plan_run.decide(session):
            self._planned.append(planned)
            record.add(report)
            if planned.verdict is not None and planned.verdict.action == "run":
                record.tests[planned.nodeid] = replace(record.tests[planned.nodeid], outcome="not_run", reason=None)
        self._others = len(session.items) - len(self._planned)
        self._forecast = plan_run.worker_lines(session)

    def _plan_fleet(self, session: pytest.Session, record: Recorder) -> None:
        from msgspec.structs import replace

        from . import fleet

        plans = {runner.name: planned for runner, planned in fleet.on_each(session, self._fleet)}
        self._fates = fleet.fates(plans)
        self._others = len(session.items) - len(self._fates)
        name = self._settings.fleet.name if self._settings.fleet is not None else ""
        self._broken += fleet.unrunnable(self._fates, name)
        for fate in self._fates:
            record.tests[fate.nodeid] = replace(record.tests[fate.nodeid], **fleet.told(fate))

    @property
    def _tests(self) -> Mapping[str, GatedRecord]:
        return self._recorder.tests if self._recorder is not None else {}

    def _print_plan(self, terminalreporter: pytest.TerminalReporter) -> None:
        from . import plan_run

        terminalreporter.section("vlmgpu plan")
        for line in [line for _, said in self._said for line in said["machines"]]:
            terminalreporter.line(line)
        gate = self._config.stash.get(GATE, None)
        text = plan_run.lines(self._planned, self._others, gate.machine_used if gate is not None else None)
        if self._fleet:
            from . import fleet

            text = fleet.lines(self._fleet, self._fates, self._others)
        text += self._forecast
        for line in text:
            terminalreporter.line(line)
        for broken in self._broken:
            terminalreporter.line(f"{broken.code}: {broken.message}", red=True, bold=True)

    def _record(self) -> Recorder:
        if self._recorder is None:
            from .recorder import Recorder

            self._recorder = Recorder()
        return self._recorder

    def _expect(self) -> None:
        """End the run unless the machine is what is expected."""
        from ..gating.expecting import unmet

        unmet_message = unmet(self._config)
        if unmet_message is None:
            return
        self._broken.append(unmet_message)
        self._said.append((None, said_by(self._config.stash[GATE], ())))
        problem = self._write("finished", _UNAVAILABLE)
        from . import github

        lines = [f"{unmet_message.code}: {unmet_message.message}", *([problem] if problem else [])]
        if github.is_here(os.environ):
            print(*github.commands({}, self._broken), sep="\n")  # noqa: T201 - GitHub reads standard output
        pytest.exit("\n".join(lines), returncode=_UNAVAILABLE)

    def _judge(self) -> None:
        settings = self._settings
        if not (self._tests or self._said or settings.min_tests or settings.baseline):
            return
        from . import promises

        origin = settings.origins.get("min_tests", "")
        self._broken += promises.too_few_ran(self._tests, settings.min_tests, origin)
        name = str(settings.baseline.name) if settings.baseline is not None else ""
        self._broken += promises.did_not_run(self._tests, self._baseline, name)
        loads = [load for _, said in self._said for load in said["loads"]]
        if loads:
            from ..models.loads import Load

            records = [Load(**load) for load in loads]
            self._broken += promises.memory_stayed(records, settings.leak_check, settings.leak_tolerance)

    def _update_baseline(self, session: pytest.Session) -> None:
        settings = self._settings
        if not settings.update_baseline or settings.baseline is None:
            return
        from . import baseline
        from .writing import write

        ran = [nodeid for nodeid, record in self._tests.items() if record.is_proof]
        machines = [line["description"] for line in self._machines]
        text = baseline.text(ran, machines[0] if machines else None)
        problem = write(settings.baseline, text, "--vlm-baseline")
        self._notes.append(problem or f"{settings.baseline}: {plural(len(ran), 'test')} noted as run")
        if problem:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @property
    def _machines(self) -> list[dict[str, Any]]:
        return [said["machine"] for _, said in self._said if said.get("machine")]

    def _finish(self, session: pytest.Session) -> None:
        """Write the report for the last time; where that fails, elsewhere."""
        if self._file is None:
            return
        # Also by pytest.exit() with a status of its own.
        is_interrupted = session.exitstatus not in _JUDGED
        problem = self._write("interrupted" if is_interrupted else "finished", int(session.exitstatus))
        if problem:
            from .evidence import Broken
            from .writing import rescue

            code, _, message = problem.partition(": ")
            where = rescue(self._file.path, self._file.text)
            self._broken.append(Broken(code=code, message=f"{message} {where}"))
            if session.exitstatus in _JUDGED:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _write(self, state: State, exit_status: int | None) -> str:
        """Write the report as far as it is; one sentence if that is not possible."""
        if self._file is None:
            return ""
        return self._file.write(
            state,
            exit_status,
            tests=self._tests,
            said=self._said,
            broken=self._broken,
            config=self._config,
            fleet=self._fleet,
        )

    def _tell_github(self, terminalreporter: pytest.TerminalReporter, tests: Mapping[str, GatedRecord]) -> None:
        from . import github

        if not github.is_here(os.environ):
            return
        for line in github.commands(tests, self._broken):
            terminalreporter.line(line)
        page = os.environ.get("GITHUB_STEP_SUMMARY")
        if page:
            try:
                with Path(page).open("a", encoding="utf-8") as file:
                    file.write(github.table(tests, self._broken))
            except OSError as error:
                terminalreporter.line(f"vlmgpu: GITHUB_STEP_SUMMARY cannot be written: {error.strerror}.")
