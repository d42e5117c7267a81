"""What the options, ini keys and environment variables of :mod:`declare` say, and how they take precedence.

Command line > environment > ini file > default, for each setting on its own.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Literal, NamedTuple

import pytest

from .declare import ENVIRONMENT_PREFIX, HELP
from .verdicts import WRONG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlm_doctor.machine import Machine

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_COUNT = r"[1-9][0-9]{0,3}"
_POSITION = r"0|[1-9][0-9]{0,3}"
_STRICT_WAIT_S = 120.0
"""A runner that exists for GPU tests rather waits for the job before it than fails."""
_UUID = r"GPU-[0-9A-Fa-f-]{1,36}"


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
    machine: str = "live"
    machine_origin: str = "--vlm-machine"
    """Where the machine was given, for messages."""
    is_strict: bool = False
    wait_s: float = 0.0
    """To wait for GPUs and memory that others hold, in all."""
    keeps_models: bool = False
    """True with ``--vlm-slots=fit``."""
    is_gpus_given: bool = False
    lease_dir: str | None = None
    """Folder of the leases; ``None`` is the usual one, ``off`` none at all."""
    given: tuple[str, ...] = ()
    """What was set somewhere, for the header: ``--vlm-gpus=2``, ``PYTEST_VLMGPU_MODEL=…``, ``vlm_strict=true``."""


def resolve(config: pytest.Config, environment: Mapping[str, str] = os.environ) -> Settings:
    """Settle every setting: command line > environment > ini file > default.

    Raises:
        pytest.UsageError: A value cannot be understood; the message names where it was given.
    """
    found = {name: _find(config, environment, name) for name in HELP}
    values = {name: value for name, (value, _) in found.items() if value is not None}
    origins = {name: origin for name, (_, origin) in found.items()}
    is_strict = _parse_bool(values["strict"], origins["strict"]) if "strict" in values else False
    return Settings(
        gpus=parse_gpus(values["gpus"], origins["gpus"]) if "gpus" in values else GpuChoice(),
        model=values.get("model"),
        machine=values.get("machine", "live"),
        machine_origin=origins["machine"] or "--vlm-machine",
        is_gpus_given="gpus" in values,
        is_strict=is_strict,
        wait_s=parse_wait(values["wait"], origins["wait"]) if "wait" in values else _STRICT_WAIT_S * is_strict,
        keeps_models=_parse_slots(values["slots"], origins["slots"]) if "slots" in values else False,
        lease_dir=_parse_lease_dir(values["lease_dir"], origins["lease_dir"]) if "lease_dir" in values else None,
        given=tuple(
            origins[name] if name == "strict" and origins[name].startswith("--") else f"{origins[name]}={value}"
            for name, value in values.items()
            # Where leases are is no news: every job of a runner says so.
            if name != "lease_dir" or origins[name].startswith("--")
        ),
    )


def recorded_machine(settings: Settings) -> Machine | None:
    """The machine of ``--vlm-machine``; ``None`` for this one.

    Raises:
        pytest.UsageError: The file or spec cannot be read.
    """
    if settings.machine == "live":
        return None
    from vlm_doctor.errors import VlmDoctorError
    from vlm_doctor.sources import load_machine

    try:
        return load_machine(settings.machine)
    except VlmDoctorError as error:
        raise pytest.UsageError(f"{WRONG}: {settings.machine_origin}: {error}") from error


def _find(config: pytest.Config, environment: Mapping[str, str], name: str) -> tuple[str | None, str]:
    """Raw value of one setting and the name of the place that gave it."""
    key = f"vlm_{name}"
    places = (
        (f"--vlm-{name.replace('_', '-')}", lambda: config.getoption(key)),
        # An empty variable counts as unset, as CI systems cannot always leave one out.
        (f"{ENVIRONMENT_PREFIX}{name.upper()}", lambda: environment.get(f"{ENVIRONMENT_PREFIX}{name.upper()}") or None),
        (key, lambda: _ini(config, key)),
    )
    for origin, read in places:
        value = read()
        if value is None:
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if not text.strip():
            raise pytest.UsageError(f"{WRONG}: {origin}: the value is empty; leave it out, or give one.")
        return text.strip(), origin
    return None, ""


def _ini(config: pytest.Config, key: str) -> object:
    try:
        return config.getini(key)
    except (TypeError, ValueError, pytest.UsageError) as error:  # of pytest's own conversion, by its version
        raise pytest.UsageError(f"{WRONG}: {key}: {error}.") from error


def _parse_bool(text: str, origin: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is neither true nor false; write 1 or 0.")


def parse_wait(text: str, origin: str) -> float:
    """Seconds of ``90``, ``90s``, ``10m``, ``1.5h``.

    Raises:
        pytest.UsageError: It is none of these.
    """
    match = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)\s*([smh]?)", text.lower())
    if match is None:
        raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no time; write seconds (90), or 90s, 10m, 1h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _parse_slots(text: str, origin: str) -> bool:
    if text.lower() in ("1", "fit"):
        return text.lower() == "fit"
    raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is neither 1 nor fit.")


def _parse_lease_dir(text: str, origin: str) -> str:
    if text.lower() == "off":
        return "off"
    if "\0" in text or not os.path.isabs(text):  # noqa: PTH117 - relative to what would differ from run to run
        raise pytest.UsageError(f"{WRONG}: {origin}: {text!r} is no absolute path; other runs must find the same folder.")
    return text


def parse_gpus(text: str, origin: str) -> GpuChoice:
    """Read a GPU choice.

    Args:
        text: ``auto``, ``none``, a count, positions with a comma (``0,2`` or ``2,``), or UUIDs.
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
    if problem is None and entries[0].startswith("GPU-"):
        return GpuChoice(kind="uuids", uuids=tuple(entries), text=said)
    instead = {"all": "auto", "-1": "auto", "cpu": "none", "off": "none", "0": "none for the CPU, or 0, for the first GPU"}
    hint = instead.get(word, "auto, none, a count (2), positions (0,2) or UUIDs (GPU-…)")
    raise pytest.UsageError(f"{WRONG}: {origin}: {problem or f'{text!r} names no GPUs'}; write {hint}.")


def _list_problem(entries: list[str]) -> str | None:
    """Why a list of GPUs cannot be read, or ``None``."""
    if entries[0].startswith("MIG-"):
        return "a MIG slice is chosen with CUDA_VISIBLE_DEVICES"
    if len(entries) == 1 and not entries[0].startswith("GPU-"):
        return None
    pattern = _UUID if entries[0].startswith("GPU-") else _POSITION
    for entry in entries:
        if not re.fullmatch(pattern, entry):
            return f"{entry!r} is neither a position nor a UUID like the others"
    if len(set(entries)) < len(entries):
        return "a GPU is named twice"
    return None
