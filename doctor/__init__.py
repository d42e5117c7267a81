"""Examine a machine with NVIDIA GPUs, say what is wrong, and place a vision-language model on it.

The folder is ``doctor/``, the import name ``vlm_doctor``. Names are loaded on first use: importing the package is free.

PYTEST_DONT_REWRITE: it comes with a plugin of pytest's, which would warn where it is imported already.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "CHECKS": "checks",
    "Diagnosis": "findings",
    "Finding": "findings",
    "Machine": "machine",
    "MapCheck": "device_map",
    "ModelProfile": "model",
    "Plan": "placement",
    "Policy": "workload",
    "Report": "report",
    "VlmDoctorError": "errors",
    "Workload": "workload",
    "Training": "workload",
    "check_map": "planner.map_check",
    "check_model": "live_model",
    "collect": "sources",
    "diagnose": "checks",
    "explain": "codes",
    "load_machine": "sources",
    "load_profile": "sources.model_files",
    "plan": "planner",
    "read_map": "sources.map_file",
    "redistribute": "live_model",
    "render": "formats",
    "suggest_gpus": "planner",
    "trace_model": "tracing",
}

__all__ = sorted([*_WHERE, "__version__"])  # noqa: PLE0605 - built from the table above, so that the two cannot differ


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'vlm_doctor' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
