"""The examples of docs/plugin.md are real: they are collected and decided about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pytest_vlmgpu import declare
from vlm_doctor.codes import all_codes

PAGE = (Path(__file__).parents[2] / "docs" / "plugin.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, flags=re.DOTALL))


def test_the_first_example_is_decided_about(suite: Any) -> None:
    suite.folder.joinpath("conftest.py").unlink()

    result = suite.run("--vlm-machine=L4", "-rs", test_describe=FILES["test_describe"])

    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED [[]1[]] test_describe.py:5: would run on GPU 0 of *",
            "SKIPPED [[]1[]] test_describe.py:10: VLM702: 2 GPUs are wanted, 1 can be used.",
            "SKIPPED [[]1[]] test_describe.py:16: *",
        ]
    )


def test_the_conftest_of_the_page_is_one(suite: Any) -> None:
    engine = (
        "\n\ndef start_engine(name, *, dtype, gpus):\n    from unittest.mock import Mock\n    return Mock(spec=['stop'])\n"
    )
    suite.configure(FILES["conftest"].replace("import pytest\n", "") + engine, without="vlm_loader")

    result = suite.run(test_x="import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): assert not vlm.stop.called")

    result.assert_outcomes(passed=1)


def test_every_option_and_gate_code_is_described() -> None:
    described = set(re.findall(r"--vlm-[\w-]+\b", PAGE))

    assert described == {f"--vlm-{name.replace('_', '-')}" for name in declare.HELP}
    assert set(re.findall(r"^\| (VLM\d+) \|", PAGE, flags=re.MULTILINE)) == {code for code in all_codes() if code[3] == "7"}


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
