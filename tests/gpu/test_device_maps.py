"""Who places a model, on real GPUs: the planner, the planner on one, transformers; and layers in host memory.

Run by hand, and look at the summaries: ``pytest -m gpu tests/gpu/test_device_maps.py -rA``. The model is random, 1.6 GB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from .nested import run_suite

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

if torch.cuda.device_count() < 1:
    pytest.skip("needs a GPU", allow_module_level=True)

PLACES = """
import pytest, torch
ANSWERS = {}
ALL = torch.cuda.device_count  # of those that this run leased

def ask(vlm):
    answer = vlm.generate(None, "Say yes.", max_new_tokens=8)
    return ANSWERS.setdefault("first", answer), answer

@pytest.mark.vlm(MODEL)
def test_doctor(vlm):
    assert (vlm.plan is not None, vlm.offloaded_bytes) == (True, 0)
    first, answer = ask(vlm)
    assert first == answer

@pytest.mark.vlm(MODEL, device_map="single")
def test_single(vlm):
    assert len(vlm.ordinals) == 1
    first, answer = ask(vlm)
    assert first == answer

@pytest.mark.vlm(MODEL, device_map="auto")
@pytest.mark.parametrize("again", range(2))
def test_auto(vlm, again):
    assert (vlm.plan, vlm.offloaded_bytes, vlm.spec.device_map) == (None, 0, "auto")
    assert {tensor.device.type for tensor in (*vlm.model.parameters(), *vlm.model.buffers())} == {"cuda"}
    assert {stage.uuid for stage in vlm.gpus} and len(vlm.gpus) == len(vlm.ordinals)
    assert 1.4 < vlm.vram_gib < 1.7
    first, answer = ask(vlm)
    assert first == answer

@pytest.mark.vlm(MODEL, device_map="balanced")
def test_balanced(vlm):
    assert len(vlm.ordinals) == ALL(), "balanced uses all that the run has"
    first, answer = ask(vlm)
    assert first == answer
"""
POLICY = """
import pytest
from vlm_doctor import Policy, Workload

@pytest.fixture(scope="session")
def vlm_policy():
    return Policy(gpus=(0,), max_memory=((0, 2 * 2**30),))

@pytest.fixture(scope="session")
def vlm_workload():
    return Workload(text_tokens=64, new_tokens=16)
"""
OFFLOADED = """
import pytest
@pytest.mark.vlm(MODEL)
@pytest.mark.parametrize("again", range(2))
def test_offloaded(vlm, again):
    assert set(vlm.device_map.values()) == {0, "cpu"}
    assert 0.5e9 < vlm.offloaded_bytes < 1.6e9
    assert vlm.vram_gib < 1.2
    assert vlm.generate(None, "Say yes.", max_new_tokens=8)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from reload_or_copy import large_model  # type: ignore[import-not-found, unused-ignore]
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("model")
    large_model(folder)
    return str(folder)


def run(folder: Path, suite: str, config: pytest.Config, *arguments: str) -> str:
    return run_suite(folder, suite, config, "--vlm-report=out.json", *arguments)


@pytest.mark.parametrize("gpus", range(1, min(2, torch.cuda.device_count()) + 1))
def test_every_way_gives_the_same_answer(tmp_path: Path, model: str, request: pytest.FixtureRequest, gpus: int) -> None:
    text = run(tmp_path, f"MODEL = {model!r}\n{PLACES}", request.config, f"--vlm-gpus={gpus}", "--vlm-strict=all")

    assert "5 passed" in text
    assert "still held" not in text
    assert "did not come back" not in text


def test_layers_in_host_memory(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    (tmp_path / "conftest.py").write_text(POLICY)
    suite = f"MODEL = {model!r}\n{OFFLOADED}"

    text = run(tmp_path, suite, request.config, "--vlm-allow-offload")
    tests = json.loads((tmp_path / "out.json").read_text())["tests"]
    assert "2 passed" in text
    assert "2 TESTS RAN WITH PART OF THE MODEL OFF THE GPUS" in text
    assert all(test["offloaded_gib"] > 0.4 for test in tests)
    assert "still held" not in text

    assert "2 skipped" in run(tmp_path, suite, request.config)
    strict = run(tmp_path, suite, request.config, "--vlm-allow-offload", "--vlm-strict")
    assert "2 errors" in strict
    assert "VLM714" in strict
