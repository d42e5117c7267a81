"""The example about machines in docs/testing.md is real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")


def test_the_example_about_machines_passes(pytester: pytest.Pytester) -> None:
    found = re.search(r"```python\n# test_my_conftest\.py\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found is not None
    pytester.makepyfile(found[1])

    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest").assert_outcomes(passed=1)


def test_every_name_is_described() -> None:
    from pytest_vlmgpu import testing

    assert [name for name in testing.__all__ if f"`{name}" not in PAGE] == []
