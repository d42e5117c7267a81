"""The file of ``--vlm-report``: written before the first test and now and then, so that a killed run leaves one."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .evidence import Broken, FindingRecord, GatedRecord, LoadRecord, MachineRecord, RunnerRecord, RunReport, gib
from .writing import write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pytest

    from ..options import Settings
    from .fleet import Runner

State = Literal["running", "finished", "interrupted"]
INTERVAL_S = 10.0
"""How old the file may be while tests run: what a killed run loses at most."""


class ReportFile:
    """Puts the report together and writes it.

    Args:
        path: The file.
        settings: Of the run.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.text = ""
        """As last put together, whether or not it could be written."""
        self._settings = settings
        self._option = settings.origins.get("report", "--vlm-report")
        self._started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        # Durations come from a clock that nobody sets.
        self._started = self._written = time.monotonic()

    @property
    def is_stale(self) -> bool:
        """True when the file should be written again."""
        return time.monotonic() - self._written > INTERVAL_S

    def write(
        self,
        state: State,
        exit_status: int | None,
        *,
        tests: Mapping[str, GatedRecord],
        said: Sequence[tuple[str | None, dict[str, Any]]],
        broken: Sequence[Broken],
        config: pytest.Config,
        fleet: Sequence[Runner] = (),
    ) -> str:
        """Write the report.

        Args:
            state: Of the run.
            exit_status: pytest's, once it is known.
            tests: Node id to record.
            said: Worker (``None`` is this process) to what it handed over.
            broken: What the run did not keep.
            config: For the hook ``pytest_vlmgpu_report``, which is asked when the run has ended.
            fleet: What it was planned for.

        Returns:
            Empty, or one sentence why it could not be written.
        """
        self._written = time.monotonic()
        machines = [(one["machine"], one["findings"]) for _, one in said if one.get("machine")]
        machine, findings = machines[0] if machines else (None, ())
        report = RunReport(
            version=_version(),
            mode="plan" if self._settings.plan else "run",
            state=state,
            exit_status=exit_status,
            started_at=self._started_at,
            duration_s=round(self._written - self._started, 3),
            settings=self._settings.given,
            machine=msgspec.convert(machine, MachineRecord) if machine else None,
            findings=msgspec.convert(findings, tuple[FindingRecord, ...]),
            fleet=tuple(_runner(runner) for runner in fleet),
            broken=tuple(broken),
            tests=tuple(tests.values()),
            loads=tuple(_load(worker, load) for worker, one in said for load in one["loads"]),
        )
        if state != "running":
            extra: dict[str, Any] = {}
            config.hook.pytest_vlmgpu_report(config=config, report=report, extra=extra)
            report = msgspec.structs.replace(report, extra=extra)
        self.text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
        return write(self.path, self.text, self._option)


def _version() -> str:
    from .. import __version__

    return __version__


def _runner(runner: Runner) -> RunnerRecord:
    from .examining import machine_record

    return RunnerRecord(name=runner.name, machine=machine_record(runner.machine))


def _load(worker: str | None, load: dict[str, Any]) -> LoadRecord:
    return LoadRecord(
        model=load["model"],
        where=load["where"],
        seconds=round(load["seconds"], 3),
        weights_gib=gib(load["weights_bytes"]),
        predicted_peak_gib=gib(load["predicted_peak_bytes"]),
        measured_peak_gib=gib(load["measured_peak_bytes"]),
        offloaded_gib=gib(load["offloaded_bytes"]),
        left_gib=gib(load["left_bytes"]),
        warm=load["warm"],
        saved_seconds=round(load["saved_seconds"], 3),
        worker=worker,
    )
