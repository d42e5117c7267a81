"""Guards on real GPUs, with the model that PYTEST_VLMGPU_MODEL names. Run by hand, and look at the out-of-memory report:

``PYTEST_VLMGPU_MODEL=FOLDER pytest tests/gpu/test_guards.py -rA``
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_vlmgpu import LoadedVlm, VramMeter

pytestmark = pytest.mark.gpu

if "PYTEST_VLMGPU_MODEL" not in os.environ:
    pytest.skip("set PYTEST_VLMGPU_MODEL to the folder of a checkpoint", allow_module_level=True)

torch = pytest.importorskip("torch")
GIB = 2**30
SUITE = """
import gc
import pytest, torch
GIB = 2**30

def take(vlm, share):
    device = vlm.input_device
    free, _ = torch.cuda.mem_get_info(device)
    return torch.empty(int(free * share), dtype=torch.uint8, device=device)

def test_alone(vlm):
    assert vlm.generate(None, "Say yes.", max_new_tokens=4)

@pytest.mark.parametrize("attempt", range(2))
def test_runs_out(vlm, attempt):
    big = take(vlm, 0.9)
    more = [take(vlm, 0.9) for _ in range(2)]
    torch.empty(64 * GIB, dtype=torch.uint8, device=vlm.input_device)

def test_memory_is_back(vlm):
    big = take(vlm, 0.9)

@pytest.mark.vlm_limit_vram("1GiB")
def test_limit(vlm):
    pass

def test_trains(vlm):
    vlm.model.train()

def test_zeroes(vlm):
    with torch.no_grad():
        next(vlm.model.parameters()).zero_()

KEPT = []
def test_leaks(vlm):
    KEPT.append(torch.empty(GIB, dtype=torch.uint8, device=vlm.input_device))

def test_still_answers(vlm):
    KEPT.clear()
    assert vlm.generate(None, "Say yes.", max_new_tokens=4)
"""


def test_the_suite_of_guards(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "test_x.py").write_text(SUITE)

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--vlm-suggest", "--junitxml=out.xml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    sys.stdout.write(run.stdout)
    assert "4 passed" in run.stdout or "6 passed" in run.stdout, "look at the output"
    assert run.stdout.count("VLM752: out of GPU memory on cuda:") >= 2
    assert "VLM750" in run.stdout
    assert "It is loaded again" in run.stdout
    assert "It was put right" in run.stdout
    assert "VLM751: the test may take 1.0 GiB of one GPU" in run.stdout
    assert "VLM754: test_leaks left 1.0 GiB on cuda:" in run.stdout
    assert "variable KEPT of module test_x holds a tensor of shape [1073741824]" in run.stdout
    assert "test_x.py::test_memory_is_back PASSED" in run.stdout
    assert "test_x.py::test_still_answers PASSED" in run.stdout
    assert "still held" not in run.stdout
    assert 'name="vlmgpu.peak_gib"' in (tmp_path / "out.xml").read_text()


def test_peaks_are_those_of_torch(vlm: LoadedVlm, vlm_vram: VramMeter) -> None:
    before = vlm_vram.used_gib
    tensor: Any = torch.empty(GIB, dtype=torch.uint8, device=vlm.input_device)
    del tensor

    assert vlm_vram.peak_gib == pytest.approx(before + 1, abs=0.05)
    assert vlm_vram.used_gib == pytest.approx(before, abs=0.05)


def test_a_look_at_the_model_costs_little(vlm: LoadedVlm) -> None:
    from pytest_vlmgpu import fingerprint

    first = fingerprint.take(vlm.model, vlm.processor)
    assert first is not None
    held = {ordinal: torch.cuda.memory_allocated(ordinal) for ordinal in set(vlm.device_map.values())}
    for ordinal in held:
        torch.cuda.reset_peak_memory_stats(ordinal)
    again = fingerprint.take(vlm.model, vlm.processor)

    assert again is not None
    assert fingerprint.changes(first, again).texts == ()
    assert set(first.samples) == set(first.tensors)
    for ordinal, size in held.items():
        assert torch.cuda.max_memory_allocated(ordinal) - size < 2**21
