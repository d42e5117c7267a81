"""Values on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_doctor import arguments
from vlm_doctor.errors import UsageError
from vlm_doctor.units import GIB


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--json"], True),
        (["plan", "m", "--format", "json"], True),
        (["plan", "--format=json"], True),
        ([], False),
        (["--format"], False),
        (["--format", "terminal", "json"], False),
    ],
)
def test_json_is_recognised_in_any_command_line(words: list[str], asked: bool) -> None:
    assert arguments.asks_for_json(words) is asked


def test_gpu_indices() -> None:
    assert arguments.gpu_indices("0") == (0,)
    assert arguments.gpu_indices("3, 1") == (3, 1)


@pytest.mark.parametrize("text", ["", "a", "0,", "0;1", "-1", "0-3", "٣", "99999", "GPU-1"])
def test_other_gpu_lists_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        arguments.gpu_indices(text)
    assert str(caught.value) == f"--gpus: {text!r} is not a list of GPU indices; write them with commas, such as 0,1."


def test_a_gpu_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="--gpus: '1,01' names a GPU twice"):
        arguments.gpu_indices("1,01")


def test_a_file_has_a_name() -> None:
    assert arguments.file_path("--output")("a b/-") == Path("a b/-")
    for text in ("", " ", "-"):
        with pytest.raises(UsageError) as caught:
            arguments.file_path("--output")(text)
        expected = f"--output: {text!r} names no file; write its name, or leave it out for standard output."
        assert str(caught.value) == expected
    with pytest.raises(UsageError, match=r"^--since: '-' names no file; write its name\.$"):
        arguments.file_path("--since")("-")


def test_image_size() -> None:
    assert arguments.image_size("1280x720") == (1280, 720)
    assert arguments.image_size("1280×720") == (1280, 720)
    assert arguments.image_size(" 448 ") == (448, 448)


@pytest.mark.parametrize("text", ["", "x", "10x", "1280*720", "-3x4", "1e3", "9999999999"])
def test_other_image_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        arguments.image_size(text)
    assert str(caught.value) == (f"--image-size: {text!r} is not a size; write width x height in pixels, such as 1280x720.")


KNOWN = ("VLM101", "VLM503")


def test_codes_and_their_beginnings() -> None:
    assert arguments.codes([], KNOWN) == ()
    assert arguments.codes(["vlm503", "VLM1,VLM10"], KNOWN) == ("VLM503", "VLM1", "VLM10")


@pytest.mark.parametrize("text", ["", "VLM", "503", "VLM6", "VLM5033", "VLM503,,VLM101"])
def test_what_begins_no_code_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not the beginning of a code; write one such as VLM503, or VLM5 for a family"):
        arguments.codes([text], KNOWN)


def test_headroom() -> None:
    assert arguments.headroom_bytes("2GiB") == 2 * GIB
    with pytest.raises(UsageError, match="--headroom: '2' is not a size; write a number and a unit"):
        arguments.headroom_bytes("2")


def test_suggestion() -> None:
    assert arguments.suggestion("--imags=3", ["--images", "--batch"]) == "; did you mean --images?"
    assert arguments.suggestion("--zzz", ["--images"]) == "."


def test_excluded_gpus_are_a_list_of_their_own_option() -> None:
    assert arguments.excluded_gpus("3,1") == (3, 1)
    with pytest.raises(
        UsageError, match=r"^--exclude: 'x' is not a list of GPU indices; write them with commas, such as 0,1.$"
    ):
        arguments.excluded_gpus("x")
    with pytest.raises(UsageError, match=r"^--exclude: '1,1' names a GPU twice; name each once.$"):
        arguments.excluded_gpus("1,1")


def test_a_pin() -> None:
    assert arguments.pin("model.visual=0") == ("model.visual", 0)
    assert arguments.pin(" a=b = 12 ") == ("a=b", 12)


@pytest.mark.parametrize("text", ["", "=", "=0", "model.visual", "model.visual=", "model.visual=cpu", "m=-1", "m=0,1"])
def test_other_pins_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        arguments.pin(text)
    assert str(caught.value) == f"--pin: {text!r} is not a module and a GPU; write them as model.visual=0."


def test_max_memory() -> None:
    assert arguments.max_memory("0=20GiB") == ((0, 20 * GIB),)
    assert arguments.max_memory("0=1GiB, 2 = 2GiB") == ((0, GIB), (2, 2 * GIB))


@pytest.mark.parametrize("text", ["", "20GiB", "0=", "=20GiB", "a=1GiB", "cpu=1GiB"])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        arguments.max_memory(text)
    assert str(caught.value) == f"--max-memory: {text!r} is not a GPU and a size; write them as 0=20GiB."


def test_a_limit_without_a_unit_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-memory: '20' is not a size; write a number and a unit"):
        arguments.max_memory("0=20")


def test_what_a_gate_expects() -> None:
    assert arguments.vram_bytes("20GiB") == 20 * 2**30
    assert arguments.gpu_number("2") == 2
    assert arguments.compute_capability("8.9") == (8, 9)
    for read, text, option in (
        (arguments.vram_bytes, "20", "--vram"),
        (arguments.gpu_number, "two", "--gpus"),
        (arguments.compute_capability, "new", "--capability"),
    ):
        with pytest.raises(UsageError, match=f"^{option}: "):
            read(text)


@pytest.mark.parametrize(
    ("words", "style"),
    [
        (["--json"], "json"),
        (["--format", "github"], "github"),
        (["gate", "--format=github"], "github"),
        (["--format", "github", "--json"], "json"),
        (["--format", "junit"], "text"),
        (["github"], "text"),
    ],
)
def test_how_a_failure_is_said(words: list[str], style: str) -> None:
    assert arguments.failure_style(words) == style
