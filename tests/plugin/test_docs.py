"""The pages of docs/plugin are real: their files are written, their commands are run, and what they show is what comes."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pytest_vlmgpu import declare
from vlm_doctor.codes import all_codes

FOLDER = Path(__file__).parents[2] / "docs" / "plugin"
PAGES = sorted(FOLDER.glob("*.md"))


class Command(NamedTuple):
    line: str
    shown: list[str]
    """Lines that must come, in this order; ``...`` stands for anything."""


def files(page: Path) -> dict[str, str]:
    """Fenced blocks that begin with the comment ``# name.ext``."""
    found = re.findall(r"```(?:python|ini|toml)\n# ([\w./]+)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(dict(found)) == len(found), f"{page.name} shows a file twice"
    return dict(found)


def commands(page: Path) -> list[Command]:
    """Lines of ``console`` blocks that begin with ``$``, each with what it prints."""
    found: list[Command] = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Command(line[2:], []))
            else:
                found[-1].shown.append(line)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    for name, text in files(page).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    given = [f"{prefix}{setting.name.upper()}" for setting in declare.SETTINGS for prefix in declare.ENVIRONMENT_PREFIXES]
    environment = {name: value for name, value in os.environ.items() if name not in given}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "400"}
    environment |= {"PYTEST_ADDOPTS": "-p no:cacheprovider -p no:hypothesispytest", "HF_HUB_OFFLINE": "1"}
    for name in ("GITHUB_ACTIONS", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)

    for command in commands(page):
        run = subprocess.run(
            ["bash", "-c", command.line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        printed = run.stdout.splitlines() + run.stderr.splitlines() + run.stdout.splitlines()
        position = 0
        for line in command.shown:
            pattern = re.sub(r"([\[\]?*])", r"[\1]", line).replace("...", "*")
            while position < len(printed) and not fnmatch.fnmatchcase(printed[position], pattern):
                position += 1
            assert position < len(printed), f"{line!r} is not printed by {command.line}:\n{run.stdout}{run.stderr}"


def test_bash_is_there() -> None:
    assert shutil.which("bash"), "the commands of the pages are for bash"


@pytest.mark.parametrize("page", [*PAGES, *FOLDER.parent.glob("*.md"), FOLDER.parents[1] / "README.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))

    missing = [name for name in targets if "://" not in name and not (page.parent / name).exists()]

    assert missing == []


def test_every_option_is_in_one_table() -> None:
    tables = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    described = set(re.findall(r"^\| `(--vlm-[\w-]+)", tables, flags=re.MULTILINE))

    assert described == {declare.option_of(setting.name) for setting in declare.SETTINGS}
    for setting in declare.SETTINGS:
        if not setting.is_option_only:
            assert f"`vlm_{setting.name}` | `VLMGPU_{setting.name.upper()}`" in tables


def test_every_gate_code_is_in_one_table() -> None:
    tables = "".join(page.read_text(encoding="utf-8") for page in PAGES)

    assert set(re.findall(r"^\| (VLM\d+) \|", tables, flags=re.MULTILINE)) == {
        code for code in all_codes() if code[3] == "7"
    }


def test_every_decorator_is_described() -> None:
    from pytest_vlmgpu import shim

    page = (FOLDER / "adopting.md").read_text(encoding="utf-8")
    assert [name for name in shim.__all__ if f"`{name}" not in page] == []


def test_the_example_about_workers_loads_each_model_once(suite: Any) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    page = (Path(__file__).parents[2] / "docs" / "plugin" / "xdist.md").read_text(encoding="utf-8")
    example = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", page, flags=re.DOTALL))["test_two_models"]
    names = {"llava-hf/llava-1.5-7b-hf": "org/a", "Qwen/Qwen2.5-VL-3B-Instruct": "org/b"}
    for name, size in names.items():
        example = example.replace(name, size)

    result = suite.run("-n2", test_two_models=example)

    result.assert_outcomes(passed=24)
    assert sorted(line for line in suite.loads() if line.startswith("LOAD")) == ["LOAD org/a", "LOAD org/b"]
