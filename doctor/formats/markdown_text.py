"""Markdown, such as the explanation of a code, for a terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.markdown import Markdown

from .look import Look
from .page import MAX_WIDTH


def render(text: str, look: Look) -> str:
    """Write Markdown of our own (it is not made inert) as terminal text."""
    file = io.StringIO()
    console = Console(
        file=file,
        width=min(look.width, MAX_WIDTH),
        height=25,
        color_system="standard" if look.color else None,
        force_terminal=look.color,
        no_color=not look.color,
        legacy_windows=False,
        _environ={},
    )
    console.print(Markdown(text))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
