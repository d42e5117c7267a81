from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.oom_text import OutOfMemory, explain, figures_of, parse_out_of_memory
from vlm_doctor.units import GIB, MIB

NEW = (
    "CUDA out of memory. Tried to allocate {tried}. GPU {gpu} has a total capacity of {total} of which {free} is "
    "free. {others}"
    "Including non-PyTorch memory, this process has {own} memory in use. Of the allocated memory {allocated} is "
    "allocated by "
    "PyTorch, and {unused} is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
OLD = (
    "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 1; 23.50 GiB total capacity; 20.00 GiB already allocated; "
    "1.00 GiB "
    "free; 22.25 GiB reserved in total by PyTorch) If reserved memory is >> allocated memory try setting max_split_size_mb"
)


def message(**values: str) -> OutOfMemory:
    figures = {
        "tried": "2.00 GiB",
        "gpu": "0",
        "total": "24.00 GiB",
        "free": "1.00 GiB",
        "others": "",
        "own": "23.00 GiB",
        "allocated": "22.00 GiB",
        "unused": "200.00 MiB",
    }
    return parse_out_of_memory(NEW.format(**{**figures, **values}))


def test_all_figures_are_read() -> None:
    assert message(
        others="Process 71 has 512.00 MiB memory in use. Process 72 has 1.50 GiB memory in use. "
    ) == OutOfMemory(
        gpu=0,
        tried=2 * GIB,
        total=24 * GIB,
        free=GIB,
        own=23 * GIB,
        allocated=22 * GIB,
        unused=200 * MIB,
        others=((71, 512 * MIB), (72, 3 * GIB // 2)),
    )


def test_the_older_form_is_read() -> None:
    found = parse_out_of_memory(OLD)

    assert (found.gpu, found.tried, found.total) == (1, 2 * GIB, int(23.5 * GIB))
    assert (found.free, found.allocated, found.unused) == (GIB, 20 * GIB, int(2.25 * GIB))
    assert found.reason == "fragments"


@pytest.mark.parametrize(
    ("values", "reason", "sentence"),
    [
        (
            {"tried": "40.00 GiB"},
            "too_large",
            "One tensor of 40.0 GiB was asked for, more than GPU 0 has: no map can help.",
        ),
        (
            {"own": "12.00 GiB", "others": "Process 9 has 11.00 GiB memory in use. "},
            "others",
            "Other processes hold 11.0 GiB of GPU 0; 2.0 GiB more were asked for.",
        ),
        ({"own": "12.00 GiB"}, "others", "Other processes hold 11.0 GiB of GPU 0; 2.0 GiB more were asked for."),
        (
            {"unused": "3.00 GiB"},
            "fragments",
            "torch holds 3.0 GiB of GPU 0 that are not in use, but in pieces smaller than 2.0 GiB.",
        ),
        ({}, "full", "GPU 0 is full, 23.0 GiB of it this process: 2.0 GiB were asked for and 1.0 GiB are free."),
        (
            {"others": "Process 9 has 100.00 MiB memory in use. ", "own": "22.90 GiB"},
            "full",
            "GPU 0 is full, 22.9 GiB of it this process: 2.0 GiB were asked for and 1.0 GiB are free.",
        ),
    ],
)
def test_the_figures_say_why(values: dict[str, str], reason: str, sentence: str) -> None:
    found = message(**values)
    told = explain(found)

    assert found.reason == reason
    assert told is not None
    assert told[0] == sentence
    assert told[2]


def test_without_figures_nothing_is_said() -> None:
    found = parse_out_of_memory("CUDA error: out of memory")

    assert (found.reason, explain(found), figures_of(found)) == ("unknown", None, {})


def test_a_card_without_a_number_is_the_gpu() -> None:
    found = message()._replace(gpu=None, own=None)
    told = explain(found)

    assert told is not None
    assert told[0] == "The GPU is full: 2.0 GiB were asked for and 1.0 GiB are free."
    assert "GPU, as torch counts" not in figures_of(found)


def test_what_is_said_of_others_is_short() -> None:
    others = "".join(f"Process {number} has 1.00 GiB memory in use. " for number in range(40))

    assert figures_of(message(others=others))["other processes"].count("pid") == 8


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    assert parse_out_of_memory("Tried to allocate " + text).reason in ("unknown", "full")
