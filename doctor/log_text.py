"""A log, read as what it is: lines without the prefixes of what carried them, and chains of Python exceptions.

Pure, and linear in the size of the text: logs come from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

MAX_LINE_CHARS = 4_000
"""Longer lines keep this much of both ends: the longest message of torch, that of an allocation, has about 900."""
MAX_LINES = 400_000

Joint = Literal["cause", "handling"]

_ANSI = re.compile(r"\x1b(?:\[[0-?]{0,40}[ -/]{0,4}[@-~]|\][^\x07\x1b]{0,400}(?:\x07|\x1b\\)?|[@-Z\\-_])")
_BREAK = re.compile(r"\r\n|\n|\r")
"""A progress bar rewrites its line with carriage returns."""
_PREFIX = re.compile(
    "|".join(
        (
            r"\s{0,12}(?P<stream_1>\[(?:rank|default|RANK)\s?\d{1,5}\])[:\s] ?",  # torchrun --tee
            r"\s{0,12}(?P<stream_2>\[\d{1,5},\d{1,5}\]<std(?:err|out)>):? ?",  # mpirun
            r"(?P<stream_3>\([\w .:-]{0,60}pid=\d{1,8}[\w ,.=:-]{0,60}\)) ?",  # Ray, vLLM
            r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,]?\d{0,9}(?:Z|[+-]\d\d:?\d\d)?\s",  # GitHub Actions, docker, logging
            r"[\w.-]{1,60}\s{0,40}\|\s",  # docker compose
            r"(?:ERROR|WARNING|INFO|CRITICAL)\s{1,4}\d\d-\d\d \d\d:\d\d:\d\d \[[^\]\n]{1,80}\]\s",  # vLLM
            r"(?:ERROR|WARNING|INFO|CRITICAL)(?::[\w.]{1,80}:|:\s{1,8})",  # logging.basicConfig, uvicorn
            r"E\s{3,12}",  # pytest
            r"\s{0,12}[|+]\s",  # exception groups
            r"(?:>\s)+",  # quoted in a mail or an issue
        )
    )
)
_MAX_PREFIXES = 6
_INDENTS = ("  ", "\t", ">   ")
_SIGN = re.compile(r"[Ee]rror|[Oo]ut of memory|NCCL|CUDA")
_WINDOW_CHARS = 300
_MAX_WINDOWS = 10
_HEADER = "Traceback (most recent call last):"
_JOINTS: dict[str, Joint] = {
    "The above exception was the direct cause of the following exception:": "cause",
    "During handling of the above exception, another exception occurred:": "handling",
}
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]{0,150}(?::|$)")
_ERROR_NAME = re.compile(r"(?:\w{1,80}\.){0,8}\w{0,80}(?:Error|Exception|Interrupt|Exit|Warning|Failure)\b(?::|$)")
_FRAME = re.compile(r'\s*File "(?P<file>[^"\n]{1,500})", line (?P<line>\d{1,9}), in (?P<function>[^\n]{1,200})')
_PYTEST_FRAME = re.compile(r"(?P<file>[\w./\\@+-]{1,300}\.py):(?P<line>\d{1,9}): (?:in (?P<function>\w{1,100})|\w{1,100})$")


class LogLine(NamedTuple):
    """One line without what carried it."""

    number: int
    """Counted from 1."""
    text: str
    stream: str
    """Prefix of the rank or process that wrote it, such as ``[rank1]``; empty when there is none."""
    is_source: bool
    """A line of program text that a traceback shows: what it says has not happened."""


class Frame(NamedTuple):
    """A place in a traceback."""

    file: str
    line: int
    function: str
    source: str
    """The line of program text below it; empty when it is not shown."""


class ExceptionText(NamedTuple):
    """One exception of a log."""

    lines: tuple[LogLine, ...]
    """Its message, first line first."""
    frames: tuple[Frame, ...]
    joint: Joint | None
    """How it came from the exception before it; ``None`` when it did not."""
    stream: str


def clean_lines(text: str) -> list[LogLine]:
    """Take a log apart: no escape sequences, no prefixes, no quotation, and no line longer than that of a message."""
    if "\\n" in text and _HEADER + "\\n" in text:
        # A log of JSON lines: tracebacks are in one line, escaped.
        text = text.replace("\\n", "\n").replace('\\"', '"')
    raw = _BREAK.split(text, maxsplit=MAX_LINES)[:MAX_LINES]
    shown = [_ANSI.sub("", _shortened(line)) if "\x1b" in line else _shortened(line) for line in raw]
    margin = _margin(shown)
    bare = [_without_prefixes(line[margin:]) for line in shown]
    # Once more: what carried the lines may have stood before the quotation, or after it.
    margin = _margin([line.text for line in bare if not line.is_message])
    return [_classified(number, line, margin) for number, line in enumerate(bare, 1)]


def _shortened(line: str) -> str:
    """A line of bounded length: both ends, and what surrounds its first words about an error."""
    if len(line) <= MAX_LINE_CHARS:
        return line
    half = MAX_LINE_CHARS // 2
    parts, position = [line[:half]], half
    for _ in range(_MAX_WINDOWS):
        place = _SIGN.search(line, position, len(line) - half)
        if place is None:
            break
        parts.append(line[max(position, place.start() - _WINDOW_CHARS) : place.end() + _WINDOW_CHARS])
        position = place.end() + _WINDOW_CHARS
    return " ... ".join([*parts, line[-half:]])


def _margin(lines: Sequence[str]) -> int:
    """Spaces that all lines begin with: a log pasted into a quotation is indented as a whole."""
    return min((len(line) - len(line.lstrip(" ")) for line in lines if line.strip()), default=0)


class _Bare(NamedTuple):
    text: str
    stream: str
    is_message: bool
    """pytest marks the lines of a message with an E."""


def _without_prefixes(line: str) -> _Bare:
    stream, is_message = "", False
    for _ in range(_MAX_PREFIXES):
        match = _PREFIX.match(line)
        if match is None or not match.end():
            break
        stream = next((text for name, text in match.groupdict().items() if text and name.startswith("stream")), stream)
        is_message = is_message or match[0].startswith("E ")
        line = line[match.end() :]
    return _Bare(line, stream, is_message)


def _classified(number: int, line: _Bare, margin: int) -> LogLine:
    text = line.text.strip() if line.is_message else line.text[margin:].rstrip()
    is_source = not line.is_message and text.startswith(_INDENTS) and not _FRAME.match(text)
    return LogLine(number, text, line.stream, is_source)


def exceptions_of(lines: Iterable[LogLine]) -> list[list[ExceptionText]]:
    """Find the exceptions of a log, in the order of their ends, those that came from each other in one chain.

    Each rank or process is read on its own, since their lines are mixed.
    """
    readers: dict[str, _Reader] = {}
    for line in lines:
        if line.stream not in readers:
            readers[line.stream] = _Reader(line.stream)
        readers[line.stream].read(line)
    chains = [chain for reader in readers.values() for chain in reader.finished()]
    return sorted(chains, key=lambda chain: chain[-1].lines[0].number)


class _Reader:
    """Reads the lines of one stream."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._chains: list[list[ExceptionText]] = []
        self._frames: list[Frame] = []
        self._message: list[LogLine] = []
        self._joint: Joint | None = None
        self._is_in_frames = False

    def read(self, line: LogLine) -> None:
        text = line.text.strip()
        if text == _HEADER or text.endswith(" " + _HEADER):
            self._end_message()
            self._is_in_frames, self._frames = True, []
        elif text in _JOINTS:
            self._end_message()
            self._joint = _JOINTS[text]
        elif self._is_in_frames or _FRAME.match(line.text):
            # Pasted without its first lines, a traceback has no header.
            self._end_message()
            self._is_in_frames = True
            self._read_frame(line)
        elif self._message and not line.is_source and text and not _ERROR_NAME.match(text):
            if len(self._message) < _MAX_MESSAGE_LINES:
                self._message.append(line)
        elif not line.is_source and _ERROR_NAME.match(text):
            # pytest shows messages without a header, and some logs show nothing else.
            self._end_message()
            self._message = [line]
        elif not text:
            self._end_message()
        else:
            self._add_pytest_frame(text)

    def finished(self) -> list[list[ExceptionText]]:
        self._end_message()
        return self._chains

    def _read_frame(self, line: LogLine) -> None:
        frame = _FRAME.match(line.text)
        if frame is not None:
            self._frames.append(Frame(frame["file"], int(frame["line"]), frame["function"], ""))
            del self._frames[:-_MAX_FRAMES]
        elif line.text[:1].isspace():
            if self._frames and not self._frames[-1].source and line.text.strip(" ^~"):
                self._frames[-1] = self._frames[-1]._replace(source=line.text.strip())
        elif line.text and _EXCEPTION.match(line.text):
            self._is_in_frames = False
            self._message = [line]

    def _add_pytest_frame(self, text: str) -> None:
        frame = _PYTEST_FRAME.match(text)
        if frame is not None:
            self._frames.append(Frame(frame["file"], int(frame["line"]), frame["function"] or "", ""))
            del self._frames[:-_MAX_FRAMES]

    def _end_message(self) -> None:
        if not self._message:
            return
        found = ExceptionText(tuple(self._message), tuple(self._frames), self._joint, self._stream)
        if self._joint is not None and self._chains:
            self._chains[-1].append(found)
        else:
            self._chains.append([found._replace(joint=None)])
        self._message, self._frames, self._joint = [], [], None


_MAX_MESSAGE_LINES = 40
_MAX_FRAMES = 200
