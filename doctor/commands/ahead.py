"""Loads what the answer will need while NVML is still being asked: with eight GPUs that takes longer than anything else.

Nothing is computed here, and no answer depends on it: a module that is missing from these lists is loaded later, as ever.
"""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable

from ..formats import FORMATS

_PACKAGE = __package__.rpartition(".")[0]
_JUDGING = (".answer", ".verdict", ".checks", ".check_clock", "packaging.requirements")
_TEXT = (".formats.chain_text", ".formats.plan_text", ".formats.to_python", "rich.align", "rich.columns", "rich.table")
"""What text for people takes in late."""
_MODEL = (".sources.model_files", ".sources.checkpoint_folder", ".sources.catalogue")
_PLANNING = (".planner", ".planner.planning")
_WHOLE_PLAN = (".planner.auto", ".planner.limits", ".planner.levers", ".planner.cards")
_CHECKING_A_MAP = (".planner.map_check",)
_GATE = (".gate", ".formats.gate_text")
_OF_COMMAND: dict[str, tuple[str, ...]] = {
    "check": (*_MODEL, *_PLANNING),
    "plan": (*_PLANNING, *_WHOLE_PLAN),
    "try": (*_PLANNING, *_WHOLE_PLAN),
    "check-map": (*_PLANNING, *_CHECKING_A_MAP),
    "gate": _GATE,
    "explain": (),
    "explain-error": (),
}
"""Command that judges a machine to what else it needs where there are GPUs."""


def loader(options: Namespace) -> Callable[[bool], None]:
    """What loads ahead for the command of the options; to be called with whether there may be GPUs."""

    def load(has_gpus: bool) -> None:
        if options.command not in _OF_COMMAND:
            return
        of_format = FORMATS.get(getattr(options, "format", ""))
        names = [
            *_JUDGING,
            *([f".formats.{of_format}"] if of_format else ()),
            *(_TEXT if of_format == "to_terminal" else ()),
        ]
        if has_gpus:
            names += _OF_COMMAND[options.command]
        for name in names:
            importlib.import_module(name, _PACKAGE)

    return load
