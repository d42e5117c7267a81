"""``--vlm-busy=skip``: what others have taken is skipped where somebody said so, and never where GPUs are to be proved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu import GateCode, verdicts
from vlm_doctor.codes import all_codes

from ..until import until
from .projects import ONE_MODEL, SLOW, finish

if TYPE_CHECKING:
    from collections.abc import Callable

    from .projects import Project

SUITE = """
import pytest
@pytest.mark.vlm("org/a")
def test_model(vlm): pass
@pytest.mark.vlm_requires(vram_gib=10)
def test_memory(): pass
@pytest.mark.vlm_requires
def test_any(): pass
"""


@pytest.mark.parametrize(
    ("options", "outcomes"),
    [
        ([], {"passed": 1, "errors": 2}),
        (["--vlm-busy=error"], {"passed": 1, "errors": 2}),
        (["--vlm-busy=skip"], {"passed": 1, "skipped": 2}),
        (["--vlm-busy=skip", "--vlm-strict=gpu", "--vlm-wait=0"], {"passed": 1, "errors": 2}),
    ],
)
def test_taken_memory(suite: Any, gpu: Any, machine: Any, options: list[str], outcomes: dict[str, int]) -> None:
    suite.has(machine(gpu(0, free_gib=1)))

    result = suite.run("-rs", *options, test_x=SUITE)

    result.assert_outcomes(**outcomes)
    result.stdout.fnmatch_lines(
        ["*VLM711: 10.0 GiB free is wanted on one GPU: GPU 0 (NVIDIA L4) has 1.0 GiB of 22.0 GiB f*"]
    )


@pytest.mark.parametrize(("options", "counts"), [([], {"passed": 1, "error": 1}), (["--vlm-busy=skip"], {"passed": 1})])
def test_leased_gpus(make: Callable[..., Project], options: list[str], counts: dict[str, int]) -> None:
    first, second = make("first", gpus=1), make("second", gpus=1)
    holder = first.start(test_x=SLOW)
    try:
        until((first.folder / "started").exists)
        text, found = second.run("-rs", *options, test_x=ONE_MODEL)
    finally:
        (first.folder / "go").touch()
        finish(holder)

    assert found == counts | ({"skipped": 1} if options else {}), text
    assert "VLM730: 1 GPU is wanted" in text


def test_what_is_broken_is_no_skip(suite: Any, gpu: Any, machine: Any) -> None:
    suite.has(machine(gpu(0, error="GPU is lost", memory_free_bytes=None)))

    suite.run("--vlm-busy=skip", test_x=SUITE).assert_outcomes(errors=3)


def test_where_one_gpu_is_broken_the_other_one_that_is_taken_is_no_skip(suite: Any, gpu: Any, machine: Any) -> None:
    suite.has(machine(gpu(0, free_gib=1), gpu(1, error="GPU is lost", memory_free_bytes=None)))

    result = suite.run("--vlm-busy=skip", test_x=SUITE)

    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["VLM712: 10.0 GiB free is wanted on one GPU: GPU 0 * VLM1?? *"])


LOSES = """
def pytest_vlmgpu_inventory(config):
    from msgspec.structs import replace
    machine = from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")
    if not (FOLDER / "lost").exists():
        return machine
    return replace(machine, gpus=(replace(machine.gpus[0], memory_free_bytes=2**30),))
"""


def test_where_one_gpu_went_the_other_one_that_is_taken_is_no_skip(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vlmgpu.gating.gate.MEMORY_AGE_S", -1.0)
    suite.configure(LOSES, without="vlm_machine")

    result = suite.run(
        "--vlm-busy=skip",
        test_x="""
import pathlib, pytest
@pytest.mark.vlm_requires(vram_gib=10)
def test_before(): pathlib.Path("lost").touch()
@pytest.mark.vlm_requires(vram_gib=10)
def test_after(): pass
""",
    )

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["VLM712: 10.0 GiB free is wanted on one GPU: * GPU 1 (NVIDIA L4) (GPU-0*) was there earlier *"]
    )


def test_codes_have_names() -> None:
    assert {code.name: code.value for code in GateCode} == {
        name: value
        for name, value in vars(verdicts).items()
        if name.isupper() and isinstance(value, str) and value < verdicts.EXPECTATION
    }
    assert {code.value for code in GateCode} <= set(all_codes())
    assert GateCode.BUSY == "VLM711"
    assert verdicts.Verdict("error", GateCode.BUSY, "Taken.").text == "VLM711: Taken."
