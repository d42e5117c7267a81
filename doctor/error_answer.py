"""From a log to one cause: which known texts it holds, which of them explains the others, and whether a machine agrees.

Pure. The choice: a cause before a symptom before a consequence. Among several, what an exception says goes before other
lines; of the last chain of exceptions the root wins, and where several ranks failed, the first one does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import msgspec

from .answers import ErrorAnswer, SeenText
from .data.known_texts import RANKS, KnownText, all_known_texts
from .findings import Diagnosis, Fix, Outcome
from .log_text import ExceptionText, LogLine, clean_lines, exceptions_of
from .oom_text import explain, figures_of, parse_out_of_memory

MAX_SHOWN_CHARS = 300
_MAX_ALSO = 8
_MAX_HITS = 2_000
_PLACEHOLDERS = ("MAP", "MODEL", "PACKAGE")
_NO_GPU = "VLM101"
"""A machine without GPUs is in order, but it explains why a program finds none."""
_OUT_OF_MEMORY = "gpu-out-of-memory"
_MODEL_FILE = re.compile(r"(?:modeling|modular|processing|visual|configuration|tokenization_(?!utils))\w{0,60}\.py$")
_CALL = re.compile(r"\bself\.(?P<path>[A-Za-z_]\w{0,60}(?:\.[A-Za-z_]\w{0,60}){0,4})\(")
_PLUMBING = ("_call_impl", "_wrapped_call_impl", "_slow_forward", "forward_fn", "new_forward")


class _Hit(NamedTuple):
    known: KnownText
    line: LogLine
    match: re.Match[str]


class _Place(NamedTuple):
    """Where a hit stands among the exceptions."""

    hit: _Hit
    chain: int
    """Number of the chain; -1 outside of exceptions."""
    link: int
    """Number of the exception in its chain."""


def answer_error(text: str, *, where: str, skipped_bytes: int = 0) -> ErrorAnswer:
    """Say what a log means, without looking at a machine.

    Args:
        text: The log; any text.
        where: Its name.
        skipped_bytes: How much of it was left out of ``text``.
    """
    lines = clean_lines(text)
    chains = exceptions_of(lines)
    places = _places(lines, chains)
    last = chains[-1][-1] if chains else None
    chosen = _choose(places, chains)
    if chosen is None:
        last_text = _last_error(last, lines)
        return ErrorAnswer(where=where, is_recognized=False, last_error=last_text, skipped_bytes=skipped_bytes)
    known = chosen.hit.known
    exception = chains[chosen.chain][chosen.link] if chosen.chain >= 0 else None
    also = _also(places, chosen)
    answer = ErrorAnswer(
        where=where,
        is_recognized=True,
        cause=_seen(chosen.hit),
        explanation=known.says,
        facts={**_groups(chosen.hit.match), **(_places_of(exception) if exception is not None else {})},
        fix=_fix(known, chosen.hit.match),
        verify=known.verify,
        checks=known.checks,
        source=known.source,
        also=also,
        last_error=None if last is None or last is exception or _is_known(last, places) else _last_error(last, lines),
        skipped_bytes=skipped_bytes,
    )
    return _with_figures(answer, chosen.hit, exception) if known.name == _OUT_OF_MEMORY else answer


def confirm(answer: ErrorAnswer, diagnosis: Diagnosis) -> ErrorAnswer:
    """Compare an answer with what the checks say of a machine; a finding there has the better advice."""
    checks = answer.checks
    if not checks:
        return answer
    # What a check did not say again because a cause says it is confirmed by that cause.
    causes = (one.symptom_of for one in diagnosis.outcomes if one.code in checks and one.symptom_of is not None)
    findings = tuple(
        finding
        for code in dict.fromkeys((*checks, *causes))
        for finding in diagnosis.findings
        if finding.code == code and (finding.severity != "info" or code == _NO_GPU)
    )
    if findings:
        fix = findings[0].fix or answer.fix
        return msgspec.structs.replace(answer, confirmation="confirmed", confirmed_by=findings, fix=fix)
    outcomes = [outcome for outcome in diagnosis.outcomes if outcome.code in checks]
    return msgspec.structs.replace(answer, confirmation="unknown" if any(map(_is_blind, outcomes)) else "not_seen")


def _is_blind(outcome: Outcome) -> bool:
    """Whether a check could not tell: what it needs could not be read, is hidden by a cause, or was made up."""
    reason = outcome.reason or ""
    return outcome.state in ("unknown", "crashed") or reason.startswith("explained by") or "made-up" in reason


@cache
def _compiled() -> tuple[tuple[KnownText, re.Pattern[str]], ...]:
    return tuple((known, re.compile(known.pattern, re.IGNORECASE)) for known in all_known_texts())


def _hits(lines: Sequence[LogLine]) -> list[_Hit]:
    """Known texts line by line; of more than any log has, the first and the last ones."""
    lowered = [(line, line.text.lower()) for line in lines if line.text and not line.is_source]
    everything = "\n".join(text for _, text in lowered)
    # Most anchors are nowhere in a log: one search through all of it spares one in every line.
    present = [
        (known, pattern, anchors)
        for known, pattern in _compiled()
        if (anchors := [anchor for anchor in known.anchors if anchor in everything])
    ]
    found: list[_Hit] = []
    for line, text in lowered:
        for known, pattern, anchors in present:
            if any(anchor in text for anchor in anchors):
                match = pattern.search(line.text)
                if match is not None:
                    found.append(_Hit(known, line, match))
    if len(found) > _MAX_HITS:
        found = found[: _MAX_HITS // 2] + found[-_MAX_HITS // 2 :]
    return found


def _places(lines: Sequence[LogLine], chains: Sequence[Sequence[ExceptionText]]) -> list[_Place]:
    where = {
        line.number: (number, link)
        for number, chain in enumerate(chains)
        for link, exception in enumerate(chain)
        for line in exception.lines
    }
    return [_Place(hit, *where.get(hit.line.number, (-1, 0))) for hit in _hits(lines)]


def _choose(places: Sequence[_Place], chains: Sequence[Sequence[ExceptionText]]) -> _Place | None:
    for rank in RANKS:
        of_rank = [place for place in places if place.hit.known.rank == rank]
        raised = [place for place in of_rank if place.chain >= 0]
        if raised:
            streams = {place.hit.line.stream for place in raised if place.hit.line.stream}
            if len(streams) > 1:
                return min(raised, key=lambda place: place.hit.line.number)
            last = max(place.chain for place in raised)
            order = _root_first(chains[last])
            return min((place for place in raised if place.chain == last), key=lambda place: order.index(place.link))
        if of_rank:
            return of_rank[0]
    return None


def _root_first(chain: Sequence[ExceptionText]) -> list[int]:
    """Order the links of a chain: what was raised last, each time led back to its direct cause.

    What an exception was merely met while handling is looked at last: it was caught, and may have nothing to do with it.
    """
    groups: list[list[int]] = []
    for number, exception in enumerate(chain):
        if exception.joint == "cause" and groups:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [number for group in reversed(groups) for number in group]


def _also(places: Sequence[_Place], chosen: _Place) -> tuple[SeenText, ...]:
    first: dict[str, _Hit] = {}
    for place in places:
        if place.hit.known.name != chosen.hit.known.name:
            first.setdefault(place.hit.known.name, place.hit)
    return tuple(map(_seen, list(first.values())[:_MAX_ALSO]))


def _is_known(exception: ExceptionText, places: Sequence[_Place]) -> bool:
    numbers = {line.number for line in exception.lines}
    return any(place.hit.line.number in numbers for place in places)


def _seen(hit: _Hit) -> SeenText:
    return SeenText(name=hit.known.name, code=hit.known.code, line=hit.line.number, text=_shown(hit.line.text, hit.match))


def _shown(text: str, match: re.Match[str] | None = None) -> str:
    """What of a line is shown: the part around what was recognized."""
    text = text.strip()
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    start = max(0, (match.start() if match is not None else 0) - MAX_SHOWN_CHARS // 4)
    cut = text[start : start + MAX_SHOWN_CHARS]
    return f"{'... ' if start else ''}{cut}{' ...' if start + MAX_SHOWN_CHARS < len(text) else ''}"


def _groups(match: re.Match[str]) -> dict[str, str]:
    found = {name: value.strip() for name, value in match.groupdict().items() if value}
    devices = [value for name, value in found.items() if name.startswith("device_")]
    facts = {name.replace("_", " "): value for name, value in found.items() if not name.startswith("device_")}
    return {"devices": ", ".join(devices), **facts} if devices else facts


def _fix(known: KnownText, match: re.Match[str]) -> Fix:
    """Advice of a known text, with the package that the log names in the place of ``PACKAGE``.

    What then still stands for something is said: a log does not always name the model.
    """
    package = match.groupdict().get("package")
    name = {"PIL": "pillow", "qwen_vl_utils": "qwen-vl-utils"}.get(package or "", package)
    commands = tuple(command.replace("PACKAGE", name) if name else command for command in known.commands)
    return Fix(text=_with_placeholders(known.fix, commands), commands=commands, who=known.who)


def _with_placeholders(text: str, commands: Sequence[str]) -> str:
    left = [word for word in _PLACEHOLDERS if any(re.search(rf"\b{word}\b", command) for command in commands)]
    stand = f"{' and '.join(left)} stand{'s' if len(left) == 1 else ''} for yours"
    return f"{text.rstrip('.')} ({stand})." if left else text


def _places_of(exception: ExceptionText) -> dict[str, str]:
    """Where an exception was raised: the last place in a model's own code, and the modules that were being called."""
    frames = [frame for frame in exception.frames if frame.function not in _PLUMBING]
    found: dict[str, str] = {}
    models = [frame for frame in frames if _MODEL_FILE.search(frame.file)]
    for frame in (models or frames)[-1:]:
        name = re.split(r"[/\\]", frame.file)[-1]
        shown = f"{name}, line {frame.line}, in {frame.function}" + (f": {frame.source}" if frame.source else "")
        found["raised in"] = _shown(shown)
    called = dict.fromkeys(match["path"] for frame in models if (match := _CALL.search(frame.source)))
    if called:
        found["modules being called"] = " > ".join(list(called)[-8:])
    return found


def _with_figures(answer: ErrorAnswer, hit: _Hit, exception: ExceptionText | None) -> ErrorAnswer:
    text = " ".join(line.text for line in exception.lines) if exception is not None else hit.line.text
    figures = parse_out_of_memory(text)
    told = explain(figures)
    both = {**figures_of(figures), **answer.facts}
    if told is None:
        return msgspec.structs.replace(answer, facts=both)
    said, fix, commands = told
    # Memory that others hold now explains only an error of which the message says the same.
    checks = answer.checks if figures.reason == "others" else ()
    return msgspec.structs.replace(
        answer,
        explanation=said,
        facts=both,
        fix=Fix(text=_with_placeholders(fix, commands), commands=commands),
        checks=checks,
    )


def _last_error(last: ExceptionText | None, lines: Sequence[LogLine]) -> str | None:
    if last is not None:
        return _shown(last.lines[0].text)
    return next(
        (_shown(line.text) for line in reversed(lines) if re.search(r"\b(?:error|failed|fatal)\b", line.text, re.I)), None
    )
