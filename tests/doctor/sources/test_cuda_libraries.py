from __future__ import annotations

from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from vlm_doctor.sources.cuda_libraries import bitsandbytes_cuda, foreign_cuda_libraries
from vlm_doctor.sources.regular_file import read_text


class Installed(Distribution):
    """A distribution that lists files, or fails to."""

    def __init__(self, *files: str, error: Exception | None = None) -> None:
        self._listed, self._error = files, error

    @property
    def files(self) -> Any:
        if self._error is not None:
            raise self._error
        return [PurePosixPath(file) for file in self._listed]

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        return path


def test_cuda_versions_of_bitsandbytes() -> None:
    files = ("bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/x.py")
    assert bitsandbytes_cuda(Installed(*files)) == ("11.8", "13.0")
    assert bitsandbytes_cuda(Installed("bitsandbytes/libbitsandbytes_cpu.so")) == ()
    assert bitsandbytes_cuda(None) is None
    assert bitsandbytes_cuda(Installed(error=OSError("gone"))) is None


def test_libraries_that_torch_brings_too(tmp_path: Path) -> None:
    for name in ("opt/lib/libcudnn.so.9", "opt/lib/libcudnn.so.9.1.0", "opt/lib/libm.so.6", "v/site-packages/nvidia/x.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "v/site-packages/nvidia/libnccl.so.2").write_text("")
    path = "/opt/lib/:/none:relative::/v/site-packages/nvidia:/opt/lib/:/nul\0l"
    environment = {"LD_LIBRARY_PATH": path, "HOME": "/opt/x"}
    assert foreign_cuda_libraries(environment, tmp_path) == ("/opt/lib/libcudnn.so.9",)
    assert foreign_cuda_libraries({}) == ()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("abcdef")
    assert read_text(tmp_path / "text", 3) == "abc"
    assert read_text(tmp_path / "pipe", 3) is None
    assert read_text(tmp_path, 3) is None
    assert read_text(tmp_path / "nul\0l", 3) is None
    with pytest.raises(TypeError):
        read_text(None, 3)  # type: ignore[arg-type]
