"""The page of every code: the docstring of its check, a file of ``data/pages``, or made from the known error texts."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

import msgspec

from .checks import CHECKS, RETIRED
from .errors import UsageError
from .likeness import nearest

_BY_HAND = "## How to look by hand"
_HEADING = re.compile(r"# (VLM[0-9]{3}): (.+)")


def explain(code: str) -> str:
    """Give the page of a code, Markdown text.

    Args:
        code: Such as ``VLM501``; case does not matter, and ``501`` will do.

    Raises:
        UsageError: There is no such code; the message names those that are near.
    """
    wanted = code.strip().upper()
    if re.fullmatch("[0-9]{3}", wanted, re.ASCII):
        wanted = f"VLM{wanted}"
    if wanted in RETIRED:
        return f"# {wanted}: no longer used\n\n{RETIRED[wanted]}\n"
    page = _pages().get(wanted)
    if page is None:
        family = [name for name in _pages() if re.fullmatch(r"VLM[0-9]{1,2}", wanted, re.ASCII) and name.startswith(wanted)]
        near = nearest(wanted[:20], _pages(), most=3, cutoff=0.8)
        if family:
            hint = f"name one of {min(family)} to {max(family)}, which vlm-doctor explain lists."
        elif near:
            hint = f"did you mean {' or '.join(near)}?"
        else:
            hint = "codes are VLM and three digits, such as VLM501."
        raise UsageError(f"There is no code {code[:20]!a}; {hint}")
    return page


class Explanation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The page of a code in its parts, each Markdown text."""

    code: str
    title: str
    summary: str = ""
    """One sentence."""
    what_it_checks: str = ""
    why_it_matters: str = ""
    example: str = ""
    how_to_look_by_hand: str = ""
    what_to_do: str = ""
    when_it_is_fine: str = ""
    sources: str = ""
    retired: str = ""
    """Of a code that is no longer given: the version that dropped it, and why. There is nothing else of it then."""


class CodeTitle(msgspec.Struct, frozen=True, kw_only=True):
    """A code in the list of all."""

    code: str
    title: str


class CodeList(msgspec.Struct, frozen=True, kw_only=True):
    """All codes in use."""

    codes: tuple[CodeTitle, ...]


def explanation(code: str) -> Explanation:
    """Give the page of a code in its parts.

    Raises:
        UsageError: As :func:`explain`.
    """
    page = explain(code)
    head, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    found, title = _HEADING.findall(head)[0]
    if found in RETIRED:
        return Explanation(code=found, title=title, retired=RETIRED[found])
    parts = {}
    for section in sections:
        heading, _, text = section.partition("\n")
        parts[heading.lower().replace(" ", "_")] = text.strip()
    return Explanation(code=found, title=title, summary=head.partition("\n")[2].strip(), **parts)


def code_list() -> CodeList:
    """All codes in use with their titles, in order."""
    return CodeList(codes=tuple(CodeTitle(code=code, title=title) for code, title in all_codes().items()))


def all_codes() -> dict[str, str]:
    """Every code in use, in order, with its title."""
    titles = {}
    for code, page in sorted(_pages().items()):
        match = _HEADING.match(page)
        titles[code] = match[2] if match else ""
    return titles


def _quoted(text: str) -> str:
    """Text as Markdown code, also where it has backticks itself."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def list_text() -> str:
    """All codes with their titles, Markdown text."""
    lines = ["# Codes", ""]
    lines += [f"- {code}: {title}" for code, title in all_codes().items()]
    return "\n".join([*lines, "", "`vlm-doctor explain CODE` explains one."]) + "\n"


@cache
def _pages() -> dict[str, str]:
    """Code to page. A page in ``data/pages`` begins with ``# VLM701: title``, as the generated ones do."""
    from .data.by_hand import BY_HAND
    from .data.by_hand_machine import BY_HAND_MACHINE

    pages = {check.code: check.page for check in CHECKS}
    for entry in files("vlm_doctor.data").joinpath("pages").iterdir():
        if entry.name.endswith(".md"):
            pages[entry.name.removesuffix(".md")] = entry.read_text(encoding="utf-8")
    pages |= _error_pages()
    by_hand = BY_HAND | BY_HAND_MACHINE
    return {code: _with_section(page, by_hand.get(code)) for code, page in pages.items()}


def _with_section(page: str, by_hand: str | None) -> str:
    """A page with how to look by hand before what to do, unless it says so itself."""
    if by_hand is None or _BY_HAND in page:
        return page
    before, heading, after = page.partition("## What to do\n")
    return f"{before}{_BY_HAND}\n{by_hand}\n\n{heading}{after}" if heading else page


def _error_pages() -> dict[str, str]:
    """Pages of errors that only a log shows, from the texts by which they are recognized."""
    from .data.error_codes import ERROR_CODES
    from .data.known_texts import all_known_texts

    texts = all_known_texts()
    pages = {}
    for one in ERROR_CODES:
        own = [known for known in texts if known.code == one.code]
        examples = "\n".join(f"- {_quoted(known.example)}\n  {known.says}" for known in own)
        meanings = "An error that a program meets; `vlm-doctor explain-error` recognizes it in a log."
        sources = "; ".join(dict.fromkeys(known.source for known in own))
        pages[one.code] = (
            f"# {one.code}: {one.title}\n\n{meanings}\n\n"
            "## What it checks\nThe text of an error given to `vlm-doctor explain-error`. A machine does not show it.\n\n"
            f"## Why it matters\n{one.why}\n\n## Example\n{examples}\n\n{_BY_HAND}\n{one.look}\n\n"
            f"## What to do\n{one.do}\n\n## When it is fine\n{one.fine}\n\n## Sources\n{sources}.\n"
        )
    return pages
