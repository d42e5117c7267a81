"""The judgement of a map as text, whole."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from vlm_doctor.answer import map_report
from vlm_doctor.errors import UsageError
from vlm_doctor.formats import render
from vlm_doctor.formats.map_text import map_source
from vlm_doctor.report import Report
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.workload import Policy, Workload


@pytest.fixture(scope="module")
def report() -> Report:
    device_map: dict[str, int | str] = {"": 0, "model.language_model.layers.1": 1}
    profile = load_profile("llava-hf/llava-1.5-7b-hf", allow_network=False)
    made = map_report(device_map, profile, load_machine("2xL4"), Workload(), Policy())
    return msgspec.structs.replace(made, version="1.2.3")


def test_whole_text(report: Report, golden: Callable[[str, str], None]) -> None:
    golden("terminal/map_report.txt", render(report, "terminal"))
    golden("terminal/map_report.verbose.txt", render(report, "terminal", verbose=True))


def test_a_judgement_of_nothing_with_notes_is_short(report: Report) -> None:
    assert report.map_check is not None
    bare = msgspec.structs.replace(report.map_check, devices=(), findings=(), corrected=None, changes=(), best=None,
                                   notes=("one",))  # fmt: skip

    text = render(msgspec.structs.replace(report, map_check=bare), "terminal", verbose=True)

    assert text.startswith("This map loads, runs and fits.\n")
    assert text.endswith("Assumed\n  - one\n")


def test_a_judgement_is_no_script(report: Report) -> None:
    with pytest.raises(UsageError, match="only a plan can be written as Python"):
        render(report, "python")


def test_a_map_is_written_so_that_python_reads_it_back() -> None:
    device_map: dict[str, int | str] = {"a'b": "cpu", "x.0": 0, "x.1": 0, "x.2": 0, "x.3": 1}
    names: dict[str, object] = {}

    exec(map_source(device_map), names)

    assert names["device_map"] == device_map
