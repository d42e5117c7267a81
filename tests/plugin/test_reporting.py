"""Header, summary, JUnit properties: what a reader of a run learns, and that a run cannot look green in silence."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SUITE = """
import pytest

@pytest.mark.vlm("org/wide")
def test_wide(vlm): pass
@pytest.mark.vlm("org/wide")
def test_wide_too(vlm): assert False
@pytest.mark.vlm("org/a", dtype="float16")
def test_a(vlm): pass
@pytest.mark.vlm_requires(gpus=4)
def test_few(): pass
@pytest.mark.vlm("org/oom")
def test_oom(vlm): pass
def test_free(): pass
"""


def test_header_counts_tests_and_models(suite: Any) -> None:
    result = suite.run("--vlm-gpus=auto", test_x=SUITE)

    result.stdout.fnmatch_lines(
        ["vlmgpu: --vlm-gpus=auto", "vlmgpu: 5 of 6 tests gated; org/wide (2), org/a (float16) (1), org/oom (1)"]
    )


def test_summary(suite: Any) -> None:
    result = suite.run(test_x=SUITE)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3, failed=1, skipped=1, errors=1)
    start = next(number for number, line in enumerate(result.outlines) if line.strip("= ") == "vlmgpu")
    lines = [re.sub(r"in \d\.\d s", "in TIME", line) for line in result.outlines[start + 1 : start + 5]]
    assert lines == [
        "2 GPUs; free: GPU 0 22.0 GiB, GPU 1 22.0 GiB",
        "3 ran; 1 skipped (VLM702 too few GPUs: 1); 1 error (VLM715 out of memory: 1)",
        "org/wide: loaded in TIME on GPU 0, 1, 30.0 GiB of weights, peak 30.0 GiB predicted; 2 tests",
        "org/a (float16): loaded in TIME on GPU 0, 4.0 GiB of weights, peak 4.0 GiB predicted; 1 test",
    ]
    assert "NO TEST RAN" not in result.stdout.str()


def test_a_run_without_any_test_on_a_gpu_says_so(suite: Any) -> None:
    result = suite.run(
        "-q", test_x="import pytest\n@pytest.mark.vlm_requires(gpus=4)\ndef test_x(): pass\ndef test_y(): pass"
    )

    assert result.ret == 0
    result.stdout.fnmatch_lines(["1 skipped (VLM702 too few GPUs: 1)", "NO TEST RAN ON A GPU (1 gated test)."])


def test_a_run_on_the_cpu_says_so(suite: Any) -> None:
    result = suite.run("--vlm-gpus=none", test_x="import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): pass")

    result.stdout.fnmatch_lines(
        ["1 ran", "org/a: loaded in * s on the CPU; 1 test", "NO TEST RAN ON A GPU (1 gated test)."]
    )


def test_a_run_without_gated_tests_says_nothing(suite: Any) -> None:
    result = suite.run(test_x="def test_x(): pass")

    assert "vlmgpu:" not in result.stdout.str()
    assert "= vlmgpu =" not in result.stdout.str()


@pytest.mark.parametrize("family", ["xunit2", "xunit1"])
def test_junit_properties(suite: Any, family: str) -> None:
    suite.run("--junitxml=out.xml", "-o", f"junit_family={family}", test_x=SUITE)

    cases = {
        case.attrib["name"]: {item.attrib["name"]: item.attrib["value"] for item in case.iter("property")}
        for case in ET.parse(suite.folder / "out.xml").iter("testcase")
    }
    gpus = ["GPU-00000000-0000-0000-0000-000000000000", "GPU-00000001-0000-0000-0000-000000000000"]
    wide = {
        "vlmgpu.verdict": "run",
        "vlmgpu.model": "org/wide",
        "vlmgpu.gpus": ",".join(gpus),
        "vlmgpu.need_gib": "30.0",
    }
    assert cases == {
        "test_wide": wide,
        "test_wide_too": wide,
        "test_a": {
            "vlmgpu.verdict": "run",
            "vlmgpu.model": "org/a (float16)",
            "vlmgpu.gpus": gpus[0],
            "vlmgpu.need_gib": "4.0",
        },
        "test_few": {"vlmgpu.verdict": "skip", "vlmgpu.code": "VLM702"},
        "test_oom": {
            "vlmgpu.verdict": "error",
            "vlmgpu.code": "VLM715",
            "vlmgpu.model": "org/oom",
            "vlmgpu.need_gib": "1.0",
        },
        "test_free": {},
    }


def test_an_error_is_an_error_in_junit(suite: Any) -> None:
    suite.run("--junitxml=out.xml", test_x="import pytest\n@pytest.mark.vlm('org/oom')\ndef test_x(vlm): pass")

    suites = next(ET.parse(suite.folder / "out.xml").iter("testsuite"))
    assert (suites.attrib["errors"], suites.attrib["skipped"]) == ("1", "0")


def test_a_test_whose_own_fixture_fails_did_not_run_on_a_gpu(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.fixture
        def broken(): raise RuntimeError
        @pytest.fixture
        def absent(): pytest.skip("no server")
        @pytest.mark.vlm_requires
        def test_x(broken): pass
        @pytest.mark.vlm_requires
        def test_y(absent): pass
        """
    )

    result.assert_outcomes(errors=1, skipped=1)
    result.stdout.fnmatch_lines(["1 skipped; 1 error", "NO TEST RAN ON A GPU (2 gated tests)."])


def test_the_machine_line_without_gpu(suite: Any, machine: Callable[..., Any]) -> None:
    suite.has(machine())

    result = suite.run(test_x="import pytest\n@pytest.mark.vlm_requires\ndef test_x(): pass")

    result.stdout.fnmatch_lines(["no GPU", "1 skipped (VLM701 no GPU: 1)", "NO TEST RAN ON A GPU (1 gated test)."])


def test_weights_that_stay_are_reported(suite: Any) -> None:
    suite.configure(
        """
@pytest.fixture(scope="session", autouse=True)
def fake_loading():
    from pytest_vlmgpu.models import loading
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", fake_load)
        patch.setattr(loading, "unload", lambda loaded: 3 * 2**30)
        yield

def fake_load(name, plan, *, dtype, trust_remote_code, ordinals, device_map, gpus, may_offload):
    assert (device_map, gpus, may_offload) == (None, [], False)
    assert ordinals == {stage.uuid: stage.gpu for stage in plan.stages}
    return SimpleNamespace(name=name, dtype=dtype, trust=trust_remote_code, held_by="variable KEPT of module test_x")
""",
        without="vlm_loader",
    )

    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/wide", dtype="float16", trust_remote_code=True)
        def test_x(vlm): assert (vlm.name, vlm.dtype, vlm.trust) == ("org/wide", "float16", True)
        """
    )

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*peak 30.0 GiB predicted; 3.0 GiB still held by variable KEPT of module test_x after it was unloaded; 1 test"]
    )

    strict = suite.run("--vlm-leak-check=error")

    assert strict.ret == pytest.ExitCode.TESTS_FAILED
    strict.stdout.fnmatch_lines(
        ["*VLM753*3.0 GiB of org/wide (float16) are still held after it was unloaded, by variable KEPT of module test_x: *"]
    )
    assert suite.run("--vlm-leak-check=error", "--vlm-leak-tolerance=4GiB").ret == pytest.ExitCode.OK


@pytest.mark.parametrize(("options", "is_shown"), [((), False), (("-v",), True)])
def test_what_the_library_raised_is_shown_to_those_who_look_closer(
    suite: Any, options: tuple[str, ...], is_shown: bool
) -> None:
    result = suite.run(*options, test_x="import pytest\n@pytest.mark.vlm('org/oom')\ndef test_x(vlm): pass\n")

    result.stdout.fnmatch_lines(["VLM715: org/oom ran out of memory."])
    assert ("Traceback of torch" in result.stdout.str()) is is_shown


def test_each_load_of_a_model_has_the_tests_that_it_served(suite: Any) -> None:
    source = """
    import pytest

    @pytest.mark.vlm("org/a")
    @pytest.mark.parametrize("number", [1, 2])
    def test_a(vlm, number): pass
    @pytest.mark.vlm("org/b")
    def test_chosen(vlm, vlm_factory):
        with vlm_factory("org/a"): pass
    """

    result = suite.run(test_x=source)

    result.assert_outcomes(passed=3)
    endings = [line.rpartition("peak 4.0 GiB predicted")[2] for line in result.outlines if line.startswith("org/a: loaded")]
    assert endings == ["; 2 tests", ""]


def test_each_worker_s_load_has_its_own_tests(suite: Any) -> None:
    pytest.importorskip("xdist")
    one = "import pytest\n@pytest.mark.vlm('org/a')\ndef test_a(vlm): pass\n"
    two = one.replace("def", "@pytest.mark.parametrize('n', [1, 2])\ndef").replace("vlm)", "vlm, n)")

    result = suite.run("-n2", "--dist=loadfile", test_x=one, test_y=two)

    result.assert_outcomes(passed=3)
    counts = sorted(line.rpartition("; ")[2] for line in result.outlines if line.startswith("org/a: loaded"))
    assert counts == ["1 test", "2 tests"]
