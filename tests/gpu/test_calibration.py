"""Calibration on a real GPU: readings are plausible, and equal when taken twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_doctor.sources import collect
from vlm_doctor.sources.calibration import calibrate
from vlm_doctor.units import MIB

pytestmark = pytest.mark.gpu


def test_two_readings_agree(tmp_path: Path) -> None:
    first = calibrate(collect(with_torch=False), cache_folder=tmp_path)
    second = calibrate(collect(with_torch=False), cache_folder=tmp_path)
    measured = [(one.calibration, two.calibration) for one, two in zip(first, second, strict=True) if one.calibration]
    if not measured:
        pytest.skip(f"no GPU could be measured: {[reading.reason for reading in first]}")
    for one, two in measured:
        assert one is not None
        assert two is not None
        assert 100 * MIB < one.bare_context_bytes <= one.context_bytes < 2048 * MIB
        assert abs(one.context_bytes - two.context_bytes) <= 16 * MIB
        assert one.workspace_bytes == two.workspace_bytes < 128 * MIB
        assert (one.rounding_bytes, one.small_segment_bytes, one.large_segment_bytes) == (512, 2 * MIB, 20 * MIB)
