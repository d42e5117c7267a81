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


def test_one_of_them_can_be_chosen_by_its_id_and_by_a_word(suite: Any) -> None:
    body = 'import pytest\n@pytest.mark.vlm("org/a", "org/bé")\ndef test_x(vlm): pass\n'
    suite.pytester.makepyfile(test_x=body)

    assert ids(suite, body, "test_x.py::test_x[a]") == ["test_x[a]"]
    assert ids(suite, body, "-k", "a and not b") == ["test_x[a]"]
    assert ids(suite, body) == ["test_x[a]", "test_x[b\\xe9]"]


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
