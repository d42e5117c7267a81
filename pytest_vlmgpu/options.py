"""What the options, ini keys and environment variables of :mod:`declare` say, and how they take precedence.

Command line > environment > ini file > default, for each setting on its own.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest

from .declare import ENVIRONMENT_PREFIXES, SETTINGS, Setting, option_of
from .requirements import DEVICE_MAPS, DTYPE_ALIASES, DTYPES
from .verdicts import WRONG

if TYPE_CHECKING:
    from vlm_doctor.machine import Machine

Strict = Literal["off", "gpu", "all", "auto"]
Level = Literal["off", "warn", "error"]
Scope = Literal["machine", "run", "off"]
MAX_BYTES = 2**46
"""64 TiB, as for the markers: more is a size in another unit."""
TESTING = "VLMGPU_TESTING"
"""Variable that lets a run on made-up GPUs be held to what only real ones can prove."""
_PROOFS = ("strict", "expect_gpus", "expect_vram", "min_tests", "baseline")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_COUNT = r"[1-9][0-9]{0,3}"
_POSITION = r"0|[1-9][0-9]{0,3}"
_STRICT_WAIT_S = 120.0
"""A runner that exists for GPU tests rather waits for the job before it than fails."""
_REFUSED = re.compile(r"""(?:with base 10|got (?:int|float|str)): (-?[0-9][0-9.e+-]*|'[^']*'|"[^"]*")$""", re.ASCII)
"""How pytest and Python name a value that is not of the type of an ini key, as Python would write it."""
_NEAR_NAME = 0.8
"""Likeness (difflib) from which a variable counts as one of ours misspelt."""
_UUID_PREFIXES = ("GPU-", "MIG-")
_UUID = r"(?:GPU|MIG)-[0-9A-Fa-f-]{1,36}"


class GpuChoice(NamedTuple):
    """The parsed ``--vlm-gpus``."""

    kind: Literal["auto", "none", "count", "positions", "uuids"] = "auto"
    number: int = 0
    positions: tuple[int, ...] = ()
    """CUDA ordinals: positions among the GPUs that CUDA_VISIBLE_DEVICES leaves visible."""
    uuids: tuple[str, ...] = ()
    """Whole UUIDs or beginnings of them."""
    text: str = "auto"
    """The value as given, with where it was given, for messages."""


class Settings(NamedTuple):
    """The settings of one run, each resolved by precedence."""

    gpus: GpuChoice = GpuChoice()
    model: str | None = None
    dtype: str | None = None
    """For models whose marker names none; ``None`` is the checkpoint's own."""
    device_map: str = "doctor"
    """One of :data:`requirements.DEVICE_MAPS`, for models whose marker names none."""
    allow_offload: bool = False
    """Layers of a model that is too large for the GPUs may stay in host memory."""
    machine: str = "live"
    fake_gpus: str | None = None
    """A machine to pretend to be."""
    strict: Strict = "off"
    expect_gpus: int | None = None
    expect_vram: int | None = None
    """Bytes, free on each GPU."""
    min_tests: int | None = None
    baseline: Path | None = None
    update_baseline: bool = False
    plan: bool = False
    fleet: Path | None = None
    """Kinds of runner to plan for."""
    mutation: Level = "error"
    leak_check: Level = "warn"
    leak_tolerance: int = 256 * 2**20
    """Bytes on one GPU: a few of the allocator's largest rounding steps of 20 MiB, and less than a leaked KV cache."""
    seed: int | None = 0
    """Of torch, in tests that use a shared model; ``None`` leaves the random state alone."""
    suggest: bool = False
    report: Path | None = None
    wait: float | None = None
    """Seconds; ``None`` where it was not said."""
    busy: Literal["error", "skip"] = "error"
    """Of a test whose GPUs others have taken."""
    slots: int | None = 1
    """Models that may be loaded at once; ``None`` is as many as fit."""
    lease: Scope = "machine"
    """Who is kept off this run's GPUs: every run on the machine, this run's own workers, nobody."""
    lease_dir: str | None = None
    """Folder of the leases; ``None`` is the usual one."""
    hide_gpu_from_cpu_tests: bool = False
    """Tests that are no concern of the plugin are to see no GPU."""
    warm: float | None = None
    """Seconds that a model is kept for the next run after its last use; ``None``: it is not kept."""
    cold: bool = False
    """Models that are kept are not used, but loaded anew."""
    origins: Mapping[str, str] = MappingProxyType({})
    """Name of each setting that was given to where, for messages: ``--vlm-gpus``, ``VLMGPU_MODEL``, ``vlm_strict``."""
    given: tuple[str, ...] = ()
    """What was set somewhere, for the header: ``--vlm-gpus=2``, ``VLMGPU_MODEL=…``, ``vlm_strict=gpu``."""

    @property
    def wait_s(self) -> float:
        """To wait for GPUs and memory that others hold, in all."""
        if self.wait is not None:
            return self.wait
        return 0.0 if self.strict == "off" or (self.strict == "auto" and not self.is_anything_expected) else _STRICT_WAIT_S

    @property
    def keeps_warm(self) -> bool:
        """True where models outlive the run."""
        return self.warm is not None

    @property
    def keeps_models(self) -> bool:
        """True where a model may stay when the next one is loaded."""
        return self.slots != 1

    @property
    def is_gpus_given(self) -> bool:
        """True when somebody said which GPUs are to be used."""
        return "gpus" in self.origins

    @property
    def is_anything_expected(self) -> bool:
        """True when the run is held to anything, so that somebody counts on its GPUs."""
        return bool(self.expect_gpus or self.expect_vram or self.min_tests or self.baseline)


def resolve(config: pytest.Config, environment: Mapping[str, str] = os.environ) -> Settings:
    """Settle every setting: command line > environment > ini file > default.

    Raises:
        pytest.UsageError: A value cannot be understood, or contradicts another; the message names where it was given.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    given: list[str] = []
    for setting in SETTINGS:
        text, origin = _find(config, environment, setting)
        if text is None:
            continue
        values[setting.name] = READERS[setting.name](text, origin)
        origins[setting.name] = origin
        is_bare = bool(setting.levels) and origin.startswith("--") and text == setting.levels[0]
        # Where leases are is no news: every job of a runner says so.
        if setting.name != "lease_dir" or origin.startswith("--"):
            given.append(origin if is_bare else f"{origin}={text}")
    _refuse_unknown_variables(environment)
    settings = Settings(**values, origins=origins, given=tuple(given))
    _refuse_contradictions(settings, environment)
    return settings


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Refuse a variable that looks like one of ours and is not: what it was to demand would not be, without a word."""
    names = {setting.name.upper(): setting for setting in SETTINGS}
    for variable, value in environment.items():
        prefix = next((prefix for prefix in ENVIRONMENT_PREFIXES if variable.startswith(prefix)), None)
        if prefix is None or not value or variable == TESTING:
            continue
        name = variable.removeprefix(prefix)
        if name in names and names[name].is_option_only:
            advice = f"it is for one run alone; write {option_of(names[name].name)} on the command line"
        elif name in names:
            continue
        else:
            import difflib

            known = [word for word, setting in names.items() if not setting.is_option_only]
            near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR_NAME)
            if not near:
                continue
            advice = f"there is no such variable; write {prefix}{near[0]}"
        raise pytest.UsageError(f"{WRONG}: {variable}: {advice}.")


def _refuse_contradictions(settings: Settings, environment: Mapping[str, str]) -> None:
    problem = ""
    if settings.lease != "machine" and settings.origins.get("lease_dir", "").startswith("--"):
        problem = f"--vlm-lease-dir: {settings.origins['lease']}={settings.lease} uses no folder; leave out one of them."
    elif settings.update_baseline and settings.baseline is None:
        problem = "--vlm-update-baseline: there is no file to write; name it with --vlm-baseline=FILE."
    elif settings.gpus.kind == "none" and (settings.expect_gpus or settings.expect_vram):
        asked = [settings.origins[name] for name in ("expect_gpus", "expect_vram") if name in settings.origins]
        problem = f"{asked[0]}: {settings.gpus.text} allows no GPU; leave out one of them."
    elif settings.fleet is not None and not settings.plan:
        problem = "--vlm-fleet: it is what a plan is made for; give --vlm-plan too."
    elif settings.fleet is not None and (settings.fake_gpus or "machine" in settings.origins):
        problem = (
            f"--vlm-fleet: {settings.origins.get('machine', '--vlm-fake-gpus')} names a machine too; give one of them."
        )
    elif settings.fake_gpus and "machine" in settings.origins:
        problem = f"--vlm-fake-gpus: {settings.origins['machine']} names a machine too; give one of them."
    elif settings.fake_gpus and not environment.get(TESTING):
        demanded = [name for name in _PROOFS if name in settings.origins and (name, settings.strict) != ("strict", "off")]
        asked = [settings.origins[name] for name in demanded]
        if asked:
            problem = (
                f"--vlm-fake-gpus: no GPU that is made up can satisfy {', '.join(asked)}; leave out one of them, or set "
                f"{TESTING}=1 to try the wiring itself."
            )
    if problem:
        raise pytest.UsageError(f"{WRONG}: {problem}")


def recorded_machine(settings: Settings) -> Machine | None:
    """The machine of ``--vlm-machine`` or ``--vlm-fake-gpus``; ``None`` for this one.

    Raises:
        pytest.UsageError: The file or spec cannot be read.
    """
    text = settings.fake_gpus or settings.machine
    if text == "live":
        return None
    from vlm_doctor.errors import VlmDoctorError
    from vlm_doctor.sources import load_machine

    try:
        return load_machine(text)
    except VlmDoctorError as error:
        origin = "--vlm-fake-gpus" if settings.fake_gpus else settings.origins.get("machine", "--vlm-machine")
        raise pytest.UsageError(f"{WRONG}: {origin}: {error}") from error


def _find(config: pytest.Config, environment: Mapping[str, str], setting: Setting) -> tuple[str | None, str]:
    """Raw value of one setting and the name of the place that gave it."""
    key = f"vlm_{setting.name}"
    places: list[tuple[str, Callable[[], object]]] = [(option_of(setting.name), lambda: config.getoption(key))]
    if not setting.is_option_only:
        variables = [f"{prefix}{setting.name.upper()}" for prefix in ENVIRONMENT_PREFIXES]
        # An empty variable counts as unset, as CI systems cannot always leave one out.
        places += [(name, partial(_variable, environment, name)) for name in variables]
        places.append((key, lambda: _ini(config, key)))
    for origin, read in places:
        value = read()
        if value is None:
            continue
        text = str(value).strip()
        if not text:
            raise pytest.UsageError(f"{WRONG}: {origin}: the value is empty; leave it out, or give one.")
        return text, origin
    return None, ""


def _variable(environment: Mapping[str, str], name: str) -> str | None:
    return environment.get(name) or None


def _ini(config: pytest.Config, key: str) -> object:
    try:
        return config.getini(key)
    except (TypeError, ValueError, pytest.UsageError) as error:  # of pytest's own conversion, by its version
        # TOML's 1 is as good as "1" to us, and a seed may be a number or a word: pytest has no type for that.
        match = _REFUSED.search(str(error))
        if match is not None:
            with suppress(ValueError, SyntaxError):
                return ast.literal_eval(match[1])
        # pytest's words for a setting that is on or off.
        hint = "; write true or false" if "truth value" in str(error) else ""
        raise pytest.UsageError(f"{WRONG}: {key}: {error}{hint}.") from error


def parse_strict(text: str, origin: str) -> Strict:
    """Read a level of ``--vlm-strict``; words for true and false count, as the setting once was one of these.

    Raises:
        pytest.UsageError: It is none.
    """
    word = text.lower()
    if word in _TRUE + _FALSE:
        return "all" if word in _TRUE else "off"
    for level in ("gpu", "all", "auto"):
        if word == level:
            return level
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no level; write gpu, all, auto or off.")


def parse_level(text: str, origin: str) -> Level:
    """Read what is to happen when something is found.

    Raises:
        pytest.UsageError: It is no level.
    """
    word = text.lower()
    for level in ("off", "warn", "error"):
        if word == level:
            return level
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no level; write error, warn or off.")


def parse_seed(text: str, origin: str) -> int | None:
    """Read a seed; ``none`` leaves the random state alone.

    Raises:
        pytest.UsageError: It is no whole number from 0 on.
    """
    if text.lower() == "none":
        return None
    if re.fullmatch(r"[0-9]{1,18}", text, re.ASCII):
        return int(text)
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no seed; write a whole number from 0 on, or none.")


def parse_count(text: str, origin: str) -> int:
    """Read a number of GPUs or tests.

    Raises:
        pytest.UsageError: It is not a whole number above zero.
    """
    if not re.fullmatch("[1-9][0-9]{0,5}", text, re.ASCII):
        raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no such number; write a whole number from 1 to 999999.")
    return int(text)


def parse_size(text: str, origin: str) -> int:
    """Read an amount of memory, in bytes; a bare number is GiB, as in the markers.

    Raises:
        pytest.UsageError: It cannot be understood.
    """
    from vlm_doctor.errors import UsageError
    from vlm_doctor.units import parse_bytes

    is_bare = re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII)
    try:
        size = parse_bytes(f"{text}GiB" if is_bare else text)
    except UsageError:
        size = 0
    if not 0 < size <= MAX_BYTES:
        raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no amount of memory; write one such as 20GiB or 24GB.")
    return size


def parse_path(text: str, origin: str) -> Path:
    """Read the name of a file that is read or written.

    Raises:
        pytest.UsageError: It names a folder, or nothing that a file system takes.
    """
    path = Path(text)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"{WRONG}: {origin}: {text[:80]!a} is no file name: {error}.") from error
    if is_folder:
        raise pytest.UsageError(f"{WRONG}: {origin}: {text} is a folder; name a file in it.")
    # A test may change the folder.
    return Path.cwd() / path


def _text(text: str, _origin: str) -> str:
    return text


def _alone(text: str, origin: str) -> bool:
    if text == "on":
        return True
    raise pytest.UsageError(f"{WRONG}: {origin}: it takes no value, and has {text!r}; write {origin} alone.")


def parse_switch(text: str, origin: str) -> bool:
    """Read on or off, in the words of ini files.

    Raises:
        pytest.UsageError: It is neither.
    """
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is neither on nor off; write one of these words.")


def parse_device_map(text: str, origin: str) -> str:
    """Read who places models.

    Raises:
        pytest.UsageError: It is none of them.
    """
    if text.lower() in DEVICE_MAPS:
        return text.lower()
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no placement; write {', '.join(DEVICE_MAPS)}.")


def parse_dtype(text: str, origin: str) -> str:
    """Read a dtype as the markers do.

    Raises:
        pytest.UsageError: Models are loaded in none of that name.
    """
    word = text.removeprefix("torch.")
    if word in DTYPES:
        return word
    instead = DTYPE_ALIASES.get(word.lower(), " or ".join(DTYPES))
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no dtype; write {instead}.")


def parse_wait(text: str, origin: str) -> float:
    """Seconds of ``90``, ``90s``, ``10m``, ``1.5h``.

    Raises:
        pytest.UsageError: It is none of these.
    """
    match = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)\s*([smh]?)", text.lower())
    if match is None:
        raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no time; write seconds (90), or 90s, 10m, 1h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_warm(text: str, origin: str) -> float | None:
    """Seconds that a model is kept; ``None`` of ``off``, of other words for no, and of no time at all.

    Raises:
        pytest.UsageError: It is no time.
    """
    if text.lower() in _FALSE:
        return None
    # ``1`` is a word for yes, as everywhere in the environment: nobody keeps a model for a second.
    return parse_wait("15m" if text.lower() in _TRUE else text, origin) or None


def _parse_slots(text: str, origin: str) -> int | None:
    if text.lower() == "fit":
        return None
    if re.fullmatch("[1-9][0-9]{0,3}", text, re.ASCII):
        return int(text)
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no such number; write a whole number from 1 to 9999, or fit.")


def parse_busy(text: str, origin: str) -> Literal["error", "skip"]:
    """Read what becomes of a test whose GPUs others have taken.

    Raises:
        pytest.UsageError: It is neither.
    """
    if text.lower() == "skip":
        return "skip"
    if text.lower() == "error":
        return "error"
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no such outcome; write error or skip.")


def parse_lease(text: str, origin: str) -> Scope:
    """Read how far leases reach.

    Raises:
        pytest.UsageError: It is none of the three.
    """
    word = text.lower()
    for scope in ("machine", "run", "off"):
        if word == scope:
            return scope
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no reach of leases; write machine, run or off.")


def _parse_lease_dir(text: str, origin: str) -> str:
    if text.lower() == "off":
        raise pytest.UsageError(f"{WRONG}: {origin}: 'off' is no folder; to lease no GPUs, write --vlm-lease=off.")
    if "\0" in text or not os.path.isabs(text):  # noqa: PTH117 - relative to what would differ from run to run
        raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no absolute path; other runs must find the same folder.")
    return text


def parse_gpus(text: str, origin: str) -> GpuChoice:
    """Read a GPU choice.

    Args:
        text: ``auto``, ``none``, a count, positions with a comma (``0,2`` or ``2,``), or UUIDs of GPUs or of MIG slices.
        origin: Where it was given, for the message.

    Raises:
        pytest.UsageError: None of these.
    """
    said = f"{origin}={text}"
    word = text.lower()
    if word == "auto":
        return GpuChoice(text=said)
    if word == "none":
        return GpuChoice(kind="none", text=said)
    if re.fullmatch(_COUNT, text):
        return GpuChoice(kind="count", number=int(text), text=said)
    entries = [entry.strip() for entry in text.removesuffix(",").split(",")]
    problem = _list_problem(entries)
    if problem is None and re.fullmatch(_POSITION, entries[0]) and "," in text:
        return GpuChoice(kind="positions", positions=tuple(map(int, entries)), text=said)
    if problem is None and entries[0].startswith(_UUID_PREFIXES):
        return GpuChoice(kind="uuids", uuids=tuple(entries), text=said)
    instead = {"all": "auto", "-1": "auto", "cpu": "none", "off": "none", "0": "none for the CPU, or 0, for the first GPU"}
    hint = instead.get(word, "auto, none, a count (2), positions (0,2) or UUIDs (GPU-…, MIG-…)")
    raise pytest.UsageError(f"{WRONG}: {origin}: {problem or f'{text!r} names no GPUs'}; write {hint}.")


def _list_problem(entries: list[str]) -> str | None:
    """Why a list of GPUs cannot be read, or ``None``."""
    is_named = entries[0].startswith(_UUID_PREFIXES)
    if len(entries) == 1 and not is_named:
        return None
    for entry in entries:
        if entry.startswith("MIG-GPU-"):
            return (
                f"{entry!r} is how drivers before 470 named a MIG slice; name it by its own UUID (MIG-…, see nvidia-smi -L)"
            )
        if not re.fullmatch(_UUID if is_named else _POSITION, entry) or (is_named and entry[:4] != entries[0][:4]):
            return f"{entry!r} is neither a position nor a UUID like the others"
    if len(set(entries)) < len(entries):
        return "a GPU is named twice"
    return None


READERS: dict[str, Callable[[str, str], Any]] = {
    "gpus": parse_gpus,
    "model": _text,
    "dtype": parse_dtype,
    "device_map": parse_device_map,
    "allow_offload": parse_switch,
    "machine": _text,
    "fake_gpus": _text,
    "strict": parse_strict,
    "expect_gpus": parse_count,
    "expect_vram": parse_size,
    "min_tests": parse_count,
    "baseline": parse_path,
    "update_baseline": _alone,
    "plan": _alone,
    "fleet": parse_path,
    "wait": parse_wait,
    "warm": parse_warm,
    "cold": _alone,
    "busy": parse_busy,
    "slots": _parse_slots,
    "hide_gpu_from_cpu_tests": parse_switch,
    "lease": parse_lease,
    "lease_dir": _parse_lease_dir,
    "mutation": parse_level,
    "leak_check": parse_level,
    "leak_tolerance": parse_size,
    "seed": parse_seed,
    "suggest": _alone,
    "report": parse_path,
}
"""Name of each setting to the function that reads its text; the second argument is where it was given."""
