"""Where a model goes: ``plan``, ``check-map`` and ``try``."""

from __future__ import annotations

import sys
import time
from argparse import Namespace

import msgspec

from ..errors import UsageError
from ..machine import Machine, TorchView
from ..plan_options import policy, with_headroom, workload
from ..progress import Progress
from ..workload import Policy
from ._shared import finish, look_for, model_and_machine


def plan(options: Namespace) -> int:
    """Place a model on a machine."""
    started = time.perf_counter()
    look = look_for(options)
    if options.trust_remote_code and not options.trace:
        raise UsageError("--trust-remote-code is about --trace: nothing else of a plan runs code of a checkpoint.")
    profile, machine = model_and_machine(options)
    from ..answer import plan_report
    from ..check_clock import CheckClock

    wanted = workload(options)
    traces = untraced = None
    if options.trace:
        from ..tracing import trace_model

        tracing = trace_model(
            options.model,
            profile,
            machine,
            wanted,
            allow_network=not options.offline,
            trust_remote_code=options.trust_remote_code,
        )
        traces, untraced = tracing.traces, tracing.reason
    clock = CheckClock()
    report = plan_report(
        profile,
        machine,
        wanted,
        policy(options),
        suggest_gpus=options.suggest_gpus,
        traces=traces,
        untraced=untraced,
        by=clock,
    )
    report = msgspec.structs.replace(report, notes=clock.notes(), seconds=time.perf_counter() - started)
    return finish(report, options, look)


def check_map(options: Namespace) -> int:
    """Judge a device_map."""
    started = time.perf_counter()
    look = look_for(options)
    from ..sources.map_file import read_map

    read = read_map(options.map)
    profile, machine = model_and_machine(options)
    from ..answer import map_report
    from ..check_clock import CheckClock

    careful = with_headroom(Policy(gpus=options.gpus or read.gpus or _selected(read.visible, machine)), options.headroom)
    clock = CheckClock()
    report = map_report(read.device_map, profile, machine, workload(options), careful, by=clock)
    report = msgspec.structs.replace(report, notes=clock.notes(), seconds=time.perf_counter() - started)
    return finish(report, options, look)


def _selected(visible: str | None, machine: Machine) -> tuple[int, ...] | None:
    """GPUs behind the numbers of a map whose file sets CUDA_VISIBLE_DEVICES; ``None`` where it does not."""
    if visible is None:
        return None
    from ..visibility import VARIABLE, quote, visible_gpus

    environment = {**machine.environment, VARIABLE: visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    # What torch saw, it saw under another value.
    unasked = TorchView(state="not_asked")
    seen = visible_gpus(msgspec.structs.replace(machine, environment=environment, torch=unasked))
    if seen.problem is not None:
        raise UsageError(
            f"The file of the map is for other GPUs than those of {machine.description} "
            f"({VARIABLE}={quote(visible)}); name with --gpus those that its numbers mean."
        )
    return seen.gpus or None


def try_model(options: Namespace) -> int:
    """Load a model where the plan puts it, call it, and say what came of it."""
    started = time.perf_counter()
    look = look_for(options)
    if options.machine != "live":
        raise UsageError(
            f"--machine {options.machine}: only this machine can be tried; vlm-doctor plan plans for any other."
        )
    profile, machine = model_and_machine(options)
    from ..probes.trial_run import Trier
    from ..trying import try_model as try_it

    trier = Trier(
        options.model,
        profile,
        workload(options),
        trust_remote_code=options.trust_remote_code,
        allow_network=not options.offline,
        deadline_s=options.deadline,
    )
    report = try_it(
        trier,
        profile,
        machine,
        policy(options),
        on_cpu=options.cpu,
        beside_auto=options.beside_auto,
        watch=lambda what: Progress(lambda: what, sys.stderr),
    )
    return finish(msgspec.structs.replace(report, seconds=time.perf_counter() - started), options, look)
