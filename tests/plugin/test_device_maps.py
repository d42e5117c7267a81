"""Who places a model, and what may stay in host memory: option, marker, gate, summary, promises."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from pytest_vlmgpu.models.offloading import emptied, with_host_memory
from pytest_vlmgpu.requirements import VlmSpec
from vlm_doctor.machine import GpuProcess
from vlm_doctor.placement import Offload, Plan, Shortage
from vlm_doctor.units import GIB

from .made_up_plans import plan
from .projects import plan_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlm_doctor.machine import Machine

LARGE = "llava-hf/llava-1.5-13b-hf"  # 26 GiB: two L4, or one with a quarter of it in host memory
THREE = f"""
import pytest
@pytest.mark.vlm("{LARGE}")
def test_default(vlm): pass
@pytest.mark.vlm("{LARGE}", device_map="single")
def test_single(vlm): pass
@pytest.mark.vlm("{LARGE}", device_map="auto")
def test_auto(vlm): pass
"""
HOST = """
from vlm_doctor.units import GIB
from msgspec.structs import replace
from vlm_doctor.placement import AutoPlacement, Offload

OFF = Offload(keys=("lm_head",), weights_bytes=3 * GIB, copy_bytes=0, host_left_bytes=None, reason="It is large.", cost="")

@pytest.fixture(scope="session")
def vlm_planner():
    def plan(spec, machine, gpus):
        found = place(spec, machine, gpus)
        if spec.name == "org/c":
            found = replace(found, offloaded=OFF, device_map={"layers.0": 0, "lm_head": "cpu"})
        return found
    return plan
"""
SUITE = """
import pytest
@pytest.mark.vlm("org/c")
def test_large(vlm): assert vlm.device_map == {"layers.0": 0, "lm_head": "cpu"}
@pytest.mark.vlm("org/a")
def test_small(vlm): pass
"""


@pytest.fixture
def plans(suite: Any) -> Any:
    """Plans of the project's tests on a made-up machine, by the real planner."""
    suite.folder.joinpath("conftest.py").unlink()

    def plan(machine: str, *arguments: str, source: str = THREE) -> list[str]:
        result = suite.run("--vlm-plan", f"--vlm-machine={machine}", *arguments, test_x=source)
        return plan_lines(result)[1:]

    return plan


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("gpus=(1,)", "no gpus of vlm_policy"),
        ('exclude=(0,), pins=(("lm_head", 1),)', "no exclude and no pins of vlm_policy"),
        ("max_gpus=1", "no max_gpus of vlm_policy"),
    ],
)
def test_rules_that_transformers_would_not_keep_to_are_refused(suite: Any, plans: Any, rules: str, said: str) -> None:
    (suite.folder / "conftest.py").write_text(
        "import pytest, vlm_doctor\n@pytest.fixture(scope='session')\n"
        f"def vlm_policy(): return vlm_doctor.Policy({rules})\n"
    )

    *_, error = plans("2xL4")

    assert error == (
        f'error: test_x.py::test_auto: VLM720: device_map="auto" lets transformers place {LARGE}, which keeps to {said}: '
        'leave that out, choose GPUs with --vlm-gpus, or let the planner place it (device_map="doctor").'
    )


def test_how_careful_a_policy_is_counts_where_transformers_places_a_model(suite: Any, plans: Any) -> None:
    (suite.folder / "conftest.py").write_text(
        "import pytest, vlm_doctor\n@pytest.fixture(scope='session')\n"
        "def vlm_policy(): return vlm_doctor.Policy(headroom_min_bytes=12 * 2**30)\n"
    )

    assert [line.partition(": VLM705")[0] for line in plans("2xL4")[1:]] == [
        f"skip: test_x.py::test_{name}" for name in ("default", "single", "auto")
    ]


def test_the_planner_the_planner_on_one_gpu_and_transformers(plans: Any) -> None:
    head, *lines = plans("2xL4")

    assert head == "2 gated tests would run, 1 would skip, 0 errors; 2 loads"
    assert lines[0].startswith(f"1. load {LARGE} on GPU 0 (")
    assert "GPU 1 (" in lines[0]
    assert lines[2].startswith(f'2. load {LARGE} (device_map "auto") on GPU 0 (')
    assert lines[2].endswith(" would place it")
    assert lines[4].startswith(
        f"skip: test_x.py::test_single: VLM705: {LARGE} does not fit: even the best split over 1 GPU "
    )


def test_the_option_is_for_models_whose_marker_does_not_say(plans: Any) -> None:
    source = f"""
import pytest
@pytest.mark.vlm("{LARGE}")
def test_default(vlm): pass
@pytest.mark.vlm("{LARGE}", device_map="doctor")
def test_own(vlm): pass
@pytest.mark.vlm("{LARGE}")
@pytest.mark.vlm_requires(gpus=2)
def test_spread(vlm): pass
"""
    head, *lines = plans("2xL4", "--vlm-device-map=single", source=source)

    assert head == "2 gated tests would run, 1 would skip, 0 errors; 2 loads"
    assert next(line for line in lines if line.startswith("skip")).startswith("skip: test_x.py::test_default: VLM705")


def test_what_is_too_large_may_stay_in_host_memory_where_that_is_allowed(plans: Any) -> None:
    assert plans("L4")[0] == "0 gated tests would run, 3 would skip, 0 errors; 0 loads"

    head, *lines = plans("L4", "--vlm-allow-offload")

    assert head == "3 gated tests would run, 0 would skip, 0 errors; 3 loads"
    assert lines[0].endswith(" GiB peak predicted), host memory (6.2 GiB OFF THE GPUS)")
    assert "host memory or disk (6.2 GiB OFF THE GPUS), as transformers" in lines[4]


def test_a_busy_gpu_is_not_made_up_for_by_host_memory(plans: Any) -> None:
    head, *lines = plans("L4:free=12GiB", "--vlm-allow-offload")

    assert head == "0 gated tests would run, 0 would skip, 3 errors; 0 loads"
    assert lines[0].startswith(
        f"error: test_x.py::test_default: VLM711: {LARGE} would leave 15.7 GiB in host memory, and only 6.2 GiB would have "
        "to stay there if others held nothing of the GPUs. GPU 0 (NVIDIA L4) has 12.0 GiB of 22.0 GiB free, "
    )
    # So little that the vision tower alone does not fit: still nothing that a smaller machine would be to blame for.
    assert plans("L4:free=1GiB", "--vlm-allow-offload")[0] == "0 gated tests would run, 0 would skip, 3 errors; 0 loads"


@pytest.mark.parametrize("level", ["--vlm-strict", "--vlm-strict=all", "--vlm-strict=auto"])
def test_a_strict_run_takes_nothing_off_the_gpus(plans: Any, level: str) -> None:
    head, *lines = plans("L4", "--vlm-allow-offload", level)

    assert head == "0 gated tests would run, 0 would skip, 3 errors; 0 loads"
    assert lines[0].startswith(f"error: test_x.py::test_default: VLM714: 6.2 GiB of {LARGE} would stay in host memory: ")
    assert lines[0].endswith(
        "--vlm-allow-offload allows that, and --vlm-strict wants proof of GPUs: use more GPUs or larger ones, or leave out "
        "one of the two."
    )
    assert 'VLM714: device_map="auto" would leave 6.2 GiB of ' in lines[2]


def test_a_test_that_ran_with_host_memory_is_told_and_proves_nothing(suite: Any) -> None:
    suite.configure(HOST, without="vlm_planner")
    suite.folder.joinpath("base.json").write_text('{"schema": 1, "machine": null, "tests": ["test_x.py::test_large"]}')

    result = suite.run(
        "--vlm-allow-offload",
        "--vlm-min-tests=2",
        "--vlm-baseline=base.json",
        "--vlm-report=out.json",
        "--junitxml=out.xml",
        test_x=SUITE,
    )

    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "2 ran",
            "org/c: loaded in * on GPU 0, 6.0 GiB of weights, *; 3.0 GiB of it in host memory; 1 test",
            "1 TEST RAN WITH PART OF THE MODEL OFF THE GPUS (--vlm-allow-offload): slow, and no proof of what GPUs do.",
            "  test_x.py::test_large: 3.0 GiB of org/c",
            "VLM741: 1 gated test ran, --vlm-min-tests=2: 1 with part of its model in host memory.",
            "VLM742: 1 of 1 test of base.json did not run again: test_x.py::test_large ran with 3.0 GiB of its model in *.",
        ]
    )
    tests = json.loads((suite.folder / "out.json").read_text())["tests"]
    assert {test["nodeid"][-5:]: test["offloaded_gib"] for test in tests} == {"large": 3.0, "small": None}
    assert 'name="vlmgpu.offloaded_gib" value="3.0"' in (suite.folder / "out.xml").read_text()

    suite.run("--vlm-allow-offload", "--vlm-baseline=new.json", "--vlm-update-baseline", test_x=SUITE)
    assert json.loads((suite.folder / "new.json").read_text())["tests"] == ["test_x.py::test_small"]


def test_a_policy_that_offloads_is_refused_unless_the_run_allows_it(suite: Any) -> None:
    suite.configure(HOST, without="vlm_planner")

    result = suite.run(test_x=SUITE)

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "VLM714: 3.0 GiB of org/c would stay in host memory: It is large. A test on GPUs must not run there unless you "
            "say so (--vlm-allow-offload): use more GPUs or larger ones, or a smaller workload."
        ]
    )
    assert "LOAD org/c" not in suite.loads()


def test_a_loader_of_the_project_that_lets_transformers_choose_is_held_to_the_gpus(suite: Any) -> None:
    source = """
import pytest
@pytest.mark.vlm("org/offload", device_map="auto")
def test_x(vlm): pass
@pytest.mark.vlm("org/astray", device_map="balanced")
def test_y(vlm): assert vlm.device_map == {"layers.0": "cuda:1"}
"""
    result = suite.run(test_x=source)

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ['VLM714: device_map="auto" has put 1 part of org/offload off the GPUs (layers.0 is on cpu)*']
    )

    suite.run("--vlm-allow-offload", test_x=source).assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('"org/a", device_map="gpu"', "has device_map='gpu'; write doctor, single, auto, balanced."),
        ('"org/a", device="auto"', "has no keyword 'device'; write device_map=…."),
        ('"org/a", revision=3', "has revision=3; write a branch, tag or commit as text."),
        ('"org/a@x", revision="y"', "has revision=… beside several names or an @; write each name as org/model@revision."),
        ('"org/a", "org/b", revision="y"', "has revision=… beside several names or an @; *"),
    ],
)
def test_a_wrong_marker_is_a_collection_error(suite: Any, arguments: str, message: str) -> None:
    result = suite.run(test_x=f"import pytest\n@pytest.mark.vlm({arguments})\ndef test_x(vlm): pass")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"*VLM720: test_x.py::test_x: @pytest.mark.vlm {message.replace('[', '[[]')}"])


def test_one_gpu_and_two_contradict_each_other(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a", device_map="single")
        @pytest.mark.vlm_requires(gpus=2)
        def test_x(vlm): pass
        """
    )

    result.stdout.fnmatch_lines(
        ['VLM720: test_x.py::test_x: @pytest.mark.vlm has device_map="single", and the test requires 2 GPUs.']
    )


def test_a_revision_becomes_part_of_the_name(suite: Any) -> None:
    suite.configure("from made_up_plans import SIZES_GIB\nSIZES_GIB['a@v2'] = 4")

    suite.run(test_x="import pytest\n@pytest.mark.vlm('org/a', revision='v2')\ndef test_x(vlm): pass")

    assert suite.loads() == ["LOAD org/a@v2", "UNLOAD org/a@v2"]


def test_a_spec_says_who_places_it() -> None:
    assert VlmSpec("org/a", device_map="auto").label == 'org/a (device_map "auto")'
    assert VlmSpec("org/a", device_map="doctor").completed(gpus=1, dtype=None, device_map="auto") == VlmSpec("org/a")
    assert VlmSpec("org/a").completed(gpus=2, dtype=None, device_map="single") == VlmSpec("org/a", min_gpus=2)
    assert VlmSpec("org/a").completed(gpus=2, dtype=None, device_map="auto").is_placed_by_transformers


def _plan(weights_gib: int | None, *, fits: bool = True, is_permanent: bool = True) -> Plan:
    off = None
    if weights_gib is not None:
        off = Offload(
            keys=("lm_head",), weights_bytes=weights_gib * GIB, copy_bytes=0, host_left_bytes=None, reason="", cost=""
        )
    shortage = None if fits else Shortage(missing_bytes=1, message="too large", is_permanent=is_permanent)
    return plan(fits=fits, offloaded=off, shortage=shortage)


@pytest.mark.parametrize(
    ("now", "empty", "is_permanent"),
    [
        (_plan(None, fits=False), _plan(None, fits=False), True),  # no host memory either
        (_plan(None, fits=False), _plan(2), False),
        (_plan(3), _plan(2), False),
        (_plan(3), _plan(None), False),
    ],
)
def test_host_memory_is_for_what_is_too_large_and_not_for_what_is_taken(
    now: Plan, empty: Plan, is_permanent: bool, gpu: Callable[..., Any], machine: Callable[..., Any]
) -> None:
    taken = machine(gpu(0, free_gib=4))

    def ask(found: Machine, *, offload: bool) -> Plan:
        assert offload
        return now if found is taken else empty

    answer = with_host_memory(_plan(None, fits=False), taken, ask)

    assert not answer.fits
    assert answer.shortage is not None
    assert answer.shortage.is_permanent is is_permanent
    assert with_host_memory(_plan(None, fits=False), machine(gpu(0)), lambda found, offload: _plan(2)) == _plan(2)


def test_what_this_process_holds_is_not_taken_by_others(gpu: Callable[..., Any], machine: Callable[..., Any]) -> None:
    import os

    mine = GpuProcess(pid=os.getpid(), kind="compute", used_bytes=12 * GIB)
    own, other = gpu(0, free_gib=10, processes=(mine,)), gpu(1, free_gib=10)

    found = emptied(machine(own, other))

    assert [one.memory_free_bytes for one in found.gpus] == [10 * GIB, 22 * GIB]
    unknown = replace(other, memory_free_bytes=None)
    assert emptied(machine(unknown)).gpus == (unknown,)
    assert emptied(machine(own)) == machine(own)
