"""Makes text from outside harmless. Without rich, since machine formats need it too."""

from __future__ import annotations

MAX_TEXT_CHARS = 1500
"""More than any message of ours; a longer one was not made by the doctor."""

_ASCII = str.maketrans({"×": "x", "…": "...", "→": "->", "–": "-", "—": "-", "·": "-", "≥": ">=", "≤": "<=", "’": "'"})


def inert(text: str, *, limit: int = MAX_TEXT_CHARS, is_unicode: bool = True) -> str:
    r"""Make text harmless on a terminal.

    Args:
        text: Any text.
        limit: Characters kept; what is cut off is replaced by an ellipsis.
        is_unicode: False writes everything in ASCII.

    Returns:
        One line: white space becomes a space, and what cannot be printed (control characters, direction marks,
        surrogates) becomes its escape, such as ``\x1b``.
    """
    shown = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    if not shown.isprintable():
        shown = "".join(map(_printable, shown))
    return shown if is_unicode else shown.translate(_ASCII).encode("ascii", "backslashreplace").decode()


def _printable(char: str) -> str:
    if char.isprintable():
        return char
    return " " if char.isspace() else char.encode("unicode_escape").decode()
