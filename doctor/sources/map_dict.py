"""Reads a flat dict as Python writes it: what ``print(model.hf_device_map)`` shows, and the map in a script."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..errors import MapError

MAX_KEYS = 20_000
_GAP = r"\s*(?:\#[^\n]*(?:\n|\Z)\s*)*"
"""Blanks and comments."""
_TOKEN = re.compile(
    _GAP
    + r"""(?:
        (?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<device>(?:torch\.)?device\(\s*(?:type\s*=\s*)?["'](?P<type>[\w:]+)["']\s*
            (?:,\s*(?:index\s*=\s*)?(?P<index>\d{1,4})\s*)?\))
      | (?P<number>-?\d{1,6})(?![\w.])
      | (?P<mark>[{}:,()\[\]])
    )""",
    re.VERBOSE | re.ASCII,
)
_SPREAD = re.compile(
    _GAP
    + r"""\*\*\{\s*(?:f(?P<quote>["'])(?P<path>[\w.]{0,400})\{\w{1,40}\}(?P=quote)
        |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')\s*\+\s*str\(\w{1,40}\))
      \s*:\s*(?P<device>-?\d{1,6}|"[^"\n]*"|'[^'\n]*')
      \s+for\s+\w{1,40}\s+in\s+range\(\s*(?P<one>\d{1,5})\s*(?:,\s*(?P<end>\d{1,5})\s*)?\)\s*\}""",
    re.VERBOSE | re.ASCII,
)
"""Layers of one GPU, as ``formats/to_python.py`` writes them: ``**{f"layers.{i}": 0 for i in range(17)}``."""
_END = re.compile(r"(?:[\s);]|\#[^\n]*(?:\n|\Z))*\Z", re.ASCII)
"""What may follow a dict that is all of a text."""
HOW = 'write {"model.visual": 0, "lm_head": 1}, or one \'module: device\' a line'


class Entry(NamedTuple):
    """One key of a map, and where it stands in the text."""

    key: str
    value: Any
    at: int | None = None
    """Characters before it; ``None`` is unknown."""


def python_dict(text: str, start: int, where: str, *, is_script: bool = False) -> list[Entry]:
    """The flat dict that begins at ``start``: texts, whole numbers, ``device(type='cuda', index=0)``, numbered layers.

    Args:
        text: All of it.
        start: Where the brace opens, or the bracket of a list of pairs, as Python before 3.12 prints an ``OrderedDict``.
        where: File name, for the message of an error.
        is_script: Anything may follow it.

    Raises:
        MapError: It is no such dict.
    """
    reader = _Reader(text, start, where)
    has_pairs = reader.takes("[")
    end = "]" if has_pairs else "}"
    if not has_pairs:
        reader.expect("{")
    entries: list[Entry] = []
    while not reader.takes(end):
        at = reader.here()
        found = None if has_pairs else reader.spread()
        if found is None:
            found = [_pair(reader) if has_pairs else _item(reader)]
        entries += [Entry(key, value, at) for key, value in found]
        _limit(entries, where)
        if reader.takes(end):
            break
        reader.expect(",")
    if not is_script:
        reader.ends()
    return entries


def _item(reader: _Reader) -> tuple[str, int | str]:
    """``"module": device``."""
    key = reader.key()
    reader.expect(":")
    return key, reader.value()


def _pair(reader: _Reader) -> tuple[str, int | str]:
    """``("module", device)``."""
    reader.expect("(")
    key = reader.key()
    reader.expect(",")
    value = reader.value()
    reader.expect(")")
    return key, value


def _limit(entries: list[Entry], where: str) -> None:
    if len(entries) > MAX_KEYS:
        raise MapError(f"{where}: more than {MAX_KEYS:,} keys are no device_map; {HOW}.")


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
            f"{self._where}, {spot(self._text, self.here())}: {wanted} is expected, and {found} is there; {HOW}."
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

    def key(self) -> str:
        found = self.value()
        if not isinstance(found, str):
            raise self.error("a module name in quotation marks")
        return found

    def spread(self) -> list[tuple[str, int | str]] | None:
        """Keys that differ in a number, where such stand here."""
        match = _SPREAD.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        prefix = match["path"] if match["text"] is None else match["text"][1:-1]
        device: int | str = match["device"][1:-1] if match["device"][0] in "\"'" else int(match["device"])
        first, end = (0, int(match["one"])) if match["end"] is None else (int(match["one"]), int(match["end"]))
        return [(f"{prefix}{number}", device) for number in range(first, min(end, first + MAX_KEYS + 1))]

    def ends(self) -> None:
        if not _END.match(self._text, self._at):
            raise self.error("the end")


def spot(text: str, at: int) -> str:
    """``line 3, column 5``."""
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"
