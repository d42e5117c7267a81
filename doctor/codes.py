"""The page of every code: from the docstring of its check, or for codes without a check from ``data/pages``."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib.resources import files

from .checks import CHECKS, RETIRED
from .errors import UsageError

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
        near = difflib.get_close_matches(wanted[:20], _pages(), n=3, cutoff=0.8)
        hint = f"did you mean {' or '.join(near)}?" if near else "codes are VLM and three digits, such as VLM501."
        raise UsageError(f"There is no code {code[:20]!a}; {hint}")
    return page


def all_codes() -> dict[str, str]:
    """Every code in use, in order, with its title."""
    titles = {}
    for code, page in sorted(_pages().items()):
        match = _HEADING.match(page)
        titles[code] = match[2] if match else ""
    return titles


@cache
def _pages() -> dict[str, str]:
    """Code to page. A page in ``data/pages`` begins with ``# VLM701: title``, as the generated ones do."""
    pages = {check.code: check.page for check in CHECKS}
    for entry in files("vlm_doctor.data").joinpath("pages").iterdir():
        if entry.name.endswith(".md"):
            pages[entry.name.removesuffix(".md")] = entry.read_text(encoding="utf-8")
    return pages
