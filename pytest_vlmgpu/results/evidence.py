"""What ``--vlm-report`` writes: records, and their JSON Schema. Sizes are GiB (2**30 bytes), times seconds. No I/O."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

REPORT_SCHEMA = 1

Outcome = Literal["passed", "failed", "error", "skipped", "xfailed", "xpassed", "not_run"]


class GatedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One gated test."""

    nodeid: str
    file: str | None = None
    """Relative to the root of the run."""
    line: int | None = None
    """Counted from 1."""
    outcome: Outcome = "not_run"
    """``error``: setup or teardown failed; ``not_run``: it was collected, and the run ended before it, or only asked
    (``--vlm-plan``)."""
    is_executed: bool = False
    """Its own code ran, and did not skip itself: what ``--vlm-min-tests`` and ``--vlm-baseline`` count, unless part of its
    model was in host memory."""
    verdict: Literal["run", "skip", "error"] | None = None
    """Of the gate; ``None`` when it was never asked."""
    code: str | None = None
    """``VLM7xx``, why it was not run or not let pass; ``vlm-doctor explain`` explains it."""
    reason: str | None = None
    """Why it did not pass, in a sentence."""
    model: str | None = None
    gpus: tuple[str, ...] = ()
    """UUIDs; empty where it ran on no GPU."""
    need_gib: float | None = None
    """Expected over all its GPUs: the peak predicted for its model, or what its markers ask for."""
    peak_gib: float | None = None
    """Measured over all its GPUs."""
    offloaded_gib: float | None = None
    """Of its model, in host memory or on disk (``--vlm-allow-offload``): it proves nothing about GPUs."""
    wait_s: float | None = None
    """Spent waiting for a GPU or for memory."""
    duration_s: float = 0.0
    """Setup, call and teardown together, of the last attempt."""
    attempts: int = 0
    """More than 1 where a plugin ran it again."""
    worker: str | None = None
    """Of pytest-xdist."""
    runners: tuple[str, ...] = ()
    """Those of ``--vlm-fleet`` that can run it."""

    @property
    def is_proof(self) -> bool:
        """It ran, and nothing of its model was in host memory: what a run is held to."""
        return self.is_executed and not self.offloaded_gib


class LoadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One load of a model."""

    model: str
    where: str
    """``GPU 0, 1``, in the numbers of nvidia-smi, or ``the CPU``."""
    seconds: float
    weights_gib: float = 0.0
    predicted_peak_gib: float = 0.0
    measured_peak_gib: float = 0.0
    """Of torch's allocator; 0 where no GPU was used."""
    offloaded_gib: float = 0.0
    """In host memory or on disk."""
    left_gib: float = 0.0
    """Weights that something still referred to after the model was unloaded."""
    warm: str = ""
    """What came of ``--vlm-warm``: ``attached``, or why not; empty without it."""
    saved_seconds: float = 0.0
    """What loading had taken, less what attaching took."""
    worker: str | None = None


class GpuRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU of the machine, as last read."""

    index: int
    uuid: str
    name: str
    total_gib: float | None = None
    free_gib: float | None = None


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that decided which tests ran."""

    description: str
    origin: Literal["live", "recorded", "synthetic"]
    """Tests run on a live one only."""
    driver_version: str | None = None
    gpus: tuple[GpuRecord, ...] = ()


class RunnerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of runner of ``--vlm-fleet``."""

    name: str
    machine: MachineRecord


class FindingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What vlm-doctor found on that machine."""

    code: str
    severity: str
    message: str


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """Something the run was held to and did not keep."""

    code: str
    message: str


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report. It is valid at any moment of the run, from before the first test."""

    schema: int = REPORT_SCHEMA
    version: str
    """Of pytest-vlmgpu."""
    mode: Literal["run", "plan"] = "run"
    state: Literal["running", "finished", "interrupted"] = "running"
    """``running`` in a file that nobody writes any more: the process was killed."""
    exit_status: int | None = None
    """Of pytest; 69 where an expectation (``--vlm-expect-…``) was not met."""
    started_at: str
    """ISO 8601, UTC, by the clock of the machine; durations do not depend on it."""
    duration_s: float
    settings: tuple[str, ...] = ()
    """What was given, and where: ``--vlm-gpus=2``, ``vlm_strict=all``."""
    machine: MachineRecord | None = None
    """``None`` where no test asked for it."""
    fleet: tuple[RunnerRecord, ...] = ()
    """The runners of ``--vlm-fleet``, for which it was planned in place of a machine."""
    findings: tuple[FindingRecord, ...] = ()
    broken: tuple[Broken, ...] = ()
    tests: tuple[GatedRecord, ...] = ()
    loads: tuple[LoadRecord, ...] = ()
    extra: dict[str, Any] = {}
    """What the project added."""


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a report; ``docs/run-report.schema.json`` is this."""
    from vlm_doctor.formats.to_json import without_indentation

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Report of pytest-vlmgpu, schema {REPORT_SCHEMA}",
        **without_indentation(msgspec.json.schema(RunReport)),
    }


def gib(size_bytes: float) -> float:
    """Bytes as GiB, to a thousandth."""
    return round(size_bytes / 2**30, 3)
