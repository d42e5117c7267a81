"""Whatever state torch, transformers and the cache are in, there is a trace or one phrase that says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vlm_doctor import Workload, load_machine, load_profile
from vlm_doctor.cli import main
from vlm_doctor.errors import ModelError
from vlm_doctor.sources import trace as source
from vlm_doctor.sources.child import Outcome
from vlm_doctor.sources.trace import PROGRAM, TraceError, find_config, trace, understand
from vlm_doctor.trace import Event, Pictures, TraceRequest
from vlm_doctor.tracing import trace_model

pytestmark = pytest.mark.usefixtures("no_children_left")

REQUEST = TraceRequest(
    architecture="MadeForConditionalGeneration",
    dtype="bfloat16",
    attention="sdpa",
    cudnn_width=128,
    layers=("model.layers.0",),
    tower=(),
    lengths=(65, 577),
    steps=1,
)
PICTURES = Pictures(images=1, height=28, width=28, sequences=1, run_height=28, run_width=28, patches=4, patch=14, merge=1)
ANSWER: dict[str, Any] = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "modules": ["", "model"],
    "weights_bytes": 1024,
    "runs": [
        {"tokens": 65, "events": [[1, 520, -1, 0], [1, -520, 0, 1], [1, 0, 1, 0]], "passes": [0]},
        {"tokens": 577, "events": [], "passes": [0], "same_as": 0, "sizes": [4616, -4616]},
    ],
}
LIBRARIES = {
    "broken torch": ("raise ImportError('libcudnn.so.9: cannot open')", "ImportError: libcudnn.so.9: cannot open"),
    "segfault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "hang": ("import time; time.sleep(3600)", "no answer within 1.5 s"),
    "leaves": ("import os; os._exit(0)", "exit status 0"),
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_version", lambda library: "1.0")


def fake_library(tmp_path: Path, name: str, text: str) -> dict[str, str]:
    package = tmp_path / "fake" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(package.parent)}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", list(LIBRARIES))
def test_any_torch(name: str, tmp_path: Path) -> None:
    text, message = LIBRARIES[name]
    with pytest.raises(TraceError) as caught:
        trace(
            REQUEST,
            {},
            environment=fake_library(tmp_path, "torch", text),
            deadline_s=1.5 if name == "hang" else 20.0,
            cache_folder=tmp_path / "cache",
        )
    assert str(caught.value) == message
    assert not list((tmp_path / "cache").glob("*"))


def test_a_library_that_is_missing_starts_no_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "_version", {"torch": "2.13"}.get)
    monkeypatch.setattr(source, "Child", None)
    with pytest.raises(TraceError, match=r"transformers is not installed; install pytest-vlmgpu\[models\]"):
        trace(REQUEST, {}, cache_folder=tmp_path)


def test_runs_that_differ_in_sizes_alone_are_told_by_them() -> None:
    traces = understand(Outcome(state="ok", answer=ANSWER, seconds=1.23456), REQUEST)
    assert [run.events[0] for run in traces.runs] == [Event(1, 520, -1, 0), Event(1, 4616, -1, 0)]
    assert [run.events[1].size_bytes for run in traces.runs] == [-520, -4616]
    assert traces.runs[1].events[2] == Event(1, 0, 1, 0)
    assert (traces.torch, traces.seconds, traces.runs[0].layers) == ("2.13.0", 1.235, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"runs": [{"tokens": 1, "events": "?", "passes": []}]},
        {"runs": [{"tokens": 1, "events": [], "passes": [], "same_as": 7}]},
        {"runs": [ANSWER["runs"][0], {"tokens": 1, "events": [], "passes": [], "same_as": 0, "sizes": [1]}]},
        {"modules": None},
    ],
)
def test_an_answer_that_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match="unreadable answer"):
        understand(Outcome(state="ok", answer={**ANSWER, **change}), REQUEST)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Outcome(state="failed", stage="error", message="LookupError: no class X"), "LookupError: no class X"),
        (Outcome(state="crashed", stage="build", message="SIGKILL"), "SIGKILL, after build"),
        (Outcome(state="timed_out", message="no answer within 5 s"), "no answer within 5 s"),
    ],
)
def test_how_it_ended_is_said(outcome: Outcome, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        understand(outcome, REQUEST)
    assert str(caught.value) == message


class FakeChild:
    """Answers at once, and counts how often."""

    started: list[dict[str, Any]]

    def __init__(self, program: str, arguments: dict[str, Any], **options: Any) -> None:
        assert program == PROGRAM
        assert options["environment"]["CUDA_VISIBLE_DEVICES"] == ""
        self.started.append(arguments)

    def outcome(self) -> Outcome:
        return Outcome(state="ok", answer=ANSWER)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(FakeChild, "started", started, raising=False)
    monkeypatch.setattr(source, "Child", FakeChild)
    monkeypatch.setattr(source, "_version", lambda library: "1.0")
    return started


def test_a_second_trace_comes_from_the_cache(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = trace(REQUEST, {"a": 1}, cache_folder=cache)
    second = trace(REQUEST, {"a": 1}, cache_folder=cache)
    assert len(asked) == 1
    assert asked[0]["runs"][1]["tokens"] == 577
    assert (first.is_cached, second.is_cached) == (False, True)
    assert second == msgspec.structs.replace(first, is_cached=True)
    assert trace(REQUEST, {"a": 1}, cache_folder=cache, is_fresh=True).is_cached is False


@pytest.mark.parametrize("change", ["request", "config", "version", "timm", "processor"])
def test_what_a_trace_depends_on_makes_another(
    change: str, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = msgspec.structs.replace(REQUEST, pictures=PICTURES)
    folder, config = tmp_path / "model", {"a": 1}
    folder.mkdir()
    trace(request, config, folder=folder, cache_folder=tmp_path)
    if change == "request":
        request = msgspec.structs.replace(request, batch=2)
    elif change == "config":
        config = {"a": 2}
    elif change == "version":
        monkeypatch.setattr(source, "_version", lambda library: "1.1")
    elif change == "timm":
        monkeypatch.setattr(source, "_version", lambda library: None if library == "timm" else "1.0")
    else:
        (folder / "preprocessor_config.json").write_text("{}")
    trace(request, config, folder=folder, cache_folder=tmp_path)
    assert len(asked) == 2


@pytest.mark.parametrize("changed", ["sources/trace_child.py", "trace.py", "data/image_rules.py"])
def test_another_program_makes_another_trace(
    changed: str, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FOLDER", tmp_path / "doctor")
    for number in (1, 2):
        (tmp_path / "doctor" / changed).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "doctor" / changed).write_text(f"number = {number}")
        trace(REQUEST, {}, cache_folder=tmp_path)
    assert len(asked) == 2


OWN = msgspec.structs.replace(REQUEST, is_remote_code=True)
AUTO_MAP = {"auto_map": {"AutoConfig": "code.MadeConfig", "AutoModel": "code.MadeForConditionalGeneration"}}


@pytest.mark.parametrize("change", ["", "file", "name", "deeper", "pipe", "mode", "elsewhere"])
def test_a_trace_of_own_code_is_of_this_code(
    change: str, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "model", AUTO_MAP
    folder.mkdir()
    (folder / "code.py").write_text("")
    (folder / "deep").mkdir()
    if change == "elsewhere":
        # Nobody looks whether code of another repository is the same.
        config = {"auto_map": {"AutoModel": "org/code--code.MadeForConditionalGeneration"}}
    trace(OWN, config, folder=folder, cache_folder=tmp_path)
    assert asked[0]["code"] == next(reversed(config["auto_map"].values()))
    if change == "file":
        (folder / "more.py").write_text("more = 1")
    elif change == "name":
        (folder / os.fsdecode(b"\xff.py")).touch()
    elif change == "deeper":
        (folder / "deep" / "more.py").write_text("more = 1")
    elif change == "pipe":
        os.mkfifo(folder / "more.py")
    elif change == "mode":
        (folder / "more.py").symlink_to("nowhere")
    again = trace(OWN, config, folder=folder, cache_folder=tmp_path)
    assert again.is_cached is (change == "")


@pytest.mark.parametrize(
    ("config", "has_folder", "message"),
    [
        ({}, True, "auto_map of its config names no class that generates"),
        ({"auto_map": {"AutoModel": ["code.Other", None]}}, True, "auto_map of its config names no class that generates"),
        (AUTO_MAP, False, "the code of MadeForConditionalGeneration is not on this machine; download the checkpoint first"),
        (AUTO_MAP, True, "the code of MadeForConditionalGeneration is not on this machine"),
    ],
)
def test_own_code_that_is_not_there(
    config: dict[str, Any], has_folder: bool, message: str, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=message):
        trace(OWN, config, folder=tmp_path if has_folder else None, cache_folder=tmp_path)
    assert not asked


def test_copies_of_own_code_go_where_nobody_else_looks(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Child(FakeChild):
        def __init__(self, program: str, arguments: dict[str, Any], **options: Any) -> None:
            super().__init__(program, arguments, **options)
            seen.append(options["environment"].get("HF_MODULES_CACHE", ""))
            assert not seen[-1] or Path(seen[-1]).is_dir()

    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    monkeypatch.setattr(source, "Child", Child)
    (tmp_path / "code.py").write_text("")
    trace(OWN, AUTO_MAP, folder=tmp_path, cache_folder=tmp_path)
    trace(REQUEST, {}, cache_folder=tmp_path)
    assert seen[0]
    assert not Path(seen[0]).exists()
    assert seen[1] == ""
    assert len(asked) == 2


def test_copies_of_own_code_that_have_no_place(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class of transformers needs none."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    (tmp_path / "code.py").write_text("")
    with pytest.raises(TraceError, match=r"no folder for copies of its code \(No such file or directory\)"):
        trace(OWN, AUTO_MAP, folder=tmp_path, cache_folder=tmp_path)
    assert not asked
    assert trace(REQUEST, {}, cache_folder=tmp_path).runs


@pytest.mark.parametrize("damage", ["", "{", "null", "link", "folder"])
def test_a_cache_that_is_damaged_is_no_cache(damage: str, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    trace(REQUEST, {}, cache_folder=cache)
    (path,) = cache.glob("trace-*.json")
    text = path.read_text()
    path.unlink()
    if damage == "link":
        (tmp_path / "other").write_text(text)
        path.symlink_to(tmp_path / "other")
    elif damage == "folder":
        path.mkdir()
    else:
        path.write_text(damage)
    assert trace(REQUEST, {}, cache_folder=cache).is_cached is False
    assert len(asked) == 2


def test_a_cache_that_cannot_be_written_is_no_error(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert trace(REQUEST, {}, cache_folder=tmp_path / "file").runs
    assert trace(REQUEST, {}, cache_folder=tmp_path / "file").runs
    assert len(asked) == 2


def test_no_home_is_no_cache(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "default_folder", lambda: None)
    assert trace(REQUEST, {}).runs
    assert len(asked) == 1


def test_old_traces_go(asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_KEPT_FILES", 2)
    for number in range(5):
        trace(REQUEST, {"number": number}, cache_folder=tmp_path)
    assert len(list(tmp_path.glob("trace-*.json"))) <= 3
    assert len(asked) == 5


def test_versions() -> None:
    assert source._version("msgspec") == msgspec.__version__
    assert source._version("no-such-library") is None


class TestConfig:
    def test_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "made"}')
        assert find_config(str(tmp_path)) == ({"model_type": "made"}, tmp_path)

    def test_of_a_folder_without(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match=r"config.json cannot be read \(No such file or directory\)"):
            find_config(str(tmp_path))

    def test_of_the_catalogue(self) -> None:
        config, folder = find_config("zai-org/GLM-4.1V-9B-Thinking")
        assert folder is None
        assert config["model_type"] == "glm4v"

    def test_of_a_hub_snapshot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commit = "0" * 40
        folder = tmp_path / "models--org--name"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        assert find_config("org/name") == ({}, folder / "snapshots" / commit)

    def test_of_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ModelError, match="the network may not be used"):
            find_config("org/name", allow_network=False)


def test_a_plan_that_cannot_be_traced_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "_version", lambda library: None)
    monkeypatch.setattr(source, "default_folder", lambda: tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["plan", "zai-org/GLM-4.1V-9B-Thinking", "--machine", "2x24GiB", "--trace", "--json"])
    answer = json.loads(capsys.readouterr().out)["plan"]
    assert caught.value.code == 0
    assert answer["tier"] == "formulas"
    assert answer["notes"][-1] == (
        "The model was not traced, so that memory is told by formulas: "
        "torch is not installed; install pytest-vlmgpu[models]."
    )


def test_code_of_a_checkpoint_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "THUDM/glm-4v-9b", "--machine", "2x24GiB", "--trace", "--json"])
    assert "its class is code of the checkpoint" in json.loads(capsys.readouterr().out)["plan"]["notes"][-1]


def test_trust_without_a_trace_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "THUDM/glm-4v-9b", "--machine", "2x24GiB", "--trust-remote-code"])
    assert caught.value.code == 2
    assert "--trust-remote-code is about --trace" in capsys.readouterr().err


def test_own_code_that_only_the_catalogue_knows(capsys: pytest.CaptureFixture[str], asked: list[dict[str, Any]]) -> None:
    words = ["plan", "THUDM/glm-4v-9b", "--machine", "2x24GiB", "--offline", "--json", "--trace"]
    for more, reason in (
        ([], "its class is code of the checkpoint: read it, and if you trust it, add --trust-remote-code"),
        (["--trust-remote-code"], "the code of ChatGLMForConditionalGeneration is not on this machine"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert reason in json.loads(capsys.readouterr().out)["plan"]["notes"][-1]
    assert not asked


@pytest.mark.usefixtures("asked")
def test_a_run_that_fails_by_what_is_known_to_be_gone_says_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what the run itself said; of a class of transformers that alone."""

    class Child(FakeChild):
        def outcome(self) -> Outcome:
            return Outcome(state="failed", stage="error", message="AttributeError: gone.")

    monkeypatch.setattr(source, "Child", Child)
    monkeypatch.setattr(source, "_version", lambda library: "5.23.0")
    monkeypatch.setattr(source, "default_folder", lambda: tmp_path)
    (tmp_path / "modeling_chatglm.py").write_text("")
    found, _ = find_config("THUDM/glm-4v-9b", allow_network=False)
    machine = load_machine("2x24GiB")
    for name, start in (
        ("THUDM/glm-4v-9b", "its own code, as published, calls _extract_past_from_model_output: with "),
        ("zai-org/GLM-4.1V-9B-Thinking", ""),
    ):
        config = found if start else find_config(name, allow_network=False)[0]
        monkeypatch.setattr(source, "find_config", lambda *_, config=config, **__: (config, tmp_path))
        profile = load_profile(name, allow_network=False)
        tracing = trace_model(name, profile, machine, Workload(images=0), trust_remote_code=True)
        assert tracing.traces is None
        assert (tracing.reason or "").startswith(start)
        ends = "5.23.0 is installed (AttributeError: gone)" if start else "AttributeError: gone"
        assert (tracing.reason or "").endswith(ends)
