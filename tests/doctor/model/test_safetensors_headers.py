from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlm_doctor.errors import ModelFileError
from vlm_doctor.sources import safetensors_headers
from vlm_doctor.sources.checkpoint import StoredTensor
from vlm_doctor.sources.safetensors_headers import MAX_HEADER_BYTES, parse_header, read_header

WHOLE = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, entries: Any, *, data_bytes: int = 24, length: int | None = None) -> Path:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data_bytes))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as raised:
        read_header(path)
    return str(raised.value)


def test_reads_names_types_shapes_and_bytes(tmp_path: Path) -> None:
    entries = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
        **WHOLE,
        "empty": {"dtype": "I64", "shape": [0, 4], "data_offsets": [24, 24]},
        "packed": {"dtype": "F4", "shape": [2, 2], "data_offsets": [26, 28]},
    }
    tensors = read_header(write(tmp_path / "m.safetensors", entries, data_bytes=28))
    assert tensors == {
        "b": StoredTensor("BF16", (), 2),
        "a": StoredTensor("F32", (2, 3), 24),
        "empty": StoredTensor("I64", (0, 4), 0),
        "packed": StoredTensor("F4", (2, 2), 2),
    }
    assert [tensor.elements for tensor in tensors.values()] == [1, 6, 0, 4]


def test_reads_a_header_padded_with_spaces(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "m.safetensors", json.dumps(WHOLE).encode() + b"   ")).keys() == {"a"}


def test_reads_a_file_without_tensors(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "m.safetensors", {}, data_bytes=0)) == {}


def test_a_file_shorter_than_its_tensors_is_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", WHOLE, data_bytes=23)
    size = path.stat().st_size
    assert refusal(path) == f"m.safetensors: truncated, {size} of {size + 1} bytes are there; download it again."


def test_a_file_shorter_than_its_header_is_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", b"{}", data_bytes=0, length=5000)
    assert refusal(path) == "m.safetensors: truncated, its header alone ends at byte 5,008 of 10; download it again."


@pytest.mark.parametrize("content", [b"", b"\x02\x00"])
def test_a_file_without_room_for_a_length_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    expected = f"m.safetensors: {len(content)} bytes are too few for a safetensors file; download it again."
    assert refusal(tmp_path / "m.safetensors") == expected


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_a_length_no_header_has_is_refused_without_reading_it(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "m.safetensors", WHOLE, length=length)
    expected = f"m.safetensors: not a safetensors file, its header would have {length:,} bytes; download it again."
    assert refusal(path) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n",
         "is a pointer of Git LFS, not the file itself; fetch that with git lfs pull."),
        ("<!DOCTYPE html>\n<html>", "is a web page, not the file itself; download it again."),
    ],
)  # fmt: skip
def test_what_people_have_in_place_of_a_safetensors_file_is_named(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "m.safetensors").write_text(text)
    assert refusal(tmp_path / "m.safetensors") == f"m.safetensors: {what}"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (b"{not json", "its header is not JSON"),
        (b'{"\xff": 1}', "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        ([], "its header is not a JSON object"),
        ({"a": 3}, "tensor 'a' is not described by a JSON object"),
        ({"a": {**WHOLE["a"], "dtype": "F17"}}, "tensor 'a' has the unknown dtype 'F17'"),
        ({"a": {**WHOLE["a"], "dtype": ["F32"]}}, "tensor 'a' has the unknown dtype"),
        ({"a": {**WHOLE["a"], "shape": [2, -3]}}, "tensor 'a' has no valid shape"),
        ({"a": {**WHOLE["a"], "shape": [2, True]}}, "tensor 'a' has no valid shape"),
        ({"a": {**WHOLE["a"], "shape": [2.0, 3]}}, "tensor 'a' has no valid shape"),
        ({"a": {**WHOLE["a"], "shape": [1] * 65}}, "tensor 'a' has no valid shape"),
        ({"a": {"dtype": "F32", "shape": [6]}}, "tensor 'a' has no valid data_offsets"),
        ({"a": {**WHOLE["a"], "data_offsets": [24, 0]}}, "tensor 'a' has no valid data_offsets"),
        ({"a": {**WHOLE["a"], "data_offsets": [0, 12, 24]}}, "tensor 'a' has no valid data_offsets"),
        ({"a": {**WHOLE["a"], "data_offsets": [-1, 23]}}, "tensor 'a' has no valid data_offsets"),
        ({"a": {**WHOLE["a"], "data_offsets": [0, 20]}}, "tensor 'a' has 20 bytes, not what F32 of shape [2, 3] takes"),
        ({"a": {**WHOLE["a"], "shape": [2**62] * 64}}, "tensor 'a' has 24 bytes, not what F32 of shape"),
        ({"n" * 2000: WHOLE["a"]}, "no parameter has a name of 2,000 letters"),
        ({"a": {**WHOLE["a"], "data_offsets": [8, 32]}}, "tensor 'a' leaves a hole before it"),
        ({**WHOLE, "b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, "tensor 'b' overlaps another tensor"),
        (
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
            "leaves a hole",
        ),
    ],
)
def test_a_damaged_header_is_refused_in_one_sentence(tmp_path: Path, entries: Any, problem: str) -> None:
    message = refusal(write(tmp_path / "m.safetensors", entries))
    assert message.startswith("m.safetensors: ")
    assert problem in message
    assert message.endswith(".")
    assert "\n" not in message


def test_bytes_after_the_last_tensor_are_refused_as_the_library_does(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", WHOLE, data_bytes=30)
    assert refusal(path) == "m.safetensors: 6 bytes follow the last tensor; download it again."


def test_a_header_that_ends_early_is_truncated() -> None:
    with pytest.raises(ModelFileError) as raised:
        parse_header(b"{", None, length=2, where="m.safetensors")
    assert str(raised.value) == "m.safetensors: truncated inside its header; download it again."


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "folder").startswith(f"{tmp_path / 'folder'}: ")
    assert refusal(tmp_path / "pipe") == f"{tmp_path / 'pipe'}: not a regular file; download it again."


def test_a_file_that_cannot_be_opened_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(tmp_path / "loop") == (
        f"{tmp_path / 'loop'}: cannot be read (Too many levels of symbolic links); download it again."
    )


def test_more_tensors_than_any_checkpoint_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_headers, "MAX_TENSORS", 1)
    header = b'{"a": 1, "b": 2}'

    with pytest.raises(ModelFileError, match=r"^s: 2 tensors are no checkpoint \(at most 1\); download it again\.$"):
        safetensors_headers.parse_header(header, None, length=len(header), where="s")


NUMBERS = st.integers(-2, 9) | st.sampled_from([2**62, 2**63, 2**64, 1.0, True, None, "4"])
ENTRIES: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "x" * 1025]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["U8", "F16", "F4", "F17", 4, None]),
            "shape": st.lists(NUMBERS, max_size=3) | st.just([1] * 65) | st.none(),
            "data_offsets": st.lists(NUMBERS, max_size=3),
            "more": st.just({}),
        },
    )
    | st.just({"dtype": "U8", "shape": [4], "data_offsets": [0, 4]})
    | st.just({"dtype": "F16", "shape": [], "data_offsets": [4, 6]})
    | NUMBERS,
)


@given(ENTRIES)
@example({"a": {"dtype": "U8", "shape": [0]}})
def test_the_quick_way_says_what_the_slow_one_does_or_nothing(entries: dict[str, Any]) -> None:
    header = json.dumps(entries).encode()
    quick = safetensors_headers._quick(header)
    if quick is not None:
        assert quick == safetensors_headers._slow(header, "x")
    try:
        slow = safetensors_headers._slow(header, "x")
    except ModelFileError:
        assert quick is None
    else:
        assert quick in (slow, None)
