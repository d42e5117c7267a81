"""Markers that hooks of a project add to tests which are collected already: gated like those in the file."""

from __future__ import annotations

from typing import Any

import pytest

HOOKS = {
    "itemcollected": "def pytest_itemcollected(item): item.add_marker(MARK)",
    "makeitem": """
@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
    result = yield
    for item in result or (): item.add_marker(MARK)
    return result
""",
    "modifyitems": "def pytest_collection_modifyitems(items):\n  for item in items: item.add_marker(MARK)",
    "modifyitems at last": """
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
  for item in items: item.add_marker(MARK)
""",
    "of the module": "def pytest_collection_modifyitems(items): items[0].parent.add_marker(MARK)",
}
"""Where projects add markers, most often by the path of a test."""
TESTS = "def test_one(): pass\ndef test_two(): pass\n"


def with_hook(suite: Any, hook: str, mark: str) -> None:
    suite.configure(f"import pytest\nMARK = pytest.mark.{mark}\n{HOOKS[hook]}\n")


@pytest.mark.parametrize("hook", HOOKS)
def test_an_added_marker_is_gated(suite: Any, hook: str) -> None:
    with_hook(suite, hook, "vlm_requires(gpus=3)")

    result = suite.run("-rs", test_x=TESTS)

    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*2 skipped (VLM702 too few GPUs: 2)*", "*VLM702: 3 GPUs are wanted, 2 can be used.*"])


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("quiet", [(), ("-p", "no:terminal")])
def test_a_wrong_added_marker_is_a_collection_error(suite: Any, hook: str, quiet: tuple[str, ...]) -> None:
    with_hook(suite, hook, "vlm_requires(min_gb=3)")

    result = suite.run(*quiet, test_x=TESTS)

    assert result.ret == pytest.ExitCode.INTERRUPTED
    if not quiet:
        result.stdout.fnmatch_lines(
            ["*ERROR collecting test_x.py*", "*test_x.py::test_one: @pytest.mark.vlm_requires has no keyword 'min_gb'*"]
        )


@pytest.mark.parametrize("hook", HOOKS)
def test_what_is_added_to_a_test_of_several_models_counts_for_each(suite: Any, hook: str) -> None:
    with_hook(suite, hook, "vlm_requires(gpus=2)")

    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a", "org/b")
        def test_x(vlm, request): assert request.node.callspec.params["vlm"].label == f"{vlm.name} (at least 2 GPUs)"
        """
    )

    result.assert_outcomes(passed=2)


def test_a_model_more_is_too_late_for_a_test_of_several(suite: Any) -> None:
    with_hook(suite, "itemcollected", 'vlm("org/c")')

    result = suite.run(test_x='import pytest\n@pytest.mark.vlm("org/a", "org/b")\ndef test_x(vlm): pass\n')

    result.stdout.fnmatch_lines(
        ["*test_x[[]a]: @pytest.mark.vlm names 3 models, and a hook that adds it to a collected test *"]
    )


@pytest.mark.parametrize("hook", ["itemcollected", "modifyitems"])
def test_a_wrong_added_marker_ends_a_run_with_workers_too(suite: Any, hook: str) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    with_hook(suite, hook, "vlm_requires(min_gb=3)")
    suite.pytester.makepyfile(test_x=TESTS, test_y="def test_y(): pass")

    result = suite.pytester.runpytest_subprocess("-n2", "-p", "no:hypothesispytest", "-p", "no:anyio")

    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*test_x.py::test_one: @pytest.mark.vlm_requires has no keyword 'min_gb'*"])
    assert "INTERNALERROR" not in result.stdout.str()


def test_other_modules_run_beside_a_wrong_added_marker(suite: Any) -> None:
    suite.configure(
        "import pytest\ndef pytest_collection_modifyitems(items):\n"
        "  for item in items:\n    if 'one' in item.name: item.add_marker(pytest.mark.vlm_requires(gpus=0))\n"
    )

    result = suite.run("--continue-on-collection-errors", test_x=TESTS, test_y="def test_y(): pass")

    result.assert_outcomes(passed=1, errors=1)


def test_an_added_model_is_loaded_and_a_marker_in_the_file_still_counts(suite: Any) -> None:
    with_hook(suite, "modifyitems", 'vlm("org/a")')

    result = suite.run(
        test_x="import pytest\n@pytest.mark.vlm_requires(gpus=2)\ndef test_x(vlm): assert vlm.name == 'org/a'\n"
    )

    result.assert_outcomes(passed=1)
    assert suite.loads() == ["LOAD org/a (at least 2 GPUs)", "UNLOAD org/a (at least 2 GPUs)"]


def test_a_stricter_marker_that_is_added_counts_beside_that_of_the_file(suite: Any) -> None:
    with_hook(suite, "modifyitems", "vlm_requires(gpus=3)")

    result = suite.run(test_x="import pytest\n@pytest.mark.vlm_requires(gpus=1)\ndef test_x(vlm_gpus): pass\n")

    result.assert_outcomes(skipped=1)


def test_several_models_come_too_late(suite: Any) -> None:
    with_hook(suite, "modifyitems", 'vlm("org/a", "org/b")')

    result = suite.run(test_x="def test_x(vlm): pass\n")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*names 2 models, and a hook that adds it to a collected test can name one: *"])


def test_an_added_alias_is_gated(suite: Any) -> None:
    suite.pytester.makeini("[pytest]\nvlm_marker_aliases =\n  big = vlm_requires(gpus=3)")
    suite.configure(
        "import pytest\ndef pytest_collection_modifyitems(items):\n  for item in items: item.add_marker(pytest.mark.big)\n"
    )

    suite.run(test_x=TESTS).assert_outcomes(skipped=2)


@pytest.mark.parametrize("value", ["10**400", "-10**400", "10**9000", "float('inf')", "-float('inf')", "W()", "'9' * 5000"])
def test_no_value_of_a_marker_ends_pytest(suite: Any, value: str) -> None:
    weird = "class W:\n  def __repr__(self): raise RuntimeError('no')\n"

    result = suite.run(test_x=f"import pytest\n{weird}@pytest.mark.vlm_requires(vram_gib={value})\ndef test_x(): pass\n")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["VLM720: test_x.py::test_x: @pytest.mark.vlm_requires has vram_gib=*; *"])
    assert max(map(len, result.outlines)) < 300
