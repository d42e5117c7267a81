"""How long a load will take: by what loads took on these GPUs before, and never a number that nobody measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from pytest_vlmgpu.models.load_times import TimedLoad, expected, keep, known
from pytest_vlmgpu.models.loads import Load
from pytest_vlmgpu.testing import machine_in_use
from vlm_doctor.placement import Offload
from vlm_doctor.units import GIB

from .made_up_plans import plan, stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan

    MakeGpu = Callable[..., Gpu]
    MakeMachine = Callable[..., Machine]


def placed(gpu: Gpu, gib: int) -> Plan:
    return plan("org/a", fits=True, stages=(stage(gpu, gib * GIB),))


def timed(model: str, gib: float, seconds: float, *uuids: str) -> TimedLoad:
    return TimedLoad(model=model, uuids=uuids, weights_bytes=int(gib * GIB), seconds=seconds, date="2026-01-02")


def test_a_load_is_kept_and_the_next_one_of_that_model_takes_its_place(
    gpu: MakeGpu, machine: MakeMachine, tmp_path: Path
) -> None:
    stages = placed(gpu(0), 4).stages
    keep(Load("org/a", "GPU 0", 8.0, weights_bytes=4 * GIB), stages, tmp_path)
    keep(Load("org/a", "GPU 0", 6.0, weights_bytes=4 * GIB), stages, tmp_path)

    (found,) = known(machine(gpu(0), gpu(1)), tmp_path)

    assert (found.model, found.weights_bytes, found.seconds, found.uuids) == ("org/a", 4 * GIB, 6.0, (gpu(0).uuid,))
    assert known(machine(gpu(1)), tmp_path) == [], "another machine"
    assert known(machine(gpu(0), origin="recorded"), tmp_path) == []
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


@pytest.mark.parametrize(
    "load",
    [
        Load("org/a", "GPU 0", 0.01, weights_bytes=4 * GIB),
        Load("org/a", "GPU 0", 0.0, weights_bytes=4 * GIB),
        Load("org/a", "GPU 0", 8.0),
        Load("org/a", "GPU 0", 8.0, weights_bytes=4 * GIB, offloaded_bytes=GIB),
    ],
    ids=["faster than any bus", "no time", "no weights", "partly in host memory"],
)
def test_what_says_nothing_of_a_load_is_not_kept(gpu: MakeGpu, tmp_path: Path, load: Load) -> None:
    keep(load, placed(gpu(0), 4).stages, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_or_cannot_be_written_is_no_record(gpu: MakeGpu, machine: MakeMachine, tmp_path: Path) -> None:
    (tmp_path / "load-1.json").write_text("{")
    (tmp_path / "load-2.json").write_text('{"model": "a", "uuids": [], "weights_bytes": 1, "seconds": -1, "date": ""}')
    assert known(machine(gpu(0)), tmp_path) == known(machine(gpu(0)), tmp_path / "nowhere") == []

    keep(Load("org/a", "GPU 0", 8.0, weights_bytes=4 * GIB), placed(gpu(0), 4).stages, tmp_path / "load-1.json")


def test_the_same_model_takes_what_it_took_and_others_go_by_the_median_rate(gpu: MakeGpu) -> None:
    uuid = gpu(0).uuid
    others = [timed("org/b", 4, 4, uuid), timed("org/c", 4, 2, uuid), timed("org/d", 8, 2, uuid)]

    assert expected("org/a", placed(gpu(1), 4), [*others, timed("org/a", 4, 9.4, uuid)]) == "about 9 s, as on 2026-01-02"
    assert expected("org/a", placed(gpu(0), 8), others) == "about 4 s at 2.1 GB/s, the median of 3 other loads here"
    assert expected("org/a", placed(gpu(0), 8), others[:1]) == "about 8 s at 1.1 GB/s, as another load here"
    changed = timed("org/a", 2, 9.4, uuid)
    assert expected("org/a", placed(gpu(0), 4), [changed]) == "about 19 s at 0.2 GB/s, as another load here"


def test_where_nothing_is_known_nothing_is_said(gpu: MakeGpu) -> None:
    tiny = timed("org/tiny", 0.01, 5, gpu(0).uuid)
    off = Offload(keys=("x",), weights_bytes=GIB, copy_bytes=0, host_left_bytes=None, reason="", cost="")

    assert expected("org/a", placed(gpu(0), 8), []) == expected("org/a", placed(gpu(0), 8), [tiny]) == ""
    assert expected("org/a", placed(gpu(0), 0), [timed("org/a", 0, 1)]) == ""
    assert expected("org/a", replace(placed(gpu(0), 8), offloaded=off), [timed("org/a", 8, 1, gpu(0).uuid)]) == ""


LOADER = """
import time
from pathlib import Path

@pytest.fixture(scope="session")
def vlm_loader():
    @contextmanager
    def slowly(spec, plan):
        time.sleep(0.3)
        with load(spec, plan) as loaded:
            yield loaded
    return slowly
"""
ONE = "import pytest\n@pytest.mark.vlm('org/a')\ndef test_a(vlm): pass\n"
TWO = ONE + "@pytest.mark.vlm('org/b')\ndef test_b(vlm): pass\n"


def test_a_plan_goes_by_the_runs_before_it(
    suite: Any, gpu: MakeGpu, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(suite.folder / "cache"))
    suite.configure(LOADER, without="vlm_machine")
    with machine_in_use(machine(gpu(0))):
        first = suite.run("--vlm-plan", test_x=TWO)
        suite.run(test_x=ONE)
        second = suite.run("--vlm-plan", test_x=TWO)

    first.stdout.fnmatch_lines(
        ["1. load org/a on GPU 0 (4.0 GiB peak predicted)", "how long loads take is not known yet: none has ended on *"]
    )
    second.stdout.fnmatch_lines(
        [
            "1. load org/a on GPU 0 (4.0 GiB peak predicted): about [1-9]* s, as on 20??-??-??",
            "2. load org/b on GPU 0 (5.0 GiB peak predicted): about [1-9]* s at * GB/s, as another load here",
        ]
    )
    second.stdout.no_fnmatch_line("*not known*")


def test_loads_on_a_machine_that_a_project_made_up_are_not_kept(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(suite.folder / "cache"))
    suite.configure(LOADER)

    suite.run(test_x=ONE)

    assert not (suite.folder / "cache" / "vlm-doctor").exists()
