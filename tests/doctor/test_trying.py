"""``vlm-doctor try`` with children that stand in for the real one, which is in ``tests/models`` and ``tests/gpu``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from vlm_doctor import cli, codec, load_machine, load_profile
from vlm_doctor.errors import CouldNotLookError, UsageError
from vlm_doctor.formats import render
from vlm_doctor.machine import Machine
from vlm_doctor.probes import trial_run
from vlm_doctor.probes.trial_run import Trier, understand
from vlm_doctor.report import Report
from vlm_doctor.sources.child import Outcome
from vlm_doctor.trying import try_model, usable_gpus
from vlm_doctor.workload import Policy, Workload

ROOT = Path(__file__).parents[2]
MODEL = "zai-org/GLM-4.1V-9B-Thinking"
CALL = Workload(new_tokens=16)
GOOD = """
    answer = {"reached": "second call", "torch": "2.13.0", "transformers": "5.23.0", "class_name": "Glm4vForX",
        "load_seconds": 8.4, "call_seconds": 1.2, "prompt_tokens": 1813, "new_tokens": 16, "is_finite": True,
        "is_repeatable": True, "text": "A cat.", "held_bytes": {"cuda:0": 10 * 2**30, "cuda:1": 9 * 2**30},
        "peaks": [{"device": f"cuda:{n}", "allocated_bytes": 11 * 2**30, "reserved_bytes": 11 * 2**30,
            "free_bytes": 10 * 2**30} for n in (0, 1)]}
"""
ASKED = """
    import os, json
    with open(__file__ + ".asked", "a") as file:
        file.write(json.dumps([given, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("HF_HUB_OFFLINE"),
            os.environ.get("PYTORCH_CUDA_ALLOC_CONF")]) + "\\n")
"""
CUT = """
    if given["device_map"] == "auto":
        answer |= {"reached": "prompt", "cut_count": 2,
            "cut_blocks": [{"key": "model.visual.blocks.3", "devices": ["cuda:0", "cuda:1"]}],
            "held_bytes": {"cuda:0": 10 * 2**30, "meta": 9 * 2**30},
            "traceback": "Traceback (most recent call last):\\nRuntimeError: Expected all tensors to be on the same "
            "device, but found at least two devices, cuda:0 and cuda:1!\\n"}
"""

Stand = Callable[..., Path]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Put another program in the place of the child's; gives the file in which it notes what it was asked."""

    def put(body: str, end: str = "    say('end', answer, is_final=True)\n") -> Path:
        program = tmp_path / "stand_in.py"
        program.write_text(f"def main(say, **given):\n{ASKED}\n{body}\n{end}")
        monkeypatch.setattr(trial_run, "_PROGRAM", "stand_in")
        monkeypatch.setattr(trial_run, "_FOLDER", tmp_path)
        return tmp_path / "stand_in.py.asked"

    return put


@pytest.fixture(scope="module")
def two_l4() -> Machine:
    """Two L4 that pass for this machine."""
    machine: Machine = msgspec.structs.replace(load_machine(str(ROOT / "tests/machines/2xl4-idle.json")), origin="live")
    return machine


def trier(**more: Any) -> Trier:
    workload = more.pop("workload", CALL)
    return Trier(MODEL, load_profile(MODEL), workload, deadline_s=more.pop("deadline_s", 30.0), **more)


def tried(machine: Machine, *, policy: Policy | None = None, run: Trier | None = None, **more: Any) -> Report:
    return try_model(run or trier(), load_profile(MODEL), machine, policy or Policy(min_gpus=2), **more)


def asked(notes: Path) -> list[Any]:
    return [json.loads(line) for line in notes.read_text("utf-8").splitlines()]


def test_it_is_loaded_where_the_plan_says(stand_in: Stand, two_l4: Machine) -> None:
    notes = stand_in(GOOD)

    report = tried(two_l4, run=trier(environment={}, allow_network=False))

    assert report.plan is not None
    assert report.trial is not None
    assert (report.exit_status, report.trial.is_good) == (0, True)
    ((given, visible, offline, allocator),) = asked(notes)
    assert given["device_map"] == report.plan.device_map
    assert (visible, offline, allocator) == (report.plan.cuda_visible_devices, "1", None)
    assert (given["name"], given["revision"], given["dtype"]) == (MODEL, "main", report.plan.dtype)
    assert given["work"]["prompt_tokens"] == report.plan.prompt_tokens
    assert given["work"]["image_tokens"] == report.plan.image_tokens
    assert "model.language_model.layers.0" in given["blocks"]
    assert [peak.gpu for peak in report.trial.attempts[0].peaks] == [0, 1]


def test_one_gpu_takes_it_whole(stand_in: Stand, two_l4: Machine) -> None:
    notes = stand_in(GOOD)

    tried(
        two_l4, policy=Policy(gpus=(1,)), run=trier(workload=Workload(allocator="expandable", new_tokens=4), environment={})
    )

    ((given, visible, offline, allocator),) = asked(notes)
    assert given["device_map"] == {"": 0}
    assert visible == two_l4.gpus[1].uuid
    assert (offline, allocator) == (None, "expandable_segments:True")


def test_auto_is_given_the_gpus_that_the_plan_could_use(stand_in: Stand, two_l4: Machine) -> None:
    notes = stand_in(GOOD + CUT)
    seen: list[str] = []

    class Watched:
        def __init__(self, what: str) -> None:
            seen.append(what)

        def __enter__(self) -> None: ...
        def __exit__(self, *args: object) -> None: ...

    report = tried(two_l4, beside_auto=True, watch=Watched)

    assert seen == ["the model by plan", 'the model by device_map="auto"']
    assert report.trial is not None
    assert report.exit_status == 0, "auto decides nothing"
    _, (given, visible, *_) = asked(notes)
    assert given["device_map"] == "auto"
    assert visible == ",".join(gpu.uuid for gpu in two_l4.gpus)
    page = render(report, "terminal", width=100)
    assert page.startswith("Loaded in 8.4 s, then 16 tokens in 1.2 s from a prompt of 1,813.")
    assert "model.visual.blocks.3 (cuda:0, cuda:1), 1 more" in " ".join(page.split())
    assert "no: it failed in the first call: RuntimeError: Expected" in " ".join(page.split())
    assert "longest prompt*" in page


def test_usable_gpus_are_those_of_the_policy(two_l4: Machine) -> None:
    assert [gpu.index for gpu in usable_gpus(two_l4, Policy())] == [0, 1]
    assert [gpu.index for gpu in usable_gpus(two_l4, Policy(gpus=(1,)))] == [1]
    assert [gpu.index for gpu in usable_gpus(two_l4, Policy(exclude=(1,)))] == [0]


def test_a_model_that_does_not_fit_is_not_loaded(stand_in: Stand, two_l4: Machine) -> None:
    notes = stand_in(GOOD)

    report = tried(two_l4, policy=Policy(max_memory=((0, 2**30), (1, 2**30))))

    assert not notes.exists()
    assert report.exit_status == 1
    assert render(report, "terminal").startswith("Nothing was loaded by plan, since none fits.")


def test_without_a_gpu_there_is_one_sentence(two_l4: Machine) -> None:
    empty = msgspec.structs.replace(two_l4, gpus=())

    with pytest.raises(CouldNotLookError, match=r"^There is no NVIDIA GPU here"):
        tried(empty)


def test_another_machine_cannot_be_tried() -> None:
    with pytest.raises(UsageError, match="2xL4: only this machine can be tried"):
        tried(load_machine("2xL4"))


def test_a_trial_makes_a_token(two_l4: Machine) -> None:
    with pytest.raises(UsageError, match="--new-tokens 0: a trial makes at least one"):
        tried(two_l4, run=trier(workload=Workload(new_tokens=0)))


def test_code_of_a_checkpoint_needs_a_word_of_the_user() -> None:
    profile = msgspec.structs.replace(load_profile(MODEL), is_remote_code=True)

    with pytest.raises(UsageError, match="add --trust-remote-code"):
        Trier(MODEL, profile, CALL, deadline_s=1.0)
    Trier(MODEL, profile, CALL, deadline_s=1.0, trust_remote_code=True)


@pytest.mark.parametrize(
    ("end", "deadline_s", "state", "says"),
    [
        (
            "    os.kill(os.getpid(), 9)\n",
            30.0,
            "crashed",
            "It crashed while the weights were loaded: the process was killed",
        ),
        (
            "    os.kill(os.getpid(), 11)\n",
            30.0,
            "crashed",
            "It crashed while the weights were loaded: the process crashed",
        ),
        ("    os._exit(7)\n", 30.0, "crashed", "It crashed while the weights were loaded: exit status 7."),
        (
            "    import time; time.sleep(60)\n",
            1.5,
            "timed_out",
            "It was stopped while the weights were loaded: no answer within 1.5 s.",
        ),
        (
            "    raise SystemExit('no')\n",
            30.0,
            "raised",
            "It failed while torch and transformers were imported: SystemExit: no.",
        ),
    ],
)
def test_whatever_becomes_of_the_child_is_a_result(
    stand_in: Stand, two_l4: Machine, end: str, deadline_s: float, state: str, says: str
) -> None:
    stand_in("    say('imports', {'reached': 'imports', 'torch': '2.13.0'})\n", end)

    report = tried(two_l4, run=trier(deadline_s=deadline_s))

    assert report.trial is not None
    attempt = report.trial.attempts[0]
    assert (report.exit_status, attempt.state) == (1, state)
    assert attempt.sentence.startswith(says)
    assert says in " ".join(render(report, "terminal").split())


def test_an_answer_that_nobody_understands_is_a_crash() -> None:
    attempt = understand(Outcome(state="ok", answer={"reached": "the moon"}, seconds=1.0), "plan")

    assert attempt.state == "crashed"
    assert attempt.message is not None
    assert attempt.message.startswith("an unreadable answer (")


def test_out_of_memory_is_shown_with_the_ledger(stand_in: Stand, two_l4: Machine) -> None:
    stand_in(
        GOOD
        + "    answer['reached'] = 'prompt'\n    answer['traceback'] = 'Traceback (most recent call last):\\n"
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.00 GiB "
        + "of which 1.00 GiB is free.'\n"
    )

    report = tried(two_l4)
    page = render(report, "terminal", verbose=True)

    assert report.exit_status == 1
    assert page.startswith("Failed: the trial did not come to its end.")
    assert "What was planned" in page
    assert "weights" in page
    assert "Traceback with the plan" in page


def test_json_is_what_the_schema_says(stand_in: Stand, two_l4: Machine) -> None:
    stand_in(GOOD + CUT)
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text("utf-8"))

    text = render(tried(two_l4, beside_auto=True), "json")

    jsonschema.validate(json.loads(text), schema)
    again = codec.from_json(text.encode(), Report, where="report")
    assert again.trial is not None
    assert [attempt.route for attempt in again.trial.attempts] == ["plan", "auto"]


def run_cli(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["try", MODEL, *words])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_the_command_line(stand_in: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    notes = stand_in(GOOD)

    status, out, err = run_cli("--cpu", "--json", "--deadline", "60", "--text-tokens", "9", capsys=capsys)

    assert (status, err) == (0, "")
    assert json.loads(out)["command"] == "try"
    ((given, visible, *_),) = asked(notes)
    assert (given["device_map"], visible) == (None, "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--machine", "2xL4"), "--machine 2xL4: only this machine can be tried"),
        (("--cpu", "--deadline", "soon"), "--deadline: 'soon' is not a number of seconds"),
        (("--cpu", "--training", "lora"), "'--training' is no option of vlm-doctor try"),
        (("--cpu", "--batch", "0"), "batch"),
    ],
)
def test_bad_usage_is_one_sentence(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_cli(*words, capsys=capsys)

    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
