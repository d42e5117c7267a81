"""Whether a machine is fine: ``check`` and ``gate``."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace

import msgspec

from ..delivery import write_file, write_stdout
from ..errors import ModelError
from ..machine import Machine
from ..progress import Progress
from ..report import Report
from ._shared import finish, is_terminal, look_for, read_machine, with_project

DEFAULT_MODEL = "zai-org/GLM-4.1V-9B-Thinking"
"""Model of the closing suggestion: an open 9B vision-language model that the catalogue knows, so no network is needed."""


def check(options: Namespace) -> int:
    """Judge a machine. On a terminal, what does not depend on torch is printed while torch is still being asked."""
    started = time.perf_counter()
    look = look_for(options)
    from ..check_clock import CheckClock

    clock = CheckClock()
    demoted, notes = with_project(options)
    saved = None
    if options.since is not None:
        from ..sources.saved_report import read_saved

        saved = read_saved(options.since)
        if saved.diagnosis is None:
            # A bare snapshot: what is judged the same way can be compared.
            from ..checks import diagnose

            saved = saved._replace(diagnosis=diagnose(saved.machine, by=clock))

    def judge(machine: Machine) -> Report:
        from ..answer import check_report

        report = check_report(machine, ignore=demoted, gpus=options.gpus, strict=options.strict, by=clock)
        if saved is None:
            return report
        from ..changes import with_changes

        return with_changes(report, saved)

    def complete(report: Report) -> Report:
        done = _suggest(report, options)
        said = (*notes, *done.notes, *clock.notes())
        done = msgspec.structs.replace(done, notes=said, seconds=time.perf_counter() - started)
        if options.save is not None:
            from .. import codec

            write_file(options.save, codec.to_json(done), option="--save")
        return done

    if options.machine != "live":
        return finish(complete(judge(read_machine(options))), options, look)
    from ..sources import Collection

    with Collection(with_torch=not options.no_torch, fresh_torch=options.fresh_torch) as collection:

        def waiting() -> Progress:
            return Progress(lambda: collection.waiting_for, sys.stderr)

        with waiting():
            machine = collection.without_torch()
        first = judge(machine)
        if options.no_torch or machine.torch.state != "not_asked":
            return finish(complete(first), options, look)
        is_page = options.format == "terminal" and options.output is None and is_terminal()
        if is_page:
            from ..formats.to_terminal import head, tail

            write_stdout(head(first, look))
        with waiting():
            machine = collection.complete()
        final = complete(judge(machine))
        if not is_page:
            return finish(final, options, look)
        write_stdout(tail(final, look, earlier=first))
        return final.exit_status


def gate(options: Namespace) -> int:
    """Say whether a machine is what a job expects."""
    started = time.perf_counter()
    look = look_for(options)
    from ..expectations import ProjectSettings, expectations

    demoted, notes = with_project(options)
    project = options.project
    wanted = expectations(
        ProjectSettings() if project is None else project.settings,
        gpus=options.gpus,
        vram_bytes=options.vram,
        nvlink=options.nvlink,
        capability_wanted=options.capability,
        model=options.model,
        where="pyproject.toml" if project is None else str(project.path),
    )
    profile = None
    if wanted.model is not None:
        from ..sources.model_files import load_profile

        profile = load_profile(wanted.model, allow_network=not options.offline)
    machine = read_machine(options)
    from ..answer import gate_report
    from ..check_clock import CheckClock

    clock = CheckClock()
    report = gate_report(wanted, machine, profile, ignore=demoted, strict=options.strict, by=clock)
    report = msgspec.structs.replace(report, notes=(*notes, *clock.notes()), seconds=time.perf_counter() - started)
    if options.github_output and report.gate is not None:
        from ..formats.gate_text import step_outputs
        from ..sources.github_output import write_outputs

        write_outputs(step_outputs(report.gate), os.environ)
    return finish(report, options, look)


def _suggest(report: Report, options: Namespace) -> Report:
    """Add a plan for ``--model``. The default model must not stop a check: that it cannot be read becomes a note."""
    from ..visibility import visible_gpus

    if not visible_gpus(report.machine).gpus:
        # Nothing to place it on; where GPUs are hidden, a finding says so.
        return report
    from ..answer import with_suggestion
    from ..sources.model_files import load_profile

    if options.model is not None:
        return with_suggestion(report, load_profile(options.model), gpus=options.gpus)
    try:
        return with_suggestion(report, load_profile(DEFAULT_MODEL, allow_network=False), gpus=options.gpus)
    except ModelError as error:
        return msgspec.structs.replace(report, notes=(*report.notes, f"No suggestion for a model: {error}"))
