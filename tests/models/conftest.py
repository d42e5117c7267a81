from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vlmgpu.testing import TINY_FAMILIES, make_tiny_vlm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_vlms(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Family to the folder of its tiny checkpoint.

    All are built at once, before any test: the fixture ``pytester`` forgets the modules that a test imports, and torch does
    not survive a second import.
    """
    return {family: make_tiny_vlm(tmp_path_factory.mktemp(family), family) for family in TINY_FAMILIES}


@pytest.fixture(scope="module")
def copied_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder to which transformers copies code of checkpoints, of this module alone.

    What was imported from the folder of another module is forgotten: all are parts of one package, which has one folder.
    """
    import transformers.dynamic_module_utils as dynamic

    folder, path = tmp_path_factory.mktemp("modules"), list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(folder))
        _forget_copied_code()
        yield folder
        _forget_copied_code()
        sys.path[:] = path


def _forget_copied_code() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "transformers_modules":
            del sys.modules[name]
