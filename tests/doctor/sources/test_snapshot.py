from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlm_doctor.codec import MAX_SNAPSHOT_BYTES, to_json
from vlm_doctor.errors import MachineError
from vlm_doctor.sources import load_machine


def message(spec: Path | str) -> str:
    with pytest.raises(MachineError) as caught:
        load_machine(str(spec))
    return str(caught.value)


def test_a_mark_of_windows_editors_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    machine = load_machine("2xL4")
    path.write_bytes(b"\xef\xbb\xbf" + to_json(machine).encode())
    assert load_machine(str(path)) == machine


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_snapshot_that_a_shell_of_windows_redirected_is_read(tmp_path: Path, encoding: str) -> None:
    """``wsl vlm-doctor collect > m.json`` in PowerShell writes UTF-16."""
    path = tmp_path / "m.json"
    machine = load_machine("2xL4")
    path.write_text(to_json(machine), encoding=encoding)
    assert load_machine(str(path)) == machine


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x1f\x8b\x08", "is compressed with gzip; unpack it first."),
        (b"\n<!doctype HTML>", "is a web page, not the file itself; download it again."),
    ],
)
def test_what_people_have_in_place_of_a_snapshot_is_named(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(data)
    assert message(path) == f"{path} {what}"


def test_snapshot_comes_back(tmp_path: Path) -> None:
    machine = load_machine("4x3090:nvlink=0-1,2-3")
    path = tmp_path / "machine.json"
    path.write_text(to_json(machine))
    assert load_machine(str(path)) == machine


def test_snapshot_without_suffix_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("node7").write_text(to_json(load_machine("2xL4")))
    assert load_machine("node7").description == "2xL4"


def test_name_that_is_neither_gpu_nor_file() -> None:
    assert message("node8").startswith("node8: 'node8' is not a GPU of the catalogue; ")


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    assert message(path) == f"{path}: no such file; record one with vlm-doctor collect."


def test_folder_in_the_working_folder_is_not_taken_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("node7").mkdir()
    assert message("node7") == "node7 is a folder; name a snapshot in it."


def test_folder(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path} is a folder; name a snapshot in it."


def test_device_or_pipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    assert message(path) == f"{path} is not a regular file; record one with vlm-doctor collect."


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    assert message(path) == f"{path} is empty; record the machine again with vlm-doctor collect."


@pytest.mark.parametrize("data", [b"\xff\xfe{", b"\xff", b"{", b"[]", b'{"schema": 1}', b"[" * 5000, b"null"])
def test_file_that_is_no_snapshot(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(data)
    assert message(path).startswith(f"{path}: not a readable machine: ")


def test_truncated_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(to_json(load_machine("2xL4"))[:500])
    assert message(path).startswith(f"{path}: not a readable machine: ")


def test_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(100 * MAX_SNAPSHOT_BYTES)
    assert f"has more than {MAX_SNAPSHOT_BYTES:,} bytes, which is too large for a snapshot" in message(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine.json"
    path.write_text("{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message(path) == f"{path} cannot be read (Permission denied); correct its permissions."


def test_path_with_a_null_character() -> None:
    assert "cannot be read" in message("a\0b.json") or "no such file" in message("a\0b.json")


def test_path_too_long_for_the_file_system() -> None:
    assert "cannot be read (File name too long); correct the name." in message("/" + "a" * 5000)
