"""The file of ``--vlm-baseline``: which gated tests ran, so that the next run can be held to it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ..verdicts import WRONG
from .given_file import read_given

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SCHEMA = 1
MAX_BYTES = 64 * 2**20
"""Node ids of 300,000 tests."""
_UPDATE = "--vlm-update-baseline"


def read(path: Path) -> tuple[str, ...]:
    """Node ids of the tests that ran.

    Raises:
        pytest.UsageError: The file is missing or is no baseline.
    """
    try:
        content = json.loads(read_given(path, MAX_BYTES))
    except FileNotFoundError:
        raise pytest.UsageError(f"{WRONG}: {path}: there is no such baseline; write it with {_UPDATE}.") from None
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "it is not JSON"
        message = f"{WRONG}: {path}: the baseline cannot be read: {why}; write it anew with {_UPDATE}."
        raise pytest.UsageError(message) from error
    found = content if isinstance(content, dict) else {}
    tests = found.get("tests")
    is_list = isinstance(tests, list) and all(isinstance(nodeid, str) for nodeid in tests)
    if not is_list or found.get("schema") != SCHEMA:
        raise pytest.UsageError(f"{WRONG}: {path}: this is no baseline of schema {SCHEMA}; write it anew with {_UPDATE}.")
    return tuple(tests or ())


def text(nodeids: Iterable[str], machine: str | None) -> str:
    """The file's text, one test a line so that a version control system shows what changed."""
    return json.dumps({"schema": SCHEMA, "machine": machine, "tests": sorted(set(nodeids))}, indent=2) + "\n"
