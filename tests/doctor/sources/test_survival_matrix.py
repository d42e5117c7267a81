"""Every state of torch with every state of NVML, in real child processes: a verdict that names the state, in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.answer import check_report
from vlm_doctor.sources import Collection, collect, collection

from .test_survival import TORCH as TORCH_FILES

pytestmark = pytest.mark.usefixtures("no_children_left")
Environment = Callable[[dict[str, Any]], dict[str, str]]

TORCH = {
    name: TORCH_FILES[name] for name in ("good", "ImportError", "OSError", "RuntimeError", "segfault", "hang", "no version")
}
"""``no version`` is what a half-installed torch looks like from outside: it imports, and there is nothing in it."""
GPU = {"Name": "NVIDIA L4", "UUID": "GPU-1", "PciInfo": "00000000:01:00.0", "CudaComputeCapability": [8, 9]}
NVML: dict[str, tuple[dict[str, Any], str]] = {
    "works": ({"gpus": [GPU]}, "ok"),
    "library absent": ({"init": 12}, "no_library"),
    "wrong version": ({"init": 18}, "error"),
    "binding too old": ({"missing": ["nvmlDeviceGetUUID"]}, "no_binding"),
    "killed at once": ({"crash_in": "nvmlInit"}, "crashed"),
    "killed half-way": ({"gpus": [GPU], "crash_in": "nvmlDeviceGetComputeMode"}, "crashed"),
    "hangs at once": ({"hang_in": "nvmlInit"}, "timed_out"),
    "hangs half-way": ({"gpus": [GPU], "hang_in": "nvmlDeviceGetComputeMode"}, "timed_out"),
}
ERRORS = [*range(1, 30), 999]
"""nvmlReturn_t of nvidia-ml-py 13.615."""
BOUND_S = 30.0
"""Deadlines are 2 s here; what is above is the patience of a loaded machine."""


@pytest.fixture
def environment_of(double_environment: Environment, tmp_path: Path) -> Callable[[str, dict[str, Any]], dict[str, str]]:
    """Environment of children that find a fake torch and a fake pynvml; ``absent`` leaves torch out."""

    def make(torch: str, scenario: dict[str, Any]) -> dict[str, str]:
        environment = double_environment(scenario)
        package = tmp_path / "fake/torch"
        package.mkdir(parents=True)
        (package / "version.py").write_text("__version__ = '2.13.0'\ncuda = '13.0'\n")
        (package / "__init__.py").write_text(TORCH_FILES[torch][0])
        return {**environment, "PYTHONPATH": f"{package.parent}:{environment['PYTHONPATH']}", "HOME": str(tmp_path)}

    return make


@pytest.mark.parametrize("nvml", NVML)
@pytest.mark.parametrize("torch", TORCH)
def test_a_verdict_whatever_happens(
    torch: str, nvml: str, environment_of: Callable[[str, dict[str, Any]], dict[str, str]], tmp_path: Path
) -> None:
    scenario, nvml_state = NVML[nvml]
    _, torch_state, message = TORCH[torch]
    root = tmp_path / "root"
    (root / "dev").mkdir(parents=True)
    (root / "dev/nvidia0").write_text("")  # there is hardware, so that blindness matters
    started = time.monotonic()
    machine = collect(
        environment=environment_of(torch, scenario),
        root=root,
        deadline_s=2.0 if "hangs" in nvml else 20.0,
        torch_deadline_s=1.5 if torch == "hang" else 20.0,
        cache_folder=tmp_path / "cache",
    )
    report = check_report(machine)
    assert time.monotonic() - started < BOUND_S
    assert (machine.driver.nvml_state, machine.torch.state, machine.torch.message) == (nvml_state, torch_state, message)
    assert report.diagnosis is not None
    assert [outcome.reason for outcome in report.diagnosis.outcomes if outcome.state == "crashed"] == []
    found = {finding.code for finding in report.diagnosis.findings}
    # A torso that no other torch is registered for is known from its files, and explains why it cannot be imported.
    failing = "VLM302" if torch == "no version" and "VLM302" in found else "VLM304"
    assert (failing in found) == (torch_state == "failed")
    assert ("VLM305" in found) == (torch_state in ("crashed", "timed_out"))
    if nvml_state == "ok":
        assert "VLM105" not in found
    else:
        assert found & {"VLM102", "VLM104", "VLM105", "VLM310"}, found
    # What a crash or a hang cut off is unknown; what came before it is kept.
    assert len(machine.gpus) == len(scenario.get("gpus", ()))


@pytest.mark.parametrize("nvml", NVML)
def test_a_verdict_without_torch(
    nvml: str, double_environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_doctor.sources.torch_view.find_torch", lambda path: None)
    scenario, nvml_state = NVML[nvml]
    deadline_s = 2.0 if "hangs" in nvml else 20.0
    machine = collect(environment=double_environment(scenario), root=tmp_path, deadline_s=deadline_s)
    assert (machine.driver.nvml_state, machine.torch.state) == (nvml_state, "absent")
    report = check_report(machine)
    assert report.diagnosis is not None
    assert [outcome.reason for outcome in report.diagnosis.outcomes if outcome.state == "crashed"] == []


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_of_nvml(code: int, double_environment: Environment, tmp_path: Path) -> None:
    machine = collect(environment=double_environment({"init": code}), root=tmp_path, with_torch=False, deadline_s=20.0)
    assert machine.driver.nvml_state == ("no_library" if code == 12 else "error")
    assert machine.driver.nvml_error_code == code
    report = check_report(machine)
    assert report.diagnosis is not None
    assert [outcome.reason for outcome in report.diagnosis.outcomes if outcome.state == "crashed"] == []


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_of_nvml_about_one_gpu(code: int, double_environment: Environment, tmp_path: Path) -> None:
    scenario = {"gpus": [{"handle": code}, GPU], "fail": {"nvmlDeviceGetComputeMode": code}}
    machine = collect(environment=double_environment(scenario), root=tmp_path, with_torch=False, deadline_s=20.0)
    assert machine.driver.nvml_state == "ok"
    assert machine.gpus[0].error is not None
    assert machine.gpus[1].name == "NVIDIA L4"
    report = check_report(machine)
    assert report.diagnosis is not None
    assert "VLM108" in {finding.code for finding in report.diagnosis.findings}


@pytest.mark.parametrize(("torch", "nvml"), [("segfault", "killed at once"), ("RuntimeError", "wrong version")])
def test_the_command_prints_json_and_nothing_else(
    torch: str, nvml: str, environment_of: Callable[[str, dict[str, Any]], dict[str, str]], tmp_path: Path
) -> None:
    environment = environment_of(torch, NVML[nvml][0])
    # The doctor itself is found behind the fakes.
    paths = [environment["PYTHONPATH"], *(path for path in sys.path if path)]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "vlm_doctor", "--json", "--fresh-torch"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode in (0, 1, 3)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["exit_status"] == done.returncode
    assert report["machine"]["torch"]["state"] == TORCH[torch][1]
    assert report["machine"]["driver"]["nvml_state"] == NVML[nvml][1]


def test_a_source_that_hangs_is_named_and_the_others_go_on(
    double_environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "SOURCE_DEADLINE_S", 1.0)
    monkeypatch.setattr(collection, "read_host", lambda *_: time.sleep(60))
    environment = double_environment({"gpus": [GPU]})
    with Collection(with_torch=False, environment=environment, root=tmp_path, deadline_s=20.0) as running:
        machine = running.without_torch()
    assert (machine.gaps[0].path, machine.gaps[0].reason) == ("host", "TimeoutError: no answer within 1 s")
    assert (machine.host, len(machine.gpus)) == (None, 1)
    assert machine.seconds["host"] >= 1
    report = check_report(machine)
    assert report.diagnosis is not None
    states = {outcome.code: outcome.state for outcome in report.diagnosis.outcomes}
    assert states["VLM504"] == "unknown"
