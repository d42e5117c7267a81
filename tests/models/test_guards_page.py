"""The example of docs/plugin/guards.md is real: its files are written, its commands are run, and its lines come."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.models

PAGE = (Path(__file__).parents[2] / "docs" / "plugin" / "guards.md").read_text(encoding="utf-8")


def test_the_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    for name, text in re.findall(r"```python\n# ([\w./]+)\n(.*?)```", PAGE, flags=re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    script = re.search(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    shown = re.search(r"```text\n(\*ERROR.*?)```", PAGE, flags=re.DOTALL)
    assert script is not None
    assert shown is not None
    environment = {**os.environ, "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:hypothesispytest", "COLUMNS": "400"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    run = subprocess.run(
        ["bash", "-c", script[1]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    printed = iter(run.stdout.splitlines())
    for line in shown[1].splitlines():
        # How many modules a family has depends on the version of transformers.
        pattern = re.sub(r"\d+ modules", "* modules", re.sub(r"([\[\]?])", r"[\1]", line))
        assert any(fnmatch.fnmatchcase(found.strip("= ") if "passed" in line else found, pattern) for found in printed), (
            f"{line!r} is not printed:\n{run.stdout}{run.stderr}"
        )
