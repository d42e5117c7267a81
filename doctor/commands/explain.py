"""What something means: ``explain`` and ``explain-error``."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace

import msgspec

from ..answers import ErrorAnswer
from ..delivery import look_of, write_stdout
from ..machine import Machine
from ._shared import finish, is_terminal, look_for, read_machine

TORCH_CHECKS = frozenset({"VLM206", "VLM304", "VLM305"})
"""Checks that need torch's own answer."""


def explain(options: Namespace) -> int:
    """Explain a code, or list all of them."""
    if options.json:
        from .. import codec
        from ..codes import code_list, explanation

        write_stdout(codec.to_json(code_list() if options.code is None else explanation(options.code)))
        return 0
    from ..codes import explain as explain_code
    from ..codes import list_text

    text = list_text() if options.code is None else explain_code(options.code)
    if is_terminal():
        from ..formats.markdown_text import render

        text = render(text, look_of(sys.stdout, environment=os.environ))
    write_stdout(text)
    return 0


def explain_error(options: Namespace) -> int:
    """Explain a log or a traceback."""
    started = time.perf_counter()
    look = look_for(options)
    from ..sources.log_file import read_log

    if options.file == "-" and sys.stdin is not None and sys.stdin.isatty() and sys.stderr is not None:
        sys.stderr.write("Paste a log or a traceback, then press Ctrl-D.\n")
    log = read_log(options.file)
    from ..error_answer import answer_error

    where = "standard input" if options.file == "-" else options.file
    answer = answer_error(log.text, where=where, skipped_bytes=log.skipped_bytes)
    from ..answer import error_report
    from ..check_clock import CheckClock

    clock = CheckClock()
    report = error_report(answer, _machine_for(answer, options), by=clock)
    report = msgspec.structs.replace(report, notes=clock.notes(), seconds=time.perf_counter() - started)
    return finish(report, options, look)


def _machine_for(answer: ErrorAnswer, options: Namespace) -> Machine:
    """The machine to compare with. torch is asked only where one of the checks that count needs its answer."""
    return read_machine(options, wants_torch=not TORCH_CHECKS.isdisjoint(answer.checks))
