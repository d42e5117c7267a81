"""The command line: ``vlm-doctor``, ``collect``, ``plan``, ``check-map``, ``explain``.

Exit status, the same in every format: 0 usable; 1 an error was found (with ``--strict`` also a warning) or the plan does
not fit; 2 bad usage or unreadable input; 3 could not look; 130 interrupted. Imports are late: a run has 0.3 s.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from . import __version__, arguments
from .delivery import is_utf8, look_of, write_file, write_stdout
from .errors import ModelError, UsageError, VlmDoctorError
from .formats.look import Look
from .machine import Machine
from .model import ModelProfile
from .options import parse, policy, with_headroom, workload
from .report import Report
from .workload import Policy

DEFAULT_MODEL = "zai-org/GLM-4.1V-9B-Thinking"
"""Model of the closing suggestion: an open 9B vision-language model that the catalogue knows, so no network is needed."""

MAX_MESSAGE_CHARS = 600
INTERRUPTED = 130
FAILED = 3


def check(options: Namespace) -> int:
    """Judge a machine. On a terminal, what does not depend on torch is printed while torch is still being asked."""
    started = time.perf_counter()
    look = _look(options)
    from .sources import Collection, load_machine

    demoted = _known_codes(options.ignore) if options.ignore else ()

    def judge(machine: Machine) -> Report:
        from .answer import check_report

        return check_report(machine, ignore=demoted, gpus=options.gpus, strict=options.strict)

    def complete(report: Report) -> Report:
        return msgspec.structs.replace(_suggest(report, options), seconds=time.perf_counter() - started)

    if options.machine != "live":
        return _finish(complete(judge(load_machine(options.machine))), options, look)
    with Collection(with_torch=not options.no_torch, fresh_torch=options.fresh_torch) as collection:
        first = judge(collection.without_torch())
        if options.no_torch or first.machine.torch.state != "not_asked":
            return _finish(complete(first), options, look)
        if options.format != "terminal" or options.output is not None or not _is_terminal():
            return _finish(complete(judge(collection.complete())), options, look)
        from .formats.to_terminal import head, tail

        write_stdout(head(first, look))
        final = complete(judge(collection.complete()))
        write_stdout(tail(final, look, earlier=first))
        return final.exit_status


def _known_codes(texts: Sequence[str]) -> tuple[str, ...]:
    from .codes import all_codes

    return arguments.codes(texts, all_codes())


def _suggest(report: Report, options: Namespace) -> Report:
    """Add a plan for ``--model``. The default model must not stop a check: that it cannot be read becomes a note."""
    if not report.machine.gpus:
        return report
    from .answer import with_suggestion
    from .sources.model_files import load_profile

    if options.model is not None:
        return with_suggestion(report, load_profile(options.model), gpus=options.gpus)
    try:
        return with_suggestion(report, load_profile(DEFAULT_MODEL, allow_network=False), gpus=options.gpus)
    except ModelError as error:
        return msgspec.structs.replace(report, notes=(*report.notes, f"No suggestion for a model: {error}"))


def plan(options: Namespace) -> int:
    """Place a model on a machine."""
    started = time.perf_counter()
    look = _look(options)
    profile, machine = _model_and_machine(options)
    from .answer import plan_report

    wanted = workload(options)
    traces = untraced = None
    if options.trace:
        from .tracing import trace_model

        tracing = trace_model(options.model, profile, machine, wanted, allow_network=not options.offline)
        traces, untraced = tracing.traces, tracing.reason
    chosen = policy(options)
    report = plan_report(
        profile, machine, wanted, chosen, suggest_gpus=options.suggest_gpus, traces=traces, untraced=untraced
    )
    return _finish(msgspec.structs.replace(report, seconds=time.perf_counter() - started), options, look)


def _model_and_machine(options: Namespace) -> tuple[ModelProfile, Machine]:
    """Read the model while the machine is looked at."""
    from .sources import Collection, load_machine
    from .sources.model_files import load_profile

    if options.machine == "live":
        with Collection(with_torch=False) as collection:
            profile = load_profile(options.model, allow_network=not options.offline, families=options.families)
            return profile, collection.without_torch()
    machine = load_machine(options.machine)
    return load_profile(options.model, allow_network=not options.offline, families=options.families), machine


def check_map(options: Namespace) -> int:
    """Judge a device_map."""
    started = time.perf_counter()
    look = _look(options)
    from .sources.map_file import read_map

    read = read_map(options.map)
    profile, machine = _model_and_machine(options)
    from .answer import map_report

    careful = with_headroom(Policy(gpus=options.gpus or read.gpus), options.headroom)
    report = map_report(read.device_map, profile, machine, workload(options), careful)
    return _finish(msgspec.structs.replace(report, seconds=time.perf_counter() - started), options, look)


def collect(options: Namespace) -> int:
    """Write a snapshot of this machine."""
    from . import codec
    from .sources import collect as collect_machine

    machine = collect_machine(with_torch=not options.no_torch, fresh_torch=options.fresh_torch)
    _write(codec.to_json(machine if options.no_redact else codec.redact(machine)), options.output)
    return 0


def calibrate(options: Namespace) -> int:
    """Measure what torch takes of each GPU."""
    from .answer import refuse_missing_gpus
    from .formats.calibration_text import calibration_text
    from .sources import collect as collect_machine
    from .sources.calibration import calibrate as measure

    machine = collect_machine(with_torch=False)
    refuse_missing_gpus(machine, options.gpus)
    readings = measure(machine, gpus=options.gpus)
    if options.json:
        text = msgspec.json.encode(readings).decode() + "\n"
    else:
        text = calibration_text((one.gpu, one.name, one.calibration, one.reason) for one in readings)
    _write(text, options.output)
    return 0 if any(reading.calibration for reading in readings) else FAILED


def explain(options: Namespace) -> int:
    """Explain a code."""
    from .codes import explain as explain_code

    text = explain_code(options.code)
    if _is_terminal():
        from .formats.markdown_text import render

        text = render(text, look_of(sys.stdout, environment=os.environ))
    write_stdout(text)
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "check": check,
    "plan": plan,
    "check-map": check_map,
    "collect": collect,
    "calibrate": calibrate,
    "explain": explain,
}


def _look(options: Namespace) -> Look:
    machine_option = "" if options.machine == "live" else f" --machine {shlex.quote(options.machine)}"
    stream = sys.stdout if options.output is None else None
    return look_of(stream, environment=os.environ, verbose=options.verbose, machine_option=machine_option)


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _finish(report: Report, options: Namespace, look: Look) -> int:
    from .formats import render

    _write(render(report, options.format, **msgspec.structs.asdict(look)), options.output)
    return report.exit_status


def _write(text: str, output: Path | None) -> None:
    if output is None:
        write_stdout(text)
    else:
        write_file(output, text)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit with its status. What goes wrong ends as one sentence, never as a traceback.

    Args:
        words: Arguments without the program's name; ``None`` takes those of the process.
    """
    given = list(sys.argv[1:] if words is None else words)
    is_json = arguments.asks_for_json(given)
    try:
        status = _run(given)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except VlmDoctorError as error:
        status = _fail(type(error).__name__, str(error), error.exit_status, is_json=is_json)
    except Exception as error:  # noqa: BLE001 - last border: a defect must not reach the user as a traceback
        status = _fail("InternalError", _confession(error), FAILED, is_json=is_json)
    sys.exit(status)


def _run(words: list[str]) -> int:
    options = parse(words)
    if options.command is None:
        write_stdout(f"vlm-doctor {__version__}\n")
        return 0
    return COMMANDS[options.command](options)


def _fail(kind: str, message: str, exit_status: int, *, is_json: bool) -> int:
    """Say what stopped the run: as JSON on standard output where JSON was asked for, else on standard error."""
    from .formats.page import inert
    from .formats.to_json import error_json

    if len(message) > MAX_MESSAGE_CHARS:
        # Somebody's name or value is huge: what is wrong stands at the beginning, what to do at the end.
        message = f"{message[: MAX_MESSAGE_CHARS // 2]} ... {message[-MAX_MESSAGE_CHARS // 3 :]}"
    message = inert(message)
    if is_json:
        try:
            write_stdout(error_json(kind, message, exit_status))
            return exit_status
        except UsageError as error:
            message = f"{message} {error}"
    if sys.stderr is not None:
        sys.stderr.write(f"vlm-doctor: {inert(message, is_unicode=is_utf8(sys.stderr))}\n")
    return exit_status


def _confession(error: Exception) -> str:
    """What a maintainer needs to find a defect, in one sentence."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"This is a defect of vlm-doctor {__version__}, please report it: {type(error).__name__}: {error} "
        f"({Path(place.filename).name}, line {place.lineno})."
    )
