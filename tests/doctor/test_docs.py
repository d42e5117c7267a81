"""What the pages about the doctor show is what it does. ``VLM_UPDATE_GOLDEN=1`` puts the real text there."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from vlm_doctor import cli
from vlm_doctor.expectations import ProjectSettings
from vlm_doctor.options import parse
from vlm_doctor.sources.project_file import read_project

ROOT = Path(__file__).parents[2]
PAGES = [
    "docs/doctor.md",
    "docs/try.md",
    "docs/ci.md",
    "docs/explain-error.md",
    "docs/plan.md",
    "docs/check-map.md",
    "docs/models.md",
]
BLOCK = re.compile(r"```console\n(?P<text>.*?)```", re.DOTALL)
COMMAND = re.compile(r"^\$ vlm-doctor ?(?P<words>[^|>\n]*)", re.MULTILINE)
SHOWN = re.compile(r"```console\n\$ vlm-doctor (?P<words>[^\n|>]*--machine [^\n|>]*)\n(?P<out>.*?)```", re.DOTALL)
RUN = ["docs/ci.md", "docs/explain-error.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_a_page_can_be_understood(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for block in BLOCK.finditer(text):
        for command in COMMAND.finditer(block["text"]):
            parse(shlex.split(command["words"]))


@pytest.mark.parametrize("page", RUN)
def test_every_output_on_a_page_is_real(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / page
    whole = path.read_text("utf-8")
    real = whole
    assert SHOWN.search(whole)
    for shown in SHOWN.finditer(whole):
        with pytest.raises(SystemExit):
            cli.main(shlex.split(shown["words"]))
        out = capsys.readouterr().out
        block = f"```console\n$ vlm-doctor {shown['words']}\n"
        real = real.replace(f"{block}{shown['out']}```", f"{block}{out}```")
    if os.environ.get("VLM_UPDATE_GOLDEN") == "1":
        path.write_text(real, encoding="utf-8")
    assert real == path.read_text("utf-8")


def test_the_table_on_the_page_is_read(tmp_path: Path) -> None:
    table = re.search(r"```toml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text("utf-8"), re.DOTALL)
    assert table is not None
    (tmp_path / "pyproject.toml").write_text(table[1], "utf-8")

    settings = read_project(tmp_path).settings

    assert {name for name in ProjectSettings.__struct_fields__ if f"\n{name} = " in table[1]} == set(
        ProjectSettings.__struct_fields__
    )
    assert settings.gpus == 2


@pytest.mark.parametrize(
    ("command", "page"), [("gate", "docs/ci.md"), ("try", "docs/try.md"), ("explain-error", "docs/explain-error.md")]
)
def test_a_page_names_every_option(command: str, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    options = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help", "--output", "--gpus"}
    documented = (ROOT / page).read_text("utf-8") + (ROOT / "docs" / "doctor.md").read_text("utf-8")

    assert options <= set(re.findall(r"--[a-z][a-z-]*", documented))


def test_outputs_of_a_step_on_the_page_are_those_that_are_written() -> None:
    from vlm_doctor.answers import GateAnswer
    from vlm_doctor.formats.gate_text import step_outputs

    page = (ROOT / "docs" / "ci.md").read_text("utf-8")

    for name in step_outputs(GateAnswer(is_met=False, reason="x")):
        assert f"`{name}`" in page
    assert set(re.findall(r"outputs\.([a-z-]+)", page)) - {"run", "gpus"} <= set(
        step_outputs(GateAnswer(is_met=False, reason="x"))
    )
