"""What the README and docs/doctor.md show is what the program does. ``VLM_UPDATE_GOLDEN=1`` puts the real text there."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from vlm_doctor import cli
from vlm_doctor.options import parse

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
REPORT = re.compile(r"```console\n\$ vlm-doctor (?P<words>--machine \S+)\n(?P<text>.*?)```", re.DOTALL)
EXAMPLE = re.compile(r"```python\n(?P<text>.*?)```", re.DOTALL)
OPTION = re.compile(r"--[a-z][a-z-]*")


def replace_once(pattern: re.Pattern[str], text: str) -> str:
    """The README with ``text`` in the place of the group of that name."""
    readme = README.read_text(encoding="utf-8")
    match = pattern.search(readme)
    assert match is not None
    whole = readme[: match.start("text")] + text + readme[match.end("text") :]
    if os.environ.get("VLM_UPDATE_GOLDEN") == "1":
        README.write_text(whole, encoding="utf-8")
    return whole


def test_the_report_in_the_readme_is_real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match = REPORT.search(README.read_text(encoding="utf-8"))
    assert match is not None

    with pytest.raises(SystemExit):
        cli.main(shlex.split(match["words"]))

    text = re.sub(r"Took [\d.]+ s", "Took 0.10 s", capsys.readouterr().out)
    assert replace_once(REPORT, text) == README.read_text(encoding="utf-8")


def test_the_test_in_the_readme_is_the_example() -> None:
    example = (ROOT / "examples" / "test_describe_image.py").read_text(encoding="utf-8")
    test = example[example.index("@pytest.mark.vlm") :].replace("vlm: LoadedVlm) -> None", "vlm)")

    assert replace_once(EXAMPLE, f"import pytest\n\n\n{test}") == README.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["check", "plan", "collect", "calibrate"])
def test_the_documentation_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    options = set(OPTION.findall(capsys.readouterr().out)) - {"--help"}

    documented = set(OPTION.findall((ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")))

    assert options <= documented


def test_every_option_in_the_documentation_exists(capsys: pytest.CaptureFixture[str]) -> None:
    options = set()
    for command in ("check", "plan", "collect"):
        with pytest.raises(SystemExit):
            parse([command, "--help"])
        options |= set(OPTION.findall(capsys.readouterr().out))

    assert set(OPTION.findall((ROOT / "docs" / "doctor.md").read_text(encoding="utf-8"))) <= options


def words_of(name: str) -> str:
    return " ".join((ROOT / name).read_text("utf-8").split())


def test_the_figures_of_the_architectures_are_those_of_their_page() -> None:
    readme, page = words_of("README.md"), words_of("docs/architectures.md")

    said = re.search(r"Of (\d+) architectures of transformers ([\d.]+), .* crashes none; .* own maps crash (\d+),", readme)
    found = re.search(r"Of (\d+) architectures that were run, .* crashes on 0; .* crashes on (\d+)\.", page)
    release = re.search(r"transformers (\d+\.\d+)", page)

    assert said is not None
    assert found is not None
    assert release is not None
    assert said.groups() == (found[1], release[1], found[2])


def test_the_figures_of_gpus_are_those_that_were_measured() -> None:
    readme, page, measured = map(words_of, ("README.md", "docs/architectures.md", "benchmarks/README.md"))
    ran = re.search(r"The (\d+) image-text-to-text .* crashed none of them, .* crashed (\d+), and", readme)
    stages = re.search(r"Over (\d+) stages of six models .* within ([\d.]+) %", readme)
    rows = re.findall(r"\| scripts \| allocated \| \w+ \| (\d+) \| [\d.]+ % \| [\d.]+ % \| ([\d.]+) % \|", measured)
    found = re.search(r"where (\d+) of \d+ ran: .* fails on 0; .*? fails on (\d+)\.", page)

    assert ran is not None
    assert stages is not None
    assert found is not None
    assert ran.groups() == found.groups()
    assert int(stages[1]) == sum(int(count) for count, _ in rows)
    assert max(float(largest) for _, largest in rows) <= float(stages[2])


def test_every_result_that_is_kept_is_told_of() -> None:
    told = words_of("benchmarks/README.md")

    assert [path.name for path in (ROOT / "benchmarks" / "results").iterdir() if f"results/{path.name}" not in told] == []
