"""The command line: ``vlm-doctor``, ``collect``, ``plan``, ``check-map``, ``try``, ``explain``.

Exit status, the same in every format: 0 usable; 1 an error was found (with ``--strict`` also a warning) or the plan does
not fit; 2 bad usage or unreadable input; 3 could not look; 130 interrupted. Imports are late: a run has 0.3 s.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from . import __version__, arguments
from .answers import ErrorAnswer
from .delivery import is_utf8, look_of, write_file, write_stdout
from .errors import ModelError, OutputError, UsageError, VlmDoctorError
from .formats.look import Look
from .machine import Machine
from .model import ModelProfile
from .options import parse, policy, with_headroom, workload
from .progress import Progress
from .report import Report
from .workload import Policy

DEFAULT_MODEL = "zai-org/GLM-4.1V-9B-Thinking"
"""Model of the closing suggestion: an open 9B vision-language model that the catalogue knows, so no network is needed."""

TORCH_CHECKS = frozenset({"VLM206", "VLM304", "VLM305"})
"""Checks that need torch's own answer."""
MAX_MESSAGE_CHARS = 600
INTERRUPTED = 130
FAILED = 3


def check(options: Namespace) -> int:
    """Judge a machine. On a terminal, what does not depend on torch is printed while torch is still being asked."""
    started = time.perf_counter()
    look = _look(options)
    from .sources import Collection, load_machine

    demoted, notes = _with_project(options)
    saved = None
    if options.since is not None:
        from .sources.saved_report import read_saved

        saved = read_saved(options.since)
        if saved.diagnosis is None:
            # A bare snapshot: what is judged the same way can be compared.
            from .checks import diagnose

            saved = saved._replace(diagnosis=diagnose(saved.machine))

    def judge(machine: Machine) -> Report:
        from .answer import check_report

        report = check_report(machine, ignore=demoted, gpus=options.gpus, strict=options.strict)
        if saved is None:
            return report
        from .changes import with_changes

        return with_changes(report, saved)

    def complete(report: Report) -> Report:
        done = _suggest(report, options)
        done = msgspec.structs.replace(done, notes=(*notes, *done.notes), seconds=time.perf_counter() - started)
        if options.save is not None:
            from . import codec

            write_file(options.save, codec.to_json(done), option="--save")
        return done

    if options.machine != "live":
        return _finish(complete(judge(load_machine(options.machine))), options, look)
    with Collection(with_torch=not options.no_torch, fresh_torch=options.fresh_torch) as collection:

        def waiting() -> Progress:
            return Progress(lambda: collection.waiting_for, sys.stderr)

        with waiting():
            machine = collection.without_torch()
        first = judge(machine)
        if options.no_torch or machine.torch.state != "not_asked":
            return _finish(complete(first), options, look)
        is_page = options.format == "terminal" and options.output is None and _is_terminal()
        if is_page:
            from .formats.to_terminal import head, tail

            write_stdout(head(first, look))
        with waiting():
            machine = collection.complete()
        final = complete(judge(machine))
        if not is_page:
            return _finish(final, options, look)
        write_stdout(tail(final, look, earlier=first))
        return final.exit_status


def _with_project(options: Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Add what the project's file says to the options: ``ignore``, ``strict``, ``model``.

    Returns:
        Codes to demote, and notes that say what came from the file.
    """
    from .sources.project_file import read_project

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
    from .codes import all_codes

    return arguments.codes(texts, all_codes(), where=where)


def gate(options: Namespace) -> int:
    """Say whether a machine is what a job expects."""
    started = time.perf_counter()
    look = _look(options)
    from .expectations import ProjectSettings, expectations

    demoted, notes = _with_project(options)
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
        from .sources.model_files import load_profile

        profile = load_profile(wanted.model, allow_network=not options.offline)
    machine = _machine(options)
    from .answer import gate_report

    report = gate_report(wanted, machine, profile, ignore=demoted, strict=options.strict)
    report = msgspec.structs.replace(report, notes=notes, seconds=time.perf_counter() - started)
    if options.github_output and report.gate is not None:
        from .formats.gate_text import step_outputs
        from .sources.github_output import write_outputs

        write_outputs(step_outputs(report.gate), os.environ)
    return _finish(report, options, look)


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


def try_model(options: Namespace) -> int:
    """Load a model where the plan puts it, call it, and say what came of it."""
    started = time.perf_counter()
    look = _look(options)
    if options.machine != "live":
        raise UsageError(
            f"--machine {options.machine}: only this machine can be tried; vlm-doctor plan plans for any other."
        )
    profile, machine = _model_and_machine(options)
    from .probes.trial_run import Trier
    from .trying import try_model as try_it

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
    return _finish(msgspec.structs.replace(report, seconds=time.perf_counter() - started), options, look)


def collect(options: Namespace) -> int:
    """Write a snapshot of this machine."""
    from . import codec

    machine = _machine(options)
    if options.redact:
        from .redaction import redact
        from .sources.identity import private_words

        machine = redact(machine, secrets=private_words(os.environ))
    _write(codec.to_json(machine), options.output)
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
    """Explain a code, or list all of them."""
    if options.json:
        from . import codec
        from .codes import code_list, explanation

        write_stdout(codec.to_json(code_list() if options.code is None else explanation(options.code)))
        return 0
    from .codes import explain as explain_code
    from .codes import list_text

    text = list_text() if options.code is None else explain_code(options.code)
    if _is_terminal():
        from .formats.markdown_text import render

        text = render(text, look_of(sys.stdout, environment=os.environ))
    write_stdout(text)
    return 0


def explain_error(options: Namespace) -> int:
    """Explain a log or a traceback."""
    started = time.perf_counter()
    look = _look(options)
    from .sources.log_file import read_log

    if options.file == "-" and sys.stdin is not None and sys.stdin.isatty() and sys.stderr is not None:
        sys.stderr.write("Paste a log or a traceback, then press Ctrl-D.\n")
    log = read_log(options.file)
    from .error_answer import answer_error

    where = "standard input" if options.file == "-" else options.file
    answer = answer_error(log.text, where=where, skipped_bytes=log.skipped_bytes)
    from .answer import error_report

    report = error_report(answer, _machine_for(answer, options))
    return _finish(msgspec.structs.replace(report, seconds=time.perf_counter() - started), options, look)


def _machine_for(answer: ErrorAnswer, options: Namespace) -> Machine:
    """The machine to compare with. torch is asked only where one of the checks that count needs its answer."""
    return _machine(options, wants_torch=not TORCH_CHECKS.isdisjoint(answer.checks))


def _machine(options: Namespace, *, wants_torch: bool = True) -> Machine:
    """The machine of ``--machine``; this one is looked at, torch where it is wanted and ``--no-torch`` is not given."""
    from .sources import collect as collect_machine
    from .sources import load_machine

    if options.machine != "live":
        return load_machine(options.machine)
    return collect_machine(with_torch=wants_torch and not options.no_torch, fresh_torch=options.fresh_torch)


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "check": check,
    "gate": gate,
    "plan": plan,
    "check-map": check_map,
    "try": try_model,
    "collect": collect,
    "calibrate": calibrate,
    "explain": explain,
    "explain-error": explain_error,
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
    style = arguments.failure_style(given)
    try:
        status = _run(given)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except OutputError as error:
        # By now standard output leads nowhere: only standard error can say why.
        status = _fail(type(error).__name__, str(error), error.exit_status, style="text")
    except VlmDoctorError as error:
        status = _fail(type(error).__name__, str(error), error.exit_status, style=style)
    except Exception as error:  # noqa: BLE001 - last border: a defect must not reach the user as a traceback
        status = _fail("InternalError", _confession(error), FAILED, style=style)
    sys.exit(status)


def _run(words: list[str]) -> int:
    options = parse(words)
    if options.command is None:
        write_stdout(f"vlm-doctor {__version__}\n")
        return 0
    return COMMANDS[options.command](options)


def _fail(kind: str, message: str, exit_status: int, *, style: str) -> int:
    """Say what stopped the run: on standard output as JSON or as an annotation where that was asked for, else on stderr."""
    from .formats.inert import inert
    from .formats.to_json import error_json

    if len(message) > MAX_MESSAGE_CHARS:
        # Somebody's name or value is huge: what is wrong stands at the beginning, what to do at the end.
        message = f"{message[: MAX_MESSAGE_CHARS // 2]} ... {message[-MAX_MESSAGE_CHARS // 3 :]}"
    message = inert(message)
    if style in ("json", "github"):
        try:
            if style == "json":
                write_stdout(error_json(kind, message, exit_status))
            else:
                from .formats.to_github import command

                is_unicode = sys.stdout is not None and is_utf8(sys.stdout)
                write_stdout(f"{command('error', 'vlm-doctor', inert(message, is_unicode=is_unicode))}\n")
            return exit_status
        except UsageError as error:
            message = f"{message} {error}"
    if sys.stderr is not None:
        sys.stderr.write(f"vlm-doctor: {inert(message, is_unicode=is_utf8(sys.stderr))}\n")
    return exit_status


def _confession(error: Exception) -> str:
    """What a maintainer needs to find a defect, in one sentence."""
    import traceback

    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"This is a defect of vlm-doctor {__version__}, please report it: {type(error).__name__}: {error} "
        f"({Path(place.filename).name}, line {place.lineno})."
    )
