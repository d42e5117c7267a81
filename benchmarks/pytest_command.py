"""How the programs here start pytest: the plugin need not be installed, and nothing of the caller's settings counts."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

_PLUGINS = {"vlmgpu": "pytest_vlmgpu.plugin", "xdist": "xdist.plugin"}
"""Name of each plugin that is wanted, and its module."""


def pytest_command(*arguments: str) -> list[str]:
    """The command line; a plugin that pytest would not find by itself is named in it, and so reaches the workers too."""
    found = {entry.name for entry in entry_points(group="pytest11")}
    named = [word for name, module in _PLUGINS.items() if name not in found for word in ("-p", module)]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *named, *arguments]


def pytest_environment(**variables: str) -> dict[str, str]:
    """The caller's environment without settings of pytest and the plugin, and with some variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "VLMGPU_")) and name != "GITHUB_ACTIONS"
    }
    return {**kept, "HF_HUB_OFFLINE": "1", **variables}
