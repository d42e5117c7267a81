"""Whether a machine is fine: ``check`` and ``gate``."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

import msgspec

from ..delivery import write_file, write_stdout
from ..errors import ModelError
from ..machine import Machine
from ..progress import Progress
from ..report import Report
from ._shared import finish, is_terminal, look_for, read_machine, with_project
from .ahead import loader

if TYPE_CHECKING:
    from pathlib import Path

    from ..changes import Saved
    from ..check_clock import CheckClock
    from ..model import ModelProfile
    from ..sources import Collection

DEFAULT_MODEL = "zai-org/GLM-4.1V-9B-Thinking"
"""Model of the closing suggestion: an open 9B vision-language model that the catalogue knows, so no network is needed."""


def check(options: Namespace) -> int:
    """Judge a machine. On a terminal, what does not depend on torch is printed while torch is still being asked."""
    started = time.perf_counter()
    suggestion = _Suggestion(options)
    if options.machine != "live":
        return _check(options, started, suggestion, None)
    load = loader(options)

    def meanwhile(has_gpus: bool) -> None:
        load(has_gpus)
        if has_gpus:
            suggestion.read_default()

    # First of all, since nothing takes longer than NVML.
    from ..sources import Collection

    with_torch = not options.no_torch
    with Collection(with_torch=with_torch, fresh_torch=options.fresh_torch, meanwhile=meanwhile) as collection:
        return _check(options, started, suggestion, collection)


def _check(options: Namespace, started: float, suggestion: _Suggestion, collection: Collection | None) -> int:
    look = look_for(options)
    from ..check_clock import CheckClock

    clock = CheckClock()
    demoted, notes = with_project(options)
    saved = _saved(options.since, clock)

    def judge(machine: Machine) -> Report:
        from ..answer import check_report

        report = check_report(machine, ignore=demoted, gpus=options.gpus, strict=options.strict, by=clock)
        if saved is None:
            return report
        from ..changes import with_changes

        return with_changes(report, saved)

    def complete(report: Report) -> Report:
        done = suggestion.added_to(report)
        said = (*notes, *done.notes, *clock.notes())
        done = msgspec.structs.replace(done, notes=said, seconds=time.perf_counter() - started)
        if options.save is not None:
            from .. import codec

            write_file(options.save, codec.to_json(done), option="--save")
        return done

    if collection is None:
        return finish(complete(judge(read_machine(options))), options, look)

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


def _saved(since: Path | None, clock: CheckClock) -> Saved | None:
    """What to compare with, judged; ``None`` where nothing was named."""
    if since is None:
        return None
    from ..sources.saved_report import read_saved

    saved = read_saved(since)
    if saved.diagnosis is not None:
        return saved
    # A bare snapshot: what is judged the same way can be compared.
    from ..checks import diagnose

    return saved._replace(diagnosis=diagnose(saved.machine, by=clock))


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


class _Suggestion:
    """A plan for ``--model``, or else for the default model, which must not stop a check: its trouble becomes a note."""

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._default: ModelProfile | ModelError | None = None

    def read_default(self) -> None:
        """Read the default model, if it will be wanted; it needs no network."""
        if self._options.model is not None or self._default is not None:
            return
        from ..sources.model_files import load_profile

        try:
            self._default = load_profile(DEFAULT_MODEL, allow_network=False)
        except ModelError as error:
            self._default = error

    def added_to(self, report: Report) -> Report:
        """The report with the plan."""
        from ..visibility import visible_gpus

        if not visible_gpus(report.machine).gpus:
            # Nothing to place it on; where GPUs are hidden, a finding says so.
            return report
        from ..answer import with_suggestion
        from ..sources.model_files import load_profile

        if self._options.model is not None:
            return with_suggestion(report, load_profile(self._options.model), gpus=self._options.gpus)
        self.read_default()
        assert self._default is not None
        if isinstance(self._default, ModelError):
            return msgspec.structs.replace(report, notes=(*report.notes, f"No suggestion for a model: {self._default}"))
        try:
            return with_suggestion(report, self._default, gpus=self._options.gpus)
        except ModelError as error:
            return msgspec.structs.replace(report, notes=(*report.notes, f"No suggestion for a model: {error}"))
