"""What each command does; the names and options are in ``options``, a file here is a kind of question."""

from __future__ import annotations

import importlib
from argparse import Namespace

_WHERE = {
    "check": ("judge", "check"),
    "gate": ("judge", "gate"),
    "plan": ("place", "plan"),
    "check-map": ("place", "check_map"),
    "try": ("place", "try_model"),
    "collect": ("record", "collect"),
    "calibrate": ("record", "calibrate"),
    "explain": ("explain", "explain"),
    "explain-error": ("explain", "explain_error"),
}
"""Command to module and function; only that of the command that runs is loaded."""


def run(options: Namespace) -> int:
    """Run the command of the options; returns the exit status."""
    module, function = _WHERE[options.command]
    status: int = getattr(importlib.import_module(f".{module}", __name__), function)(options)
    return status
