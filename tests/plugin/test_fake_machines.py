"""Machines for users' own suites: the gate decides about them as about real ones."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_vlmgpu.testing import fake_machine, machine_in_use
from vlm_doctor import sources
from vlm_doctor.errors import UsageError

BODY = """
import pytest
@pytest.mark.vlm_requires(gpus=2)
def test_two(vlm_gpus): assert len(vlm_gpus) == 2
@pytest.mark.vlm_requires(vram_gib=20)
def test_large(): pass
"""


def outcomes(suite: Any, machine: Any) -> dict[str, int]:
    suite.folder.joinpath("conftest.py").write_text("")
    with machine_in_use(machine):
        result: dict[str, int] = suite.run(test_x=BODY).parseoutcomes()
    return result


def test_a_machine_in_use_is_the_one_that_decides(suite: Any) -> None:
    real = sources.collect

    assert outcomes(suite, fake_machine("2xL4")) == {"passed": 2}
    assert outcomes(suite, fake_machine("L4")) == {"passed": 1, "skipped": 1}
    assert outcomes(suite, fake_machine("2x12GiB")) == {"passed": 1, "skipped": 1}
    assert outcomes(suite, fake_machine("none")) == {"skipped": 2}
    assert outcomes(suite, fake_machine("2xL4", origin="synthetic")) == {"skipped": 2}
    assert sources.collect is real


def test_taken_and_lost_gpus_are_errors(suite: Any) -> None:
    assert outcomes(suite, fake_machine("2xL4", taken_gib={0: 10, 1: 8.5})) == {"passed": 1, "errors": 1}
    assert outcomes(suite, fake_machine("2xL4", lost=[1])) == {"passed": 1, "errors": 1}


def test_the_holder_has_a_name() -> None:
    gpu = fake_machine("L4", taken_gib={0: 10}).gpus[0]

    assert [(process.pid, process.user, process.used_bytes) for process in gpu.processes] == [
        (4242, "somebody", 10 * 2**30)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lost": [2]}, r"2xL4 has no GPU 2: its GPUs are \[0, 1\]\."),
        ({"taken_gib": {0: 99}}, r"GPU 0 \(.*L4.*\) has less than 99 GiB free\."),
    ],
)
def test_what_cannot_be_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_machine("2xL4", **arguments)


def test_a_spec_that_cannot_be_read() -> None:
    with pytest.raises(UsageError):
        fake_machine("2xNothing")
