"""GPUs hidden from tests without markers, on a real GPU: what one process can do, and what workers can.

Run by hand: ``pytest -m gpu tests/gpu/test_hiding.py -rA``. No model is loaded. It also measures what is not documented:
whether CUDA that was started while no GPU was visible finds one later (look at the output of the second test).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from .nested import run_suite

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")

if torch.cuda.device_count() < 1:
    pytest.skip("needs a GPU", allow_module_level=True)

ASKS = """
import pytest, torch
def test_asks():
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
@pytest.mark.vlm_requires
def test_gated(): assert torch.ones(2, device="cuda").sum().item() == 2
def test_after(): assert torch.cuda.is_available(), "CUDA is started: nothing can be hidden any more"
"""
STARTS = """
import pytest, torch
def test_starts():
    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"):
        torch.ones(2, device="cuda")
@pytest.mark.vlm_requires
def test_gated(): assert torch.ones(2, device="cuda").sum().item() == 2
"""
WORKERS = """
import pytest, torch
@pytest.mark.parametrize("n", range(20))
def test_free(n): assert not torch.cuda.is_available()
@pytest.mark.vlm_requires
@pytest.mark.parametrize("n", range(4))
def test_gated(n): assert torch.ones(2, device="cuda").sum().item() == 2
"""


def run(folder: Path, suite: str, config: pytest.Config, *arguments: str) -> str:
    return run_suite(folder, suite, config, "--vlm-hide-gpu-from-cpu-tests", "--vlm-gpus=1", *arguments)


def test_a_test_that_asks_is_told_of_none_and_gated_tests_have_theirs(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = run(tmp_path, ASKS, request.config)

    assert "3 passed, 1 warning" in text
    assert "CUDA was started in this process before this test" in text


def test_a_test_that_starts_cuda_fails_and_what_follows_is_no_silent_success(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = run(tmp_path, STARTS, request.config)

    # Either CUDA can be started again, and all is well; or the gated test is an error that names the culprit.
    assert "2 passed" in text or "test_starts, which has no marker of the plugin, started CUDA" in text


@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_a_worker_without_gated_tests_never_sees_a_gpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert "24 passed" in run(tmp_path, WORKERS, request.config, "-n2")
