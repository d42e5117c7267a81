"""What a job expects of a machine, and what ``[tool.vlm-doctor]`` of a ``pyproject.toml`` may say. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from .errors import UsageError
from .likeness import nearest
from .units import format_gib, parse_bytes

MAX_GPUS = 1_000
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)", re.ASCII)


class Expectations(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine has to offer. Every number is a lower bound that may be met exactly."""

    gpus: int = 1
    """So many GPUs, each of which meets the rest."""
    vram_bytes: int | None = None
    """Free on each of them."""
    nvlink: bool = False
    """NVLink joins them, directly or through each other."""
    capability: tuple[int, int] | None = None
    model: str | None = None
    """Fits on them."""

    def described(self) -> dict[str, str]:
        """Names and values, for people."""
        said = {"gpus": str(self.gpus)}
        if self.vram_bytes is not None:
            said["vram"] = format_gib(self.vram_bytes)
        if self.nvlink:
            said["nvlink"] = "yes"
        if self.capability is not None:
            said["capability"] = ".".join(map(str, self.capability))
        if self.model is not None:
            said["model"] = self.model
        return said


class ProjectSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[tool.vlm-doctor]``; its keys are the long options of ``vlm-doctor gate`` and ``check``."""

    gpus: int | None = None
    vram: str | None = None
    nvlink: bool = False
    capability: str | float | None = None
    model: str | None = None
    ignore: tuple[str, ...] = ()
    strict: bool = False


_KINDS = {
    "gpus": ("a whole number", "2"),
    "vram": ("a text with a size", '"20GiB"'),
    "nvlink": ("true or false", "true"),
    "capability": ("a number or a text", '"8.0"'),
    "model": ("a text", '"org/name"'),
    "ignore": ("a list of texts", '["VLM503"]'),
    "strict": ("true or false", "true"),
}
"""What each key of the table has to be, and an example, as TOML writes it."""


def read_settings(table: Mapping[str, Any], *, where: str) -> ProjectSettings:
    """Read the table.

    Args:
        table: As a TOML reader gives it.
        where: The file, for the message of an error.

    Raises:
        UsageError: One sentence about the first key or value that is wrong.
    """
    known = ProjectSettings.__struct_fields__
    for key in table:
        if key not in known:
            near = nearest(key, known, most=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise UsageError(f"{where}: [tool.vlm-doctor] has no key {key[:40]!r}; {hint}")
    for key, value in table.items():
        try:
            msgspec.convert({key: value}, ProjectSettings)
        except msgspec.ValidationError as error:
            kind, example = _KINDS[key]
            raise UsageError(
                f"{where}: [tool.vlm-doctor] {key}: {str(value)[:40]!r} is not {kind}; write {key} = {example}."
            ) from error
    return msgspec.convert(table, ProjectSettings)


def gpu_count(number: int | str, *, where: str) -> int:
    """Read a number of GPUs.

    Raises:
        UsageError: It is not a whole number from 1 on.
    """
    text = str(number).strip()
    if not re.fullmatch(r"\d{1,4}", text, re.ASCII) or not 1 <= int(text) <= MAX_GPUS:
        raise UsageError(f"{where}: {text[:40]!r} is not a number of GPUs; write one from 1 to {MAX_GPUS:,}.")
    return int(text)


def capability(value: str | float, *, where: str) -> tuple[int, int]:
    """Read a compute capability, such as ``8.0`` or ``sm_90``.

    Raises:
        UsageError: It is neither.
    """
    text = str(value).strip().lower()
    sm = re.fullmatch(r"sm_?(\d{1,2})(\d)", text, re.ASCII)
    match = sm or _CAPABILITY.fullmatch(text if "." in text else f"{text}.0")
    if match is None:
        raise UsageError(f"{where}: {text[:40]!r} is not a compute capability; write one such as 8.0 or 9.0.")
    return int(match[1]), int(match[2])


def expectations(
    settings: ProjectSettings,
    *,
    gpus: int | None = None,
    vram_bytes: int | None = None,
    nvlink: bool | None = None,
    capability_wanted: tuple[int, int] | None = None,
    model: str | None = None,
    where: str = "pyproject.toml",
) -> Expectations:
    """Join the command line and the project's file: what is said on the command line counts.

    Raises:
        UsageError: A value of the file makes no sense.
    """
    there = f"{where}: [tool.vlm-doctor]"
    if gpus is None:
        gpus = 1 if settings.gpus is None else gpu_count(settings.gpus, where=f"{there} gpus")
    if vram_bytes is None and settings.vram is not None:
        vram_bytes = parse_bytes(settings.vram, where=f"{there} vram")
    if capability_wanted is None and settings.capability is not None:
        capability_wanted = capability(settings.capability, where=f"{there} capability")
    return Expectations(
        gpus=gpus,
        vram_bytes=vram_bytes,
        nvlink=settings.nvlink if nvlink is None else nvlink,
        capability=capability_wanted,
        model=settings.model if model is None else model,
    )
