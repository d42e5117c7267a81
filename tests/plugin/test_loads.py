"""Models load once, one after the other, and a refusal is an error or a skip at the right test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vlm_doctor.machine import GpuProcess

if TYPE_CHECKING:
    from collections.abc import Callable

INTERLEAVED = {
    "test_one": """
        import pytest
        @pytest.mark.vlm("org/a")
        def test_a(vlm): assert vlm.name == "org/a"
        @pytest.mark.vlm("org/b")
        def test_b(vlm): assert vlm.name == "org/b"
        def test_free(): pass
        """,
    "test_two": """
        import pytest
        @pytest.mark.vlm("org/b")
        class TestB:
            def test_b(self, vlm): assert vlm.name == "org/b"
        @pytest.mark.vlm("org/a")
        def test_a(vlm): assert vlm.name == "org/a"
        @pytest.mark.vlm("org/a", "org/b")
        def test_both(vlm): pass
        """,
}
ONCE = ["LOAD org/a", "UNLOAD org/a", "LOAD org/b", "UNLOAD org/b"]


def test_interleaved_tests_in_two_files_load_each_model_once(suite: Any) -> None:
    result = suite.run(**INTERLEAVED)

    result.assert_outcomes(passed=7)
    assert suite.loads() == ONCE


def test_a_shuffled_order_still_loads_each_model_once(suite: Any) -> None:
    suite.pytester.syspathinsert()
    suite.pytester.makepyfile(
        shuffle="""
        def pytest_collection_modifyitems(items):
            items[:] = items[::2] + items[1::2]
        """
    )

    result = suite.run("-p", "shuffle", **INTERLEAVED)

    result.assert_outcomes(passed=7)
    assert sorted(suite.loads()) == sorted(ONCE)


def test_the_id_of_a_test_with_one_model_stays(suite: Any) -> None:
    result = suite.run("--co", "-q", **INTERLEAVED)

    result.stdout.fnmatch_lines(["test_one.py::test_a", "test_two.py::test_both[[]a[]]", "test_two.py::test_both[[]b[]]"])


def test_models_with_one_last_name_part_have_different_ids(suite: Any) -> None:
    result = suite.run("--co", "-q", test_x="import pytest\n@pytest.mark.vlm('org/a', 'other/a')\ndef test_x(vlm): pass")

    ids = [line for line in result.outlines if "test_x[" in line]
    assert len(set(ids)) == 2


def test_the_closest_marker_names_the_model(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        pytestmark = pytest.mark.vlm("org/a")
        def test_module(vlm): assert vlm.name == "org/a"
        @pytest.mark.vlm("org/b")
        def test_function(vlm): assert vlm.name == "org/b"
        """
    )

    result.assert_outcomes(passed=2)


def test_stacked_markers_give_each_model_its_own_options(suite: Any) -> None:
    suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a", dtype="float16")
        @pytest.mark.vlm("org/a", dtype="bfloat16")
        def test_x(vlm): pass
        """
    )

    assert [line for line in suite.loads() if line.startswith("LOAD")] == ["LOAD org/a (bfloat16)", "LOAD org/a (float16)"]


def test_a_default_dtype_is_for_models_whose_marker_names_none(suite: Any) -> None:
    suite.run(
        "--vlm-dtype=float16",
        "--vlm-model=org/a",
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_default(vlm): pass
        @pytest.mark.vlm("org/a", dtype="bfloat16")
        def test_own(vlm): pass
        def test_unmarked(vlm): pass
        """,
    )

    assert [line for line in suite.loads() if line.startswith("LOAD")] == ["LOAD org/a (float16)", "LOAD org/a (bfloat16)"]


def test_a_marker_on_a_parameter_names_the_model_of_that_case(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        A, B = pytest.mark.vlm("org/a"), pytest.mark.vlm("org/b")
        @pytest.mark.parametrize("n", [pytest.param("org/a", marks=A), pytest.param("org/b", marks=B)])
        @pytest.mark.parametrize("m", [1, 2])
        def test_x(n, m, vlm): assert vlm.name == n
        """
    )

    result.assert_outcomes(passed=4)
    assert [line for line in suite.loads() if line.startswith("LOAD")] == ["LOAD org/a", "LOAD org/b"]


def test_a_required_number_of_gpus_spreads_the_model(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        @pytest.mark.vlm_requires(gpus=2)
        def test_wide(vlm): assert set(vlm.device_map.values()) == {0, 1}
        @pytest.mark.vlm("org/a")
        def test_narrow(vlm): assert set(vlm.device_map.values()) == {0}
        @pytest.mark.vlm_requires(gpus=2)
        @pytest.mark.parametrize("vlm", ["org/a"], indirect=True)
        def test_parametrized(vlm): assert len(vlm.plan.stages) == 2
        """
    )

    result.assert_outcomes(passed=3)
    assert [line for line in suite.loads() if line.startswith("LOAD")] == ["LOAD org/a (at least 2 GPUs)", "LOAD org/a"]


def test_a_shared_model_is_placed_where_all_its_tests_can_run(
    suite: Any, machine: Callable[..., Any], gpu: Callable[..., Any]
) -> None:
    old = gpu(0, name="NVIDIA T4", compute_capability=(7, 5))
    suite.has(machine(old, gpu(1), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}))

    result = suite.run(
        test_x="""
        import pytest
        pytestmark = pytest.mark.vlm("org/a")
        def test_any(vlm): assert [stage.gpu for stage in vlm.plan.stages] == [1]
        @pytest.mark.vlm_requires(bf16=True)
        def test_new(vlm): assert [stage.gpu for stage in vlm.plan.stages] == [1]
        @pytest.mark.vlm_requires(gpus=8)
        def test_skipped(vlm): pass
        """
    )

    result.assert_outcomes(passed=2, skipped=1)
    assert suite.loads() == ["LOAD org/a", "UNLOAD org/a"]


def test_tests_that_share_a_model_must_not_contradict_each_other(
    suite: Any, machine: Callable[..., Any], gpu: Callable[..., Any]
) -> None:
    old = gpu(0, name="Tesla V100", total_gib=32, free_gib=31, compute_capability=(7, 0))
    suite.has(machine(old, gpu(1), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}))

    result = suite.run(
        test_x="""
        import pytest
        pytestmark = pytest.mark.vlm("org/a")
        @pytest.mark.vlm_requires(bf16=True)
        def test_new(vlm): pass
        @pytest.mark.vlm_requires(vram_gib=30)
        def test_large(vlm): pass
        """
    )

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["VLM720: tests that share org/a ask together for what no GPU here offers: memory and *"])


def test_the_default_model_serves_tests_that_name_none(suite: Any) -> None:
    result = suite.run("--vlm-model=org/b", test_x="def test_x(vlm): assert vlm.name == 'org/b'")

    result.assert_outcomes(passed=1)


def test_no_model_at_all_is_an_error(suite: Any) -> None:
    result = suite.run(test_x="def test_x(vlm): pass")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "VLM720: the test uses the fixture vlm and names no model; "
            'add @pytest.mark.vlm("org/model"), or give --vlm-model.'
        ]
    )


def test_a_model_asked_for_by_name_is_the_default_one(suite: Any) -> None:
    body = "def test_x(request): assert request.getfixturevalue('vlm').name == 'org/a'"

    suite.run("--vlm-model=org/a", test_x=body).assert_outcomes(passed=1)
    result = suite.run(test_x=body)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ['VLM720: the fixture vlm needs a model; mark the test @pytest.mark.vlm("org/model"), or *']
    )


def test_on_the_cpu_the_workers_of_xdist_load_too(suite: Any) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")

    result = suite.run("-n1", "--vlm-gpus=none", test_x="import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): pass")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["1 ran", "org/a: loaded in * s on the CPU; 1 test"])


def test_nothing_loads_for_a_deselected_or_skipped_test(suite: Any) -> None:
    suite.run(
        "-k",
        "not test_a",
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_a(vlm): pass
        @pytest.mark.vlm("org/b")
        @pytest.mark.skip(reason="later")
        def test_b(vlm): pass
        """,
    )

    assert suite.loads() == []
    assert suite.log() == [], "the machine was asked although nothing was to run"


@pytest.mark.parametrize(
    ("model", "mark", "message"),
    [
        ("org/oom", "", "VLM715: org/oom ran out of memory."),
        ("org/oom", "@pytest.mark.xfail", "VLM715: org/oom ran out of memory."),
        ("org/oom", "@pytest.mark.xfail(strict=True)", "VLM715: org/oom ran out of memory."),
        ("org/code", "", "VLM713: org/code brings its own Python code *allow it with trust_remote_code=True."),
        ("org/gone", "@pytest.mark.xfail", "VLM713: org/gone: no such model."),
        ("org/astray", "", "VLM716: *org/astray*layers.0 is on cuda:1, planned cuda:0*"),
        ("org/offload", "", "VLM714: *org/offload*layers.0 is on cpu, planned cuda:0*"),
    ],
)
def test_a_model_that_does_not_load_is_an_error_of_each_of_its_tests(
    suite: Any, model: str, mark: str, message: str
) -> None:
    result = suite.run(
        test_x=f"""
        import pytest
        pytestmark = pytest.mark.vlm("{model}")
        {mark}
        def test_x(vlm): pass
        def test_y(vlm): pass
        """
    )

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_x*", message, "*ERROR at setup of test_y*", message])
    assert "Traceback" not in result.stdout.str()
    assert sum(line == f"LOAD {model}" for line in suite.loads()) <= 1


def test_taken_memory_is_judged_when_the_model_before_is_gone(
    suite: Any, machine: Callable[..., Any], gpu: Callable[..., Any]
) -> None:
    suite.has(machine(gpu(0, free_gib=5.5), gpu(1, free_gib=0)))

    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_a(vlm): pass
        @pytest.mark.vlm("org/c")
        def test_c(vlm): pass
        @pytest.mark.vlm("org/b")
        def test_b(vlm): pass
        """
    )

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["VLM711: org/c needs 6 GiB. GPU 0 (NVIDIA L4) has 5.5 GiB of 22.0 GiB free*"])
    assert suite.loads() == ONCE


@pytest.mark.parametrize("gpus", ["auto", "none"])
def test_no_more_models_are_loaded_than_there_are_slots(suite: Any, gpus: str) -> None:
    body = "import pytest\n" + "\n".join(f"@pytest.mark.vlm('org/{name}')\ndef test_{name}(vlm): pass" for name in "abc")

    suite.run("--vlm-slots=2", f"--vlm-gpus={gpus}", test_x=body).assert_outcomes(passed=3)

    first, second, gone, third, *ends = suite.loads()
    assert [first, second, third] == ["LOAD org/a", "LOAD org/b", "LOAD org/c"]
    assert gone in ("UNLOAD org/a", "UNLOAD org/b")
    assert sorted([gone, *ends]) == ["UNLOAD org/a", "UNLOAD org/b", "UNLOAD org/c"]


def test_free_memory_is_required_without_loading(suite: Any, machine: Callable[..., Any], gpu: Callable[..., Any]) -> None:
    suite.has(machine(gpu(0, free_gib=5.5)))

    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_loads(vlm): pass
        @pytest.mark.vlm("org/b")
        def test_starts_it_itself(): pass
        @pytest.mark.vlm("org/c")
        def test_has_no_room(): pass
        @pytest.mark.vlm_requires(vram_gib=6)
        def test_needs_room(): pass
        """
    )

    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["VLM711: org/c needs 6 GiB. *", "VLM711: 6.0 GiB free is wanted on one GPU: *"])


def test_a_gpu_of_ones_own_is_busy_while_others_compute_there(
    suite: Any, machine: Callable[..., Any], gpu: Callable[..., Any]
) -> None:
    other = GpuProcess(pid=4242, kind="compute", used_bytes=2**30, user="ana", command="python train.py")
    suite.has(machine(gpu(0, free_gib=21, processes=(other,))))

    result = suite.run(
        "-rs",
        test_x="""
        import pytest
        @pytest.mark.vlm_requires(exclusive=True)
        def test_times(): pass
        @pytest.mark.vlm("org/a")
        @pytest.mark.vlm_requires(exclusive=True)
        def test_times_model(vlm): pass
        @pytest.mark.vlm_requires(gpus=2, reason="one a rank")
        def test_ranks(): pass
        """,
    )

    result.assert_outcomes(errors=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "VLM711: 1 GPU without any other process wanted: GPU 0 * held by pid 4242 (ana, python train.py) 1.0 GiB.",
            "SKIPPED *: VLM702: 2 GPUs are wanted, 1 can be used (one a rank).",
        ]
    )


def test_tests_that_need_free_memory_run_before_a_model_takes_it(suite: Any) -> None:
    result = suite.run(
        "-v",
        test_x="""
        import pytest
        def test_first(): pass
        @pytest.mark.vlm("org/a")
        def test_loads(vlm): pass
        @pytest.mark.vlm_requires(vram_gib=20)
        def test_needs_room(): pass
        """,
    )

    order = [line.split()[0] for line in result.outlines if "PASSED" in line]
    assert order == ["test_x.py::test_first", "test_x.py::test_needs_room", "test_x.py::test_loads"]


def test_a_model_too_large_for_the_machine_skips_at_the_test(suite: Any) -> None:
    result = suite.run("-rs", test_x="import pytest\n\n@pytest.mark.vlm('org/huge')\ndef test_x(vlm): pass\n")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED [[]1[]] test_x.py:3: VLM705: org/huge needs 900 GiB."])
    assert suite.loads() == []


def test_on_the_cpu_models_run_and_tests_of_gpus_skip(suite: Any) -> None:
    result = suite.run(
        "--vlm-gpus=none",
        "-rs",
        test_x="""
        import pytest
        @pytest.mark.vlm("org/huge")
        def test_cpu(vlm): assert vlm.plan is None
        @pytest.mark.vlm("org/a")
        @pytest.mark.vlm_requires(gpus=2)
        def test_gpus(vlm): pass
        def test_records(vlm_gpus): pass
        """,
    )

    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED [[]1[]] test_x.py:*: VLM701: a GPU is wanted, and --vlm-gpus=none allows none."])
    assert suite.loads() == ["LOAD org/huge", "UNLOAD org/huge"]
    assert "MACHINE" not in suite.log()


def test_strict_makes_skips_errors_with_the_same_code(suite: Any) -> None:
    result = suite.run(
        "--vlm-strict",
        test_x="""
        import pytest
        @pytest.mark.vlm_requires(gpus=4)
        def test_x(): pass
        @pytest.mark.skip(reason="of the project's own")
        def test_y(): pass
        """,
    )

    result.assert_outcomes(errors=1, skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["VLM702: 4 GPUs are wanted, 2 can be used. (An error because of --vlm-strict.)"])


def test_on_a_made_up_machine_the_gate_decides_and_nothing_runs(suite: Any) -> None:
    suite.folder.joinpath("conftest.py").unlink()

    result = suite.run(
        "--vlm-machine=2xL4",
        "-rs",
        test_x="""
        import pytest
        @pytest.mark.vlm_requires(gpus=2, vram_gib=20)
        def test_runs(): assert False, "must not run"
        @pytest.mark.vlm_requires(gpus=4)
        def test_skips(): assert False, "must not run"
        def test_free(): pass
        """,
    )

    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(
        [
            "SKIPPED [[]1[]] test_x.py:*: would run on GPU 0, 1 of *, which is synthetic, not live.",
            "SKIPPED [[]1[]] test_x.py:*: VLM702: 4 GPUs are wanted, 2 can be used.",
        ]
    )


@pytest.mark.parametrize("arguments", [["--vlm-machine=2xL4"], ["--vlm-machine=2xL4", "--vlm-gpus=none"]])
def test_nothing_is_loaded_on_a_made_up_machine(suite: Any, arguments: list[str]) -> None:
    suite.folder.joinpath("machine.json").unlink()
    suite.configure(without="vlm_machine")

    result = suite.run(*arguments, test_x="import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): pass")

    result.assert_outcomes(skipped=1)
    assert suite.loads() == []


def test_a_model_asked_for_at_run_time_is_that_of_the_marker(suite: Any) -> None:
    source = """
    import pytest

    @pytest.fixture
    def helper(request): return request.getfixturevalue("vlm")
    @pytest.mark.vlm("org/a")
    def test_fixture(helper): assert helper.name == "org/a"
    @pytest.mark.vlm("org/a")
    @pytest.mark.parametrize("number", [1, 2])
    def test_parameter(request, number): assert request.getfixturevalue("vlm").name == "org/a"
    @pytest.mark.vlm("org/b")
    class TestAll:
        @pytest.fixture(autouse=True)
        def injected(self, request): self.vlm = request.getfixturevalue("vlm")
        def test_class(self): assert self.vlm.name == "org/b"
    @pytest.mark.vlm("org/a", "org/b")
    def test_two(request): request.getfixturevalue("vlm")
    def test_none(request): assert request.getfixturevalue("vlm").name == "org/c"
    """

    result = suite.run("--vlm-model=org/c", test_x=source)

    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["VLM720: @pytest.mark.vlm names 2 models, and the test asks for one at run time: *"])
    assert [line for line in suite.loads() if line.startswith("LOAD")] == ["LOAD org/a", "LOAD org/b", "LOAD org/c"]
