"""Reads a ``device_map`` as people have it: JSON, a plan of ``vlm-doctor plan --json``, a Python dict, or YAML lines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MapError

MAX_MAP_BYTES = 4 * 2**20
"""A report of a plan over 16 GPUs has about 100 kB, a map of every tensor of the largest published model about 3 MB."""
MAX_KEYS = 20_000
MAX_NUMBER = 9_999
"""Largest number of a device that is read: no process sees as many GPUs."""
_KEY = re.compile(r"[\w.\-]{0,400}", re.ASCII)
_ASSIGNMENT = re.compile(r"(?:[A-Za-z_][\w.]{0,80}\s*=\s*)?(?:OrderedDict\(\s*)?(?=\{)", re.ASCII)
_TOKEN = re.compile(
    r"""\s*(?:\#[^\n]*(?:\n|\Z)\s*)*(?:
        (?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<device>(?:torch\.)?device\(\s*(?:type\s*=\s*)?["'](?P<type>[\w:]+)["']\s*
            (?:,\s*(?:index\s*=\s*)?(?P<index>\d{1,4})\s*)?\))
      | (?P<number>-?\d{1,6})(?![\w.])
      | (?P<mark>[{}:,])
    )""",
    re.VERBOSE | re.ASCII,
)
_LINE = re.compile(
    r"""(?P<key>"[^"]*"|'[^']*'|[^\s"'#:][^\s:]*)\s*:(?:\s+(?P<value>"[^"]*"|'[^']*'|[^\s"'#]\S*))?\s*(?:\#.*)?"""
)
_WHOLE = re.compile(r"-?\d{1,6}", re.ASCII)
_HOW = 'write {"model.visual": 0, "lm_head": 1}, or one \'module: device\' a line'


class MapText(NamedTuple):
    """A map as it was written."""

    device_map: dict[str, int | str]
    gpus: tuple[int, ...] | None = None
    """GPU index behind each number, where the text says so (a plan does); ``None``: the numbers are CUDA's."""


class _Entry(NamedTuple):
    """One key of a map, and where it stands in the text."""

    key: str
    value: Any
    at: int | None = None
    """Characters before it; ``None`` is unknown."""


def read_map(name: str) -> MapText:
    """Read a map from a file, or from standard input when the name is ``-``.

    Raises:
        MapError: It cannot be read, is too large, or is no map; one sentence says where and what to do.
    """
    where = "standard input" if name == "-" else name
    return parse_map(_read(name, where), where=where)


def _read(name: str, where: str) -> str:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_MAP_BYTES + 1) if sys.stdin is not None else b""
        else:
            path = Path(name).expanduser()
            if path.is_dir():
                raise MapError(f"{where} is a folder; name the file of a device_map.")
            if path.exists() and not path.is_file():
                raise MapError(f"{where} is not a regular file; name the file of a device_map, or - for standard input.")
            with path.open("rb") as file:
                data = file.read(MAX_MAP_BYTES + 1)
    except FileNotFoundError:
        raise MapError(f"{where}: no such file; name the file of a device_map, or - for standard input.") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise MapError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > MAX_MAP_BYTES:
        raise MapError(f"{where} is larger than {MAX_MAP_BYTES:,} bytes, so it is no device_map; {_HOW}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MapError(f"{where} is not UTF-8 text (byte {error.start:,}); save the map as UTF-8.") from error


def parse_map(text: str, *, where: str) -> MapText:
    """Understand the text of a map.

    Args:
        text: JSON object (a map, or a report or config that holds one as ``device_map``), Python dict as
            ``print(model.hf_device_map)`` writes it, or ``module: device`` lines of YAML.
        where: File name, for the message of the error.

    Raises:
        MapError: It is none of these, a key stands twice, or a value is no device.
    """
    if not text.strip():
        raise MapError(f"{where} is empty; {_HOW}.")
    head = _ASSIGNMENT.match(text, len(text) - len(text.lstrip()))
    if head is None:
        return MapText(_checked(_yaml_lines(text, where), text, where))
    found = _json(text)
    if found is None:
        return MapText(_checked(_python_dict(text, head.end(), where), text, where))
    inner, gpus = _map_in(found)
    if inner is not found and not inner.pairs:
        raise MapError(f"{where}: its device_map is empty, as that of a plan that does not fit; there is nothing to judge.")
    return MapText(_checked([_Entry(*pair) for pair in inner.pairs], text, where), gpus)


def _json(text: str) -> _Pairs | None:
    """The object in a JSON text; ``None`` when it is none."""
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, _Pairs) else None


def _map_in(found: _Pairs) -> tuple[_Pairs, tuple[int, ...] | None]:
    """The map itself in a report, a plan or a config, and the GPUs that its numbers stand for."""
    for name in ("map_check", "plan"):
        holder = found.last(name)
        if isinstance(holder, _Pairs):
            found = holder
            break
    for name in ("device_map", "hf_device_map"):
        inner = found.last(name)
        if isinstance(inner, _Pairs):
            return inner, _gpus_of(found)
    return found, None


def _gpus_of(holder: _Pairs) -> tuple[int, ...] | None:
    """``gpus`` of a judgement, or the GPUs of a plan's stages."""
    listed = holder.last("gpus")
    stages = holder.last("stages")
    if listed is None and isinstance(stages, list):
        listed = [stage.last("gpu") for stage in stages if isinstance(stage, _Pairs)]
    if not isinstance(listed, list) or not all(type(gpu) is int for gpu in listed) or len(set(listed)) != len(listed):
        return None
    return tuple(listed) or None


class _Pairs:
    """A JSON object that forgets no key, also one that stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs

    def last(self, name: str) -> Any:
        return next((value for key, value in reversed(self.pairs) if key == name), None)


def _python_dict(text: str, start: int, where: str) -> list[_Entry]:
    """The flat dict that begins at ``start``: texts, whole numbers and ``device(type='cuda', index=0)``."""
    reader = _Reader(text, start, where)
    reader.expect("{")
    entries: list[_Entry] = []
    while not reader.takes("}"):
        at = reader.here()
        key = reader.value()
        if not isinstance(key, str):
            raise reader.error("a module name in quotation marks")
        reader.expect(":")
        entries.append(_Entry(key, reader.value(), at))
        if len(entries) > MAX_KEYS:
            raise MapError(f"{where}: more than {MAX_KEYS:,} keys are no device_map; {_HOW}.")
        if reader.takes("}"):
            break
        reader.expect(",")
    reader.ends()
    return entries


class _Reader:
    """Takes a dict apart, token by token."""

    def __init__(self, text: str, start: int, where: str) -> None:
        self._text, self._at, self._where = text, start, where

    def _next(self) -> re.Match[str] | None:
        return _TOKEN.match(self._text, self._at)

    def here(self) -> int:
        """Where the next token begins."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._at

    def error(self, wanted: str) -> MapError:
        rest = self._text[self._at : self._at + 200].strip()
        found = f"{rest.splitlines()[0][:24]!r}" if rest else "the end"
        return MapError(
            f"{self._where}, {_spot(self._text, self.here())}: {wanted} is expected, and {found} is there; {_HOW}."
        )

    def takes(self, mark: str) -> bool:
        match = self._next()
        if match is None or match["mark"] != mark:
            return False
        self._at = match.end()
        return True

    def expect(self, mark: str) -> None:
        if not self.takes(mark):
            raise self.error(f"{mark!r}")

    def value(self) -> int | str:
        match = self._next()
        if match is None or match["mark"]:
            raise self.error("a text or a whole number")
        self._at = match.end()
        if match["number"]:
            return int(match["number"])
        if match["device"]:
            return f"{match['type']}:{match['index']}" if match["index"] else match["type"]
        return match["text"][1:-1]

    def ends(self) -> None:
        rest = self._text[self._at :].strip()
        if rest.strip(");"):
            raise self.error("the end")


def _spot(text: str, at: int) -> str:
    """``line 3, column 5``."""
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def _yaml_lines(text: str, where: str) -> list[_Entry]:
    """``module: device``, one a line; with a heading ``device_map:`` or without."""
    entries: list[_Entry] = []
    at = 0
    for number, line in enumerate(text.split("\n"), start=1):
        content, begin = line.strip(), at
        at += len(line) + 1
        if not content or content.startswith("#") or content in ("---", "..."):
            continue
        match = _LINE.fullmatch(content)
        place = f"line {number}"
        if match is None:
            raise MapError(f"{where}, {place}: {content[:40]!r} is not 'module: device'; {_HOW}.")
        key = _unquoted(match["key"])
        if match["value"] is None:
            if entries or key not in ("device_map", "hf_device_map"):
                raise MapError(
                    f"{where}, {place}: {key[:60]!r} has no device; write a number, cpu or disk behind the colon."
                )
            continue
        value = match["value"]
        entries.append(_Entry(key, int(value) if _WHOLE.fullmatch(value) else _unquoted(value), begin))
        if len(entries) > MAX_KEYS:
            raise MapError(f"{where}: more than {MAX_KEYS:,} lines are no device_map; {_HOW}.")
    return entries


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _shown(value: Any) -> str:
    if isinstance(value, _Pairs):
        return "a nested object"
    return "a list" if isinstance(value, list) else json.dumps(value)[:40]


def _problem(entry: _Entry, known: dict[str, int | str]) -> str:
    """What is wrong with an entry; nothing when all is well."""
    key, value = entry.key[:60], entry.value
    if not _KEY.fullmatch(entry.key):
        return f"{key!r} is not the name of a module; {_HOW}"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        shown = _shown(value)
        return f"the device of {key!r} is {shown}; write a number, cpu or disk"
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return f"the device of {key!r} is out of range; write the number of a GPU"
    return f"the key {key!r} stands twice; keep one of them" if entry.key in known else ""


def _checked(entries: Iterable[_Entry], text: str, where: str) -> dict[str, int | str]:
    """The entries as a map: every key once, every value a number or a text."""
    result: dict[str, int | str] = {}
    for entry in entries:
        problem = _problem(entry, result)
        if problem:
            spot = where if entry.at is None else f"{where}, {_spot(text, entry.at)}"
            raise MapError(f"{spot}: {problem}.")
        result[entry.key] = entry.value if isinstance(entry.value, int) else entry.value[:100]
    if not 0 < len(result) <= MAX_KEYS:
        raise MapError(f"{where}: the map has {len(result):,} keys; give one with 1 to {MAX_KEYS:,}.")
    return result
