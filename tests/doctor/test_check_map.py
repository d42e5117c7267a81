"""check-map as a user meets it, and its page: what is shown there runs."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor import cli
from vlm_doctor.options import parse
from vlm_doctor.planner.map_question import TITLES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "check-map.md").read_text(encoding="utf-8")
MODEL = "llava-hf/llava-1.5-7b-hf"
OPTION = re.compile(r"--[a-z][a-z-]*")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["check-map", *words])
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return run


def written(path: Path, device_map: Any) -> str:
    path.write_text(json.dumps(device_map), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("device_map", "status"),
    [({"": 0}, 0), ({"": 0, "lm_head": 1}, 0), ({"": 5}, 1), ({"model": 0}, 1), ({}, 2), ([], 2)],
)
def test_exit_status_is_the_same_in_every_format(run: Run, tmp_path: Path, device_map: Any, status: int) -> None:
    path = written(tmp_path / "map.json", device_map)
    words = (path, "--model", MODEL, "--machine", "2xL4")

    text, data = run(*words), run(*words, "--json")

    assert (text[0], data[0]) == (status, status)
    assert json.loads(data[1])["exit_status"] == status
    assert text[2].count("\n") == (status == 2)


def test_errors_of_the_machine_count_where_the_map_uses_it(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path / "map.json", {"": 0})
    lost = str(ROOT / "tests" / "machines" / "driver-mismatch.json")

    status, out, _ = run(path, "--model", MODEL, "--machine", lost)

    assert status == 1
    assert out


def test_nothing_can_be_said_where_nothing_can_be_seen(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path / "map.json", {"": 0})
    status, out, _ = run(path, "--model", MODEL, "--machine", str(ROOT / "tests" / "machines" / "nvml-crashed.json"))

    assert status == 3
    assert out.startswith("Could not look")


@pytest.mark.parametrize("style", ["json", "yaml", "python"])
def test_a_plan_is_judged_on_its_own_gpus(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", MODEL, "--machine", "4GiB,12GiB,12GiB", "--format", style])
    planned = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(planned.encode())))

    status, out, _ = run("-", "--model", MODEL, "--machine", "4GiB,12GiB,12GiB", "--json")

    checked = json.loads(out)["map_check"]
    assert status == 0
    assert (checked["gpus"], [use["gpu"] for use in checked["devices"]]) == ([1, 2], [1, 2])


def test_the_order_that_a_script_sets_outweighs_what_torch_once_saw(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "load.py"
    path.write_text("import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '1, 0'\ndevice_map = {'': 0}\n")
    recorded = str(ROOT / "tests" / "machines" / "2xh200-recorded.json")

    _, out, _ = run(str(path), "--model", MODEL, "--machine", recorded, "--json")

    assert json.loads(out)["map_check"]["gpus"] == [1, 0]


def test_a_plan_of_another_machine_is_not_guessed_at(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "load.py"
    path.write_text("import os\nos.environ['CUDA_VISIBLE_DEVICES'] = 'GPU-1234'\ndevice_map = {'': 0}\n")

    status, _, message = run(str(path), "--model", MODEL, "--machine", "2xL4")

    assert status == 2
    assert message == (
        "vlm-doctor: The file of the map is for other GPUs than those of 2xL4 (CUDA_VISIBLE_DEVICES='GPU-1234'); "
        "name with --gpus those that its numbers mean.\n"
    )


def test_the_text_shows_findings_devices_and_the_map_to_paste(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path / "map.json", {"": 0, "model.language_model.layers.1": 1})

    status, out, _ = run(path, "--model", MODEL, "--machine", "2xL4", "-v")

    assert status == 1
    assert out.startswith("This map fails: 1 error")
    source = out[out.index("device_map = {") : out.index("}\n\n") + 1]
    names: dict[str, Any] = {}
    exec(source, names)
    assert names["device_map"]["model.language_model.layers.1"] == 1
    assert len(names["device_map"]) == 38
    assert "The planner's own map\n  GPU 0 " in out
    assert "Seen:" in out


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"": 0}, "This map loads, runs and fits.\n"),
        ({"": 0, "nothing": 0}, "This map loads, runs and fits; 1 warning.\n"),
        ({"model.visual": 0, "lm_head": "cpu"}, "This map fails: 1 error, 2 warnings.\n"),
    ],
)
def test_the_first_line_is_the_verdict(run: Run, tmp_path: Path, device_map: Any, words: str) -> None:
    _, out, _ = run(written(tmp_path / "map.json", device_map), "--model", MODEL, "--machine", "2xL4")

    assert out.startswith(words)


def test_what_would_not_fit_anywhere_says_so(run: Run, tmp_path: Path) -> None:
    status, out, _ = run(
        written(tmp_path / "map.json", {"": 0}), "--model", MODEL, "--machine", "8GiB", "--headroom", "1GiB"
    )

    assert status == 1
    assert "No map would do for this workload on these GPUs" in out
    assert "The planner's own map" not in out


def test_the_page_names_every_option_and_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["check-map", "--help"])

    assert set(OPTION.findall(capsys.readouterr().out)) - {"--help"} == set(OPTION.findall(PAGE))
    assert re.findall(r"\[(VLM\d{3})\]", PAGE) == list(TITLES)


def test_the_command_on_the_page_finds_what_it_is_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = re.search(r"```console\n\$ vlm-doctor check-map (.*)\n```", PAGE)
    assert command is not None

    status, out, _ = run(*shlex.split(command[1]))

    assert status == 1
    assert "'visual' is written 'model.visual'" in out
    assert "model.language_model.rotary_emb" in out


def test_the_python_on_the_page_runs() -> None:
    names: dict[str, Any] = {}
    for source in re.findall(r"```python[^\n]*\n(.*?)```", PAGE, re.DOTALL):
        exec(source, names)
    assert callable(names["settle"])
