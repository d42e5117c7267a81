"""The commands and their options: names, help, defaults. What they do is in ``cli``.

argparse, not typer: typer loads pydantic to read a number, which took 0.09 s of a run that has 0.3 s for everything
(measured with typer 0.29), and a doctor has to work where such packages are what is broken.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

import msgspec

from . import arguments
from .delivery import write_stdout
from .errors import UsageError
from .workload import Attention, DType, Optimizer, Policy, Preference, Quantization, Training, Workload

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
TRIAL_TOKENS = 16
"""Enough to see that decoding works; a plan's own default would take a minute on a slow card."""
JUDGEMENT_FORMATS = ("terminal", "json", "github", "junit", "sarif", "markdown")
"""Of commands whose answer is verdicts on a machine."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes on the command line that are not UTF-8."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one sentence, raised instead of printed."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise UsageError(f"{message.rstrip('.')}. Try '{self.prog} --help'.")

    def print_help(self, file: Any = None) -> None:  # noqa: ARG002 - argparse's signature
        """Print the help, also into a pipe whose reader has gone."""
        write_stdout(self.format_help())


def parse(words: list[str]) -> argparse.Namespace:
    """Understand a command line.

    Returns:
        The options; ``command`` is one of :data:`COMMANDS`, or ``None`` with ``version`` set.

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
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["check", *words]
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        raise UsageError(
            f"{words[0]!r} is not a command (they are {', '.join(COMMANDS)}){arguments.suggestion(words[0], COMMANDS)}"
        )
    parser, commands = _parsers(words[0])
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = re.findall(r"--[a-z-]+", commands[options.command].format_usage())
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
    parser.add_argument("--save", metavar="FILE", type=Path, help="keep this report, for --since when something broke")
    parser.add_argument("--since", metavar="FILE", type=Path, help="say what changed since a saved report or snapshot")
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
    parser.add_argument("model", metavar="MODEL", help="hub id, or folder of a checkpoint")
    _add_machine(parser)
    _add_model_reading(parser)
    parser.add_argument(
        "--trace",
        action="store_true",
        help="tell memory by running the model's code without GPU and weights; takes a minute",
    )
    _add_workload(parser)
    _add_policy(parser)
    parser.add_argument(
        "--suggest-gpus", action="store_true", help="name cards on which the workload would fit, also when it fits here"
    )
    _add_output(parser, ("terminal", "json", "python", "yaml"))


def _add_policy(parser: Parser) -> None:
    careful = Policy()
    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--prefer",
        choices=get_args(Preference),
        default=careful.prefer,
        help="fewest GPUs, then longest prompt (balanced) or fastest links (speed); or longest prompt first (context)",
    )
    policy.add_argument("--max-gpus", metavar="N", type=int, help="use at most so many GPUs")
    policy.add_argument("--min-gpus", metavar="N", type=int, default=careful.min_gpus, help="spread over at least so many")
    policy.add_argument(
        "--exclude", metavar="0,1", type=arguments.excluded_gpus, default=(), help="GPUs that must not be used"
    )
    policy.add_argument(
        "--pin",
        metavar="MODULE=GPU",
        type=arguments.pin,
        action="append",
        default=[],
        help="module that must be on a GPU, such as model.visual=0; repeatable",
    )
    policy.add_argument(
        "--max-memory",
        metavar="GPU=SIZE",
        type=arguments.max_memory,
        action="append",
        default=[],
        help="most that this process may take there, such as 0=20GiB; repeatable",
    )
    policy.add_argument(
        "--offload", action="store_true", help="allow the last layers in host memory when the GPUs do not suffice: slow"
    )
    policy.add_argument("--headroom", metavar="SIZE", type=arguments.headroom_bytes, help="keep free on each GPU: 1GiB")


def _add_workload(parser: Parser) -> None:
    """What the model is to do: the same words for a plan and for the judgement of a map, so that the two never differ."""
    work = _add_call(parser, Workload())
    work.add_argument("--logits", choices=("generate", "forward"), default="generate", help="forward keeps all of them")
    work.add_argument("--padded", action="store_true", help="prompts of a batch differ in length, so that there is a mask")
    usual = Training()
    group = parser.add_argument_group("training: one optimizer step instead of a call")
    group.add_argument("--training", choices=("lora", "full"), help="adapters on the text body, or all weights")
    group.add_argument("--optimizer", choices=get_args(Optimizer), help=f"default: {usual.optimizer}")
    group.add_argument("--lora-rank", metavar="N", type=int, help=f"rank of the adapters (default: {usual.lora_rank})")
    group.add_argument(
        "--no-gradient-checkpointing", action="store_true", help="keep all activations for the backward pass"
    )


def _add_call(parser: Parser, default: Workload) -> argparse._ArgumentGroup:
    """What a call of the model holds."""
    work = parser.add_argument_group("largest call of the model")
    for name, value, text in (
        ("--images", default.images, "images in each prompt"),
        ("--text-tokens", default.text_tokens, "text tokens of each prompt"),
        ("--new-tokens", default.new_tokens, "tokens to generate"),
        ("--batch", default.batch, "prompts at once"),
    ):
        work.add_argument(name, metavar="N", type=int, default=value, help=f"{text} (default: {value})")
    work.add_argument(
        "--image-size",
        metavar="WxH",
        type=arguments.image_size,
        default=(None, None),
        help="pixels; one number: a square",
    )
    work.add_argument("--dtype", choices=get_args(DType), help="of the weights (default: the checkpoint's)")
    work.add_argument("--quantization", choices=get_args(Quantization), help="load with bitsandbytes")
    work.add_argument("--attention", choices=get_args(Attention), default=default.attention)
    work.add_argument(
        "--allocator",
        choices=("native", "expandable"),
        default=default.allocator,
        help="torch's, or expandable_segments:True",
    )
    return work


def _add_try(parser: Parser) -> None:
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
    _add_call(parser, Workload(new_tokens=TRIAL_TOKENS))
    # A trial is a call of generate with prompts of one length.
    parser.set_defaults(
        logits="generate", padded=False, training=None, optimizer=None, lora_rank=None, no_gradient_checkpointing=False
    )
    _add_policy(parser)
    _add_output(parser, ("terminal", "json"))


def _add_check_map(parser: Parser) -> None:
    parser.add_argument("map", metavar="FILE|-", help="JSON, YAML lines, a Python dict or a plan; - is standard input")
    parser.add_argument("--model", metavar="MODEL", required=True, help="hub id, or folder of a checkpoint")
    _add_machine(parser)
    _add_model_reading(parser)
    _add_workload(parser)
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
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write a file, whole or not at all")


def _add_calibrate(parser: Parser) -> None:
    parser.add_argument("--gpus", metavar="0,1", type=arguments.gpu_indices, help="GPUs to measure (default: all)")
    parser.add_argument("--json", action="store_true", help="the readings as JSON")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write a file, whole or not at all")


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
    parser.add_argument(
        "--families", metavar="FILE", type=Path, help="TOML with rules for models that are not built in (docs/models.md)"
    )


def _add_torch(parser: Parser) -> None:
    parser.add_argument("--no-torch", action="store_true", help="do not ask torch, which takes a second or two")
    parser.add_argument("--fresh-torch", action="store_true", help="ask torch again, even if it answered recently")


def _add_output(parser: Parser, formats: tuple[str, ...]) -> None:
    parser.set_defaults(format="terminal")
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=formats, help="default: terminal")
    output.add_argument("--json", action="store_true", help="same as --format json, whatever --format says")
    output.add_argument("-o", "--output", metavar="FILE", type=Path, help="write a file, whole or not at all")
    output.add_argument("-v", "--verbose", action="store_true", help="more: evidence, sources, what passed")


def workload(options: argparse.Namespace) -> Workload:
    """Put the workload of ``plan`` together. Numbers out of range are the planner's to refuse."""
    width, height = options.image_size
    return Workload(
        images=options.images,
        image_width=width,
        image_height=height,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        batch=options.batch,
        dtype=options.dtype,
        quantization=options.quantization,
        attention=options.attention,
        logits=options.logits,
        training=_training(options),
        allocator=options.allocator,
        is_padded=options.padded,
    )


def _training(options: argparse.Namespace) -> Training | None:
    """The training step that was asked for; its details make no sense without it."""
    usual = Training()
    if options.training is None:
        for name, value in (
            ("--optimizer", options.optimizer),
            ("--lora-rank", options.lora_rank),
            ("--no-gradient-checkpointing", options.no_gradient_checkpointing),
        ):
            if value is not None and value is not False:
                raise UsageError(f"{name} is about training: add --training lora or --training full.")
        return None
    if options.training == "full" and options.lora_rank is not None:
        raise UsageError("--lora-rank is about adapters: use it with --training lora, or leave it out.")
    return Training(
        method=options.training,
        optimizer=options.optimizer or usual.optimizer,
        lora_rank=usual.lora_rank if options.lora_rank is None else options.lora_rank,
        gradient_checkpointing=not options.no_gradient_checkpointing,
    )


def policy(options: argparse.Namespace) -> Policy:
    """Put the policy of ``plan`` together."""
    chosen = Policy(
        gpus=options.gpus,
        max_gpus=options.max_gpus,
        min_gpus=options.min_gpus,
        prefer=options.prefer,
        exclude=options.exclude,
        pins=tuple(options.pin),
        max_memory=tuple(limit for limits in options.max_memory for limit in limits),
        offload=options.offload,
    )
    return with_headroom(chosen, options.headroom)


def with_headroom(chosen: Policy, size_bytes: int | None) -> Policy:
    """A policy with a headroom that was asked for, in the place of both parts of the default one."""
    if size_bytes is None:
        return chosen
    return msgspec.structs.replace(chosen, headroom_fraction=0.0, headroom_min_bytes=size_bytes)


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
