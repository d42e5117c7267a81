"""Where text goes, and how it looks there."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from vlm_doctor.delivery import look_of, write_file, write_stdout
from vlm_doctor.errors import UsageError
from vlm_doctor.formats import Look


class Screen(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(encoding: str = "utf-8") -> Screen:
    return Screen(io.BytesIO(), encoding=encoding)


def pipe(encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def test_a_terminal_has_its_own_width_and_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "97")

    assert look_of(screen(), environment={}) == Look(width=97, color=True)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_color_can_be_refused(environment: dict[str, str]) -> None:
    assert look_of(screen(), environment=environment).color is False


def test_an_empty_no_color_refuses_nothing() -> None:
    assert look_of(screen(), environment={"NO_COLOR": ""}).color is True


def test_a_pipe_is_80_columns_without_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    assert look_of(pipe(), environment={}) == Look(width=80, color=False)


@pytest.mark.parametrize(
    ("encoding", "is_unicode"), [("utf-8", True), ("ascii", False), ("latin-1", False), ("cp1252", False)]
)
def test_only_utf8_shows_everything(encoding: str, is_unicode: bool) -> None:
    assert look_of(pipe(encoding), environment={}).is_unicode is is_unicode


def test_a_file_of_our_own_does_not_depend_on_the_terminal() -> None:
    assert look_of(None, environment={}, verbose=True, machine_option=" --machine x") == Look(
        verbose=True, machine_option=" --machine x"
    )


def test_standard_output_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)

    write_stdout("lost")


def test_a_reader_that_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)

    with os.fdopen(write_end, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        write_stdout("text\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(UsageError) as caught:
            write_stdout("text\n")

    assert str(caught.value) == "Standard output cannot be written: No space left on device."


def test_a_file_is_replaced_whole_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")

    write_file(path, "new → \n")

    assert path.read_text(encoding="utf-8") == "new → \n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to("real")

    write_file(tmp_path / "link", "new")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf-8") == "new"


def test_a_device_is_written_and_not_replaced() -> None:
    write_file(Path("/dev/null"), "text")

    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing/report.json", "No such file or directory; make its folder first."),
        (".", "Is a directory; name a file in it."),
        # Each Python words it in its own way.
        ("a\0b", "embedded null"),
        ("x" * 300, "File name too long; shorten the name."),
        ("/", "Is a directory; name a file in it."),
        ("/dev/full", "No space left on device; make room, or name a file elsewhere."),
    ],
)
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str, why: str) -> None:
    path = tmp_path / name

    with pytest.raises(UsageError) as caught:
        write_file(path, "text")

    said = str(caught.value)
    assert said.startswith(f"--output {path}: cannot be written: ")
    assert why in said
    assert said.endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(UsageError):
        write_file(tmp_path / "loop", "text")


def test_a_pipe_is_written_only_when_somebody_reads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UsageError, match="No such device or address"):
        write_file(tmp_path / "pipe", "text")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "text")

    assert os.read(reader, 100) == b"text"
    os.close(reader)


def test_the_name_of_an_open_pipe_is_written() -> None:
    reader, writer = os.pipe()
    write_file(Path(f"/dev/fd/{writer}"), "text")
    os.close(writer)

    assert os.read(reader, 100) == b"text"
    os.close(reader)
