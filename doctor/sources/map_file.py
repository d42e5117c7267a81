"""Reads a ``device_map`` as people have it: JSON, a Python dict, YAML lines, or all that ``vlm-doctor plan`` writes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MapError
from .map_dict import HOW, MAX_KEYS, Entry, python_dict, spot
from .regular_file import in_utf8, read_given

MAX_MAP_BYTES = 4 * 2**20
"""A report of a plan over 16 GPUs has about 100 kB, a map of every tensor of the largest published model about 3 MB."""
MAX_NUMBER = 9_999
"""Largest number of a device that is read: no process sees as many GPUs."""
_KEY = re.compile(r"[\w.\-]{0,400}", re.ASCII)
_OPENS = r"(?:(?:collections\.)?OrderedDict\(\s*)?(?=\{|\[\s*\()"
"""A dict, or the pairs that Python before 3.12 prints an ``OrderedDict`` as, which accelerate makes of a map."""
_COMMENTS = re.compile(r"(?:\s|\#[^\n]*(?:\n|\Z))*")
_ASSIGNMENT = re.compile(r"(?:[A-Za-z_][\w.]{0,80}\s*=\s*)?" + _OPENS, re.ASCII)
_LINE = re.compile(
    r"""(?P<key>"[^"]*"|'[^']*'|[^\s"'#:][^\s:]*)\s*:(?:\s+(?P<value>"[^"]*"|'[^']*'|[^\s"'#]\S*))?\s*(?:\#.*)?"""
)
_IN_SCRIPT = re.compile(
    r"^[ \t]*(?:hf_)?device_map(?::[\w\[\], |.]{1,60}| {1,9})?= {0,9}" + _OPENS, re.MULTILINE | re.ASCII
)
_HEADING = re.compile(r"^(?:hf_)?device_map:[ \t]*(?:#.*)?\n(?=[ \t]+\S)", re.MULTILINE)
_VISIBLE = re.compile(
    r"""^[^\#\n]{0,200}CUDA_VISIBLE_DEVICES(?:["']\])?[ ]*[:=][ ]*
        (?:(?P<quote>["'])(?P<quoted>[\w,./\- ]{1,4000})(?P=quote) | (?P<bare>(?:\d|GPU-|MIG-)[\w,/\-]{0,4000}))""",
    re.VERBOSE | re.MULTILINE | re.ASCII,
)
"""Set in a script or in the environment of a configuration file."""
_WHOLE = re.compile(r"-?\d{1,6}", re.ASCII)


class MapText(NamedTuple):
    """A map as it was written."""

    device_map: dict[str, int | str]
    gpus: tuple[int, ...] | None = None
    """GPU index behind each number, where the text says so (a plan does); ``None``: the numbers are CUDA's."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES that the numbers count under, where the text sets it."""


def read_map(name: str) -> MapText:
    """Read a map from a file, or from standard input when the name is ``-``.

    Raises:
        MapError: It cannot be read, is too large, or is no map; one sentence says where and what to do.
    """
    where = "standard input" if name == "-" else name
    return parse_map(_read(name, where), where=where)


def _read(name: str, where: str) -> str:
    if not name.strip():
        raise MapError("The name of the map is empty; name the file of a device_map, or - for standard input.")
    if name == "-":
        data = in_utf8(sys.stdin.buffer.read(MAX_MAP_BYTES + 1) if sys.stdin is not None else b"")
        if len(data) > MAX_MAP_BYTES:
            raise MapError(f"{where} is larger than {MAX_MAP_BYTES:,} bytes, so it is no device_map; {HOW}.")
    else:
        advice = "name the file of a device_map, or - for standard input"
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - which does not raise where there is no such user
        data = read_given(path, MAX_MAP_BYTES, where=where, what="a device_map", advice=advice, error=MapError)
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise MapError(f"{where} is not UTF-8 text (byte {error.start:,}); save the map as UTF-8.") from error


def parse_map(text: str, *, where: str) -> MapText:
    """Understand the text of a map.

    Args:
        text: JSON object (a map, or a report or config that holds one as ``device_map``), Python dict as
            ``print(model.hf_device_map)`` writes it, a script with ``device_map = {...}``, or ``module: device`` lines of
            YAML, which may stand under ``device_map:`` among other keys.
        where: File name, for the message of the error.

    Raises:
        MapError: It is none of these, a key stands twice, or a value is no device.
    """
    if not text.strip():
        raise MapError(f"{where} is empty; {HOW}.")
    start = _COMMENTS.match(text).end()  # type: ignore[union-attr]  # matches nothing as well
    head = _ASSIGNMENT.match(text, start)
    if head is None or (text[start] != "{" and _IN_SCRIPT.search(text)):
        return _in_document(text, where)
    found = _json(text)
    if found is None:
        return MapText(_checked(python_dict(text, head.end(), where), text, where))
    inner, gpus = _map_in(found)
    if inner is not found and not inner.pairs:
        raise MapError(f"{where}: its device_map is empty, as that of a plan that does not fit; there is nothing to judge.")
    return MapText(_checked([Entry(*pair) for pair in inner.pairs], text, where), gpus)


def _in_document(text: str, where: str) -> MapText:
    """The map in a script or in YAML, which may hold more than the map."""
    seen = _VISIBLE.search(text)
    visible = seen["quoted"] or seen["bare"] if seen else None
    script = _IN_SCRIPT.search(text)
    if script is not None:
        return MapText(_checked(python_dict(text, script.end(), where, is_script=True), text, where), visible=visible)
    heading = _HEADING.search(text)
    if heading is None:
        return MapText(_checked(_yaml_lines(text, where), text, where))
    lines = text[heading.end() :].split("\n")
    end = next((number for number, line in enumerate(lines) if line[:1] not in ("", " ", "\t", "#")), len(lines))
    # What stands before is blanked, so that lines keep their numbers.
    block = re.sub(r"[^\n]", " ", text[: heading.end()]) + "\n".join(lines[:end])
    return MapText(_checked(_yaml_lines(block, where), block, where), visible=visible)


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


def _yaml_lines(text: str, where: str) -> list[Entry]:
    """``module: device``, one a line; with a heading ``device_map:`` or without."""
    entries: list[Entry] = []
    at = 0
    for number, line in enumerate(text.split("\n"), start=1):
        content, begin = line.strip(), at
        at += len(line) + 1
        if not content or content.startswith("#") or content in ("---", "..."):
            continue
        match = _LINE.fullmatch(content)
        place = f"line {number}"
        if match is None:
            raise MapError(f"{where}, {place}: {content[:40]!r} is not 'module: device'; {HOW}.")
        key = _unquoted(match["key"])
        if match["value"] is None:
            if entries or key not in ("device_map", "hf_device_map"):
                raise MapError(
                    f"{where}, {place}: {key[:60]!r} has no device; "
                    "write the number of a GPU, cpu or disk behind the colon."
                )
            continue
        value = match["value"]
        entries.append(Entry(key, int(value) if _WHOLE.fullmatch(value) else _unquoted(value), begin))
        if len(entries) > MAX_KEYS:
            raise MapError(f"{where}: more than {MAX_KEYS:,} lines are no device_map; {HOW}.")
    return entries


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _shown(value: Any) -> str:
    if isinstance(value, _Pairs):
        return "a nested object"
    return "a list" if isinstance(value, list) else json.dumps(value)[:40]


def _problem(entry: Entry, known: dict[str, int | str]) -> str:
    """What is wrong with an entry; nothing when all is well."""
    key, value = entry.key[:60], entry.value
    if not _KEY.fullmatch(entry.key):
        return f"{key!r} is not the name of a module; {HOW}"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        shown = _shown(value)
        return f"the device of {key!r} is {shown}; write the number of a GPU, cpu or disk"
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return f"the device of {key!r} is out of range; write the number of a GPU"
    return f"the key {key!r} stands twice; keep one of them" if entry.key in known else ""


def _checked(entries: Iterable[Entry], text: str, where: str) -> dict[str, int | str]:
    """The entries as a map: every key once, every value a number or a text."""
    result: dict[str, int | str] = {}
    for entry in entries:
        problem = _problem(entry, result)
        if problem:
            place = where if entry.at is None else f"{where}, {spot(text, entry.at)}"
            raise MapError(f"{place}: {problem}.")
        result[entry.key] = entry.value if isinstance(entry.value, int) else entry.value[:100]
    if not 0 < len(result) <= MAX_KEYS:
        raise MapError(f"{where}: the map has {len(result):,} keys; give one with 1 to {MAX_KEYS:,}.")
    return result
