"""From a machine to the report of a command: judge it, plan for it, and come to a verdict. Pure.

What only one command needs is imported there: a check of a machine without GPUs has no use for the planner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from . import __version__
from .answers import ErrorAnswer
from .checks import Examine, diagnose, examine, plain
from .errors import UsageError
from .machine import Machine
from .model import ModelProfile
from .placement import Plan
from .report import Report
from .trace import Traces
from .trial import Attempt
from .verdict import COULD_NOT_LOOK, PROBLEM, USABLE, exit_status, focus
from .workload import Policy, Workload

if TYPE_CHECKING:
    from .expectations import Expectations

SLOW_SOURCE_S = 2.0
"""Every source but torch takes less than a tenth of this on any machine that was measured."""


def check_report(
    machine: Machine,
    *,
    ignore: Sequence[str] = (),
    gpus: tuple[int, ...] | None = None,
    strict: bool = False,
    by: Examine = examine,
) -> Report:
    """Judge a machine.

    Args:
        machine: What was seen.
        ignore: Codes, or beginnings of codes, whose findings decide nothing.
        gpus: GPU indices that matter; findings about others decide nothing. ``None`` is all.
        strict: Count warnings like errors.
        by: Runs each check.

    Raises:
        UsageError: The machine has no such GPU.
    """
    refuse_missing_gpus(machine, gpus)
    diagnosis = diagnose(machine, ignore=ignore, by=by)
    if gpus is not None:
        diagnosis = focus(diagnosis, gpus)
    return Report(
        version=__version__,
        machine=machine,
        diagnosis=diagnosis,
        exit_status=exit_status(machine, diagnosis, strict=strict),
        notes=_slow_sources(machine),
    )


def _slow_sources(machine: Machine) -> tuple[str, ...]:
    """Name what held up the verdict: a doctor that hangs does not say on what. torch's own time is expected."""
    slow = sorted((s, part) for part, s in machine.seconds.items() if s >= SLOW_SOURCE_S and part != "torch")
    named = ", ".join(f"{plain(part)} {seconds:.1f} s" for seconds, part in reversed(slow[-3:]))
    return (f"Slow to read: {named}.",) if named else ()


def with_suggestion(report: Report, profile: ModelProfile, *, gpus: tuple[int, ...] | None = None) -> Report:
    """Add a sketch of a plan for one image with a short text: a suggestion, which does not change the verdict."""
    from .planner import sketch

    return msgspec.structs.replace(report, plan=sketch(profile, report.machine, Workload(), Policy(gpus=gpus)))


def plan_report(
    profile: ModelProfile,
    machine: Machine,
    workload: Workload,
    policy: Policy,
    *,
    suggest_gpus: bool = False,
    traces: Traces | None = None,
    untraced: str | None = None,
    by: Examine = examine,
) -> Report:
    """Place a model on a machine. Of the machine's faults, those of the GPUs that the plan uses count.

    Args:
        profile: The model.
        machine: What was seen.
        workload: What the model is to do.
        policy: How to choose.
        suggest_gpus: Name cards on which the workload would fit, also when it fits here.
        traces: Allocations of the model's real code for this workload; ``None`` plans by formulas.
        untraced: Why there are none although they were asked for.
        by: Runs each check.

    Raises:
        UsageError: Workload or policy make no sense for this model and machine.
        ModelFileError: The model cannot be placed.
    """
    from . import planner

    answer = planner.plan(profile, machine, workload, policy, traces=traces, untraced=untraced)
    if suggest_gpus and answer.fits:
        answer = msgspec.structs.replace(answer, gpu_sets=planner.suggest_gpus(profile, workload, policy))
    diagnosis = focus(diagnose(machine, plan=answer, by=by), _gpus_of(answer))
    return Report(
        version=__version__,
        command="plan",
        machine=machine,
        diagnosis=diagnosis,
        plan=answer,
        exit_status=exit_status(machine, diagnosis, answer),
    )


def map_report(
    device_map: Mapping[str, int | str],
    profile: ModelProfile,
    machine: Machine,
    workload: Workload,
    policy: Policy,
    *,
    by: Examine = examine,
) -> Report:
    """Judge a ``device_map``. Of the machine's faults, those of the GPUs that the map uses count.

    Raises:
        MapError: The map is empty or too large.
        UsageError: Workload or policy make no sense for this model and machine.
        ModelFileError: The model cannot be placed.
    """
    from .planner import check_map

    checked = check_map(device_map, profile, machine, workload, policy)
    used = frozenset(use.gpu for use in checked.devices if use.gpu is not None)
    diagnosis = focus(diagnose(machine, by=by), used)
    status = exit_status(machine, diagnosis)
    return Report(
        version=__version__,
        command="check-map",
        machine=machine,
        diagnosis=diagnosis,
        map_check=checked,
        exit_status=PROBLEM if status == USABLE and not checked.is_clean else status,
    )


def gate_report(
    wanted: Expectations,
    machine: Machine,
    profile: ModelProfile | None = None,
    *,
    ignore: Sequence[str] = (),
    strict: bool = False,
    by: Examine = examine,
) -> Report:
    """Say whether a machine is what a job expects.

    Args:
        wanted: What it expects.
        machine: What was seen.
        profile: The model that has to fit, if there is one.
        ignore: Codes, or beginnings of codes, whose findings decide nothing.
        strict: Warnings about the machine, or about the GPUs that would be used, stand against it.
        by: Runs each check.

    Raises:
        UsageError: The model cannot be planned for this machine as asked.
        ModelFileError: The model cannot be placed.
    """
    from .gate import answer_gate, choose, refused

    diagnosis = diagnose(machine, ignore=ignore, by=by)
    choice = choose(wanted, machine, diagnosis)
    plan = None
    if profile is not None and choice.gpus:
        from .planner import plan as place

        plan = place(profile, machine, Workload(), Policy(gpus=choice.gpus))
        if not plan.fits and len(choice.able) > len(choice.gpus) and not wanted.nvlink:
            plan = place(profile, machine, Workload(), Policy(gpus=choice.able))
    answer = answer_gate(wanted, machine, choice, plan)
    if answer.is_met:
        diagnosis = focus(diagnosis, answer.gpus)
        if strict and diagnosis.count("warning"):
            answer = refused(answer, diagnosis)
    status = USABLE if answer.is_met else PROBLEM if answer.unmet else COULD_NOT_LOOK
    return Report(
        version=__version__, command="gate", machine=machine, diagnosis=diagnosis, gate=answer, exit_status=status
    )


def error_report(answer: ErrorAnswer, machine: Machine, *, by: Examine = examine) -> Report:
    """Compare what a log says with a machine."""
    from .error_answer import confirm

    diagnosis = diagnose(machine, by=by)
    return Report(
        version=__version__,
        command="explain-error",
        machine=machine,
        diagnosis=diagnosis,
        error_text=confirm(answer, diagnosis),
        exit_status=USABLE if answer.is_recognized else COULD_NOT_LOOK,
    )


def try_report(
    planned: Report, attempts: Sequence[Attempt], workload: Workload, *, model: str, gpus: Mapping[str, Sequence[int]]
) -> Report:
    """Say what came of loading a model for real.

    Args:
        planned: Of :func:`plan_report`; on the CPU a report of the machine without a plan.
        attempts: What the processes told, the plan's (or the CPU's) first; none when nothing was loaded.
        workload: The call that was made.
        model: Its name.
        gpus: Route to the GPU index behind each CUDA ordinal.
    """
    from .error_answer import confirm
    from .trial_verdict import judged

    diagnosis = planned.diagnosis
    machine = planned.machine.description
    trial = judged(attempts, model=model, machine=machine, workload=workload, plan=planned.plan, gpus=gpus)
    if diagnosis is not None:
        confirmed = tuple(
            attempt if attempt.error is None else msgspec.structs.replace(attempt, error=confirm(attempt.error, diagnosis))
            for attempt in trial.attempts
        )
        trial = msgspec.structs.replace(trial, attempts=confirmed)
    return msgspec.structs.replace(planned, command="try", trial=trial, exit_status=USABLE if trial.is_good else PROBLEM)


def _gpus_of(answer: Plan) -> frozenset[int]:
    return frozenset(stage.gpu for stage in answer.stages)


def refuse_missing_gpus(machine: Machine, gpus: Sequence[int] | None) -> None:
    """Refuse GPU indices that a machine does not have.

    Raises:
        UsageError: One sentence that names the GPUs there are.
    """
    there = [gpu.index for gpu in machine.gpus]
    for index in gpus or ():
        if index not in there:
            if not there:
                raise UsageError(f"--gpus: there is no GPU {index} ({machine.description}); leave the option out.")
            have = ", ".join(map(str, there))
            raise UsageError(f"--gpus: {machine.description} has no GPU {index}; its GPUs are {have}.")
