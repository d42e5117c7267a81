"""The command line as a user meets it: exit status, streams, files, and no traceback whatever happens."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import msgspec
import pytest

from vlm_doctor import __version__, cli, codec
from vlm_doctor.commands.judge import DEFAULT_MODEL
from vlm_doctor.errors import ModelFileError
from vlm_doctor.machine import Machine, TorchView
from vlm_doctor.redaction import redact
from vlm_doctor.report import Report
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.catalogue import catalogue

MACHINES = Path(__file__).parents[1] / "machines"
MODEL = DEFAULT_MODEL


class Ran(msgspec.Struct):
    """What one run left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run(*words: str) -> Ran:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(words))
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Ran(caught.value.code, captured.out, captured.err)

    return run


def recorded(name: str) -> str:
    return str(MACHINES / f"{name}.json")


@pytest.mark.parametrize(
    ("machine", "words", "status"),
    [
        ("2xl4-idle", (), 0),
        ("laptop-no-gpu", (), 0),
        ("gpus-taken-from-container", (), 1),
        ("pynvml-shadowed", (), 1),
        ("2xa10-half-taken", (), 0),
        ("2xa10-half-taken", ("--strict",), 1),
        ("2xa10-half-taken", ("--strict", "--ignore", "VLM501"), 0),
        ("2xa10-half-taken", ("--strict", "--gpus", "0"), 0),
        ("2xa10-half-taken", ("--strict", "--gpus", "1"), 1),
        ("cpu-torch", (), 1),
        ("cpu-torch", ("--ignore", "vlm3"), 0),
        ("gpu-lost", ("--gpus", "0,1"), 0),
        ("gpu-lost", ("--gpus", "2"), 1),
        ("driver-mismatch", (), 1),
        ("nvml-crashed", (), 3),
        ("nvml-crashed", ("--ignore", "VLM105"), 3),
    ],
)
def test_exit_status_is_the_same_in_every_format(run: Run, machine: str, words: tuple[str, ...], status: int) -> None:
    text = run("--machine", recorded(machine), *words)
    data = run("--machine", recorded(machine), *words, "--json")

    assert (text.status, data.status, data.json["exit_status"]) == (status, status, status)
    assert text.err == data.err == ""


def test_check_suggests_a_placement_that_does_not_change_the_verdict(run: Run) -> None:
    ran = run("--machine", "T4", "--json")

    assert ran.json["plan"]["fits"] is False
    assert ran.status == 0


def test_check_suggests_no_placement_where_every_gpu_is_hidden(run: Run) -> None:
    assert run("--machine", recorded("masked"), "--json").json["plan"] is None
    assert run("--machine", recorded("some-hidden"), "--json").json["plan"]["fits"]


def test_check_suggests_the_model_that_is_named(run: Run) -> None:
    other = next(name for name in catalogue() if name != MODEL)

    assert f"{other}: " in run("--machine", "2xH200", "--model", other).out


def test_a_named_model_that_cannot_be_read_is_bad_input(run: Run, tmp_path: Path) -> None:
    ran = run("--machine", "2xL4", "--model", str(tmp_path))

    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("vlm-doctor: ")


def test_a_default_model_that_cannot_be_read_does_not_stop_a_check(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *, allow_network: bool = True) -> None:
        assert not allow_network
        raise ModelFileError("config.json: damaged.")

    monkeypatch.setattr("vlm_doctor.sources.model_files.load_profile", broken)

    ran = run("--machine", "2xL4")

    assert ran.status == 0
    assert "No suggestion for a model: config.json: damaged." in ran.out


def test_commands_in_the_text_name_the_machine_that_was_asked_about(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "my machine.json"
    path.write_bytes(Path(recorded("2xl4-idle")).read_bytes())

    assert f"vlm-doctor plan {MODEL} --machine '{path}'" in run("--machine", str(path)).out


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("--machine", "2xL4"), 0),
        (("--machine", "T4"), 1),
        (("--machine", "2xT4", "--min-gpus", "2"), 0),
        (("--machine", "2xT4", "--max-gpus", "1"), 1),
        (("--machine", "T4", "--quantization", "nf4"), 0),
        (("--machine", "L4", "--headroom", "20GiB"), 1),
        (("--machine", "2xL4", "--gpus", "1", "--text-tokens", "4000"), 0),
    ],
)
def test_a_plan_that_fits_is_0_and_another_is_1_in_every_format(run: Run, words: tuple[str, ...], status: int) -> None:
    text, data, code = (run("plan", MODEL, *words, "--format", name) for name in ("terminal", "json", "python"))

    assert (text.status, data.status, code.status) == (status, status, status)
    assert data.json["plan"]["fits"] is (status == 0)
    assert ("raise SystemExit" in code.out) is (status == 1)
    compile(code.out, "snippet", "exec")


def test_faults_of_gpus_that_a_plan_does_not_use_do_not_count(run: Run) -> None:
    machine = recorded("gpu-lost")

    assert run("plan", MODEL, "--machine", machine).status == 0
    assert "VLM108" not in run("plan", MODEL, "--machine", machine).out


def test_a_plan_for_a_machine_that_does_not_work_says_so(run: Run) -> None:
    ran = run("plan", MODEL, "--machine", recorded("cpu-torch"))

    assert ran.status == 1
    assert ran.out.startswith("Fits on 1 of 2 GPUs")
    assert "This machine has errors that stop any model:" in ran.out
    assert "(VLM303)" in ran.out


def test_a_plan_without_gpu_is_told_how_to_describe_another_machine(run: Run) -> None:
    ran = run("plan", MODEL, "--machine", recorded("laptop-no-gpu"))

    assert ran.status == 1
    assert f"    vlm-doctor plan {MODEL} --machine 2xL4\n" in ran.out


def test_a_plan_for_a_machine_that_nobody_could_look_at_is_3(run: Run) -> None:
    ran = run("plan", MODEL, "--machine", recorded("nvml-crashed"))

    assert ran.status == 3
    assert ran.out.startswith("Could not look: ")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["--machine", "2xL4", "--gpus", "5"], "UsageError", "--gpus: 2xL4 has no GPU 5; its GPUs are 0, 1."),
        (["--machine", recorded("laptop-no-gpu"), "--gpus", "0"], "UsageError", "leave the option out."),
        (["--machine", "2xL4", "--ignore", "VLM999"], "UsageError", "--ignore: 'VLM999' is not the beginning of a code"),
        (["--machine", "/does/not/exist.json"], "MachineError", "/does/not/exist.json"),
        (["plan", MODEL, "--machine", "2xL4", "--batch", "0"], "UsageError", "batch"),
        (["plan", MODEL, "--machine", "2xL4", "--headroom", "3"], "UsageError", "--headroom: '3' is not a size"),
        (["plan", "no/such-model", "--machine", "2xL4", "--offline"], "ModelNotFoundError", "no/such-model"),
        (["nonsense"], "UsageError", "'nonsense' is not a command"),
    ],
)
def test_bad_input_is_2_and_one_sentence_in_every_format(run: Run, words: list[str], kind: str, message: str) -> None:
    text = run(*words)
    data = run(*words, "--json")

    assert (text.status, text.out) == (2, "")
    assert text.err.startswith("vlm-doctor: ")
    assert message in text.err
    assert text.err.count("\n") == 1
    assert (data.status, data.err) == (2, "")
    assert data.json["exit_status"] == 2
    assert data.json["error"]["type"] == kind
    assert message in data.json["error"]["message"]


def test_hostile_words_are_repeated_inertly(run: Run) -> None:
    ran = run("\x1b[2J\x07[red]")

    assert "\x1b" not in ran.err
    assert "\\x1b[2J\\x07[red]" in ran.err


def test_output_goes_to_a_file_whole(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.json"

    ran = run("--machine", "2xL4", "--json", "--output", str(path))

    assert (ran.status, ran.out, ran.err) == (0, "", "")
    assert codec.from_json(path.read_bytes(), Report, where="report").machine.description == "2xL4"


def test_text_in_a_file_does_not_depend_on_the_terminal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.txt"
    monkeypatch.setattr(sys, "stdout", Screen(encoding="ascii"))

    run("--machine", "2xL4", "--output", str(path))

    assert "→" in path.read_text(encoding="utf-8")
    assert "\x1b" not in path.read_text(encoding="utf-8")


def test_a_file_that_cannot_be_written_is_bad_usage(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "report.json"

    text = run("--machine", "2xL4", "--output", str(path))
    data = run("--machine", "2xL4", "--json", "--output", str(path))

    assert text == Ran(
        2, "", f"vlm-doctor: --output {path}: cannot be written: No such file or directory; make its folder first.\n"
    )
    assert (data.status, data.json["error"]["type"]) == (2, "UsageError")


def test_a_defect_is_confessed_in_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: str) -> Machine:
        raise KeyError("\x1b[31mgpus")

    monkeypatch.setattr("vlm_doctor.sources.load_machine", broken, raising=False)

    text = run("--machine", "2xL4")
    data = run("--machine", "2xL4", "--json")

    assert (text.status, text.out) == (3, "")
    assert text.err.startswith(
        f"vlm-doctor: This is a defect of vlm-doctor {__version__}, please report it: "
        "KeyError: '\\x1b[31mgpus' (test_cli.py, line "
    )
    assert text.err.count("\n") == 1
    assert (data.status, data.json["exit_status"], data.json["error"]["type"]) == (3, 3, "InternalError")


def test_an_interrupted_run_is_130_and_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(spec: str) -> Machine:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm_doctor.sources.load_machine", interrupted, raising=False)

    assert run("--machine", "2xL4") == Ran(130, "", "")


def test_explain_writes_markdown_when_piped(run: Run) -> None:
    ran = run("explain", "vlm501")

    assert ran.status == 0
    assert ran.out.startswith("# VLM501: ")


def test_explain_of_an_unknown_code_names_near_ones(run: Run) -> None:
    ran = run("explain", "VML501")

    assert (ran.status, ran.out) == (2, "")
    assert "did you mean VLM501" in ran.err


def test_explain_as_data_follows_its_published_schema(run: Run) -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs" / "explain.schema.json").read_text("utf-8"))

    one, every, wrong = run("explain", "501", "--json"), run("explain", "--json"), run("explain", "--json", "nothing")

    jsonschema.validate(one.json, schema)
    jsonschema.validate(every.json, schema)
    assert one.json["code"] == "VLM501"
    assert one.json["what_to_do"].startswith("Wait, ")
    assert {"code": "VLM501", "title": one.json["title"]} in every.json["codes"]
    assert (wrong.status, wrong.err, wrong.json["exit_status"]) == (2, "", 2)
    assert "There is no code 'nothing'" in wrong.json["error"]["message"]


def test_version(run: Run) -> None:
    assert run("--version") == Ran(0, f"vlm-doctor {__version__}\n", "")
    assert run("--version", "--json").json == {"version": __version__}
    assert run("--version", "check", "--json").json["error"]["message"] == "--version stands alone, or with --json."


class Screen(io.TextIOWrapper):
    """Standard output that is a terminal, and remembers."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


class FakeCollection:
    """An examination whose answers are known; what was printed before torch was waited for is kept."""

    screen: Screen | None = None
    before_torch = ""
    machine = load_machine(recorded("2xl4-idle"))
    waiting_for = ""

    def __init__(
        self, *, with_torch: bool = True, fresh_torch: bool = False, meanwhile: Callable[[bool], None] | None = None
    ) -> None:
        self.with_torch = with_torch
        self.meanwhile = meanwhile

    def __enter__(self) -> FakeCollection:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def without_torch(self) -> Machine:
        if self.meanwhile is not None:
            self.meanwhile(True)
        return msgspec.structs.replace(self.machine, torch=TorchView(state="not_asked", message="still being asked"))

    def complete(self) -> Machine:
        assert self.with_torch
        type(self).before_torch = self.screen.shown() if self.screen else ""
        return self.machine


@pytest.fixture
def collection(monkeypatch: pytest.MonkeyPatch) -> type[FakeCollection]:
    monkeypatch.setattr("vlm_doctor.sources.Collection", FakeCollection, raising=False)
    monkeypatch.setattr(FakeCollection, "screen", None)
    monkeypatch.setattr(FakeCollection, "before_torch", "")
    return FakeCollection


def test_on_a_terminal_the_verdict_does_not_wait_for_torch(
    run: Run, collection: type[FakeCollection], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(collection, "screen", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("NO_COLOR", "1")

    ran = run()

    assert ran.status == 0
    assert "torch ? (still being asked)" in " ".join(collection.before_torch.split())
    assert "Ready:" not in collection.before_torch
    rest = screen.shown().removeprefix(collection.before_torch)
    assert "sees 2 GPUs" in rest
    assert "Ready: 2 GPUs, no errors, no warnings." in rest


def test_in_a_pipe_there_is_one_whole_document(run: Run, collection: type[FakeCollection]) -> None:
    text, data = run(), run("--json")

    assert text.out.count("vlm-doctor 0.") == 1
    assert "→ torch 2" in text.out
    assert data.json["machine"]["torch"]["state"] == "ok"


def test_without_torch_the_report_says_what_is_not_known(run: Run, collection: type[FakeCollection]) -> None:
    ran = run("--no-torch")

    assert ran.status == 0
    assert "Not known" in ran.out


def test_a_plan_for_this_machine_does_not_ask_torch(run: Run, collection: type[FakeCollection]) -> None:
    ran = run("plan", MODEL, "--json")

    assert ran.status == 0
    assert ran.json["machine"]["torch"]["state"] == "not_asked"


def test_color_is_for_terminals(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    run("--machine", recorded("cpu-torch"))

    assert "\x1b[1;31m✗ error\x1b[0m" in screen.shown()


def test_explain_is_rendered_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("NO_COLOR", "1")

    run("explain", "VLM501")

    assert "VLM501" in screen.shown()
    assert "# VLM501" not in screen.shown()


def test_collect_redacts_unless_told_otherwise(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_machine(recorded("2xa10-half-taken"))
    monkeypatch.setattr("vlm_doctor.sources.collect", lambda **_: machine, raising=False)

    redacted, whole = run("collect"), run("collect", "--no-redact")

    assert codec.machine_from_json(whole.out.encode(), where="snapshot") == machine
    assert codec.machine_from_json(redacted.out.encode(), where="snapshot") == redact(machine)
    assert redacted.out != whole.out


def test_explain_without_a_code_lists_them(run: Run) -> None:
    ran = run("explain")

    assert ran.status == 0
    assert "- VLM501: GPU memory held by other processes\n" in ran.out


LOGS = Path(__file__).parents[1] / "logs"


def test_an_error_is_explained_and_confirmed_by_a_machine(run: Run, golden: Callable[[str, str], None]) -> None:
    words = ("explain-error", str(LOGS / "driver-warning-first.txt"), "--machine", recorded("old-driver"))

    text, data = run(*words), run(*words, "--json")

    assert (text.status, data.status, data.json["exit_status"]) == (0, 0, 0)
    golden("terminal/explain_error.txt", text.out)
    assert data.json["command"] == "explain-error"
    assert data.json["error_text"]["cause"]["name"] == "driver-too-old"
    assert data.json["error_text"]["confirmation"] == "confirmed"


@pytest.mark.parametrize("name", sorted(path.name for path in LOGS.glob("*.txt")))
@pytest.mark.parametrize("machine", ["2xl4-idle", "nvml-crashed", "masked", "2xa10-half-taken"])
def test_an_explanation_is_at_most_80_columns_of_ascii_where_asked(
    run: Run, name: str, machine: str, tmp_path: Path
) -> None:
    ran = run("explain-error", str(LOGS / name), "--machine", recorded(machine), "--verbose")

    assert ran.status == 0
    assert all(len(line) <= 80 or line.startswith("    ") for line in ran.out.splitlines())
    assert "Do this next:" in ran.out
    assert "Then verify with:" in ran.out


def test_an_error_that_is_not_known_is_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"KeyError: 'foo'\n")))

    ran = run("explain-error", "--machine", "2xL4")

    assert ran.status == 3
    assert ran.out.startswith(
        "Not recognized: nothing in this text is known to the doctor.\n  It ends with: KeyError: 'foo'\n"
    )


def test_an_empty_log_is_bad_usage_in_json_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "log").touch()

    ran = run("explain-error", str(tmp_path / "log"), "--json", "--machine", "2xL4")

    assert (ran.status, ran.json["error"]["type"]) == (2, "UsageError")


def test_only_errors_about_torch_ask_torch(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def collect(*, with_torch: bool, fresh_torch: bool, meanwhile: Callable[[bool], None]) -> Machine:
        meanwhile(True)
        asked.append(with_torch)
        return load_machine(recorded("2xl4-idle"))

    monkeypatch.setattr("vlm_doctor.sources.collect", collect, raising=False)
    for text in ("RuntimeError: No CUDA GPUs are available", "Segmentation fault", "uncorrectable ECC error encountered"):
        (tmp_path / "log").write_text(text, "utf-8")
        run("explain-error", str(tmp_path / "log"))
    run("explain-error", str(tmp_path / "log"), "--no-torch")

    assert asked == [True, True, False, False]


def test_a_gate_is_a_status_one_line_and_outputs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    words = ("gate", "--machine", "8xH100:nvswitch", "--gpus", "2", "--vram", "20GiB", "--nvlink", "--capability", "8.0")

    ran = run(*words, "--model", MODEL, "--github-output")

    assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
    assert ran.out.startswith("Met: GPUs 0, 1 (NVIDIA H100 80GB HBM3), 20.0 GiB free each, joined by NVLink")
    assert "run-gpu-tests<<" in (tmp_path / "output").read_text("utf-8")
    data = run(*words, "--json")
    assert data.json["gate"]["is_met"] is True
    assert data.json["command"] == "gate"
    assert run("gate", "--machine", "T4", "--gpus", "2").status == 1
    assert run("gate", "--machine", recorded("nvml-crashed"), "--no-project").status == 3


def test_github_output_outside_of_a_job_is_bad_usage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)

    ran = run("gate", "--machine", "2xL4", "--github-output", "--json")

    assert (ran.status, ran.json["error"]["type"]) == (2, "UsageError")


def test_the_project_says_what_is_expected_and_the_report_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = '[tool.vlm-doctor]\ngpus = 2\nvram = "20GiB"\nignore = ["VLM501"]\nstrict = true\n'
    (tmp_path / "pyproject.toml").write_text(table, "utf-8")
    monkeypatch.chdir(tmp_path)
    machine = ("--machine", recorded("2xa10-half-taken"))

    assert run("gate", *machine).status == 1
    assert run("gate", *machine, "--gpus", "1").status == 0
    assert run("gate", *machine, "--no-project").status == 0
    checked = run(*machine)
    assert checked.status == 0
    assert "Demoted from warning: --ignore VLM501." in checked.out
    # A folder's name may be longer than a line.
    note = f"From {tmp_path}/pyproject.toml: [tool.vlm-doctor]: ignore VLM501; strict."
    assert "".join(note.split()) in "".join(checked.out.split())
    (tmp_path / "pyproject.toml").write_text("[tool.vlm-doctor]\nignore = ['VLM999']\n", "utf-8")
    wrong = run(*machine)
    assert wrong.status == 2
    assert "[tool.vlm-doctor] ignore: 'VLM999' is not the beginning of a code" in wrong.err


def test_the_model_of_the_project_is_suggested(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(name for name in catalogue() if name != MODEL)
    (tmp_path / "pyproject.toml").write_text(f"[tool.vlm-doctor]\nmodel = '{other}'\n", "utf-8")
    monkeypatch.chdir(tmp_path)

    assert f"{other}: " in run("--machine", "2xH200").out


def test_a_report_is_saved_and_compared_with(run: Run, tmp_path: Path) -> None:
    good = str(tmp_path / "good.json")

    first = run("--machine", recorded("2xl4-idle"), "--save", good)
    later = run("--machine", recorded("cpu-torch"), "--since", good, "--save", good)

    assert (first.status, later.status) == (0, 1)
    assert "Changed since 2026-11-22T12:00:00Z, when it was usable\n" in later.out
    again = run("--machine", recorded("cpu-torch"), "--since", good, "--json")
    assert again.json["changes"] == {
        "where": good,
        "saved_at": "2026-11-22T12:00:00Z",
        "saved_exit_status": 1,
        "changes": [],
        "findings_before": {"VLM303": "error", "VLM401": "info"},
    }
    unwritable = run("--machine", "2xL4", "--save", str(tmp_path / "missing" / "x.json"))
    assert (unwritable.status, unwritable.out) == (2, "")
    assert unwritable.err.startswith(f"vlm-doctor: --save {tmp_path}/missing/x.json: cannot be written: ")


def test_a_snapshot_of_somebody_else_can_be_redacted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "half")

    ran = run("collect", "--redact", "--machine", recorded("2xa10-half-taken"))

    assert ran.status == 0
    assert '"ana"' not in ran.out
    assert codec.machine_from_json(ran.out.encode(), where="snapshot").gpus[1].processes[0].pid == 4711


def test_a_failure_in_a_job_is_an_annotation(run: Run) -> None:
    ran = run("gate", "--format", "github", "--gpus", "%:,")

    assert (ran.status, ran.err) == (2, "")
    assert ran.out.startswith("::error title=vlm-doctor::--gpus: '%25:,' is not a number of GPUs")
    assert ran.out.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("gate", "--machine", "2xL4", "--gpus", "2", "--model", MODEL),
        ("gate", "--machine", "T4", "--gpus", "2"),
        ("explain-error", str(LOGS / "nccl-shm.txt"), "--machine", "2xL4"),
        ("--machine", "2xL4", "--since", recorded("2xl4-idle")),
        ("--machine", recorded("cpu-torch"), "--since", recorded("small-shm")),
    ],
)
def test_every_report_follows_the_published_schema(run: Run, words: tuple[str, ...]) -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text("utf-8"))

    jsonschema.validate(run(*words, "--json").json, schema)


def process(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Run a command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "vlm_doctor", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_that_stops_reading_is_no_error() -> None:
    child = process("--machine", "8xH100:nvswitch", "--json")
    assert child.stdout is not None
    child.stdout.close()

    _, err = child.communicate(timeout=60)

    assert (child.returncode, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words", [("--json", "--bogus"), ("--machine", "2xL4", "--json"), ("--machine", "2xL4", "--format", "github")]
)
def test_a_full_disk_is_one_sentence_even_where_errors_are_json(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(
            [sys.executable, "-m", "vlm_doctor", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert child.returncode == 2
    assert child.stderr.count("\n") == 1
    assert "Standard output cannot be written: No space left on device." in child.stderr


def test_output_that_is_not_utf8_is_ascii() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}

    for words in (["--machine", "2xL4"], ["--machine", "2xL4", "--json"], ["nönsense"]):
        child = process(*words, env=environment)
        out, err = child.communicate(timeout=60)

        assert (out + err).isascii(), words
        assert "Traceback" not in err


def test_a_check_loads_neither_torch_nor_pytest_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from vlm_doctor.cli import main\n"
        "try:\n    main(['--no-torch'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pytest', 'numpy', 'pynvml', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )

    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)

    assert child.stderr == "[]\n"


@pytest.fixture
def heeded() -> Iterator[None]:
    """Children heed interrupts even where this process was started in the background, which makes shells ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_an_interrupt_is_130_without_traceback() -> None:
    child = process("--machine", "32xH100:nvswitch", "--json")
    assert child.stdout is not None
    # The report is larger than a pipe holds, so that the child cannot end before the rest is read.
    first = child.stdout.read(1)

    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)

    # A write that was cut short goes on before Python looks at the signal, so that the report may be whole or not.
    assert (first + out).startswith("{")
    assert (child.returncode, err) == (130, "")


def test_an_interrupt_while_the_program_is_loaded_is_130_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "vlm_doctor.options", Interrupted("vlm_doctor.options"))

    with pytest.raises(SystemExit) as stopped:
        cli.main([])

    assert stopped.value.code == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_where_nothing_can_be_written_the_exit_status_has_to_do() -> None:
    with Path("/dev/full").open("w") as full:
        for words, status in ((["--machine", "2xL4"], 2), (["--machine", "nope"], 2), (["--bogus", "--json"], 2)):
            child = subprocess.run(
                [sys.executable, "-m", "vlm_doctor", *words], stdout=full, stderr=full, check=False, timeout=60
            )
            assert child.returncode == status, words


def test_a_huge_value_leaves_a_short_sentence_with_both_ends(run: Run) -> None:
    said = run("--machine", "2xL4", "--gpus", "9" * 5000)

    assert len(said.err) < 650
    assert said.err.startswith("vlm-doctor: --gpus: '999")
    assert said.err.endswith("write them with commas, such as 0,1.\n")


def test_cards_are_suggested_when_asked_for_and_when_nothing_fits(run: Run) -> None:
    words = ("plan", "zai-org/GLM-4.1V-9B-Thinking", "--offline", "--json", "--machine")
    assert json.loads(run(*words, "2xH100").out)["plan"]["gpu_sets"] == []
    asked = json.loads(run(*words, "2xH100", "--suggest-gpus").out)["plan"]["gpu_sets"]
    assert [card["count"] for card in asked]
    assert json.loads(run(*words, "T4", "--suggest-gpus").out)["plan"]["gpu_sets"] == asked
    assert json.loads(run(*words, "T4").out)["plan"]["gpu_sets"] == asked
