"""Pytest plugin for tests with vision-language models on NVIDIA GPUs.

The plugin needs no import. These names are for annotations, and for a conftest that overrides a fixture or a hook.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Estimate": "requirements",
    "GateCode": "verdicts",
    "LoadFailure": "models.failures",
    "LoadedVlm": "models.loaded",
    "Requirements": "requirements",
    "TestImages": "fakes.images",
    "Verdict": "verdicts",
    "VlmFactory": "models.ladder",
    "VlmSpec": "requirements",
    "VramMeter": "watching.vram",
}

__all__ = sorted([*_WHERE, "__version__"])  # noqa: PLE0605 - built from the table above, so that the two cannot differ


def _leave_unrewritten() -> None:
    """Have pytest import the plugin as it imports any library.

    pytest rewrites the asserts of a plugin's modules. Wherever Python may write no bytecode (PYTHONDONTWRITEBYTECODE, as in
    many images) it compiles them anew for that in each run, 25 ms for messages that nobody sees, and there is no public way
    out. Without the attribute that is used here everything still works.
    """
    for finder in sys.meta_path:
        marked = getattr(finder, "_must_rewrite", None)
        if isinstance(marked, set):
            marked.difference_update((__name__, "vlm_doctor"))


_leave_unrewritten()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pytest_vlmgpu' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
