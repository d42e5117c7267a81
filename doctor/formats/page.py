"""A page of terminal text: fixed width, color or none, Unicode or plain ASCII, and nothing on it that can act.

Names and messages may come from a snapshot that somebody else wrote. Whatever is put on a page is made inert first: no
control character, escape sequence or markup of its own reaches the terminal.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .inert import inert
from .look import DEFAULT_WIDTH

__all__ = ["Column", "Page", "Piece", "inert"]

MIN_WIDTH = 40
MAX_WIDTH = 110
"""Longer lines are hard to read."""

Piece = str | tuple[str, str]
"""Text, or text with a style of rich, such as ``("error", "bold red")``."""

_GLUE = "\ue000"
"""Stands for a space that is no place to break a line. It cannot be in the text: :func:`inert` escapes it."""
_NO_BREAK = re.compile(r"(?<=\d) (?=[KMG]?i?B\b)|(?<=\bGPU) (?=\d)|(?<=\w) (?=\d+\.\d+\.\d)")
"""Between a number and its unit, GPU and its index, a package and its version."""


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    justify: Literal["left", "right"] = "left"
    is_flexible: bool = False
    """True lets the column wrap when the table is too wide; the others keep their width."""


class Page:
    """Lines of text under construction."""

    def __init__(self, *, width: int = DEFAULT_WIDTH, color: bool = False, is_unicode: bool = True) -> None:
        """Start an empty page of ``width`` columns, kept between 40 and 110."""
        self.width = max(MIN_WIDTH, min(width, MAX_WIDTH))
        self.is_unicode = is_unicode
        self._file = io.StringIO()
        # Everything that rich would ask the environment is answered here: a page depends on its arguments alone.
        self._console = Console(
            file=self._file,
            width=self.width,
            height=25,
            color_system="standard" if color else None,
            force_terminal=color,
            no_color=not color,
            markup=False,
            highlight=False,
            emoji=False,
            legacy_windows=False,
            _environ={},
        )

    def text(self, *pieces: Piece, indent: int = 0) -> None:
        """Write a paragraph, wrapped between words."""
        self._paragraph(Text(" " * indent), self._text(pieces))

    def item(self, marker: Piece, *pieces: Piece, indent: int = 0, marker_width: int | None = None) -> None:
        """Write a paragraph beside a marker, such as a bullet or a heading of ``marker_width`` columns."""
        start = Text(" " * indent).append_text(self._text((marker,)))
        start.pad_right(max(indent + (marker_width or 0) - start.cell_len, 0) + 1)
        self._paragraph(start, self._text(pieces))

    def ends(self, left: Sequence[Piece], right: Piece) -> None:
        """Write a line with ``right`` at its end; where there is no room, ``left`` wraps."""
        grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
        grid.add_column(ratio=1, overflow="fold")
        grid.add_column(no_wrap=True, justify="right")
        grid.add_row(self._text(left), self._text((right,)))
        self._console.print(grid)

    def legend(self, entries: Iterable[str], *, indent: int = 0) -> None:
        """Write entries one after the other, dimmed; lines break between entries only, as far as they are short."""
        text = Text(", ", style="dim").join(
            Text(inert(entry, is_unicode=self.is_unicode).replace(" ", _GLUE)) for entry in entries
        )
        self._paragraph(Text(" " * indent), text)

    def verbatim(self, text: str, *, indent: int = 4, style: str = "") -> None:
        """Write a line to copy, such as a command: never wrapped, since a wrapped command cannot be pasted."""
        self._console.print(self._text((" " * indent, (text, style))), soft_wrap=True)

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[Piece]]) -> None:
        """Write a table without lines, headings dimmed."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for column in columns:
            table.add_column(
                self._text((column.heading,)), justify=column.justify, no_wrap=not column.is_flexible, overflow="fold"
            )
        for row in rows:
            table.add_row(*(self._text((cell,)) for cell in row))
        self._console.print(Padding(table, (0, 0, 0, 2)))

    def gap(self) -> None:
        """Leave one line empty, never two, and none at the top."""
        if self._file.tell() and not self._file.getvalue().endswith("\n\n"):
            self._file.write("\n")

    def render(self) -> str:
        """Return the text, without spaces at the ends of lines."""
        lines = (line.rstrip() for line in self._file.getvalue().strip("\n").replace(_GLUE, " ").split("\n"))
        return "\n".join(lines) + "\n"

    def _paragraph(self, start: Text, text: Text) -> None:
        """Write a text behind the start of its first line. Rich's grids do the same in three times the time."""
        lines = text.wrap(self._console, max(self.width - start.cell_len, 1))
        margin = Text("\n" + " " * start.cell_len)
        self._console.print(start + margin.join(lines), soft_wrap=True)

    def _text(self, pieces: Iterable[Piece]) -> Text:
        text = Text(overflow="fold")
        for piece in pieces:
            words, style = (piece, "") if isinstance(piece, str) else piece
            text.append(_NO_BREAK.sub(_GLUE, inert(words, is_unicode=self.is_unicode)), style or None)
        return text
