"""Logs in, one cause out: real texts, hostile ones, and what a machine says to them."""

from __future__ import annotations

import re
import textwrap
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_doctor.answer import error_report
from vlm_doctor.checks import diagnose
from vlm_doctor.codes import all_codes
from vlm_doctor.data.error_codes import ERROR_CODES
from vlm_doctor.data.known_texts import RANKS, KnownText, all_known_texts
from vlm_doctor.error_answer import answer_error, confirm
from vlm_doctor.formats import render
from vlm_doctor.sources import load_machine

TESTS = Path(__file__).parents[1]
LOGS = {path.name: path.read_text("utf-8") for path in sorted((TESTS / "logs").glob("*.txt"))}
KNOWN = all_known_texts()
HEADER = "Traceback (most recent call last):\n"

EXPECTED = {
    # Log to the cause, its line, and what else is said of it.
    "cogvlm-cache.txt": ("remote-code-cache", 5, []),
    "cogvlm2-cut-block.txt": ("tensors-apart", 13, []),
    "driver-warning-first.txt": ("driver-too-old", 1, ["no-cuda-gpus"]),
    "github-actions.txt": ("kernel-image-missing", 1, []),
    "glm4v-padding-side.txt": ("remote-code-padding-side", 8, []),
    "handled-then-full.txt": ("gpu-out-of-memory", 11, ["flash-attn-broken"]),
    "json-lines.txt": ("model-type-unknown", 5, []),
    "kernel-log.txt": ("gpu-lost", 1, []),
    "nccl-shm.txt": ("shared-memory", 1, ["disk-full", "nccl-error"]),
    "pytest-cpu-wheel.txt": ("cpu-torch", 20, []),
    "torchrun-two-ranks.txt": ("gpu-out-of-memory", 10, ["nccl-remote-died", "rank-failed"]),
    "transformers-lazy-import.txt": ("torchvision-mismatch", 6, ["lazy-import-failed"]),
    "vllm-engine.txt": ("uuid-read-as-number", 5, ["rank-failed"]),
}


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_every_known_text_is_recognized_by_its_example(known: KnownText) -> None:
    answer = answer_error(f"some line before\n{known.example}\nsome line after", where="log")

    assert answer.cause is not None
    assert (answer.cause.name, answer.cause.code, answer.cause.line) == (known.name, known.code, 2)
    assert answer.explanation
    assert answer.verify


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("torch.AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", "devices-busy"),
        ("RuntimeError: Triton Error [CUDA]: device kernel image is invalid", "kernel-image-missing"),
        ("OSError: libcuda.so.1: cannot open shared object file: No such file or directory", "no-driver"),
        ("RuntimeError: CUDA error: unknown error", "cuda-unknown-error"),
        (
            "RuntimeError: cuDNN version incompatibility: PyTorch was compiled  against (9, 20, 0) but found runtime "
            "version (8, 9, 2). PyTorch already comes bundled with cuDNN.",
            "torch-libraries-shadowed",
        ),
        ("RuntimeError: DataLoader worker (pid 1234) is killed by signal: Killed.", "host-out-of-memory"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=81.0.", "host-out-of-memory"),
        ("OSError: You are trying to access a gated repo.", "hub-access"),
        ("Killed", "killed"),
        ("Out of memory: Killed process 48213 (python)", "host-out-of-memory"),
    ],
)
def test_other_words_for_the_same(text: str, name: str) -> None:
    cause = answer_error(text, where="log").cause
    assert cause is not None
    assert cause.name == name


@pytest.mark.parametrize("text", ["3 tests were Killed off", "He killed the process.", "Process 12 Killed it"])
def test_killed_is_an_ordinary_word_elsewhere(text: str) -> None:
    assert answer_error(text, where="log").cause is None


def test_known_texts_are_complete() -> None:
    assert len({known.name for known in KNOWN}) == len(KNOWN)
    for known in KNOWN:
        assert known.code in all_codes(), known.name
        assert set(known.checks) <= set(all_codes()), known.name
        assert known.rank in RANKS
        assert known.says.endswith("."), known.name
        assert known.fix.endswith("."), known.name
        assert known.source, known.name
        assert all(anchor == anchor.lower() for anchor in known.anchors), known.name


def test_every_code_of_an_error_has_a_text() -> None:
    assert {one.code for one in ERROR_CODES} <= {known.code for known in KNOWN}


def test_every_log_is_judged_here() -> None:
    assert set(EXPECTED) == set(LOGS)
    readme = (TESTS / "logs" / "README.md").read_text("utf-8")
    assert {f"{name}" for name in re.findall(r"`([\w-]+\.txt)`", readme)} == set(LOGS)


@pytest.mark.parametrize("name", LOGS)
def test_a_real_log_has_one_cause(name: str) -> None:
    cause, line, also = EXPECTED[name]

    answer = answer_error(LOGS[name], where=name)

    assert answer.cause is not None
    assert (answer.cause.name, answer.cause.line) == (cause, line)
    assert [seen.name for seen in answer.also] == also
    assert answer.last_error is None


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_line_ends_do_not_matter(name: str, ends: str) -> None:
    answer = answer_error(LOGS[name].replace("\n", ends), where=name)

    assert answer.cause is not None
    assert answer.cause.name == EXPECTED[name][0]


@pytest.mark.parametrize("name", [name for name in LOGS if name != "json-lines.txt"])
@pytest.mark.parametrize("prefix", ["> ", "        ", "worker-1  | ", "2026-11-22T10:00:00.123Z "])
def test_what_carried_a_log_does_not_matter(name: str, prefix: str) -> None:
    text = "".join(f"{prefix}{line}\n" for line in LOGS[name].splitlines())

    answer = answer_error(text, where=name)

    assert answer.cause is not None
    assert answer.cause.name == EXPECTED[name][0]


def test_tensors_apart_name_devices_place_and_modules() -> None:
    assert answer_error(LOGS["cogvlm2-cut-block.txt"], where="log").facts == {
        "devices": "cuda:2, cuda:3",
        "raised in": "visual.py, line 81, in forward: output = mlp_input + mlp_output",
        "modules being called": "encode_images > vision",
    }


def test_the_newer_form_of_tensors_apart_names_the_argument() -> None:
    text = (
        "RuntimeError: Expected all tensors to be on the same device, but got index is on cpu, different from other "
        "tensors on "
        "cuda:0 (when checking argument in method wrapper_CUDA__index_select)"
    )

    assert answer_error(text, where="log").facts == {"devices": "cpu, cuda:0", "argument": "index"}


def test_the_missing_package_is_in_the_command() -> None:
    for text, name in (
        ("ModuleNotFoundError: No module named 'qwen_vl_utils'", "qwen-vl-utils"),
        ("ModuleNotFoundError: No module named 'PIL.Image'", "pillow"),
        ("ModuleNotFoundError: No module named 'av'", "av"),
    ):
        fix = answer_error(text, where="log").fix
        assert fix is not None
        assert fix.commands == (f"python -m pip install {name}",)


def test_an_error_that_is_not_known_is_said_plainly() -> None:
    answer = answer_error(
        'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    x()\nKeyError: 5\n', where="log"
    )

    assert (answer.is_recognized, answer.cause, answer.fix) == (False, None, None)
    assert answer.last_error == "KeyError: 5"


def test_without_an_exception_the_last_line_about_an_error_is_shown() -> None:
    assert answer_error("build failed: 3\nok\n", where="log").last_error == "build failed: 3"
    assert answer_error("all is well", where="log").last_error is None


def test_a_later_error_that_is_not_known_is_named_beside_the_one_that_is() -> None:
    text = (
        LOGS["cogvlm-cache.txt"] + "\nTraceback (most recent call last):\n  File \"a.py\", line 1, in f\nKeyError: 'foo'\n"
    )

    answer = answer_error(text, where="log")

    assert answer.cause is not None
    assert answer.cause.name == "remote-code-cache"
    assert answer.last_error == "KeyError: 'foo'"


def test_the_last_of_several_unrelated_failures_counts() -> None:
    text = "\n\n".join([LOGS["cogvlm-cache.txt"], textwrap.dedent(LOGS["cogvlm2-cut-block.txt"])])

    answer = answer_error(text, where="log")

    assert answer.cause is not None
    assert answer.cause.name == "tensors-apart"


def test_of_a_message_of_many_lines_every_line_counts() -> None:
    text = f'{HEADER}  File "a", line 1, in f\nRuntimeError: call failed\nmore\nCUDA error: invalid device ordinal\n'

    answer = answer_error(text, where="log")

    assert answer.cause is not None
    assert answer.cause.name == "invalid-device-ordinal"
    assert "raised in" in answer.facts


def test_where_several_ranks_failed_the_first_one_counts() -> None:
    text = (
        "[rank1]: RuntimeError: CUDA error: invalid device ordinal\n"
        "[rank0]: RuntimeError: operator torchvision::nms does not exist\n"
    )

    answer = answer_error(text, where="log")

    assert answer.cause is not None
    assert (answer.cause.name, answer.cause.line) == ("invalid-device-ordinal", 1)


def test_a_message_has_an_end() -> None:
    text = HEADER + '  File "a", line 1, in f\nRuntimeError: x\n' + "more\n" * 100 + "Segmentation fault\n"

    answer = answer_error(text, where="log")

    assert answer.cause is not None
    assert answer.cause.name == "process-crashed"
    assert "raised in" not in answer.facts


def test_of_thousands_of_hits_the_first_and_the_last_are_looked_at() -> None:
    text = "GPU is lost\n" + "Bus error\n" * 5_000 + "uncorrectable ECC error encountered\n"

    answer = answer_error(text, where="log")

    assert answer.cause is not None
    assert answer.cause.name == "gpu-lost"
    assert [seen.name for seen in answer.also] == ["shared-memory", "memory-fault"]


def test_a_long_line_is_shown_around_what_matters() -> None:
    answer = answer_error("x" * 3000 + " CUDA error: invalid device ordinal " + "y" * 3000, where="log")

    assert answer.cause is not None
    assert "invalid device ordinal" in answer.cause.text
    assert len(answer.cause.text) < 320


@settings(deadline=None)
@given(st.text(max_size=300))
@example("\x1b]" * 100)
@example("Traceback (most recent call last):\n" * 5)
@example("The above exception was the direct cause of the following exception:\nValueError: x")
@example("E   \nE   E   \n | | \n")
def test_any_text_has_an_answer(text: str) -> None:
    answer = answer_error(text, where="log")

    assert answer.is_recognized is (answer.cause is not None)


PIECES = [known.example for known in KNOWN] + [
    "Traceback (most recent call last):",
    '  File "modeling_x.py", line 3, in forward',
    "    x = self.y(z)",
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
    "[rank0]: ValueError: x",
    "[rank1]: RuntimeError: CUDA error: invalid device ordinal",
    "E       RuntimeError: No CUDA GPUs are available",
    "",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_any_order_of_pieces_has_one_cause_of_the_best_rank(pieces: list[str]) -> None:
    answer = answer_error("\n".join(pieces), where="log")
    rank_of = {known.name: RANKS.index(known.rank) for known in KNOWN}

    if answer.cause is not None:
        assert all(rank_of[answer.cause.name] <= rank_of[seen.name] for seen in answer.also)


HOSTILE = [
    "a" * 4_000_000,
    "CUDA out of memory " * 200_000,
    ("Expected all tensors to be on the same device " + "found at least two devices, " * 50 + "\n") * 2_000,
    "\x1b[" * 1_000_000,
    "[rank0]: " * 400_000,
    "\n".join(f"[rank{number}]: ValueError: x" for number in range(50_000)),
    "E   " * 500_000,
    "Error: " * 500_000,
    "w.w." * 500_000 + "Error",
    ("NVRM: Xid (PCI:" + "0:" * 60 + "\n") * 5_000,
    "(" + "pid=1," * 500_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_text_costs_no_more_than_its_size(text: str) -> None:
    # A ratio, not a time: a text of a quarter of the size must not be a sixteenth of the work.
    quarter = _seconds(text[: len(text) // 4])
    whole = _seconds(text)

    assert whole < 12 * quarter + 0.5


def _seconds(text: str) -> float:
    started = time.process_time()
    answer_error(text, where="log")
    return time.process_time() - started


# --- against machines ---


def confirmation(log: str, machine: str) -> tuple[str, list[str]]:
    report = error_report(answer_error(log, where="log"), load_machine(str(TESTS / "machines" / f"{machine}.json")))
    assert report.error_text is not None
    return report.error_text.confirmation, [finding.code for finding in report.error_text.confirmed_by]


@pytest.mark.parametrize(
    ("log", "machine", "state", "codes"),
    [
        ("RuntimeError: No CUDA GPUs are available", "masked", "confirmed", ["VLM201"]),
        ("RuntimeError: No CUDA GPUs are available", "cpu-torch", "confirmed", ["VLM303"]),
        ("RuntimeError: No CUDA GPUs are available", "driver-missing", "confirmed", ["VLM102"]),
        ("RuntimeError: No CUDA GPUs are available", "8xh100-fabric-down", "confirmed", ["VLM403"]),
        ("RuntimeError: No CUDA GPUs are available", "2xl4-idle", "not_seen", []),
        ("RuntimeError: No CUDA GPUs are available", "laptop-no-gpu", "confirmed", ["VLM101"]),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "laptop-no-gpu", "not_seen", []),
        ("Failed to initialize NVML: Driver/library version mismatch", "driver-mismatch", "confirmed", ["VLM104"]),
        ("AssertionError: Torch not compiled with CUDA enabled", "2xl4-idle", "not_seen", []),
        (
            "CUDA error: no kernel image is available for execution on the device",
            "v100-missing-sm",
            "confirmed",
            ["VLM307"],
        ),
        (LOGS["driver-warning-first.txt"], "old-driver", "confirmed", ["VLM306"]),
        (LOGS["torchrun-two-ranks.txt"], "2xa10-half-taken", "confirmed", ["VLM501"]),
        (LOGS["handled-then-full.txt"], "2xa10-half-taken", "no_check", []),
        (LOGS["nccl-shm.txt"], "small-shm", "confirmed", ["VLM503"]),
        (LOGS["kernel-log.txt"], "nvml-crashed", "unknown", []),
        (LOGS["cogvlm2-cut-block.txt"], "2xl4-idle", "no_check", []),
    ],
)
def test_a_machine_confirms_or_does_not(log: str, machine: str, state: str, codes: list[str]) -> None:
    assert confirmation(log, machine) == (state, codes)


def test_of_a_made_up_machine_it_is_not_known() -> None:
    report = error_report(
        answer_error("CUDA error: uncorrectable ECC error encountered", where="log"), load_machine("2xL4")
    )

    assert report.error_text is not None
    assert report.error_text.confirmation == "unknown"


def test_lines_of_a_log_in_parts_have_no_numbers() -> None:
    text = LOGS["driver-warning-first.txt"]
    machine = load_machine("2xL4")

    parts = render(error_report(answer_error(text, where="log", skipped_bytes=1_000_000), machine), "terminal")

    assert "Line 1" not in parts
    assert "line 6" not in parts
    assert "1,000,000 bytes from the middle of log were only searched for errors." in " ".join(parts.split())


def test_a_finding_of_the_machine_has_the_better_advice() -> None:
    machine = load_machine(str(TESTS / "machines" / "cpu-torch.json"))
    report = error_report(answer_error("RuntimeError: No CUDA GPUs are available", where="log"), machine)

    assert report.error_text is not None
    assert report.error_text.fix is not None
    assert report.error_text.fix.commands[0].endswith("/whl/cu130")
    assert report.exit_status == 0


def test_what_is_not_recognized_is_3() -> None:
    machine = load_machine(str(TESTS / "machines" / "cpu-torch.json"))

    assert error_report(answer_error("KeyError: 5", where="log"), machine).exit_status == 3


@settings(deadline=None)
@given(st.sampled_from([known.example for known in KNOWN]), st.text(max_size=40), st.text(max_size=40))
@example("RuntimeError: No CUDA GPUs are available", "\x1b]0;x\x07\x1b[2J", "\u202e\x9b31m")
def test_a_hostile_log_does_nothing_on_a_terminal(text: str, before: str, after: str) -> None:
    report = error_report(answer_error(f"{before}{text}{after}", where=before), load_machine("2xL4"))

    for is_unicode in (True, False):
        shown = render(report, "terminal", is_unicode=is_unicode, verbose=True)
        assert all(char.isprintable() or char == "\n" for char in shown)
        assert is_unicode or shown.isascii()


def test_what_a_cause_says_for_a_check_confirms_too() -> None:
    text = "ImportError: libtorch_cuda.so: undefined symbol: cudnnGetVersion, version libcudnn.so.9"
    answer = answer_error(text, where="log")
    assert "VLM304" in answer.checks

    only = msgspec.structs.replace(answer, checks=("VLM304",))
    confirmed = confirm(only, diagnose(load_machine(str(Path(__file__).parents[1] / "machines" / "foreign-cudnn.json"))))

    assert confirmed.confirmation == "confirmed"
    assert [finding.code for finding in confirmed.confirmed_by] == ["VLM316"]
    assert confirmed.fix is not None
    assert confirmed.fix.commands == ("unset LD_LIBRARY_PATH",)


def test_what_stands_for_something_in_a_command_is_said() -> None:
    for known in all_known_texts():
        answer = answer_error(known.example, where="log")
        if answer.fix is not None:
            for word in re.findall(r"\b(?:MAP|MODEL|PACKAGE)\b", " ".join(answer.fix.commands)):
                assert word in answer.fix.text, known.name
