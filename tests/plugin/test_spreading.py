"""Tests that name several models run with each: their ids, their order, and what else may stand beside."""

from __future__ import annotations

from typing import Any

import pytest


def ids(suite: Any, body: str, *arguments: str) -> list[str]:
    """Ids of the tests of a module, in the order in which they run."""
    result = suite.run("--co", "-q", *arguments, test_x=body)
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_the_first_model_comes_first_and_parameters_of_the_test_stay(suite: Any) -> None:
    found = ids(
        suite,
        """
        import pytest
        def test_before(): pass
        @pytest.mark.vlm("org/a", "org/b")
        @pytest.mark.parametrize("x", [1, 2])
        def test_each(vlm, x): pass
        def test_after(): pass
        """,
    )

    assert found == ["test_before", "test_each[a-1]", "test_each[a-2]", "test_each[b-1]", "test_each[b-2]", "test_after"]


def test_each_runs_with_its_model_and_its_parameter(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a", "org/b")
        @pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.vlm_requires(gpus=2))])
        def test_each(vlm, x, request):
            assert request.node.name == f"test_each[{vlm.name[-1]}-{x}]"
            assert request.node.callspec.params["vlm"].min_gpus == x
        """
    )

    result.assert_outcomes(passed=4)


def test_models_with_the_same_last_part_are_told_apart(suite: Any) -> None:
    body = 'import pytest\n@pytest.mark.vlm("one/m", "two/m")\ndef test_x(vlm): pass\n'

    assert ids(suite, body) == ["test_x[one/m]", "test_x[two/m]"]


@pytest.mark.parametrize(
    ("markers", "labels"),
    [
        (["vlm('org/m', dtype='float16')", "vlm('org/m')"], ["m", "m-float16"]),
        (["vlm('org/m', device_map='auto')", "vlm('org/m', 'org/n')"], ["m", "n", "m-auto"]),
        (["vlm('one/m', dtype='float16')", "vlm('one/m', 'two/m')"], ["one/m", "two/m", "one/m-float16"]),
        (["vlm('org/m', trust_remote_code=True)", "vlm('org/m')"], ["m-0", "m-1"]),
    ],
)
def test_each_way_to_load_a_model_has_an_id_of_its_own(suite: Any, markers: list[str], labels: list[str]) -> None:
    body = "import pytest\n" + "".join(f"@pytest.mark.{marker}\n" for marker in markers) + "def test_x(vlm): pass\n"

    assert ids(suite, body) == [f"test_x[{label}]" for label in labels]


def test_one_of_them_can_be_chosen_by_its_id_and_by_a_word(suite: Any) -> None:
    body = 'import pytest\n@pytest.mark.vlm("org/a", "org/bé")\ndef test_x(vlm): pass\n'
    suite.pytester.makepyfile(test_x=body)

    assert ids(suite, body, "test_x.py::test_x[a]") == ["test_x[a]"]
    assert ids(suite, body, "-k", "a and not b") == ["test_x[a]"]
    assert ids(suite, body) == ["test_x[a]", "test_x[b\\xe9]"]


def test_those_that_failed_last_time_are_run_again_each_with_its_model(suite: Any) -> None:
    body = """
        import pytest
        @pytest.mark.vlm("org/a", "org/b")
        class TestX:
            def test_x(self, vlm): assert vlm.name != "org/b"
        """
    suite.run("-p", "cacheprovider", test_x=body)

    assert ids(suite, body, "-p", "cacheprovider", "--lf") == ["TestX::test_x[b]"]


def test_a_plugin_that_picks_tests_as_they_are_collected_sees_each(suite: Any) -> None:
    suite.pytester.makepyfile(
        picking="""
        import pytest
        @pytest.hookimpl(wrapper=True)
        def pytest_make_collect_report(collector):
            report = yield
            report.result = [node for node in report.result if isinstance(node, pytest.Collector) or "[b]" in node.name]
            return report
        """
    )
    suite.pytester.syspathinsert()
    body = 'import pytest\n@pytest.mark.vlm("org/a", "org/b")\ndef test_x(vlm): pass\n'

    assert ids(suite, body, "-p", "picking") == ["test_x[b]"]


def test_a_project_that_parametrizes_by_its_own_hook_keeps_its_choice(suite: Any) -> None:
    suite.configure("def pytest_generate_tests(metafunc):\n  metafunc.parametrize('vlm', ['org/c'], indirect=True)\n")

    result = suite.run(test_x='import pytest\n@pytest.mark.vlm("org/a", "org/b")\ndef test_x(vlm): pass\n')

    result.stdout.fnmatch_lines(["*a marker on a parameter names one model, and none where the test function *"])


@pytest.mark.parametrize("marker", ['vlm("org/b")', "other"])
def test_a_marker_on_a_parameter_beside_one_on_the_function_is_refused(suite: Any, marker: str) -> None:
    suite.pytester.makeini('[pytest]\nmarkers = other\nvlm_marker_aliases =\n  other = vlm("org/b")\n')

    result = suite.run(
        test_x=f"""
        import pytest
        @pytest.mark.vlm("org/a")
        @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.{marker})])
        def test_x(vlm, x): pass
        """
    )

    result.stdout.fnmatch_lines(["*a marker on a parameter names one model, and none where the test function *"])


def test_a_marker_that_a_hook_adds_while_items_are_made_names_several_too(suite: Any) -> None:
    suite.configure(
        """
import pytest
@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
    result = yield
    for item in result or ():
        item.add_marker(pytest.mark.vlm("org/a", "org/b"))
    return result
"""
    )

    assert ids(suite, "def test_x(vlm): pass\n") == ["test_x[a]", "test_x[b]"]


def test_other_models_that_a_hook_adds_to_one_parameter_are_run_too(suite: Any) -> None:
    suite.configure(
        """
import pytest
@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
    result = yield
    for item in result or ():
        item.add_marker(pytest.mark.vlm(*["org/a", "org/b", "org/c"][:item.callspec.params["x"]]))
    return result
"""
    )
    body = 'import pytest\n@pytest.mark.parametrize("x", [2, 3, 1])\ndef test_x(vlm, x): pass\n'

    found = ["test_x[a-2]", "test_x[b-2]", "test_x[a-3]", "test_x[b-3]", "test_x[c-3]", "test_x[1]"]
    assert sorted(ids(suite, body)) == sorted(found)


def test_what_a_hook_has_made_of_a_test_holds_with_each_model(suite: Any) -> None:
    suite.configure(
        """
import pytest
@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
    result = yield
    for item in result if isinstance(result, list) else ():
        item.add_marker("added")
        item.user_properties.append(("added", 1))
        if item.name == "test_wrapped":
            def wrapped(vlm, run=item.obj):
                run(vlm)
                assert vlm.name != "org/b", "said by the hook"
            item.obj = wrapped
    return result
"""
    )
    suite.pytester.makeini("[pytest]\nmarkers = added")

    result = suite.run(
        test_x="""
        import pytest
        pytestmark = pytest.mark.vlm("org/a", "org/b")
        def test_wrapped(vlm): pass
        class TestX:
            def test_x(self, vlm, request):
                assert not vars(self), "another test has this object too"
                self.used = True
                assert "added" in request.node.keywords and request.node.user_properties[0] == ("added", 1)
        """
    )

    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["FAILED test_x.py::test_wrapped?b? - AssertionError: said by the hook*"])


def test_a_function_that_a_collector_of_the_project_gives_runs_with_each_model(suite: Any) -> None:
    suite.configure(
        """
import pytest
@pytest.mark.vlm("org/a", "org/b")
def written(vlm, request): assert request.node.name == f"made[{vlm.name[-1]}]"
class Made(pytest.File):
    def collect(self):
        yield pytest.Function.from_parent(self, name="made", callobj=written)
def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".made":
        return Made.from_parent(parent, path=file_path)
"""
    )
    (suite.folder / "x.made").touch()

    suite.run("x.made").assert_outcomes(passed=2)


def test_unmarked_tests_beside_gated_ones_are_left_alone(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import pytest
        def test_plain(request): assert not [name for name in request.node.fixturenames if "vlm" in name]
        @pytest.mark.vlm_requires(gpus=True + 1)
        def test_gated(request): assert "_vlm_gate" in request.node.fixturenames
        @pytest.mark.usefixtures("vlm_gpus")
        def test_used(request): assert "_vlm_gate" in request.node.fixturenames
        """
    )

    result.assert_outcomes(passed=3)
