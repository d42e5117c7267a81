from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlm_doctor.sources import child as child_module
from vlm_doctor.sources import child_entry
from vlm_doctor.sources.child import Child, Outcome

from ...until import is_running, until

pytestmark = pytest.mark.usefixtures("no_children_left")


def run(folder: Path, body: str, *, deadline_s: float = 20.0, idle_s: float | None = None, **arguments: Any) -> Outcome:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    (folder / "program.py").write_text(f"import os, signal, sys, time\n\ndef main(say, **arguments):\n{lines}\n")
    child = Child("program", arguments, environment=os.environ, deadline_s=deadline_s, idle_s=idle_s, folder=folder)
    return child.outcome()


def test_answer_and_arguments_travel(tmp_path: Path) -> None:
    outcome = run(tmp_path, "say('all', {'got': arguments}, is_final=True)", number=3, text="ü")
    assert (outcome.state, outcome.answer, outcome.stage, outcome.message) == (
        "ok",
        {"got": {"number": 3, "text": "ü"}},
        "all",
        None,
    )
    assert outcome.seconds > 0


def test_a_child_does_not_wait_for_a_reader_that_is_busy(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "from pathlib import Path\n"
        "def main(say, done):\n"
        "    for _ in range(10): say('more', {'text': 'x' * 30_000})\n"
        "    Path(done).touch()\n"
        "    say('all', {'is_fine': True}, is_final=True)\n"
    )
    done = tmp_path / "done"
    child = Child("program", {"done": str(done)}, environment=os.environ, deadline_s=60, folder=tmp_path)
    until(done.exists)
    assert child.outcome().answer == {"is_fine": True}


def test_bytes_of_old_bindings_become_text(tmp_path: Path) -> None:
    assert run(tmp_path, "say('all', {'name': b'Tesla T4'}, is_final=True)").answer == {"name": "Tesla T4"}


def test_noise_on_stdout_and_stderr_does_not_matter(tmp_path: Path) -> None:
    body = """
for _ in range(200):
    print('{"stage": "fake", "answer": {}, "is_final": true}' * 400, flush=True)
    print('warning ' * 4000, file=sys.stderr, flush=True)
say('all', {'is_fine': True}, is_final=True)
"""
    assert run(tmp_path, body).answer == {"is_fine": True}


def test_exception_is_a_failure_with_its_text(tmp_path: Path) -> None:
    outcome = run(tmp_path, "raise OSError('libcudart.so.13:\\n cannot open')")
    assert (outcome.state, outcome.message) == ("failed", "OSError: libcudart.so.13: cannot open")


@pytest.mark.parametrize("exception", ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()"])
def test_exceptions_that_are_no_errors_are_failures_too(tmp_path: Path, exception: str) -> None:
    outcome = run(tmp_path, f"raise {exception}")
    assert outcome.state == "failed"
    assert outcome.message is not None
    assert outcome.message.startswith(exception.partition("(")[0])


def test_an_error_whose_text_is_no_text_is_a_failure_as_well(tmp_path: Path) -> None:
    outcome = run(tmp_path, "raise ImportError('/opt/\\udcff/libtorch.so: \\u00fc')")
    assert (outcome.state, outcome.message) == ("failed", "ImportError: /opt/?/libtorch.so: ü")
    body = """
class Odd(Exception):
    def __str__(self):
        raise ValueError('no')
raise Odd
"""
    outcome = run(tmp_path, body)
    assert (outcome.state, outcome.message) == ("failed", "Odd: its message cannot be read")


def test_program_that_cannot_be_imported_fails(tmp_path: Path) -> None:
    child = Child("absent", {}, environment=os.environ, deadline_s=20, folder=tmp_path)
    assert child.outcome().state == "failed"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGBUS", "SIGTERM"])
def test_signal_is_named(tmp_path: Path, name: str) -> None:
    outcome = run(tmp_path, f"os.kill(os.getpid(), signal.{name})")
    assert (outcome.state, outcome.message, outcome.answer) == ("crashed", name, {})


def test_signal_without_a_name_has_its_number(tmp_path: Path) -> None:
    assert run(tmp_path, "os.kill(os.getpid(), signal.SIGRTMIN + 1)").message == f"signal {signal.SIGRTMIN + 1}"


def test_silent_exit_is_a_crash_with_the_last_words(tmp_path: Path) -> None:
    outcome = run(tmp_path, "print('free(): invalid pointer\\n\\n', file=sys.stderr, flush=True)\nos._exit(3)")
    assert (outcome.state, outcome.message) == ("crashed", "exit status 3: free(): invalid pointer")


def test_what_was_said_before_a_crash_is_kept(tmp_path: Path) -> None:
    outcome = run(tmp_path, "say('first', {'a': 1})\nsay('second', {'a': 1, 'b': 2})\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert (outcome.state, outcome.answer, outcome.stage) == ("crashed", {"a": 1, "b": 2}, "second")


def test_hang_is_cut_off_at_the_deadline_and_keeps_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def main(say, said):\n    say('first', {'a': 1})\n    Path(said).touch()\n    time.sleep(3600)\n"
    )
    said = tmp_path / "said"
    child = Child("program", {"said": str(said)}, environment=os.environ, deadline_s=600, folder=tmp_path)
    until(said.exists)
    child._started -= 600
    outcome = child.outcome()
    assert (outcome.state, outcome.answer, outcome.message) == ("timed_out", {"a": 1}, "no answer within 600 s")


def test_child_that_ignores_signals_is_killed(tmp_path: Path) -> None:
    body = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
    signal.signal(number, signal.SIG_IGN)
time.sleep(3600)
"""
    assert run(tmp_path, body, deadline_s=0.7).state == "timed_out"


def test_endless_noise_on_stderr_does_not_outlast_the_deadline(tmp_path: Path) -> None:
    outcome = run(tmp_path, "while True:\n    os.write(2, b'x' * 65536)", deadline_s=0.7)
    assert outcome.state == "timed_out"
    assert outcome.seconds < 60


def test_endless_answer_is_cut_off(tmp_path: Path) -> None:
    outcome = run(tmp_path, "while True:\n    say('more', {'x': 'y' * 100000})")
    assert (outcome.state, outcome.message) == ("crashed", "more than 4,194,304 bytes of answer")


def test_unreadable_answer_is_a_crash(tmp_path: Path) -> None:
    outcome = run(tmp_path, "os.write(int(sys.argv[1]), b'\\xff not json\\n')\nos._exit(0)")
    assert outcome.state == "crashed"
    assert outcome.message is not None
    assert outcome.message.startswith("an unreadable answer (")


def test_half_a_line_is_not_an_answer(tmp_path: Path) -> None:
    outcome = run(tmp_path, 'os.write(int(sys.argv[1]), b\'{"stage": "a", "ans\')\nos._exit(0)')
    assert (outcome.state, outcome.message, outcome.answer) == ("crashed", "exit status 0", {})


def test_grandchildren_that_keep_the_pipe_open_are_killed_with_the_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f"""
pid = os.fork()
if pid == 0:
    time.sleep(3600)
open({str(pid_file)!r}, 'w').write(str(pid))
os.kill(os.getpid(), signal.SIGSEGV)
"""
    outcome = run(tmp_path, body)
    assert (outcome.state, outcome.message) == ("crashed", "SIGSEGV")
    until(lambda: not is_running(int(pid_file.read_text())))


def test_answer_of_a_child_that_lingers_is_taken_at_once(tmp_path: Path) -> None:
    outcome = run(tmp_path, "say('all', {}, is_final=True)\ntime.sleep(3600)", deadline_s=600)
    assert outcome.state == "ok"
    assert outcome.seconds < 300


def test_crash_at_the_exit_of_a_child_that_has_answered_does_not_matter(tmp_path: Path) -> None:
    body = "import atexit\natexit.register(os.kill, os.getpid(), signal.SIGSEGV)\nsay('all', {}, is_final=True)"
    assert run(tmp_path, body).state == "ok"


def test_answer_that_waits_for_a_late_reader_counts(tmp_path: Path) -> None:
    said = tmp_path / "said"
    (tmp_path / "program.py").write_text(
        f"def main(say):\n    say('all', {{'x': 'y' * 1000}}, is_final=True)\n    open({str(said)!r}, 'w').close()\n"
    )
    child = Child("program", {}, environment=os.environ, deadline_s=600, folder=tmp_path)
    until(said.exists)
    child._started -= 601
    assert child.outcome().state == "ok"


def test_outcome_is_the_same_when_asked_again(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("def main(say):\n    say('all', {}, is_final=True)\n")
    child = Child("program", {}, environment=os.environ, deadline_s=20, folder=tmp_path)
    assert child.outcome() is child.outcome()


def test_closed_child_is_gone_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\n\ndef main(say):\n    time.sleep(3600)\n")
    child = Child("program", {}, environment=os.environ, deadline_s=20, folder=tmp_path)
    child.close()
    child.close()
    assert child.outcome() == Outcome(state="crashed", message="was stopped before it answered")


def test_forgotten_child_is_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\n\ndef main(say):\n    time.sleep(3600)\n")
    child = Child("program", {}, environment=os.environ, deadline_s=20, folder=tmp_path)
    pid = child._process.pid
    del child
    assert not is_running(pid)


def test_interpreter_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    outcome = Child("nvml", {}, environment={}, deadline_s=5).outcome()
    assert outcome.state == "crashed"
    assert outcome.message is not None
    assert outcome.message.startswith("could not be started: ")


def test_no_pipe_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pipe() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", no_pipe)
    child = Child("nvml", {}, environment={}, deadline_s=5)
    child.close()
    assert child.outcome().message == "could not be started: [Errno 24] Too many open files"


def test_program_that_ignores_sigchld_can_use_children(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "from vlm_doctor.sources.child import Child\n"
        "child = Child('program', {}, environment=os.environ, deadline_s=20, folder=pathlib.Path(sys.argv[1]))\n"
        "print(child.outcome().state)\n"
    )
    (tmp_path / "program.py").write_text("def main(say):\n    say('all', {}, is_final=True)\n")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "ok\n"


def test_our_file_names_shadow_no_module(tmp_path: Path) -> None:
    folder = str(Path(child_module.__file__).parent)
    outcome = run(tmp_path, "say('all', {'path': sys.path}, is_final=True)")
    assert folder not in outcome.answer["path"]
    assert str(tmp_path) not in outcome.answer["path"]


def test_folders_of_the_user_stay_where_python_adds_none_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    for is_safe in ("", "1"):
        monkeypatch.setenv("PYTHONSAFEPATH", is_safe)
        path = run(tmp_path, "say('all', {'path': sys.path}, is_final=True)").answer["path"]
        assert path[0] == str(tmp_path / "own")


def test_entry_runs_a_program_and_reports_what_it_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("def main(say, number):\n    say('all', {'number': number}, is_final=True)\n")
    (tmp_path / "bad.py").write_text("def main(say):\n    raise ValueError\n")
    timers: list[float] = []
    monkeypatch.setattr(signal, "setitimer", lambda kind, seconds: timers.append(seconds))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    reader, writer = os.pipe()
    for program, arguments in (("good", '{"number": 7}'), ("bad", "{}")):
        monkeypatch.setitem(sys.modules, "vlm_doctor_child", ModuleType("vlm_doctor_child"))
        child_entry.main(["child_entry.py", str(writer), str(tmp_path), program, "5", arguments])
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        good, bad = (json.loads(line) for line in answers)
    assert good == {"stage": "all", "answer": {"number": 7}, "is_final": True, "error": None}
    assert bad == {"stage": "error", "answer": {}, "is_final": True, "error": "ValueError"}
    assert timers == [7.0, 7.0]


def test_child_ends_itself_when_its_parent_is_gone(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    entry = Path(child_module.__file__).with_name("child_entry.py")
    (tmp_path / "program.py").write_text("import time\n\ndef main(say):\n    time.sleep(3600)\n")
    command = [sys.executable, str(entry), str(writer), str(tmp_path), "program", "-1.5", "{}"]
    done = subprocess.run(command, pass_fds=(writer,), timeout=300, check=False)
    os.close(reader)
    os.close(writer)
    assert done.returncode == -signal.SIGALRM


def test_a_child_that_does_nothing_is_not_waited_for(tmp_path: Path) -> None:
    outcome = run(tmp_path, "time.sleep(3600)", deadline_s=600.0, idle_s=0.5)

    assert (outcome.state, outcome.message) == ("timed_out", "no answer, and nothing done for 0.5 s")
    assert outcome.seconds < 300


def test_a_child_that_works_or_has_begun_to_answer_has_until_the_deadline(tmp_path: Path) -> None:
    busy = "\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end:\n    pass\nsay('all', {}, is_final=True)"
    waiting = "say('begun', {})\ntime.sleep(1.5)\nsay('all', {}, is_final=True)"

    assert run(tmp_path, busy, idle_s=0.5).state == "ok"
    assert run(tmp_path, waiting, idle_s=0.5).state == "ok"
