from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.errors import UsageError
from vlm_doctor.units import GIB, MIB, format_gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        (" 1.5 GiB ", 3 * 2**29),
        ("512MiB", 512 * 2**20),
        ("7b", 7),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("2TiB", 2**41),
        ("0GB", 0),
    ],
)
def test_reads_a_size_with_its_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "-1GiB", "24 GiB/s", "1e3GB", "٣GB", "24XB", "1.2.3GB", "9" * 400 + "GB", "24\x00GB"]
)
def test_refuses_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text, where="--headroom")

    assert str(caught.value) == f"--headroom: {text!r} is not a size; write a number and a unit, such as 24GiB or 80GB."


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_one_sentence(text: str) -> None:
    try:
        size = parse_bytes(text)
    except UsageError as error:
        sentence = str(error)
    else:
        sentence = ""
        assert size >= 0
    assert not sentence or sentence.endswith("such as 24GiB or 80GB.")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 MiB"),
        (618 * MIB, "618 MiB"),
        (GIB - 1, "1024 MiB"),
        (GIB, "1.0 GiB"),
        (int(23.46 * GIB), "23.5 GiB"),
        (-2 * GIB, "-2.0 GiB"),
    ],
)
def test_writes_sizes_for_people(size: int, text: str) -> None:
    assert format_gib(size) == text
