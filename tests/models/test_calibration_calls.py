"""The calls that calibration makes on a GPU are calls that torch takes; on the CPU they take the same arguments."""

from __future__ import annotations

import pytest

from vlm_doctor.sources import calibration_child

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.models


def test_the_first_calls_of_a_model_are_valid() -> None:
    with torch.no_grad():
        calibration_child._first_calls(torch, torch.device("cpu"))
