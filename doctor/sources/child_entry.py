"""First file of every child process: makes a small room in which a program of ours can run, crash or talk.

Run as ``python child_entry.py FD FOLDER PROGRAM DEADLINE_S ARGUMENTS``. It must not import anything of ours the usual
way: the folder of this file comes off ``sys.path`` first, so that no file name here can shadow a module of anybody, and
the program is then loaded under a package name of its own. ``vlm_doctor`` need not be importable in the child.
"""

from __future__ import annotations

import sys

# With PYTHONSAFEPATH=1 it is not on it, and what is first is somebody's own.
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

import importlib
import json
import os
import signal
import types
from collections.abc import Callable
from typing import Any

ALARM_GRACE_S = 2.0
"""After the deadline the parent kills the child; this much later the child's own alarm does, should the parent be gone."""

Say = Callable[..., None]
"""``say(stage, answer, is_final=False)``: what is known so far. The last answer said survives a crash or a hang."""


def talk_through(descriptor: int) -> Say:
    """Make the function with which a program answers, one JSON line a time, on a pipe that no library prints to."""

    def say(stage: str, answer: dict[str, Any], *, is_final: bool = False, error: str | None = None) -> None:
        whole = {"stage": stage, "answer": answer, "is_final": is_final, "error": error}
        # Half a character, as in the name of a file that is not UTF-8, is no JSON: it becomes a question mark.
        data = f"{json.dumps(whole, default=_plain, ensure_ascii=False)}\n".encode("utf-8", "replace")
        while data:
            data = data[os.write(descriptor, data) :]

    return say


def _plain(value: Any) -> str:
    """Values that JSON does not know: old bindings give bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def describe(error: BaseException) -> str:
    """``ImportError: libcudart.so.12: cannot open shared object file``, at most 1,000 characters."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - border: the error of a broken library may be broken, too
        text = "its message cannot be read"
    return f"{type(error).__name__}: {text}"[:1000].rstrip(": ")


def run(folder: str, program: str, say: Say, arguments: dict[str, Any]) -> None:
    """Run ``main(say, **arguments)`` of the program in ``folder``; whatever it raises becomes an answer."""
    room = types.ModuleType("vlm_doctor_child")
    room.__path__ = [folder]
    sys.modules[room.__name__] = room
    try:
        importlib.import_module(f"{room.__name__}.{program}").main(say, **arguments)
    except BaseException as error:  # noqa: BLE001 - border: a library may even raise SystemExit while it is imported
        say("error", {}, is_final=True, error=describe(error))


def main(argv: list[str]) -> None:
    """Set the alarm, send what libraries print to stderr, and run the program."""
    descriptor, folder, program, deadline_s = int(argv[1]), argv[2], argv[3], float(argv[4])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, deadline_s + ALARM_GRACE_S)
    os.set_inheritable(descriptor, False)
    run(folder, program, talk_through(descriptor), json.loads(argv[5]))


if __name__ == "__main__":
    main(sys.argv)
    # Everything has been said: a library that crashes or lingers while it is torn down shall not matter.
    os._exit(0)
