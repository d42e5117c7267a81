"""What is installed is what the folders hold, under the right names, and importing it is light.

tox runs this against the built wheel, where a forgotten subpackage or data file is missing; an editable installation would
hide that, so the list in ``pyproject.toml`` is compared as well.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import pytest

import pytest_vlmgpu
import vlm_doctor

ROOT = Path(__file__).parents[1]
FOLDERS = {"vlm_doctor": ROOT / "doctor", "pytest_vlmgpu": ROOT / "pytest_vlmgpu"}


def dotted(package: str, path: Path) -> str:
    """Import name of a module's file or a package's folder."""
    return ".".join((package, *path.relative_to(FOLDERS[package]).parts)).removesuffix(".py")


PACKAGES = sorted(
    dotted(package, init.parent) for package, folder in FOLDERS.items() for init in folder.rglob("__init__.py")
)
MODULES = sorted(
    dotted(package, path)
    for package, folder in FOLDERS.items()
    for path in folder.rglob("*.py")
    if path.stem not in ("__init__", "__main__") and not path.stem.startswith("trace_")
)
"""Without those of the child that traces a model, which has torch."""
DATA_FILES = sorted(
    (package, path.relative_to(folder).as_posix())
    for package, folder in FOLDERS.items()
    for path in folder.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
)


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

    assert sorted(listed) == PACKAGES, "list it under [tool.setuptools] packages in pyproject.toml"


def test_every_module_is_installed_and_imports_nothing_heavy() -> None:
    program = (
        f"import importlib, json, sys\nfor name in {PACKAGES + MODULES!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT / "tests")

    assert run.returncode == 0, run.stderr
    loaded = set(json.loads(run.stdout.splitlines()[-1]))
    assert loaded.isdisjoint({"torch", "transformers", "accelerate"})
    assert "doctor" not in loaded, "the folder doctor/ is imported as vlm_doctor only"


@pytest.mark.parametrize(("package", "path"), DATA_FILES)
def test_every_data_file_is_installed(package: str, path: str) -> None:
    assert files(package).joinpath(path).is_file(), (
        "name its pattern under [tool.setuptools] package-data in pyproject.toml"
    )


def test_nothing_in_this_run_has_imported_the_folder_by_its_name() -> None:
    assert "doctor" not in sys.modules


@pytest.mark.parametrize("module", [vlm_doctor, pytest_vlmgpu])
def test_public_names_are_sorted_and_importable(module: object) -> None:
    names = list(module.__all__)  # type: ignore[attr-defined]

    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert dir(module) == names
    assert [name for name in names if not hasattr(module, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_exported_names_of_a_module_exist(name: str) -> None:
    module = importlib.import_module(name)

    assert [exported for exported in getattr(module, "__all__", ()) if not hasattr(module, exported)] == []


def test_one_version() -> None:
    assert version("pytest-vlmgpu") == vlm_doctor.__version__ == pytest_vlmgpu.__version__


def test_entry_points() -> None:
    (plugin,) = entry_points(group="pytest11", name="vlmgpu")
    (script,) = entry_points(group="console_scripts", name="vlm-doctor")

    assert (plugin.value, script.value) == ("pytest_vlmgpu.plugin", "vlm_doctor.cli:main")
    assert callable(script.load())
