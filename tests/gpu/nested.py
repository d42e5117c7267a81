"""A suite of its own, run by pytest in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def run_suite(folder: Path, suite: str, config: pytest.Config, *arguments: str) -> str:
    """Output of a run, which is shown too."""
    (folder / "test_x.py").write_text(suite)
    # The project need not be installed.
    plugin = [] if config.pluginmanager.has_plugin("vlmgpu") else ["-p", "pytest_vlmgpu.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "-v", *arguments],
        cwd=folder,
        # The run around this one may have leased the GPUs, and has room on them.
        env={**os.environ, "VLMGPU_LEASE_DIR": str(folder / "leases")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    return done.stdout
