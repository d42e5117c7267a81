"""What torch's files say about it: version, CUDA, architectures. A CPU wheel is told in 11 ms, without importing torch."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import re
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ..machine import TorchBuild
from .environment import shown

_OFFICIAL_VERSION = re.compile(r"\d+(\.\d+)+(\+(cu\d+|cpu))?")
"""Only for a wheel of the torch project do the tables of its release hold; vendors and conda build for other GPUs."""


def find_torch(search_path: Sequence[str]) -> Path | None:
    """Folder of the package ``torch`` that an import would find, even when it is a torso; ``None`` when there is none."""
    try:
        # Development installs are found by hooks of their own, which only the second way asks.
        spec = PathFinder.find_spec("torch", list(search_path)) or importlib.util.find_spec("torch")
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    return Path(folders[0]) if folders else Path(spec.origin) if spec.origin else None


def read_torch_build(
    folder: Path | None, *, registered: str | None, home: str = ""
) -> tuple[TorchBuild | None, str | None]:
    """Read torch's own files.

    Args:
        folder: Where the package is, from :func:`find_torch`.
        registered: Version in the installed metadata, or ``None`` when there is none.
        home: Home directory, written as ``~``.

    Returns:
        The build, if it can be told, and what is wrong with the installation, if anything is.
    """
    if folder is None:
        return None, f"torch {registered} is registered, but its package folder is gone" if registered else None
    where = shown(str(folder), home)
    if folder.is_file():
        return None, f"{where} is a file where the package torch should be"
    if not (folder / "__init__.py").is_file():
        return None, f"{where} is a torso: it has no __init__.py"
    try:
        values = _literals((folder / "version.py").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"{where}/version.py is missing"
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return None, f"{where}/version.py cannot be read ({type(error).__name__}: {error})"
    version, cuda, hip = (_text(values.get(name)) for name in ("__version__", "cuda", "hip"))
    if version is None:
        return None, f"{where}/version.py does not tell the version"
    build = TorchBuild(
        version=version,
        cuda=cuda,
        hip=hip,
        archs=_archs(folder, version, cuda),
        has_cuda_library=any((folder / "lib").glob("libtorch_cuda*.so")) if (folder / "lib").is_dir() else None,
        location=where,
    )
    return build, _disagreement(version, registered, where)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _disagreement(version: str, registered: str | None, where: str) -> str | None:
    """Two half installs on top of each other. The local part (``+cu130``) is left out: wheels from PyPI register none."""
    if registered is None:
        return f"{where} holds torch {version}, but no installed package is registered for it"
    if registered.partition("+")[0] != version.partition("+")[0]:
        return f"torch {registered} is registered, but the files in {where} are those of {version}"
    return None


def _archs(folder: Path, version: str, cuda: str | None) -> tuple[str, ...]:
    """``sm_XX`` of this wheel, from torch's own table of its release (torch 2.10 and newer)."""
    if cuda is None or not _OFFICIAL_VERSION.fullmatch(version):
        return ()
    is_arm = platform.machine() == "aarch64"
    try:
        text = (folder / "cuda/__init__.py").read_text(encoding="utf-8")
        table: Any = _literals("\n".join(statements(text, "PYTORCH_RELEASES_CODE_CC"))).get("PYTORCH_RELEASES_CODE_CC")
        release = table[cuda]
        if isinstance(release, dict):
            numbers = release["aarch64" if is_arm else "x86_64"]
        else:  # older: one set for all machines, of which the x86_64 wheel has all but sm_110, an Arm board (torch 2.11)
            numbers = set() if is_arm else release - {110}
        return tuple(f"sm_{number:d}" for number in sorted(numbers))
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, RecursionError):
        return ()


def statements(text: str, *starts: str) -> Iterator[str]:
    """Top-level statements of a source file that begin with one of ``starts``, up to the next one at column 0.

    Parsing all of a 2,400-line module takes 24 ms of the 300 that a verdict has; the parts wanted take one.
    """
    lines = text.splitlines()
    for first, line in enumerate(lines):
        if line.startswith(starts):
            last = first + 1
            while last < len(lines) and (not lines[last] or lines[last][0] in " \t)]}"):
                last += 1
            yield "\n".join(lines[first:last])


def _literals(text: str) -> dict[str, object]:
    """Names that a source file gives a literal value at its top level, with or without a type."""
    # Late: without torch there is nothing to parse.
    import ast

    values: dict[str, object] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                with contextlib.suppress(ValueError, TypeError):
                    values[target.id] = ast.literal_eval(value)
    return values
