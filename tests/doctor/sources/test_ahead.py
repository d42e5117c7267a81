"""While NVML is asked, what the answer needs is loaded: nothing of it is left for afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from .test_nvml import TWO_H200

RUN = """
import json, sys
from vlm_doctor.machine import PciDevice
from vlm_doctor.sources import collection
from vlm_doctor.sources.child import Child
collection.read_pci_devices = lambda root: (PciDevice(bus_id="0000:00:06.0", device_id="2335"),)
seen = set()
real = Child.outcome
def outcome(child):
    answer = real(child)
    seen.update(sys.modules)
    return answer
Child.outcome = outcome
from vlm_doctor.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    late = sorted(set(sys.modules) - seen) if seen else ["NVML was not asked"]
    print(json.dumps({"status": end.code, "late": late}), file=sys.stderr)
"""
MODEL = "zai-org/GLM-4.1V-9B-Thinking"


@pytest.mark.parametrize(
    "words",
    [
        ["--no-torch"],
        ["--no-torch", "--json"],
        ["--no-torch", "--format", "markdown"],
        ["plan", MODEL],
        ["plan", MODEL, "--json"],
        ["gate", "--no-torch", "--gpus", "1"],
        ["gate", "--no-torch", "--gpus", "1", "--model", MODEL],
    ],
    ids=" ".join,
)
def test_nothing_is_loaded_when_nvml_has_answered(
    words: list[str], double_environment: Callable[[dict[str, Any]], dict[str, str]]
) -> None:
    environment = double_environment(TWO_H200)
    environment["PYTHONPATH"] += f":{':'.join(filter(None, sys.path))}"
    done = subprocess.run([sys.executable, "-c", RUN, *words], env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["status"] in (0, 1), done.stderr
    # rich chooses its table of widths when it first measures a text.
    assert [name for name in told["late"] if not name.startswith("rich._unicode_data.")] == []


def test_what_is_done_meanwhile_is_done_once_and_before_nvml_is_waited_for(
    double_environment: Callable[[dict[str, Any]], dict[str, str]], tmp_path: Any
) -> None:
    from vlm_doctor.sources import collect

    told: list[bool] = []
    collect(with_torch=False, environment=double_environment(TWO_H200), root=tmp_path, meanwhile=told.append)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05\n")
    collect(with_torch=False, environment=double_environment(TWO_H200), root=tmp_path, meanwhile=told.append)
    assert told == [False, True]
