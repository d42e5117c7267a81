"""Logs of any size: what is kept, and how much memory and time it takes."""

from __future__ import annotations

import io
import sys
import tracemalloc
from pathlib import Path

import pytest

from vlm_doctor.error_answer import answer_error
from vlm_doctor.errors import UsageError
from vlm_doctor.sources import log_file
from vlm_doctor.sources.log_file import read_log
from vlm_doctor.units import MIB

OOM = b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
NOISE = b"step 1 loss 0.5\n" * 65_536


def written(path: Path, *parts: bytes) -> Path:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
    return path


def test_a_small_log_is_whole(tmp_path: Path) -> None:
    log = read_log(str(written(tmp_path / "log", b"\xef\xbb\xbfone\r\ntwo\xff\n")))

    assert log.text == "one\r\ntwo\ufffd\n"
    assert log.skipped_bytes == 0


def test_what_powershell_writes_is_read(tmp_path: Path) -> None:
    assert read_log(str(written(tmp_path / "log", "RuntimeError: x".encode("utf-16")))).text == "RuntimeError: x"


@pytest.mark.parametrize("before", [0, 3, 12, 23])
def test_an_error_anywhere_in_a_huge_log_is_found(tmp_path: Path, before: int) -> None:
    path = written(tmp_path / "log", *([NOISE] * before), OOM, *([NOISE] * (24 - before)))

    tracemalloc.start()
    log = read_log(str(path))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert path.stat().st_size > 24 * MIB
    assert peak_bytes < 28 * MIB
    assert log.skipped_bytes > 15 * MIB
    answer = answer_error(log.text, where="log")
    assert answer.cause is not None
    assert answer.cause.name == "gpu-out-of-memory"


def test_one_line_of_100_mib(tmp_path: Path) -> None:
    path = written(tmp_path / "log", *([b"x" * MIB] * 50), OOM.rstrip(), *([b"y" * MIB] * 50))

    answer = answer_error(read_log(str(path)).text, where="log")

    assert answer.cause is not None
    assert answer.cause.name == "gpu-out-of-memory"


def test_a_pipe_that_never_ends_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return b"yes\n" * ((size or 4) // 4)

    monkeypatch.setattr(log_file, "MAX_READ_BYTES", 20 * MIB)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Endless()))

    log = read_log("-")

    assert log.text.startswith("yes\n")
    assert log.skipped_bytes > 0


def test_the_end_of_a_log_counts_however_long_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "MAX_SEARCHED_BYTES", 8 * MIB)
    monkeypatch.setattr(log_file, "MAX_READ_BYTES", 16 * MIB)
    path = written(tmp_path / "log", OOM, *[NOISE] * 40, b"the last line\n")
    log = read_log(str(path))
    assert log.text.startswith(OOM.decode())
    assert log.text.endswith("the last line\n")
    assert log.skipped_bytes + len(log.text) == pytest.approx(path.stat().st_size, abs=100)


def test_only_so_many_errors_of_the_middle_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "log", *([NOISE + OOM] * 30))

    assert len(read_log(str(path)).text) < 8 * MIB


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "missing: no such file; name a log, or - for standard input."),
        ("/dev/zero", "/dev/zero is a device; name a log, or - for standard input."),
        (".", ". is a folder; name the log in it."),
        ("a\0b", "cannot be read (embedded null byte); name a log, or - for standard input."),
        ("x" * 300, "cannot be read (File name too long); correct the name."),
        (" ", "The name of the log is empty; name one, or - for standard input."),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_log(name)

    assert str(caught.value).endswith(sentence)


def test_an_empty_log_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is empty; paste a log or a traceback\.$"):
        read_log(str(written(tmp_path / "log", b" \n\n")))


def test_without_standard_input_a_file_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)

    with pytest.raises(UsageError, match=r"^There is no standard input; name a file\.$"):
        read_log("-")
