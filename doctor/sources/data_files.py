"""Files that come with the doctor, read from beside its code: ``importlib.resources`` imports zipfile and tempfile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "data"


def read_data(name: str) -> bytes:
    """Contents of a file in ``doctor/data``."""
    return (_FOLDER / name).read_bytes()


def read_all_data(folder: str, ending: str) -> Iterator[bytes]:
    """Contents of all files with an ending in a folder of ``doctor/data``, by name."""
    for path in sorted((_FOLDER / folder).glob(f"*{ending}")):
        yield path.read_bytes()
