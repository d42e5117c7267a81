"""The fixture ladder: values, overriding, and staying out of the way of a project's own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def test_parts_of_the_model(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/wide")
        def test_x(vlm, vlm_model, vlm_processor, vlm_device_map):
            assert (vlm_model, vlm_processor) == ("model org/wide", "processor org/wide")
            assert vlm_device_map == vlm.device_map == {"layers.0": 0, "layers.1": 1}
        """
    )

    result.assert_outcomes(passed=1)


def test_gpus_are_those_that_may_be_used(suite: Any) -> None:
    result = suite.run("--vlm-gpus=1,", test_x="def test_x(vlm_gpus): assert [gpu.index for gpu in vlm_gpus] == [1]")

    result.assert_outcomes(passed=1)
    assert suite.loads() == []


def test_gpus_of_a_machine_without_any_skip(suite: Any, machine: Callable[..., Any]) -> None:
    suite.has(machine())

    result = suite.run("-rs", test_x="def test_x(vlm_gpus): pass")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED [[]1[]] test_x.py:1: VLM701: this machine has no NVIDIA GPU."])


def test_the_doctors_report_is_no_reason_to_skip(suite: Any, machine: Callable[..., Any]) -> None:
    suite.has(machine())

    result = suite.run(
        test_x="def test_x(vlm_doctor): assert vlm_doctor.machine.gpus == () and vlm_doctor.diagnosis.outcomes"
    )

    result.assert_outcomes(passed=1)


def test_a_policy_of_the_project_reaches_the_planner(suite: Any) -> None:
    suite.configure(
        """
@pytest.fixture(scope="session")
def vlm_policy():
    from vlm_doctor.workload import Policy
    return Policy(gpus=(1,), min_gpus=1)

@pytest.fixture(scope="session")
def vlm_workload():
    from vlm_doctor.workload import Workload
    return Workload(dtype="float16", text_tokens=64)

@pytest.fixture(scope="session", autouse=True)
def record_planning():
    import vlm_doctor.planner as planner
    import vlm_doctor.sources.model_files as model_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_files, "load_profile", lambda name: f"profile of {name}")
        patch.setattr(planner, "plan", record)
        yield

def record(profile, machine, workload, policy):
    from vlm_doctor.errors import ModelNotFoundError
    raise ModelNotFoundError(f"{profile} {workload.dtype} {workload.text_tokens} {policy.gpus} {policy.min_gpus}")
""",
        without="vlm_planner",
    )

    result = suite.run(
        "--vlm-gpus=0,1",
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a", dtype="bfloat16")
        def test_marker(vlm): pass
        @pytest.mark.vlm("org/b")
        def test_default(vlm): pass
        """,
    )

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        ["VLM713: profile of org/a bfloat16 64 (1,) 1", "VLM713: profile of org/b float16 64 (1,) 1"]
    )


def test_a_planner_without_plan_needs_a_loader_of_its_own(suite: Any) -> None:
    suite.configure("\n@pytest.fixture(scope='session')\ndef vlm_planner():\n    return lambda *_: None\n")
    body = "import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): assert vlm.plan is None"
    suite.run(test_x=body).assert_outcomes(passed=1)

    suite.configure(without="vlm_loader")
    result = suite.run(test_x=body)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*vlm_planner returned no plan: override vlm_loader too, to place the model yourself.*"])


def test_the_model_may_be_wrapped_in_a_conftest(suite: Any) -> None:
    suite.configure("\n@pytest.fixture(scope='session')\ndef vlm(vlm):\n    vlm.tuned = True\n    return vlm\n")

    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_x(vlm): assert vlm.tuned and vlm.name == "org/a"
        @pytest.mark.vlm("org/a")
        @pytest.mark.vlm_requires(gpus=3)
        def test_y(vlm): pass
        """
    )

    result.assert_outcomes(passed=1, skipped=1)


@pytest.mark.parametrize("name", ["vlm", "vlm_model", "vlm_gpus", "vlm_machine"])
def test_a_fixture_of_the_project_with_our_name_is_left_alone(suite: Any, machine: Callable[..., Any], name: str) -> None:
    suite.has(machine())

    result = suite.run(
        test_x=f"""
        import pytest
        @pytest.fixture
        def {name}(): return 7
        def test_x({name}): assert {name} == 7
        """
    )

    result.assert_outcomes(passed=1)
    assert "vlmgpu:" not in result.stdout.str()


def test_a_plain_parameter_with_our_name_is_left_alone(suite: Any) -> None:
    result = suite.run(
        test_x="import pytest\n@pytest.mark.parametrize('vlm, n', [(1, 2)])\ndef test_x(vlm, n): assert (vlm, n) == (1, 2)"
    )

    result.assert_outcomes(passed=1)
    assert "vlmgpu:" not in result.stdout.str()


def test_hooks_see_verdicts_and_loads(suite: Any) -> None:
    suite.configure(
        """
from pytest_vlmgpu import Verdict

def pytest_vlmgpu_verdict(item, verdict):
    if item.name == "test_kept_out":
        return Verdict("error", "OURS", "the project says so.")

def pytest_vlmgpu_loaded(spec, loaded):
    log(f"LOADED {spec.label} {loaded.name}")
"""
    )

    result = suite.run(
        test_x="""
        import pytest
        pytestmark = pytest.mark.vlm("org/a")
        def test_x(vlm): pass
        def test_kept_out(vlm): pass
        """
    )

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["OURS: the project says so.", "1 ran; 1 error (OURS: 1)"])
    assert "LOADED org/a org/a" in suite.loads()


def test_the_gate_comes_after_the_sessions_own_setup_and_before_all_other_fixtures(suite: Any) -> None:
    suite.configure(
        """
@pytest.fixture(scope="session", autouse=True)
def session_setup(): log("session setup")

@pytest.fixture(autouse=True)
def each_setup(): log("each setup")

@pytest.fixture(scope="session")
def gpu_server(): log("gpu server")

@pytest.fixture(scope="session")
def other(): log("other")
"""
    )

    suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm_requires(gpus=4)
        @pytest.mark.usefixtures("other")
        def test_x(gpu_server): pass
        """
    ).assert_outcomes(skipped=1)

    assert suite.log() == ["session setup", "MACHINE"]


def test_a_unittest_class_is_gated(suite: Any) -> None:
    result = suite.run(
        "-rs",
        test_x="""
        import unittest, pytest
        class TestX(unittest.TestCase):
            @pytest.mark.vlm_requires(gpus=4)
            def test_skipped(self): raise AssertionError
            @pytest.mark.vlm_requires(gpus=2)
            def test_run(self): pass
        """,
    )

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED [[]1[]] test_x.py:*: VLM702: 4 GPUs are wanted, 2 can be used."])


def test_gpus_asked_for_while_a_test_runs_are_none_on_a_cpu_run(suite: Any) -> None:
    result = suite.run("--vlm-gpus=none", "-rs", test_x="def test_x(request): request.getfixturevalue('vlm_gpus')\n")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * VLM701: a GPU is wanted, and --vlm-gpus=none allows none."])
