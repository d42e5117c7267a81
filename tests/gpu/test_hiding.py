"""GPUs hidden from tests without markers, on a real GPU: what one process can do, and what workers can.

Run by hand: ``pytest -m gpu tests/gpu/test_hiding.py -rA``. No model is loaded. The output tells what is not documented:
what torch, its runtime and the driver remember of an attempt to start CUDA while no GPU is visible.
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
def test_after():
    import subprocess, sys
    code = "import torch; print(torch.cuda.device_count())"
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.strip() == "0"
    # CUDA is started, and cannot be taken back; what asks is told so by some versions of torch, and not by others.
    assert torch.ones(2, device="cuda").sum().item() == 2
    print("FACT: after CUDA was started is_available() says", torch.cuda.is_available(), "and torch is", torch.__version__)
"""
STARTS = """
import pytest, torch
from pytest_vlmgpu.leasing import masks
def facts(): print("FACT: driver library loaded", masks.is_driver_loaded(), "and started", masks.is_cuda_started())
def test_starts():
    facts()
    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"):
        torch.ones(2, device="cuda")
    facts()
@pytest.mark.vlm_requires
def test_gated(): assert torch.ones(2, device="cuda").sum().item() == 2
@pytest.mark.vlm_requires
def test_gated_too(): torch.ones(2, device="cuda", requires_grad=True).sum().backward()
"""
BACKWARD = STARTS.replace(
    """    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"):
        torch.ones(2, device="cuda")
""",
    "    torch.ones(2, requires_grad=True).sum().backward()\n",
)
LATE = STARTS.replace("pytest, torch", "pytest").replace("    facts()\n    with", "    import torch\n    with")
CULPRIT = "VLM712: test_x.py::test_starts, which has no marker of the plugin, started CUDA while GPUs were hidden from it"
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
    text = run(tmp_path, ASKS, request.config, "-s")

    assert "3 passed, 1 warning" in text
    assert "CUDA was started in this process before this test" in text


@pytest.mark.parametrize("suite", [STARTS, LATE], ids=["starts", "imports torch and starts"])
def test_a_test_that_starts_cuda_while_it_sees_none_is_named_by_every_gated_test_after_it(
    tmp_path: Path, request: pytest.FixtureRequest, suite: str
) -> None:
    text = run(tmp_path, suite, request.config, "-s")

    assert "1 passed" in text
    assert "2 errors" in text
    assert text.count(CULPRIT) >= 2


def test_backward_on_the_cpu_is_no_trap(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = run(tmp_path, BACKWARD, request.config, "-s")

    # Autograd counts the GPUs once in a process. Where that takes them from it, whoever made it count is named.
    assert "3 passed" in text or text.count(CULPRIT) >= 2


@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_a_worker_without_gated_tests_never_sees_a_gpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert "24 passed" in run(tmp_path, WORKERS, request.config, "-n2")
