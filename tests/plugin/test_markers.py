"""Markers: what they mean, and what each wrong one says when it is collected."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from pytest_vlmgpu import declare, markers
from pytest_vlmgpu.requirements import Requirements, VlmSpec

GIB = 2**30


def requires(**keywords: Any) -> Requirements:
    result: Requirements = markers.read(pytest.mark.vlm_requires(**keywords).mark, "test_x.py::test_x")
    return result


def models(*names: Any, **keywords: Any) -> tuple[VlmSpec, ...]:
    result: tuple[VlmSpec, ...] = markers.read(pytest.mark.vlm.with_args(*names, **keywords).mark, "test_x.py::test_x")
    return result


def test_a_bare_marker_requires_one_gpu() -> None:
    assert requires() == Requirements(gpus=1)


def test_numbers_are_gib_and_text_carries_its_unit() -> None:
    assert requires(vram_gib=20, total_vram_gib="80GB") == Requirements(vram_bytes=20 * GIB, total_vram_bytes=80 * 10**9)
    assert requires(vram_gib=0.5).vram_bytes == GIB // 2


@pytest.mark.parametrize("capability", [(8, 9), [8, 9], "8.9", 8.9])
def test_forms_of_a_compute_capability(capability: Any) -> None:
    assert requires(capability=capability).capability == (8, 9)


def test_number_formats_become_capabilities_and_the_highest_counts() -> None:
    assert requires(bf16=True).capability == (8, 0)
    assert requires(fp8=True).capability == (8, 9)
    assert requires(bf16=True, capability=(9, 0)).capability == (9, 0)
    assert requires(bf16=False).capability is None


def test_the_strictest_of_each_requirement_applies() -> None:
    joined = Requirements.strictest([requires(gpus=2, vram_gib=10), requires(vram_gib=20, bf16=True), requires()])

    assert joined == Requirements(gpus=2, vram_bytes=20 * GIB, capability=(8, 0))


def test_models_by_name_path_and_dtype() -> None:
    class dtype:  # noqa: N801 - torch.dtype prints itself like this
        def __str__(self) -> str:
            return "torch.float16"

    assert models("org/a", Path("b"), dtype=dtype()) == (VlmSpec("org/a", dtype="float16"), VlmSpec("b", dtype="float16"))
    assert models("org/a", trust_remote_code=True) == (VlmSpec("org/a", trust_remote_code=True),)


def test_a_spec_says_what_differs_from_the_default() -> None:
    assert VlmSpec("org/a").label == "org/a"
    assert VlmSpec("org/a", dtype="float16", min_gpus=2).label == "org/a (float16, at least 2 GPUs)"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"min_gb": 20}, "has no keyword 'min_gb'; write vram_gib=…"),
        ({"gpus": 2, "min_gib": 20}, "has no keyword 'min_gib'; write vram_gib=…"),
        ({"memory": 20}, "has no keyword 'memory'; write vram_gib=…"),
        ({"vram_gb": 20}, "has no keyword 'vram_gb'; write vram_gib=…"),
        ({"VRAM_GiB": 20}, "has no keyword 'VRAM_GiB'; write vram_gib=…"),
        ({"num_gpus": 2}, "has no keyword 'num_gpus'; write gpus=…"),
        ({"count": 2}, "has no keyword 'count'; write gpus=…"),
        ({"nvlink": True}, "has no keyword 'nvlink'; write p2p=…"),
        ({"p2p": 1}, "has p2p=1; write True or False"),
        ({"exclusive": "yes"}, "has exclusive='yes'; write True or False"),
        ({"reason": " "}, "has reason=' '; write a text"),
        ({"reason": 3}, "has reason=3; write a text"),
        ({"gpuss": 2}, "has no keyword 'gpuss'; write gpus=…"),
        ({"cc": 8}, "has no keyword 'cc'; write capability=…"),
        ({"torch_dtype": "x"}, "has no keyword 'torch_dtype'; write @pytest.mark.vlm(dtype=…)"),
        (
            {"color": 2},
            "has no keyword 'color'; it takes gpus, vram_gib, total_vram_gib, capability, bf16, fp8, p2p, exclusive, "
            "reason",
        ),
        ({"gpus": 0}, "has gpus=0; write a whole number from 1 to 1024"),
        ({"gpus": True}, "has gpus=True; write a whole number from 1 to 1024"),
        ({"gpus": 1.0}, "has gpus=1.0; write a whole number from 1 to 1024"),
        ({"gpus": 10**9}, "has gpus=1000000000; write a whole number from 1 to 1024"),
        ({"vram_gib": "20"}, "has vram_gib='20'; write GiB as a number, or text with a unit such as \"80GB\""),
        ({"vram_gib": float("nan")}, 'has vram_gib=nan; write GiB as a number, or text with a unit such as "80GB"'),
        ({"vram_gib": True}, 'has vram_gib=True; write GiB as a number, or text with a unit such as "80GB"'),
        ({"vram_gib": -1}, "has vram_gib=-1; write a size above zero"),
        ({"total_vram_gib": "0GB"}, "has total_vram_gib='0GB'; write a size above zero"),
        ({"vram_gib": 24 * 10**9}, "has vram_gib=24000000000; a number is in GiB, so this is too large"),
        ({"capability": 80}, 'has capability=80; write (8, 0) or "8.0"'),
        ({"capability": (8,)}, 'has capability=(8,); write (8, 0) or "8.0"'),
        ({"capability": "sm_80"}, "has capability='sm_80'; write (8, 0) or \"8.0\""),
        ({"bf16": 1}, "has bf16=1; write True or False"),
    ],
)
def test_a_wrong_requirement(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(pytest.Collector.CollectError) as caught:
        requires(**keywords)

    assert str(caught.value) == f"VLM720: test_x.py::test_x: @pytest.mark.vlm_requires {message}."


def test_requirements_have_names() -> None:
    with pytest.raises(pytest.Collector.CollectError) as caught:
        markers.read(pytest.mark.vlm_requires.with_args(2, 20).mark, "test_x.py::test_x")

    assert str(caught.value) == (
        "VLM720: test_x.py::test_x: @pytest.mark.vlm_requires takes keywords only, such as gpus=2; got 2, 20."
    )


@pytest.mark.parametrize(
    ("names", "keywords", "message"),
    [
        ((), {}, 'names no model; write vlm("org/model")'),
        ((), {"model": "a"}, "has no keyword 'model'; write the name alone, as in vlm(\"org/model\")"),
        (("a",), {"gpus": 2}, "has no keyword 'gpus'; write @pytest.mark.vlm_requires(gpus=…)"),
        (("a",), {"min_gb": 2}, "has no keyword 'min_gb'; write @pytest.mark.vlm_requires(vram_gib=…)"),
        (("",), {}, "names a model ''; write a folder or a hub id as text"),
        ((7,), {}, "names a model 7; write a folder or a hub id as text"),
        (("\x1b[31m",), {}, "names a model '\\x1b[31m'; write a folder or a hub id as text"),
        (("a" * 5000,), {}, f"names a model '{'a' * 79}…; write a folder or a hub id as text"),
        (("a", "a"), {}, "names a model twice; name it once"),
        (("a",), {"dtype": "bf16"}, "has dtype='bf16'; write bfloat16"),
        (("a",), {"dtype": "int3"}, "has dtype='int3'; write bfloat16 or float16 or float32"),
        (("a",), {"trust_remote_code": "yes"}, "has trust_remote_code='yes'; write True or False"),
    ],
)
def test_a_wrong_model(names: tuple[Any, ...], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(pytest.Collector.CollectError) as caught:
        models(*names, **keywords)

    assert str(caught.value) == f"VLM720: test_x.py::test_x: @pytest.mark.vlm {message}."


def test_markers_are_listed_with_their_signature(suite: Any) -> None:
    result = suite.run("--markers")

    result.stdout.fnmatch_lines(
        [
            "@pytest.mark.vlm(*names, revision=None, dtype=None, device_map=None, trust_remote_code=False): Name the *",
            "@pytest.mark.vlm_requires(*, gpus=1, vram_gib=None, total_vram_gib=None, capability=None, *): Skip *",
        ]
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("@pytest.mark.vlm_requires(min_gb=20)\ndef test_x(): pass", "*@pytest.mark.vlm_requires has no keyword 'min_gb'*"),
        ("@pytest.mark.vlm\ndef test_x(vlm): pass", "*test_x.py::test_x: @pytest.mark.vlm names no model*"),
        (
            "@pytest.mark.vlm('a')\n@pytest.mark.vlm('a')\ndef test_x(vlm): pass",
            "*@pytest.mark.vlm names a model twice; name it once.*",
        ),
        (
            "import unittest\nclass TestX(unittest.TestCase):\n"
            "  @pytest.mark.vlm_requires(count=2)\n  def test_x(self): pass",
            "*test_x.py::TestX::test_x: @pytest.mark.vlm_requires has no keyword 'count'; write gpus=*",
        ),
        (
            "@pytest.mark.parametrize('n', [pytest.param(1, marks=pytest.mark.vlm_requires(gpus=0))])\ndef test_x(n): pass",
            "*test_x.py::test_x[[]1[]]: @pytest.mark.vlm_requires has gpus=0*",
        ),
        (
            "@pytest.mark.parametrize('n', [pytest.param(1, marks=pytest.mark.vlm('a', 'b'))])\ndef test_x(n, vlm): pass",
            "*a marker on a parameter names one model*",
        ),
    ],
)
def test_a_wrong_marker_is_a_collection_error(suite: Any, body: str, message: str) -> None:
    result = suite.run(test_x=f"import pytest\n{body}\n", test_y="def test_y(): pass")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*ERROR collecting test_x.py*", message, "*1 error*"])
    assert "INTERNALERROR" not in result.stdout.str()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
@pytest.mark.parametrize(("typed", "meant"), [("vlm_require", "vlm_requires"), ("vlms", "vlm"), ("vml", "vlm")])
def test_a_misspelt_marker_is_a_collection_error(suite: Any, typed: str, meant: str) -> None:
    result = suite.run(test_x=f"import pytest\n@pytest.mark.{typed}(gpus=2)\ndef test_x(): pass\n")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(
        [f"VLM720: test_x.py::test_x: there is no marker @pytest.mark.{typed}; did you mean @pytest.mark.{meant}? *"]
    )


def test_a_registered_marker_of_the_project_is_left_alone(suite: Any) -> None:
    suite.pytester.makeini("[pytest]\nmarkers =\n  vlm_slow: ours\n  vlm_tier(n): ours too")

    result = suite.run(test_x="import pytest\n@pytest.mark.vlm_slow\n@pytest.mark.vlm_tier(2)\ndef test_x(): pass\n")

    result.assert_outcomes(passed=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
def test_an_unregistered_marker_of_a_project_without_vlms_is_pytest_s_concern(suite: Any) -> None:
    plain = suite.run(test_x="import pytest\n@pytest.mark.vlm_slow\ndef test_x(): pass\n")
    gated = suite.run(test_x="import pytest\n@pytest.mark.vlm_slow\ndef test_x(vlm_gpus): pass\n")

    plain.assert_outcomes(passed=1)
    gated.stdout.fnmatch_lines(["VLM720: test_x.py::test_x: there is no marker @pytest.mark.vlm_slow; *"])


@pytest.mark.parametrize("marker", ["vlm", "vlm('slow')", "vlm(suite=3)"])
def test_a_project_s_own_marker_vlm_keeps_its_meaning(suite: Any, marker: str) -> None:
    suite.pytester.makeini("[pytest]\nmarkers = vlm(...): our own")
    suite.has_none()

    own = suite.run(test_x=f"import pytest\n@pytest.mark.{marker}\ndef test_x(): pass\n")
    ours = suite.run(test_x="import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): pass\n")

    own.assert_outcomes(passed=1)
    ours.assert_outcomes(skipped=1)


def test_a_project_s_own_fixture_and_marker_vlm_keep_their_meaning(suite: Any) -> None:
    body = """
    import pytest
    @pytest.fixture
    def vlm(): return "theirs"
    @pytest.mark.vlm
    def test_x(vlm): assert vlm == "theirs"
    """

    suite.run(test_x=body).assert_outcomes(passed=1)


def test_the_lines_of_markers_tell_their_signatures() -> None:
    for line, (name, function) in zip(declare.MARKERS, markers.MARKERS.items(), strict=True):
        signature = inspect.signature(function)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        shown = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        assert line == f"{name}{shown}: {inspect.getdoc(function)}"


def test_markers_of_class_module_and_parameter_join(suite: Any) -> None:
    result = suite.run(
        "-rs",
        test_x="""
        import pytest
        pytestmark = pytest.mark.vlm_requires(gpus=2)

        @pytest.mark.vlm_requires(vram_gib=21)
        class TestX:
            @pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.vlm_requires(capability="9.0"))])
            def test_x(self, n): pass
            @pytest.mark.vlm_requires(gpus=3, vram_gib=1)
            def test_y(self): pass
        """,
    )

    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(
        [
            "SKIPPED [[]1[]] test_x.py:*: VLM704: compute capability 9.0 is wanted on each of 2 GPUs, *",
            "SKIPPED [[]1[]] test_x.py:*: VLM702: 3 GPUs are wanted, 2 can be used.",
        ]
    )


def test_a_class_overrides_the_model_and_the_limit_of_its_base(suite: Any) -> None:
    source = """
    import unittest
    import pytest
    class Cases:
        def test_name(self): assert self.vlm.name == self.wanted
    @pytest.mark.vlm("org/a")
    @pytest.mark.usefixtures("vlm_cls")
    class TestA(Cases, unittest.TestCase): wanted = "org/a"
    @pytest.mark.vlm("org/b")
    class TestB(TestA): wanted = "org/b"
    class TestStillB(TestB):
        pass
    @pytest.mark.model("org/a")
    class TestAAgain(TestB): wanted = "org/a"
    class TestC(TestA):
        pytestmark = pytest.mark.vlm("org/c")
        wanted = "org/c"

    @pytest.mark.vlm_limit_vram("1GiB")
    @pytest.mark.vlm("org/a")
    class TestSmall:
        def test_limit(self, request, vlm):
            from pytest_vlmgpu.state import WATCHED_TEST
            assert request.node.stash[WATCHED_TEST].limit_bytes == self.limit
        limit = 2**30
    @pytest.mark.vlm_limit_vram("2GiB")
    class TestLarge(TestSmall): limit = 2**31
    """
    (suite.folder / "pytest.ini").write_text("[pytest]\nvlm_marker_aliases = model(name) = vlm(name)\n")

    suite.run(test_x=source).assert_outcomes(passed=7)
    assert sorted(suite.loads()) == sorted(f"{what} org/{name}" for what in ("LOAD", "UNLOAD") for name in "abc")
