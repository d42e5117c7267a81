from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from vlm_doctor.answer import check_report
from vlm_doctor.codec import machine_from_json
from vlm_doctor.formats import render

MACHINE = Path(__file__).parents[1] / "machines" / "2xl4-idle.json"


def test_the_slowest_sources_are_named_and_torch_is_not() -> None:
    machine = machine_from_json(MACHINE.read_bytes(), where="m.json")
    seconds = {"nvml": 5.02, "host": 3.0, "libraries": 0.05, "torch": 20.0, "checkpoints": 2.1, "driver": 2.0}
    report = check_report(replace(machine, seconds=seconds))
    assert report.notes == ("Slow to read: nvml 5.0 s, host 3.0 s, checkpoints 2.1 s.",)
    assert "Slow to read: nvml 5.0 s" in render(report, "terminal")
    assert check_report(machine).notes == ()
