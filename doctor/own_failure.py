"""What to say of an error that is no message for the user: a package that is broken, or a defect of the doctor.

Standard library alone: it speaks where any other package may be what is broken.
"""

from __future__ import annotations

import shlex
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

_OURS = __name__.partition(".")[0]
_DISTRIBUTIONS = {"markdown_it": "markdown-it-py"}
"""Package to the name that pip knows, where that is another one."""


class OwnFailure(NamedTuple):
    """How a run failed that nobody foresaw."""

    kind: str
    """For ``error.type`` of the JSON."""
    sentence: str


def own_failure(error: Exception) -> OwnFailure:
    """Tell a package that cannot be imported, which its owner can repair, from a defect of ours."""
    package = _broken_package(error)
    if package is not None:
        install = f"{shlex.quote(sys.executable)} -m pip install --force-reinstall {_DISTRIBUTIONS.get(package, package)}"
        sentence = f"The Python package {package} is broken ({_reason(error)}), and vlm-doctor needs it; run {install}"
        return OwnFailure("BrokenPackageError", f"{sentence}.")
    from . import __version__

    place = traceback.extract_tb(error.__traceback__)[-1]
    sentence = f"This is a defect of vlm-doctor {__version__}, please report it: {_reason(error)}"
    return OwnFailure("InternalError", f"{sentence} ({Path(place.filename).name}, line {place.lineno}).")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _broken_package(error: Exception) -> str | None:
    """The package of somebody else that raised the error while it was imported, or that lacks what it should have."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [_package(str(frame.f_globals.get("__name__", ""))) for frame in frames]
    own = max((number for number, name in enumerate(names) if name == _OURS), default=-1)
    # Python takes its import system out of most tracebacks: what is left is the module whose lines were run.
    is_import = any(frame.f_code.co_name == "<module>" for frame in frames[own + 1 :])
    found = [*(names[own + 1 :] if is_import else ()), *_named_packages(error)]
    return next((name for name in found if name and name not in sys.stdlib_module_names and name != _OURS), None)


def _named_packages(error: Exception) -> list[str]:
    """Packages that an error itself names."""
    if isinstance(error, ImportError):
        return [_package(error.name or "")]
    if isinstance(error, AttributeError):
        return [_package(error.obj.__name__)] if isinstance(error.obj, ModuleType) else []
    if isinstance(error, SyntaxError) and error.filename:
        return [_package_of_file(Path(error.filename))]
    return []


def _package_of_file(file: Path) -> str:
    """The outermost package that a file is part of, or a module that stands alone: pip knows no part of a package."""
    if Path(__file__).parent in file.parents:
        return _OURS
    found = file.parent if file.stem == "__init__" else file
    while (found.parent / "__init__.py").is_file():
        found = found.parent
    return found.stem


def _package(module: str) -> str:
    return module.partition(".")[0]
