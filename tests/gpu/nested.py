"""A suite of its own, run by pytest in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pytest


def run_suite(folder: Path, suite: str, config: pytest.Config, *arguments: str) -> str:
    """Output of a run, which is shown too."""
    text, _ = start_suite(folder, suite, config, "-v", *arguments).communicate()
    sys.stdout.write(text)
    return text


def start_suite(
    folder: Path, suite: str, config: pytest.Config, *arguments: str, environment: Mapping[str, str] = os.environ
) -> subprocess.Popen[str]:
    """The run, as it goes on."""
    (folder / "test_x.py").write_text(suite)
    # The project need not be installed.
    plugin = [] if config.pluginmanager.has_plugin("vlmgpu") else ["-p", "pytest_vlmgpu.plugin"]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        # The run around this one may have leased the GPUs, and has room on them.
        env={**environment, "VLMGPU_LEASE_DIR": str(folder / "leases")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
