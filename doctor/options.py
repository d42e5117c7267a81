"""The commands and their options: names, help, defaults. What they do is in ``commands``; what plans are asked for besides
is in ``plan_options``, which only they load.

argparse, not typer: typer loads pydantic to read a number, which took 0.09 s of a run that has 0.3 s for everything
(measured with typer 0.29), and a doctor has to work where such packages are what is broken.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

from . import arguments
from .delivery import write_stdout
from .errors import UsageError

_DESCRIPTION = "Examine a machine with NVIDIA GPUs, say what is wrong, and place a vision-language model on it."
_EPILOG = (
    "Without a command: check. Exit status: 0 usable; 1 an error was found, the plan does not fit or the gate is not "
    "met; 2 bad usage or "
    "unreadable input; 3 could not look; 130 interrupted. Try 'vlm-doctor plan --help'."
)
COMMANDS = {
    "check": "Say what is wrong with a machine and how to repair it.",
    "gate": "Say whether a machine is what a CI job expects: exit status 0 or 1 and one line.",
    "plan": "Place a model on the GPUs of a machine: device_map, memory of each GPU, and why.",
    "check-map": "Judge a device_map before anything loads: what fails, why, and the map that would do.",
    "try": "Load a model where the plan puts it, call it, and hold what happens against the plan.",
    "collect": "Write a snapshot of this machine as JSON, for --machine elsewhere and for bug reports.",
    "calibrate": "Measure what torch takes of each GPU of this machine, for later plans; makes a CUDA context on each.",
    "explain": "Explain a code: what it means, why it matters, how to repair it; without a code, list them.",
    "explain-error": "Explain a log or a traceback: one cause, whether this machine agrees, what to do.",
}


DEFAULT_TRIAL_S = 900.0
"""30 GiB from a disk that gives 100 MB/s take 5 minutes."""
JUDGEMENT_FORMATS = ("terminal", "json", "github", "junit", "sarif", "markdown")
"""Of commands whose answer is verdicts on a machine."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes on the command line that are not UTF-8."""


_SENTENCES = (
    (re.compile(r"argument (?:-\w/)?(\S+): expected one argument"), r"\1 needs a value, as in \1=VALUE"),
    (re.compile(r"argument (?:-\w/)?(\S+): ignored explicit argument (.*)"), r"\1 takes no value, and was given \2"),
)
"""Sentences of argparse that leave out what to do, and ours."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one sentence, raised instead of printed."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        for theirs, ours in _SENTENCES:
            message = theirs.sub(ours, message)
        raise UsageError(f"{message.rstrip('.')}. Try '{self.prog} --help'.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not among the choices of an option; argparse's own sentence differs from one Python to
        the next, and knows no word that is meant.
        """
        if action.choices is not None and value not in action.choices:
            near = arguments.suggestion(str(value), list(action.choices))
            name = action.option_strings[0] if action.option_strings else action.dest
            raise UsageError(f"{name}: {value!r} is none of {', '.join(map(str, action.choices))}{near}")

    def print_help(self, file: Any = None) -> None:  # noqa: ARG002 - argparse's signature
        """Print the help, also into a pipe whose reader has gone."""
        write_stdout(self.format_help())


def parse(words: list[str]) -> argparse.Namespace:
    """Understand a command line.

    Returns:
        The options; ``command`` is one of :data:`COMMANDS`, or ``None`` where only the version is asked for.

    Raises:
        UsageError: It cannot be understood; one sentence says why.
        SystemExit: Help was asked for, and printed.
    """
    for word in words:
        if _SURROGATE.search(word):
            raise UsageError(f"{word!r} is not UTF-8 text, which a report could not hold; rename the file or folder.")
        if word.startswith("-") and word.endswith("=--"):
            # argparse before Python 3.13 would make an empty list of it.
            raise UsageError(f"{word!r} gives no value; write one after the =.")
    if words[:1] == ["--version"]:
        if set(words[1:]) - {"--json"}:
            raise UsageError("--version stands alone, or with --json.")
        return argparse.Namespace(command=None, json="--json" in words)
    is_implied = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help"))
    if is_implied:
        words = ["check", *words]
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        raise UsageError(
            f"{words[0]!r} is not a command (they are {', '.join(COMMANDS)}){arguments.suggestion(words[0], COMMANDS)}"
        )
    parser, commands = _parsers(words[0])
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = re.findall(r"--[a-z-]+", commands[options.command].format_usage())
        if is_implied and unknown[0] in COMMANDS:
            raise UsageError(
                f"{unknown[0]!r} stands behind an option; write the command first: vlm-doctor {unknown[0]} ..."
            )
        if not unknown[0].startswith("-"):
            raise UsageError(
                f"{unknown[0]!r} is one argument too many for vlm-doctor {options.command}. "
                f"Try 'vlm-doctor {options.command} --help'."
            )
        raise UsageError(
            f"{unknown[0]!r} is no option of vlm-doctor {options.command}{arguments.suggestion(unknown[0], known)} "
            f"Try 'vlm-doctor {options.command} --help'."
        )
    if getattr(options, "json", False):
        options.format = "json"
    return options


def _parsers(wanted: str) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the commands; only that of the command ``wanted`` has its options, which take their time."""
    parser = Parser(prog="vlm-doctor", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    adder = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands = {
        name: adder.add_parser(name, help=text, description=text, allow_abbrev=False) for name, text in COMMANDS.items()
    }
    if wanted in _ADDERS:
        _ADDERS[wanted](commands[wanted])
    return parser, commands


def _add_check(parser: Parser) -> None:
    _add_machine(parser)
    _add_torch(parser)
    parser.add_argument("--model", metavar="NAME", help="hub id or folder of the model to suggest a placement for")
    _add_severity(parser)
    _add_file(parser, "--save", help="keep this report, for --since when something broke")
    _add_file(parser, "--since", help="say what changed since a saved report or snapshot")
    _add_output(parser, JUDGEMENT_FORMATS)


def _add_severity(parser: Parser) -> None:
    parser.add_argument("--ignore", metavar="CODE", action="append", default=[], help="demote findings to info; repeatable")
    parser.add_argument("--strict", action="store_true", help="warnings count like errors")
    parser.add_argument("--no-project", action="store_true", help="do not read [tool.vlm-doctor] of pyproject.toml")


def _add_gate(parser: Parser) -> None:
    parser.description = f"{COMMANDS['gate']} What is left out is taken from [tool.vlm-doctor] of pyproject.toml."
    wanted = parser.add_argument_group("expectations")
    wanted.add_argument("--gpus", metavar="N", type=arguments.gpu_number, help="at least so many GPUs (default: 1)")
    wanted.add_argument("--vram", metavar="SIZE", type=arguments.vram_bytes, help="free on each of them: 20GiB")
    wanted.add_argument(
        "--nvlink", action=argparse.BooleanOptionalAction, default=None, help="NVLink joins them (--no-nvlink: need not)"
    )
    wanted.add_argument(
        "--capability", metavar="X.Y", type=arguments.compute_capability, help="compute capability of each, or later: 8.0"
    )
    wanted.add_argument("--model", metavar="MODEL", help="hub id or folder of a model that fits on them")
    parser.add_argument("--offline", action="store_true", help="do not ask the model hub")
    parser.add_argument("--machine", metavar="live|FILE|SPEC", default="live", help="as for check")
    _add_torch(parser)
    _add_severity(parser)
    parser.add_argument(
        "--github-output",
        action="store_true",
        help="write run-gpu-tests, reason, gpus, gpu-count, cuda-visible-devices and device-map to $GITHUB_OUTPUT",
    )
    _add_output(parser, JUDGEMENT_FORMATS)


def _add_plan(parser: Parser) -> None:
    from .plan_options import add_policy, add_workload

    parser.add_argument("model", metavar="MODEL", help="hub id, or folder of a checkpoint")
    _add_machine(parser)
    _add_model_reading(parser)
    parser.add_argument(
        "--trace",
        action="store_true",
        help="tell memory by running the model's code without GPU and weights; takes a minute",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="with --trace: allow Python code of the checkpoint to run"
    )
    add_workload(parser)
    add_policy(parser)
    parser.add_argument(
        "--suggest-gpus", action="store_true", help="name cards on which the workload would fit, also when it fits here"
    )
    _add_output(parser, ("terminal", "json", "python", "yaml"))


def _add_try(parser: Parser) -> None:
    from .plan_options import add_policy, add_trial_call

    parser.description = f"{COMMANDS['try']} In a process of its own, which may fail, hang or be killed."
    parser.add_argument("model", metavar="MODEL", help="hub id, or folder of a checkpoint")
    parser.add_argument("--beside-auto", action="store_true", help='then load it with device_map="auto" as well')
    parser.add_argument("--cpu", action="store_true", help="load it for the CPU, without a plan")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow Python code of the checkpoint to run")
    parser.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=arguments.seconds,
        default=DEFAULT_TRIAL_S,
        help=f"for each load with its calls (default: {DEFAULT_TRIAL_S:.0f})",
    )
    _add_machine(parser)
    _add_model_reading(parser)
    add_trial_call(parser)
    add_policy(parser)
    _add_output(parser, ("terminal", "json"))


def _add_check_map(parser: Parser) -> None:
    from .plan_options import add_workload

    parser.add_argument("map", metavar="FILE|-", help="JSON, YAML, a Python dict or script, or a plan; - is standard input")
    parser.add_argument("--model", metavar="MODEL", required=True, help="hub id, or folder of a checkpoint")
    _add_machine(parser)
    _add_model_reading(parser)
    add_workload(parser)
    parser.add_argument("--headroom", metavar="SIZE", type=arguments.headroom_bytes, help="keep free on each GPU: 1GiB")
    _add_output(parser, ("terminal", "json"))


def _add_explain_error(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE|-", nargs="?", default="-", help="a log; - or nothing: standard input")
    _add_machine(parser)
    _add_torch(parser)
    _add_output(parser, ("terminal", "json"))


def _add_collect(parser: Parser) -> None:
    _add_torch(parser)
    parser.add_argument(
        "--machine", metavar="live|FILE|SPEC", default="live", help="a snapshot to redact, in the place of this machine"
    )
    parser.add_argument(
        "--redact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replace user and host names, commands, folders, UUIDs, addresses and tokens (default); --no-redact "
        "keeps them",
    )
    _add_file(parser, "-o", "--output", help="write a file, whole or not at all")


def _add_calibrate(parser: Parser) -> None:
    parser.add_argument("--gpus", metavar="0,1", type=arguments.gpu_indices, help="GPUs to measure (default: all)")
    parser.add_argument("--json", action="store_true", help="the readings as JSON")
    _add_file(parser, "-o", "--output", help="write a file, whole or not at all")


def _add_machine(parser: Parser) -> None:
    parser.add_argument(
        "--machine",
        metavar="live|FILE|SPEC",
        default="live",
        help="this machine (default), a snapshot of 'collect', or a made-up one: 2xL4, 8xH100:nvswitch, L4+A10, 24GiB",
    )
    parser.add_argument(
        "--gpus", metavar="0,1", type=arguments.gpu_indices, help="the GPUs that matter, as nvidia-smi has them"
    )


def _add_model_reading(parser: Parser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not ask the model hub")
    _add_file(parser, "--families", help="TOML with rules for models that are not built in (docs/models.md)")


def _add_file(parser: Parser | argparse._ArgumentGroup, *names: str, help: str) -> None:  # noqa: A002 - argparse's word
    parser.add_argument(*names, metavar="FILE", type=arguments.file_path(names[-1]), help=help)


def _add_torch(parser: Parser) -> None:
    parser.add_argument("--no-torch", action="store_true", help="do not ask torch, which takes a second or two")
    parser.add_argument("--fresh-torch", action="store_true", help="ask torch again, even if it answered recently")


def _add_output(parser: Parser, formats: tuple[str, ...]) -> None:
    parser.set_defaults(format="terminal")
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=formats, help="default: terminal")
    output.add_argument("--json", action="store_true", help="same as --format json, whatever --format says")
    _add_file(output, "-o", "--output", help="write a file, whole or not at all")
    output.add_argument("-v", "--verbose", action="store_true", help="more: evidence, sources, what passed")


def _add_explain(parser: Parser) -> None:
    parser.add_argument("code", metavar="CODE", nargs="?", help="such as VLM501; left out: list them all")
    parser.add_argument("--json", action="store_true", help="the page in its parts, as data")


_ADDERS: dict[str, Callable[[Parser], None]] = {
    "check": _add_check,
    "gate": _add_gate,
    "plan": _add_plan,
    "check-map": _add_check_map,
    "try": _add_try,
    "collect": _add_collect,
    "calibrate": _add_calibrate,
    "explain": _add_explain,
    "explain-error": _add_explain_error,
}
