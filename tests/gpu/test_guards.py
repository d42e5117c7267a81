"""Guards on real GPUs, with a tiny model or the one that VLMGPU_MODEL names. Run by hand, and look at the reports:

``pytest -m gpu tests/gpu/test_guards.py -rA``
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .nested import run_suite

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from pytest_vlmgpu.testing import make_tiny_vlm  # noqa: E402

if torch.cuda.device_count() < 1:
    pytest.skip("needs a GPU", allow_module_level=True)

HEADER = """
import gc
import pytest, torch
from pytest_vlmgpu.watching import fingerprint
GIB = 2**30
"""
SUITE = """
FREE = []

def free_bytes(vlm):
    return torch.cuda.mem_get_info(vlm.input_device)[0]

def take(vlm, size_bytes):
    return torch.empty(int(size_bytes), dtype=torch.uint8, device=vlm.input_device)

def test_alone(vlm):
    assert vlm.generate(None, "Say yes.", max_new_tokens=4)
    FREE.append(free_bytes(vlm))

@pytest.mark.parametrize("attempt", range(2))
def test_runs_out(vlm, attempt):
    more = [take(vlm, 0.9 * free_bytes(vlm)) for _ in range(3)]
    take(vlm, 64 * GIB)

def test_memory_is_back(vlm):
    torch.cuda.empty_cache()
    assert free_bytes(vlm) > FREE[0] - GIB / 4

@pytest.mark.vlm_limit_vram("1GiB")
def test_limit(vlm):
    take(vlm, 1.25 * GIB)

def test_trains(vlm):
    vlm.model.train()

def test_zeroes(vlm):
    with torch.no_grad():
        next(vlm.model.parameters()).zero_()

KEPT = []
def test_leaks(vlm):
    KEPT.append(take(vlm, GIB))

def test_still_answers(vlm):
    KEPT.clear()
    assert vlm.generate(None, "Say yes.", max_new_tokens=4)
"""
MEASURES = """
def test_peaks_are_those_of_torch(vlm, vlm_vram):
    before = vlm_vram.used_gib
    tensor = torch.empty(GIB, dtype=torch.uint8, device=vlm.input_device)
    del tensor

    assert vlm_vram.peak_gib == pytest.approx(before + 1, abs=0.05)
    assert vlm_vram.used_gib == pytest.approx(before, abs=0.05)

def test_a_look_at_the_model_costs_little(vlm):
    first = fingerprint.take(vlm.model, vlm.processor)
    assert first is not None
    held = {ordinal: torch.cuda.memory_allocated(ordinal) for ordinal in vlm.ordinals}
    assert held
    for ordinal in held:
        torch.cuda.reset_peak_memory_stats(ordinal)
    again = fingerprint.take(vlm.model, vlm.processor)

    assert again is not None
    assert fingerprint.changes(first, again).texts == ()
    assert set(first.samples) == set(first.tensors)
    for ordinal, size in held.items():
        assert torch.cuda.max_memory_allocated(ordinal) - size < 2**21
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = os.environ.get("VLMGPU_MODEL") or os.environ.get("PYTEST_VLMGPU_MODEL")
    return named or str(make_tiny_vlm(tmp_path_factory.mktemp("model"), "llava"))


def run(folder: Path, model: str, suite: str, config: pytest.Config) -> str:
    """Output of a run in a process of its own, which is shown too."""
    options = ("--vlm-suggest", "--junitxml=out.xml", f"--vlm-model={model}")
    return run_suite(folder, HEADER + suite, config, *options)


def test_the_suite_of_guards(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    text = run(tmp_path, model, SUITE, request.config)

    assert "3 failed, 6 passed" in text
    assert "2 errors" in text
    assert text.count("VLM752: out of GPU memory on cuda:") >= 2
    assert "VLM750" in text
    assert "It is loaded again" in text
    assert "It was put right" in text
    assert "VLM751: the test may take 1.0 GiB of one GPU" in text
    assert "VLM754: test_leaks left 1.0 GiB on cuda:" in text
    assert "variable KEPT of module test_x holds a tensor of shape [1073741824]" in text
    assert "test_x.py::test_memory_is_back PASSED" in text
    assert "test_x.py::test_still_answers PASSED" in text
    assert "still held" not in text
    assert 'name="vlmgpu.peak_gib"' in (tmp_path / "out.xml").read_text()


def test_measures(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    text = run(tmp_path, model, MEASURES, request.config)

    assert "2 passed" in text
    assert "failed" not in text.splitlines()[-1]
