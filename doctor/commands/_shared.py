"""What commands share: options into facts, reports onto streams."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .. import arguments
from ..delivery import look_of, write_file, write_stdout
from .ahead import loader

if TYPE_CHECKING:
    from ..formats.look import Look
    from ..machine import Machine
    from ..model import ModelProfile
    from ..report import Report


def look_for(options: Namespace) -> Look:
    """How text has to look where the options send it."""
    machine_option = "" if options.machine == "live" else f" --machine {shlex.quote(options.machine)}"
    stream = sys.stdout if options.output is None else None
    return look_of(stream, environment=os.environ, verbose=options.verbose, machine_option=machine_option)


def is_terminal() -> bool:
    """Whether somebody watches standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


def finish(report: Report, options: Namespace, look: Look) -> int:
    """Write a report as the options say; returns its exit status."""
    from ..formats import render

    write(render(report, options.format, **msgspec.structs.asdict(look)), options.output)
    return report.exit_status


def write(text: str, output: Path | None) -> None:
    """Write to a file, or with ``None`` to standard output."""
    if output is None:
        write_stdout(text)
    else:
        write_file(output, text)


def read_machine(options: Namespace, *, wants_torch: bool = True) -> Machine:
    """The machine of ``--machine``; this one is looked at, torch where it is wanted and ``--no-torch`` is not given."""
    if options.machine != "live":
        from ..sources import load_machine

        return load_machine(options.machine)
    from ..sources import collect as collect_machine

    return collect_machine(
        with_torch=wants_torch and not options.no_torch, fresh_torch=options.fresh_torch, meanwhile=loader(options)
    )


def model_and_machine(options: Namespace) -> tuple[ModelProfile, Machine]:
    """Read the model while the machine is looked at."""
    from ..sources.model_files import load_profile

    if options.machine == "live":
        from ..sources import Collection

        with Collection(with_torch=False, meanwhile=loader(options)) as collection:
            profile = load_profile(options.model, allow_network=not options.offline, families=options.families)
            return profile, collection.without_torch()
    from ..sources import load_machine

    machine = load_machine(options.machine)
    return load_profile(options.model, allow_network=not options.offline, families=options.families), machine


def with_project(options: Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Add what the project's file says to the options: ``ignore``, ``strict``, ``model``.

    Returns:
        Codes to demote, and notes that say what came from the file.
    """
    from ..sources.project_file import read_project

    project = None if options.no_project else read_project()
    options.project = project
    demoted = _known_codes(options.ignore, "--ignore") if options.ignore else ()
    if project is None or project.path is None:
        return demoted, ()
    where = f"{project.path}: [tool.vlm-doctor]"
    settings = project.settings
    said = []
    if settings.ignore:
        demoted = (*demoted, *_known_codes(settings.ignore, f"{where} ignore"))
        said.append(f"ignore {', '.join(settings.ignore)}")
    if settings.strict and not options.strict:
        options.strict = True
        said.append("strict")
    if settings.model is not None and options.model is None:
        options.model = settings.model
        said.append(f"model {settings.model}")
    return demoted, (f"From {where}: {'; '.join(said)}.",) if said else ()


def _known_codes(texts: Sequence[str], where: str) -> tuple[str, ...]:
    from ..codes import all_codes

    return arguments.codes(texts, all_codes(), where=where)
