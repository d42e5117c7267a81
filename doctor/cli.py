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
    try:
        return _run(words)
    except Exception as error:  # noqa: BLE001 - last border: no error may reach the user as a traceback
        try:
            return _tell(error, words)
        except Exception:  # noqa: BLE001 - what tells it is itself among what is broken, as where msgspec is
            return _tell_plainly(error, words)


def _tell(error: Exception, words: list[str]) -> int:
    from .arguments import failure_style
    from .errors import OutputError, VlmDoctorError

    if isinstance(error, VlmDoctorError):
        # Where standard output cannot be written, only standard error can say why.
        style = "text" if isinstance(error, OutputError) else failure_style(words)
        return _fail(type(error).__name__, str(error), error.exit_status, style=style)
    from .own_failure import own_failure

    failure = own_failure(error)
    return _fail(failure.kind, failure.sentence, FAILED, style=failure_style(words))


def _tell_plainly(error: Exception, words: list[str]) -> int:
    """Tell it with what Python brings."""
    import json

    from .own_failure import own_failure

    kind, sentence = own_failure(error)
    shown = ascii(" ".join(sentence.split()))[1:-1][:MAX_MESSAGE_CHARS]
    if "--json" in words:
        text = json.dumps({"error": {"type": kind, "message": shown}, "exit_status": FAILED}, indent=2)
        stream = sys.stdout
    else:
        text, stream = f"vlm-doctor: {shown}", sys.stderr
    if stream is not None:
        stream.write(f"{text}\n")
    return FAILED


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
