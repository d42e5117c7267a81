"""The command line, ``vlm-doctor``: from words to an exit status, with a border that no error passes as a traceback.

Exit status, the same in every format: 0 usable; 1 an error was found (with ``--strict`` also a warning) or the plan does
not fit; 2 bad usage or unreadable input; 3 could not look; 130 interrupted. Everything is loaded late: a run has 0.3 s, and
whoever interrupts it while it is loaded gets no traceback either.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

MAX_MESSAGE_CHARS = 600
INTERRUPTED = 130
"""As shells say it: 128 and the number of SIGINT."""
FAILED = 3


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit with its status. What goes wrong ends as one sentence, never as a traceback.

    Args:
        words: Arguments without the program's name; ``None`` takes those of the process.
    """
    given = list(sys.argv[1:] if words is None else words)
    try:
        status = _guarded(given)
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def _guarded(words: list[str]) -> int:
    from .arguments import failure_style
    from .errors import OutputError, VlmDoctorError

    try:
        return _run(words)
    except OutputError as error:
        # By now standard output leads nowhere: only standard error can say why.
        return _fail(type(error).__name__, str(error), error.exit_status, style="text")
    except VlmDoctorError as error:
        return _fail(type(error).__name__, str(error), error.exit_status, style=failure_style(words))
    except Exception as error:  # noqa: BLE001 - last border: a defect must not reach the user as a traceback
        return _fail("InternalError", _confession(error), FAILED, style=failure_style(words))


def _run(words: list[str]) -> int:
    from .options import parse

    options = parse(words)
    if options.command is None:
        from . import __version__
        from .delivery import write_stdout

        write_stdout(f'{{"version": "{__version__}"}}\n' if options.json else f"vlm-doctor {__version__}\n")
        return 0
    from .commands import run

    return run(options)


def _fail(kind: str, message: str, exit_status: int, *, style: str) -> int:
    """Say what stopped the run: on standard output as JSON or as an annotation where that was asked for, else on stderr."""
    from .delivery import is_utf8, write_stderr, write_stdout
    from .errors import UsageError
    from .formats.inert import inert
    from .formats.to_json import error_json

    if len(message) > MAX_MESSAGE_CHARS:
        # Somebody's name or value is huge: what is wrong stands at the beginning, what to do at the end.
        message = f"{message[: MAX_MESSAGE_CHARS // 2]} ... {message[-MAX_MESSAGE_CHARS // 3 :]}"
    message = inert(message)
    if style in ("json", "github"):
        try:
            if style == "json":
                write_stdout(error_json(kind, message, exit_status))
            else:
                from .formats.to_github import command

                is_unicode = sys.stdout is not None and is_utf8(sys.stdout)
                write_stdout(f"{command('error', 'vlm-doctor', inert(message, is_unicode=is_unicode))}\n")
            return exit_status
        except UsageError as error:
            message = f"{message} {error}"
    write_stderr(f"vlm-doctor: {message}")
    return exit_status


def _confession(error: Exception) -> str:
    """What a maintainer needs to find a defect, in one sentence."""
    import traceback
    from pathlib import Path

    from . import __version__

    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"This is a defect of vlm-doctor {__version__}, please report it: {type(error).__name__}: {error} "
        f"({Path(place.filename).name}, line {place.lineno})."
    )
