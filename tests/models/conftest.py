from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vlmgpu.testing import TINY_FAMILIES, make_tiny_vlm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_vlms(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Family to the folder of its tiny checkpoint.

    All are built at once, before any test: the fixture ``pytester`` forgets the modules that a test imports, and torch does
    not survive a second import.
    """
    return {family: make_tiny_vlm(tmp_path_factory.mktemp(family), family) for family in TINY_FAMILIES}
