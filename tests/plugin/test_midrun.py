"""What breaks between the first look at the machine and a test: each is a clear verdict, and the report is complete."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from vlm_doctor.machine import Driver

if TYPE_CHECKING:
    from collections.abc import Callable

LIVE = """
from vlm_doctor import sources

def collect(*, with_torch):
    log("COLLECT")
    return from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")

sources.collect = collect
"""
SUITE = """
import shutil
import pytest
from pathlib import Path

@pytest.mark.vlm_requires(gpus=2)
def test_before(): shutil.copy("later.json", "machine.json")
@pytest.mark.vlm_requires(gpus=2)
def test_counts(): pass
@pytest.mark.vlm_requires(vram_gib=10)
def test_memory(): pass
@pytest.mark.vlm("org/wide")
def test_model(vlm): pass
"""


@pytest.fixture
def breaking(suite: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A live machine that the first test changes into later.json; each test looks anew."""
    from vlm_doctor import sources

    monkeypatch.setattr(sources, "collect", sources.collect)  # the conftest puts its own there
    for name in ("MEMORY_AGE_S", "HEALTH_AGE_S"):
        monkeypatch.setattr(f"pytest_vlmgpu.gating.gate.{name}", -1.0)
    suite.configure(LIVE, without="vlm_machine")
    return suite


def outcomes(suite: Any) -> dict[str, tuple[str, str | None]]:
    report = json.loads((suite.folder / "out.json").read_text())
    assert report["state"] == "finished"
    return {test["nodeid"].partition("::")[2]: (test["outcome"], test["code"]) for test in report["tests"]}


def later(suite: Any, found: Any) -> None:
    before = (suite.folder / "machine.json").read_text()
    suite.has(found)
    (suite.folder / "machine.json").rename(suite.folder / "later.json")
    (suite.folder / "machine.json").write_text(before)


def test_a_gpu_that_falls_off_the_bus_without_a_word(
    breaking: Any, gpu: Callable[..., Any], machine: Callable[..., Any]
) -> None:
    later(breaking, machine(gpu(0)))

    result = breaking.run("--vlm-report=out.json", test_x=SUITE)

    assert outcomes(breaking) == {
        "test_before": ("passed", None),
        "test_counts": ("error", "VLM712"),
        "test_memory": ("passed", None),
        "test_model": ("error", "VLM712"),
    }
    result.stdout.fnmatch_lines(
        ["VLM712: * GPU 1 (NVIDIA L4) (GPU-00000001-*) was there earlier in this run: look for Xid messages with dmesg."]
    )


def test_a_gpu_that_answers_with_an_error(breaking: Any, gpu: Callable[..., Any], machine: Callable[..., Any]) -> None:
    later(breaking, machine(gpu(0), gpu(1, error="GPU is lost")))

    breaking.run("--vlm-report=out.json", test_x=SUITE)

    assert outcomes(breaking)["test_counts"] == ("error", "VLM712")


@pytest.mark.parametrize("state", ["error", "timed_out", "crashed", "no_library"])
def test_nvml_that_fails_in_mid_run(breaking: Any, machine: Callable[..., Any], state: str) -> None:
    driver = Driver(nvml_state=state, nvml_error_code=15 if state == "error" else None, nvml_message="it is lost")  # type: ignore[arg-type]
    later(breaking, machine(driver=driver))

    result = breaking.run("--vlm-report=out.json", test_x=SUITE)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert set(list(outcomes(breaking).values())[1:]) == {("error", "VLM712")}


def test_memory_that_is_taken_in_mid_run(breaking: Any, gpu: Callable[..., Any], machine: Callable[..., Any]) -> None:
    later(breaking, machine(gpu(0, free_gib=2), gpu(1, free_gib=2)))

    breaking.run("--vlm-report=out.json", test_x=SUITE)

    assert outcomes(breaking) == {
        "test_before": ("passed", None),
        "test_counts": ("passed", None),
        "test_memory": ("error", "VLM711"),
        "test_model": ("error", "VLM711"),
    }


def test_a_device_that_is_lost_between_the_expectation_and_the_first_test(
    breaking: Any, gpu: Callable[..., Any], machine: Callable[..., Any]
) -> None:
    later(breaking, machine(gpu(0)))

    result = breaking.run(
        "--vlm-expect-gpus=2",
        "--vlm-report=out.json",
        test_x="import shutil\nshutil.copy('later.json', 'machine.json')\n" + SUITE,
    )

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert outcomes(breaking)["test_before"] == ("error", "VLM712")


def test_a_clock_that_is_set_back_hides_no_change(
    breaking: Any, gpu: Callable[..., Any], machine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(breaking, machine(gpu(0, free_gib=2), gpu(1, free_gib=2)))
    source = SUITE.replace('shutil.copy("later', 'import time; time.time = lambda: 0.0; shutil.copy("later')
    import time

    monkeypatch.setattr(time, "time", time.time)  # puts it back

    breaking.run("--vlm-report=out.json", test_x=source)

    assert outcomes(breaking)["test_memory"] == ("error", "VLM711")
