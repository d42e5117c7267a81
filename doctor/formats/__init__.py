"""Reports as text: one file a format, each a pure function of the report. Adding one is a file and a line here."""

from __future__ import annotations

import importlib

from ..errors import UsageError
from ..report import Report
from .look import DEFAULT_WIDTH, Look

__all__ = ["FORMATS", "Look", "render"]

FORMATS: dict[str, str] = {
    "terminal": "to_terminal",
    "json": "to_json",
    "python": "to_python",
    "yaml": "to_yaml",
    "github": "to_github",
    "junit": "to_junit",
    "sarif": "to_sarif",
    "markdown": "to_markdown",
}
"""Format to the module of this package that writes it. Modules are loaded on use: only text for people needs rich."""


def render(
    report: Report,
    format: str,  # noqa: A002 - the word of the command line
    *,
    width: int | None = None,
    color: bool = False,
    is_unicode: bool = True,
    verbose: bool = False,
    machine_option: str = "",
) -> str:
    """Write a report.

    Args:
        report: What to write.
        format: A key of :data:`FORMATS`.
        width: Columns; ``None`` is 80. This and the following matter to text for people only.
        color: Use ANSI colors.
        is_unicode: False where the output cannot show more than ASCII.
        verbose: Also what passed, what did not apply, evidence and links.
        machine_option: What commands in the text need to name the same machine, such as `` --machine 2xL4``.

    Returns:
        Text that ends in a newline.

    Raises:
        UsageError: There is no such format, or it cannot hold such a report.
    """
    if format not in FORMATS:
        raise UsageError(f"--format: {format!r} is not a format; choose one of {', '.join(FORMATS)}.")
    look = Look(
        width=DEFAULT_WIDTH if width is None else width,
        color=color,
        is_unicode=is_unicode,
        verbose=verbose,
        machine_option=machine_option,
    )
    text: str = importlib.import_module(f".{FORMATS[format]}", __name__).render(report, look)
    return text
