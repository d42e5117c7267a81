"""A trial, put together: the plan, the processes that follow it, ``auto`` beside it, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from . import __version__
from .answer import plan_report, try_report
from .errors import CouldNotLookError, UsageError
from .machine import Gpu, Machine
from .model import ModelProfile
from .planner.validate import validate_workload
from .probes.trial_run import Trier
from .report import Report
from .visibility import visible_gpus
from .workload import Policy

Watch = Callable[[str], AbstractContextManager[object]]
"""Entered while what it is called with is waited for."""


def try_model(
    trier: Trier,
    profile: ModelProfile,
    machine: Machine,
    policy: Policy,
    *,
    on_cpu: bool = False,
    beside_auto: bool = False,
    watch: Watch = nullcontext,
) -> Report:
    """Load a model for real and say what came of it.

    Args:
        trier: Runs the attempts; knows the model's name and the call.
        profile: The model.
        machine: This one: what is tried elsewhere cannot be told.
        policy: How to place it.
        on_cpu: Load it for the CPU, without a plan.
        beside_auto: Then load it with ``device_map="auto"`` on the GPUs that the plan could use.
        watch: Shows what is waited for.

    Raises:
        UsageError: The machine is another one, or the call makes no sense.
        CouldNotLookError: There is no GPU.
        ModelFileError: The model cannot be placed.
    """
    workload = trier.workload
    if machine.origin != "live":
        raise UsageError(
            f"--machine {machine.description}: only this machine can be tried; vlm-doctor plan plans for any other."
        )
    if workload.new_tokens < 1:
        raise UsageError(f"--new-tokens {workload.new_tokens}: a trial makes at least one token; write 1 or more.")
    gpus: dict[str, Sequence[int]] = {}
    attempts = []
    dtype = workload.dtype or profile.dtype
    if on_cpu:
        validate_workload(workload, profile)
        planned = Report(version=__version__, command="try", machine=machine, exit_status=0)
        with watch("the model on the CPU"):
            attempts.append(trier.on_cpu())
    else:
        if not machine.gpus:
            raise CouldNotLookError(
                "There is no NVIDIA GPU here that could be used, so nothing was tried: run vlm-doctor to see why, try on "
                "the CPU with --cpu, or plan for another machine with vlm-doctor plan MODEL --machine 2xL4."
            )
        planned = plan_report(profile, machine, workload, policy)
        plan = planned.plan
        assert plan is not None, "a report of a plan holds one"
        dtype = plan.dtype
        if plan.fits:
            gpus["plan"] = [stage.gpu for stage in plan.stages]
            with watch("the model by plan"):
                attempts.append(trier.by_plan(plan))
    if beside_auto:
        usable = [] if on_cpu else usable_gpus(machine, policy)
        gpus["auto"] = [gpu.index for gpu in usable]
        with watch('the model by device_map="auto"'):
            attempts.append(trier.by_auto([gpu.uuid for gpu in usable], dtype=dtype))
    return try_report(planned, attempts, workload, model=trier.name, gpus=gpus)


def usable_gpus(machine: Machine, policy: Policy) -> list[Gpu]:
    """The GPUs that a plan could use, as CUDA numbers them."""
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    chosen = [index for index in visible_gpus(machine).gpus if policy.gpus is None or index in policy.gpus]
    return [by_index[index] for index in chosen if index not in policy.exclude]
