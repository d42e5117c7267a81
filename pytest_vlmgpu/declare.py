"""Every option, ini key and marker, as pytest lists them. Small on purpose: each pytest run of each project reads it.

A new setting is one line in :data:`SETTINGS`, one field of ``options.Settings`` and one line in ``options.READERS``.
"""

from __future__ import annotations

import argparse
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pytest


class Setting(NamedTuple):
    """One setting: option ``--vlm-NAME``, ini key ``vlm_NAME``, environment ``VLMGPU_NAME``."""

    name: str
    """With underscores: ``min_tests`` is ``--vlm-min-tests``, ``vlm_min_tests`` and ``VLMGPU_MIN_TESTS``."""
    help: str
    metavar: str | None = None
    """``None`` for an option that takes no value."""
    levels: tuple[str, ...] = ()
    """Values that may follow ``=`` of an option that takes none otherwise; the first is that of the bare option."""
    is_option_only: bool = False
    """It makes sense for one run only: no ini key, no variable."""
    ini_type: Literal["string", "int", "bool"] = "string"
    """As TOML has to write it: ``vlm_min_tests = 3``."""


SETTINGS = (
    Setting(
        "gpus",
        "GPUs for tests that use vlm markers or fixtures: auto (all visible ones, default), none (run models on the "
        "CPU), a count (2), positions among the visible GPUs (0,2 or 2,), or UUIDs (GPU-…, or MIG-… for slices)",
        "SPEC",
    ),
    Setting("model", "model (folder or hub id) for tests that use the fixture vlm and name none", "ID"),
    Setting(
        "dtype", "dtype (bfloat16, float16, float32) for models whose marker names none; default: the checkpoint's", "DTYPE"
    ),
    Setting(
        "device_map",
        "who places models whose marker does not say: doctor (the planner, default), single (the same on one GPU), auto or "
        "balanced (transformers)",
        "HOW",
    ),
    Setting(
        "allow_offload",
        "let a model that is too large for the GPUs leave its last layers in host memory; otherwise that is an error",
        levels=("on", "off"),
        ini_type="bool",
    ),
    Setting(
        "machine",
        "decide for a recorded or made-up machine (snapshot file, or a spec such as 2xL4) and run no gated test; "
        "default: this machine, live",
        "FILE|SPEC",
    ),
    Setting(
        "fake_gpus",
        "pretend to have these GPUs (snapshot file, or a spec such as 2x24GiB,1x80GB) and run what needs no real one: "
        "models are loaded by a vlm_loader of yours only",
        "SPEC",
        is_option_only=True,
    ),
    Setting(
        "strict",
        "report skips of gated tests as errors: all (the plugin's and the test's own; the option alone means this), gpu "
        "(the plugin's alone), auto (gpu where GPUs are expected or there), off",
        levels=("all", "gpu", "auto", "off"),
    ),
    Setting("expect_gpus", "end the run at once (exit status 69) unless so many GPUs can be used", "N", ini_type="int"),
    Setting("expect_vram", "with this much free memory on each of them, such as 20GiB or 24GB", "SIZE"),
    Setting("min_tests", "fail the run unless at least so many gated tests ran", "N", ini_type="int"),
    Setting("baseline", "fail the run unless each gated test that is listed in this file ran", "FILE"),
    Setting(
        "update_baseline",
        "write the gated tests that ran into the file of --vlm-baseline",
        levels=("on",),
        is_option_only=True,
    ),
    Setting(
        "wait",
        "seconds to wait (or 90s, 10m, 1h) for GPUs that other runs have leased and for memory that others hold; default: "
        "0, with strict 120",
        "TIME",
    ),
    Setting(
        "busy",
        "what becomes of a test whose GPUs are large enough and taken by others when the time to wait is over: error "
        "(default), skip (on machines that people share; with strict it is an error all the same)",
        "LEVEL",
    ),
    Setting("slots", "models that stay loaded together: 1 (default), a number, or fit: as many as fit", "N|fit"),
    Setting(
        "lease",
        "who is kept off the GPUs of this run: machine (other runs on this machine, default), run (only its own workers, "
        "among which they are shared out), off (nobody)",
        "SCOPE",
    ),
    Setting(
        "lease_dir",
        "folder in which runs on this machine lease GPUs; default: /tmp/pytest-vlmgpu-leases",
        "FOLDER",
    ),
    Setting(
        "warm",
        "keep each model, in a process of its own, for the next run, until it was not used for so long, such as 90s or 4h "
        "(15m for the option alone); default: off",
        levels=("15m", "off"),
    ),
    Setting("cold", "load the models of this run anew, whatever is kept", levels=("on",), is_option_only=True),
    Setting(
        "hide_gpu_from_cpu_tests",
        "let tests without markers or fixtures of the plugin see no GPU, where CUDA is not started yet",
        levels=("on", "off"),
        ini_type="bool",
    ),
    Setting("plan", "say what would run where and why not, and run nothing", levels=("on",), is_option_only=True),
    Setting(
        "fleet",
        "with --vlm-plan: the kinds of runner in this file (TOML or JSON) in place of this machine; status 1 if a test can "
        "run on none of them",
        "FILE",
        is_option_only=True,
    ),
    Setting("mutation", "report a test that changes a shared model and leaves it so: error (default), warn, off", "LEVEL"),
    Setting(
        "leak_check",
        "report GPU memory that stays taken after a test, or after a model was unloaded: warn (default), error, off",
        "LEVEL",
    ),
    Setting("leak_tolerance", "memory that a test may leave behind on a GPU; default: 256MiB", "SIZE"),
    Setting("seed", "seed of torch in each test that uses a shared model (default: 0), or none", "N", ini_type="int"),
    Setting("suggest", "print markers to paste, from the measured peaks", levels=("on",), is_option_only=True),
    Setting("report", "write what gated tests did, and why, into this file (JSON)", "FILE"),
)
ENVIRONMENT_PREFIXES = ("VLMGPU_", "PYTEST_VLMGPU_")
"""Both are read, the first first."""
ALIASES = "vlm_marker_aliases"
"""Ini key alone: a table belongs into a file."""
MARKERS = (
    "vlm(*names, revision=None, dtype=None, device_map=None, trust_remote_code=False): Name the model (folder or hub id) "
    "that the fixture vlm loads; several names run the test with each.",
    "vlm_requires(*, gpus=1, vram_gib=None, total_vram_gib=None, capability=None, bf16=False, fp8=False, p2p=False, "
    "exclusive=False, reason=None): Skip unless GPUs can do it: count, free memory on each and in all (GiB, or text as "
    '"80GB"), capability, links.',
    'vlm_limit_vram(amount): Fail when the test\'s tensors take more on any one GPU (GiB, or text such as "18GiB").',
    "vlm_mutates(): The test may change the shared model: it runs last, and the model is loaded again after it.",
)
"""The lines of ``pytest --markers``; :mod:`markers` holds the functions of these signatures."""


class _Level(argparse.Action):
    """``--vlm-strict`` and ``--vlm-strict=all``, and never the word behind it, which is a folder of tests.

    Each form is an option string of its own: with ``nargs="?"`` argparse takes ``tests/`` in ``--vlm-strict tests/``. So
    are those that somebody wrote, right or wrong: argparse has no word on what is allowed, and the settings have one.
    """

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        _values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the level that was written, or the first one."""
        _, is_written, level = (option_string or "").partition("=")
        setattr(namespace, self.dest, level if is_written else self.const)


def words_given(config: Any) -> list[object]:
    """What pytest is about to parse: words of the command line, of ``PYTEST_ADDOPTS`` and of the ini key ``addopts``."""
    by_variable = shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))
    # A plugin that a call of pytest.main() names is asked before there is any ini file.
    by_file = config.getini("addopts") if hasattr(config, "known_args_namespace") else []
    return [*_read([*config.invocation_params.args, *by_variable]), *by_file]


def _read(words: Iterable[object]) -> Iterator[object]:
    """Words, and of a file of words (``@FILE``, one a line) those that are in it."""
    for word in words:
        if not isinstance(word, str) or not word.startswith("@"):
            yield word
            continue
        with suppress(OSError, ValueError):  # pytest says it
            path = Path(word[1:])
            # A pipe, as of "@<(ls)", can be read once, and pytest is to do that.
            yield from _read(path.read_text().splitlines() if path.is_file() else ())


def add_options(parser: pytest.Parser, words: Iterable[object] = ()) -> None:
    """Declare command-line options and ini keys. Each default is ``None``, so that "not given" can be told.

    Args:
        parser: pytest's.
        words: Those that will be parsed.
    """
    written = [word for word in words if isinstance(word, str) and word.startswith("--vlm-")]
    group = parser.getgroup("vlmgpu", "tests with vision-language models on GPUs")
    for setting in SETTINGS:
        option, dest = option_of(setting.name), f"vlm_{setting.name}"
        if setting.levels:
            forms = [f"{option}={level}" for level in setting.levels] if len(setting.levels) > 1 else []
            forms = list(dict.fromkeys([*forms, *(word for word in written if word.startswith(f"{option}="))]))
            const = setting.levels[0]
            group.addoption(option, *forms, dest=dest, action=_Level, nargs=0, const=const, default=None, help=setting.help)
        else:
            group.addoption(option, dest=dest, metavar=setting.metavar, default=None, help=setting.help)
        if not setting.is_option_only:
            parser.addini(dest, setting.help, type=setting.ini_type, default=None)
    help_text = "markers of the project that mean one of ours, one a line: multi_gpu = vlm_requires(gpus=2)"
    parser.addini(ALIASES, help_text, type="linelist", default=[])


def option_of(name: str) -> str:
    """``--vlm-min-tests`` of ``min_tests``."""
    return f"--vlm-{name.replace('_', '-')}"


def is_anything_given(config: pytest.Config) -> bool:
    """True when a setting is given anywhere, right or wrong."""
    if any(name.startswith(ENVIRONMENT_PREFIXES) and os.environ[name] for name in os.environ):
        return True
    for setting in SETTINGS:
        if config.getoption(f"vlm_{setting.name}") is not None:
            return True
        if setting.is_option_only:
            continue
        try:
            if config.getini(f"vlm_{setting.name}") is not None:
                return True
        except Exception:  # noqa: BLE001 - pytest cannot convert it, and its versions raise different errors
            return True
    return False
