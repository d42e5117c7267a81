"""Projects in folders of their own, run by pytest in processes of their own, on a made-up machine that they share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from pytest_vlmgpu.leasing.leases import Leases
from vlm_doctor.units import GIB

from ..until import LIMIT_S

with_workers = pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")

UUIDS = [f"GPU-{index:08d}-0000-0000-0000-000000000000" for index in range(4)]
ONE_MODEL = """
import pytest
@pytest.mark.vlm("org/a")
def test_a(vlm): pass
def test_free(): pass
"""
SLOW = """
import pathlib, pytest, time
@pytest.mark.vlm("org/a")
def test_a(vlm):
    pathlib.Path("started").touch()
    while not pathlib.Path("go").exists(): time.sleep(0.05)
"""
LOAD = re.compile(r"LOAD (?P<model>\S+) gpus=(?P<gpus>\S+) worker=(?P<worker>\S+) sees=(?P<sees>\S+)")


@dataclass
class Project:
    """A folder with tests, on a made-up machine that other projects may share."""

    folder: Path
    shared: Path
    environment: dict[str, str] = field(default_factory=dict)
    conftest: str = ""
    """Behind that of all these projects."""

    def start(self, *arguments: str, **files: str) -> subprocess.Popen[str]:
        self.folder.mkdir(exist_ok=True)
        for name, source in (("conftest", "shared_project"), ("made_up_plans", "made_up_plans")):
            text = Path(__file__).with_name(f"{source}.py").read_text()
            (self.folder / f"{name}.py").write_text(text + (self.conftest if name == "conftest" else ""))
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(text)
        plugins = [word for name in ("cacheprovider", "hypothesispytest", "anyio") for word in ("-p", f"no:{name}")]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *plugins, *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, **files: str) -> tuple[str, dict[str, int]]:
        """Output, and how many tests ended how."""
        return finish(self.start(*arguments, **files))

    def loads(self) -> list[dict[str, str]]:
        log = self.shared / "log.txt"
        return [match.groupdict() for match in LOAD.finditer(log.read_text())] if log.exists() else []

    def models(self) -> list[str]:
        return sorted(load["model"] for load in self.loads())

    def hold(self, index: int, gib: float, pid: int) -> Path:
        """Let a process take memory."""
        (self.shared / "memory").mkdir(exist_ok=True)
        path = self.shared / "memory" / f"{UUIDS[index]}.{pid}"
        path.write_text(str(int(gib * GIB)))
        return path


def read_until(run: subprocess.Popen[str], wanted: str) -> str:
    """What a run prints up to a line with some text."""
    assert run.stdout is not None
    lines: list[str] = []
    for line in run.stdout:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def finish(run: subprocess.Popen[str], before: str = "") -> tuple[str, dict[str, int]]:
    if before:  # partly read already, so that some of the rest is in our own buffer
        assert run.stdout is not None
        text = before + run.stdout.read()
        run.wait(LIMIT_S)
        run.stdout.close()
    else:
        text, _ = run.communicate(timeout=LIMIT_S)
    assert "INTERNALERROR" not in text, text
    last = [line for line in text.splitlines() if re.search(r"=+ .*in [0-9.]+s", line)]
    counts = {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last[-1])} if last else {}
    return text, counts


def plan_lines(result: pytest.RunResult) -> list[str]:
    """What ``--vlm-plan`` prints below its heading."""
    start = next(number for number, line in enumerate(result.outlines) if line.strip("= ") == "vlmgpu plan")
    return result.outlines[start + 1 : -1]


def is_held(leases: Leases, *gpus: str, by: str = "") -> bool:
    """Whether all of these are held by somebody else; what is free is not kept."""
    taken = leases.take(gpus)
    leases.release()
    return set(taken) == set(gpus) and all(by in holder for holder in taken.values())
