"""Models chosen at run time, unittest suites, devices, and engines that plugins bring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .projects import with_workers

if TYPE_CHECKING:
    from collections.abc import Callable


def test_unittest_suites_share_loads_with_all_other_tests(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import unittest
        import pytest
        @pytest.mark.vlm("org/a")
        @pytest.mark.usefixtures("vlm_cls")
        class TestOne(unittest.TestCase):
            def test_one(self): self.assertEqual(self.vlm.name, "org/a")
            def test_two(self): self.assertEqual(self.vlm.name, "org/a")
        @pytest.mark.vlm("org/b")
        @pytest.mark.usefixtures("vlm_cls")
        class TestTwo(unittest.TestCase):
            def test_one(self): self.assertEqual(self.vlm.name, "org/b")
        @pytest.mark.vlm("org/a")
        @pytest.mark.usefixtures("vlm_cls")
        class TestThree(unittest.TestCase):
            def test_one(self): self.assertEqual(self.vlm.name, "org/a")
        @pytest.mark.vlm("org/a")
        def test_plain(vlm): assert vlm.name == "org/a"
        """
    )

    result.assert_outcomes(passed=5)
    assert suite.loads() == ["LOAD org/a", "UNLOAD org/a", "LOAD org/b", "UNLOAD org/b"]


def test_a_plain_class_runs_with_each_of_its_models(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a", "org/b")
        @pytest.mark.usefixtures("vlm_cls")
        class TestBoth:
            def test_one(self, request): assert self.vlm.name == request.getfixturevalue("vlm").name
        """
    )

    result.assert_outcomes(passed=2)


def test_a_unittest_class_names_one_model(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import unittest
        import pytest
        @pytest.mark.vlm("org/a", "org/b")
        @pytest.mark.usefixtures("vlm_cls")
        class TestBoth(unittest.TestCase):
            def test_one(self): pass
        """
    )

    result.stdout.fnmatch_lines(
        ["*test_one: @pytest.mark.vlm names 2 models, and tests of a unittest.TestCase run once: *"]
    )


def test_the_default_model_reaches_unittest_suites_and_a_skip_stays_one(suite: Any) -> None:
    body = """
        import unittest
        import pytest
        @pytest.mark.usefixtures("vlm_cls")
        class TestOne(unittest.TestCase):
            def test_one(self): self.assertEqual(self.vlm.name, "org/a")
        """

    suite.run("--vlm-model=org/a", test_x=body).assert_outcomes(passed=1)
    suite.run("--vlm-model=org/huge", test_x=body).assert_outcomes(skipped=1)


def test_vlm_cls_outside_a_class_is_an_error(suite: Any) -> None:
    result = suite.run("--vlm-model=org/a", test_x="def test_x(vlm_cls): pass")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["VLM720: the fixture vlm_cls sets an attribute of a class, and this test is in none."])


def test_the_factory_loads_what_is_chosen_at_run_time_and_lets_it_go(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_both(vlm, vlm_factory):
            for name in ("org/b", "org/c"):
                with vlm_factory(name, dtype="float16") as other:
                    assert (other.name, vlm.name) == (name, "org/a")
                    assert other.plan.stages
        def test_none(vlm_factory):
            with vlm_factory("org/huge"):
                raise AssertionError("must not load")
        """
    )

    result.assert_outcomes(passed=1, skipped=1)
    assert suite.loads() == [
        "LOAD org/a",
        "LOAD org/b (float16)",
        "UNLOAD org/b (float16)",
        "LOAD org/c (float16)",
        "UNLOAD org/c (float16)",
        "UNLOAD org/a",
    ]


def test_the_shared_model_is_still_known_after_a_second_one_went(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_both(vlm, vlm_factory):
            with vlm_factory("org/b"): pass
        @pytest.mark.vlm("org/a")
        def test_after(vlm): pass
        """
    )

    result.assert_outcomes(passed=2)
    assert suite.loads().count("LOAD org/a") == 1


def test_the_factory_skips_where_there_is_no_gpu(suite: Any) -> None:
    suite.has_none()

    suite.run(test_x="def test_x(vlm_factory): pass").assert_outcomes(skipped=1)


def test_the_first_device_is_told_without_loading(suite: Any, machine: Callable[..., Any], gpu: Callable[..., Any]) -> None:
    suite.has(machine(gpu(0), gpu(1), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}))

    suite.run("--vlm-gpus=1,", test_x="def test_x(vlm_device): assert vlm_device == 'cuda:0'").assert_outcomes(passed=1)
    suite.run(test_x="def test_x(vlm_device): assert vlm_device == 'cuda:0'").assert_outcomes(passed=1)
    suite.run("--vlm-gpus=none", test_x="def test_x(vlm_device): assert vlm_device == 'cpu'").assert_outcomes(passed=1)
    suite.has_none()
    suite.run(test_x="def test_x(vlm_device): pass").assert_outcomes(skipped=1)
    assert suite.loads() == []


ENGINE = """
from types import SimpleNamespace
from pytest_vlmgpu import Estimate

def pytest_vlmgpu_estimate(config, spec):
    return Estimate(vram_bytes=9 * 2**30, gpus=2) if spec.name == "org/engine" else None

def pytest_vlmgpu_load(config, spec, plan, gpus):
    if spec.name == "org/engine":
        log(f"ENGINE LOAD {spec.name} on {[gpu.index for gpu in gpus]} by {plan}")
        return SimpleNamespace(name="engine")

def pytest_vlmgpu_unload(config, spec, loaded):
    log(f"ENGINE UNLOAD {loaded.name}")
"""


def test_a_plugin_brings_an_engine_that_places_models_itself(suite: Any) -> None:
    suite.configure(ENGINE)

    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/engine")
        def test_x(vlm): assert vlm.name == "engine"
        @pytest.mark.vlm("org/a")
        def test_y(vlm): assert vlm.name == "org/a"
        """
    )

    result.assert_outcomes(passed=2)
    assert suite.loads() == [
        "ENGINE LOAD org/engine on [0, 1] by None",
        "ENGINE UNLOAD engine",
        "LOAD org/a",
        "ENGINE UNLOAD org/a",
        "UNLOAD org/a",
    ]


def test_what_an_engine_needs_is_asked_of_the_machine(
    suite: Any, machine: Callable[..., Any], gpu: Callable[..., Any]
) -> None:
    suite.configure(ENGINE)
    body = "import pytest\n@pytest.mark.vlm('org/engine')\ndef test_x(vlm): pass"

    suite.has(machine(gpu(0)))
    suite.run(test_x=body).assert_outcomes(skipped=1)
    suite.has(machine(gpu(0), gpu(1, free_gib=3)))
    result = suite.run(test_x=body)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["VLM711: 9.0 GiB free is wanted on each of 2 GPUs: GPU 1 *has 3.0 GiB of*"])


OVERRIDDEN = {
    "vlm_machine": ("5", "fixture vlm_machine gives 5; let it give a vlm_doctor.Machine, as load_machine does."),
    "vlm_policy": ("None", "fixture vlm_policy gives None; let it give a vlm_doctor.Policy."),
    "vlm_workload": ("{}", "fixture vlm_workload gives {}; let it give a vlm_doctor.Workload."),
    "vlm_planner": ("'x'", "fixture vlm_planner gives 'x'; let it give a function of (spec, machine, gpus)."),
    "vlm_planner returns": (
        "lambda *_: 5",
        "fixture vlm_planner(spec, machine, gpus) gives 5; let it give a vlm_doctor.Plan or None.",
    ),
    "vlm_loader": ("7", "fixture vlm_loader gives 7; let it give a function of (spec, plan)."),
    "vlm_loader returns": ("lambda *_: 5", "fixture vlm_loader(spec, plan) gives 5; let it give a context manager."),
}


@pytest.mark.parametrize("case", OVERRIDDEN)
def test_a_fixture_of_a_conftest_that_gives_something_else_is_one_sentence(pytester: pytest.Pytester, case: str) -> None:
    value, sentence = OVERRIDDEN[case]
    pytester.makeconftest(f"""
        import pytest
        @pytest.fixture(scope="session")
        def {case.split(maxsplit=1)[0]}(): return {value}
        """)
    pytester.makepyfile("""
        import pytest
        @pytest.mark.vlm("llava-hf/llava-1.5-7b-hf")
        def test_one(vlm): pass
        """)

    result = pytester.runpytest_subprocess("--vlm-fake-gpus=2xL4")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"VLM720: the {sentence.replace('[', '[[]')}", "1 error (VLM720 *"])
    result.stdout.no_fnmatch_line("*Error: *")


NAMED = """
import pytest
@pytest.mark.vlm("llava-hf/llava-1.5-7b-hf")
def test_one(): pass
"""


def test_a_hook_that_gives_no_verdict_is_one_sentence(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("def pytest_vlmgpu_verdict(item, verdict): return 5")
    pytester.makepyfile(NAMED)

    result = pytester.runpytest_subprocess("--vlm-fake-gpus=2xL4")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["VLM720: the hook pytest_vlmgpu_verdict gives 5; let it give a Verdict or None."])


def test_a_hook_that_fails_to_estimate_is_one_sentence_with_its_place(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("def pytest_vlmgpu_estimate(config, spec):\n    return {}[spec.name]")
    pytester.makepyfile(NAMED)

    result = pytester.runpytest_subprocess("--vlm-fake-gpus=2xL4")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([
        "ERROR: VLM720: the hook pytest_vlmgpu_estimate fails for llava-hf/llava-1.5-7b-hf: "
        "KeyError: 'llava-hf/llava-1.5-7b-hf' (conftest.py, line 2); correct it."
    ])  # fmt: skip


@with_workers
def test_a_hook_that_fails_to_estimate_ends_a_run_with_workers_too(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("def pytest_vlmgpu_estimate(config, spec):\n    return {}[spec.name]")
    pytester.makepyfile(test_named=NAMED, test_other="def test_other(): pass")

    result = pytester.runpytest_subprocess("--vlm-fake-gpus=2xL4", "-n2")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR collecting the tests of a worker*", "VLM720: the hook pytest_vlmgpu_estimate *; correct it."]
    )
    assert "INTERNALERROR" not in result.stdout.str()


def test_a_hook_that_gives_no_estimate_is_one_sentence(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("def pytest_vlmgpu_estimate(config, spec): return '9' if spec else None")
    pytester.makepyfile(
        test_named=NAMED,
        test_chosen="""
        def test_two(vlm_factory):
            with vlm_factory("llava-hf/llava-1.5-13b-hf"): pass
        """,
    )
    sentence = "VLM720: the hook pytest_vlmgpu_estimate gives '9'; let it give an Estimate or None."

    named = pytester.runpytest_subprocess("--vlm-fake-gpus=2xL4")
    chosen = pytester.runpytest_subprocess("--vlm-fake-gpus=2xL4", "test_chosen.py")

    assert named.ret == pytest.ExitCode.USAGE_ERROR
    named.stderr.fnmatch_lines([f"ERROR: {sentence}"])
    chosen.assert_outcomes(failed=1)
    chosen.stdout.fnmatch_lines([sentence])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("5", "names a model 5; write a folder or a hub id as text."),
        ("None", "names a model None; write a folder or a hub id as text."),
        ("'a/b', dtype='int9'", "has dtype='int9'; write bfloat16 or float16 or float32."),
        ("'a/b', gpus='x'", "has gpus='x'; write a whole number from 1 to 1024."),
        ("'a/b', device_map={'': 0}", "has device_map={'': 0}; write doctor, single, auto, balanced."),
        ("'a/b', trust_remote_code='no'", "has trust_remote_code='no'; write True or False."),
    ],
)
def test_a_wrong_call_of_the_factory_is_one_sentence(pytester: pytest.Pytester, arguments: str, sentence: str) -> None:
    pytester.makeconftest("""
        import pytest
        @pytest.fixture(scope="session")
        def vlm_loader(): pass
        """)
    pytester.makepyfile(f"""
        def test_one(vlm_factory):
            with vlm_factory({arguments}): pass
        """)

    result = pytester.runpytest_subprocess("--vlm-fake-gpus=2xL4")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"VLM720: vlm_factory {sentence}"])
