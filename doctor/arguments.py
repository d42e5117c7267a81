"""Values on the command line, read. Pure: text in, value or one clear sentence out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path

from .errors import UsageError
from .expectations import capability, gpu_count
from .likeness import nearest
from .units import parse_bytes

_SIZE = re.compile(r"(\d{1,9})(?:[xX×](\d{1,9}))?", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_INDEX = re.compile(r"\d{1,4}", re.ASCII)
_SECONDS = re.compile(r"\d{1,7}(?:\.\d{1,3})?", re.ASCII)
_CODE_START = re.compile(r"VLM\d{1,3}", re.ASCII)


def asks_for_json(words: Sequence[str]) -> bool:
    """Tell whether a command line asks for JSON, even one that cannot be understood otherwise."""
    return "--json" in words or _asks_for(words, "json")


def failure_style(words: Sequence[str]) -> str:
    """How a run that fails has to say so: ``json``, ``github``, or ``text``; also of a command line that is wrong."""
    if asks_for_json(words):
        return "json"
    return "github" if _asks_for(words, "github") else "text"


def _asks_for(words: Sequence[str], format: str) -> bool:  # noqa: A002 - the word of the command line
    return f"--format={format}" in words or ("--format", format) in pairwise(words)


def whole_number(option: str, example: int) -> Callable[[str], int]:
    """A reader of whole numbers; whether one makes sense is for others to say.

    Args:
        option: Its name, for the message of an error.
        example: A number that does make sense.
    """

    def read(text: str) -> int:
        if not _NUMBER.fullmatch(text.strip()):
            raise UsageError(f"{option}: {text!r} is not a whole number; write digits, such as {example}.")
        return int(text)

    return read


def file_path(option: str) -> Callable[[str], Path]:
    """A reader of names of files; whether there is such a file is for others to say.

    Args:
        option: Its name, for the message of an error.
    """

    def read(text: str) -> Path:
        if text.strip() in ("", "-"):
            instead = ", or leave it out for standard output" if option == "--output" else ""
            raise UsageError(f"{option}: {text!r} names no file; write its name{instead}.")
        return Path(text)

    return read


def gpu_indices(text: str, *, option: str = "--gpus") -> tuple[int, ...]:
    """Read ``0,1`` as GPU indices.

    Raises:
        UsageError: It is not a list of numbers, or names a GPU twice.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(map(_INDEX.fullmatch, entries)):
        raise UsageError(f"{option}: {text!r} is not a list of GPU indices; write them with commas, such as 0,1.")
    indices = tuple(int(entry) for entry in entries)
    if len(set(indices)) != len(indices):
        raise UsageError(f"{option}: {text!r} names a GPU twice; name each once.")
    return indices


def excluded_gpus(text: str) -> tuple[int, ...]:
    """Read ``0,1`` as indices of GPUs that must not be used.

    Raises:
        UsageError: It is not a list of numbers, or names a GPU twice.
    """
    return gpu_indices(text, option="--exclude")


def pin(text: str) -> tuple[str, int]:
    """Read ``model.visual=0`` as a module path and the GPU it must be on.

    Raises:
        UsageError: It is not a path, an equals sign and an index.
    """
    path, _, index = (part.strip() for part in text.rpartition("="))
    if not path or not _INDEX.fullmatch(index):
        raise UsageError(f"--pin: {text!r} is not a module and a GPU; write them as model.visual=0.")
    return path, int(index)


def max_memory(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``0=20GiB,1=10GiB`` as GPU indices and bytes.

    Raises:
        UsageError: It is not a list of indices and sizes.
    """
    result = []
    for entry in text.split(","):
        index, _, size = (part.strip() for part in entry.partition("="))
        if not _INDEX.fullmatch(index) or not size:
            raise UsageError(f"--max-memory: {entry!r} is not a GPU and a size; write them as 0=20GiB.")
        result.append((int(index), parse_bytes(size, where="--max-memory")))
    return tuple(result)


def image_size(text: str) -> tuple[int, int]:
    """Read ``1280x720`` (width x height) or ``1024`` (both), in pixels.

    Returns:
        Width and height.

    Raises:
        UsageError: It is neither.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--image-size: {text!r} is not a size; write width x height in pixels, such as 1280x720.")
    return int(match[1]), int(match[2] or match[1])


def headroom_bytes(text: str) -> int:
    """Read ``1GiB`` as bytes.

    Raises:
        UsageError: It is not a size with a unit.
    """
    return parse_bytes(text, where="--headroom")


def vram_bytes(text: str) -> int:
    """Read ``20GiB`` as bytes.

    Raises:
        UsageError: It is not a size with a unit.
    """
    return parse_bytes(text, where="--vram")


def gpu_number(text: str) -> int:
    """Read ``2`` as a number of GPUs.

    Raises:
        UsageError: It is not a whole number from 1 on.
    """
    return gpu_count(text, where="--gpus")


def seconds(text: str) -> float:
    """Read ``900`` or ``0.5`` as seconds.

    Raises:
        UsageError: It is not a number from 0.1 to 1,000,000.
    """
    value = float(text) if _SECONDS.fullmatch(text) else 0.0
    if not 0.1 <= value <= 1_000_000:
        raise UsageError(f"--deadline: {text!r} is not a number of seconds; write one such as 900.")
    return value


def compute_capability(text: str) -> tuple[int, int]:
    """Read ``8.0`` as a compute capability.

    Raises:
        UsageError: It is not one.
    """
    return capability(text, where="--capability")


def codes(texts: Sequence[str], known: Collection[str], *, where: str = "--ignore") -> tuple[str, ...]:
    """Read codes, or beginnings of codes, for ``--ignore``: ``VLM503``, ``vlm5``; several may share one option.

    Raises:
        UsageError: No code begins so.
    """
    wanted = [entry.strip().upper() for text in texts for entry in text.split(",")]
    for entry in wanted:
        if not _CODE_START.fullmatch(entry) or not any(code.startswith(entry) for code in known):
            raise UsageError(
                f"{where}: {entry!r} is not the beginning of a code; write one such as VLM503, or VLM5 for a family."
            )
    return tuple(wanted)


def suggestion(word: str, known: Collection[str]) -> str:
    """``; did you mean plan?``, or nothing."""
    # All words of the command line are in small letters.
    near = nearest(word.partition("=")[0].lower(), known, most=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "."
