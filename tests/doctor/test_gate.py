"""The gate: which GPUs meet what a job expects, and the one line that says what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from vlm_doctor.answer import gate_report
from vlm_doctor.answers import GateAnswer
from vlm_doctor.errors import UsageError
from vlm_doctor.expectations import (
    Expectations,
    ProjectSettings,
    capability,
    expectations,
    gpu_count,
    read_settings,
)
from vlm_doctor.formats import render
from vlm_doctor.formats.gate_text import step_outputs
from vlm_doctor.gate import free_bytes
from vlm_doctor.machine import Host, Machine
from vlm_doctor.report import Report
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.github_output import write_outputs
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.project_file import read_project
from vlm_doctor.units import GIB

MACHINES = Path(__file__).parents[1] / "machines"
MODEL = "zai-org/GLM-4.1V-9B-Thinking"


def machine(name: str) -> Machine:
    path = MACHINES / f"{name}.json"
    return load_machine(str(path) if path.exists() else name)


def ask(name: str | Machine, *, model: str | None = None, **wanted: Any) -> Report:
    one = machine(name) if isinstance(name, str) else name
    profile = None if model is None else load_profile(model, allow_network=False)
    return gate_report(Expectations(model=model, **wanted), one, profile)


def answered(report: Report) -> GateAnswer:
    assert report.gate is not None
    return report.gate


@pytest.mark.parametrize(
    ("name", "wanted", "status", "reason"),
    [
        ("2xL4", {"gpus": 2}, 0, "Met: GPUs 0, 1 (NVIDIA L4)."),
        ("2xL4", {}, 0, "Met: GPU 0 (NVIDIA L4)."),
        (
            "8xH100:nvswitch",
            {"gpus": 2, "vram_bytes": 20 * GIB, "nvlink": True, "capability": (8, 0)},
            0,
            "Met: GPUs 0, 1 (NVIDIA H100 80GB HBM3), 20.0 GiB free each, joined by NVLink, compute capability 8.0 or "
            "later.",
        ),
        ("2xL4", {"gpus": 3}, 1, "Not met: 3 GPUs are wanted, 2 can be used (VLM003)."),
        (
            "masked",
            {"gpus": 1},
            1,
            "Not met: CUDA_VISIBLE_DEVICES='' hides every GPU (VLM201); 1 GPU is wanted, 0 can be used",
        ),
        (
            "gpu-lost",
            {"gpus": 4},
            1,
            "Not met: 4 GPUs are wanted, 3 can be used (1 more hidden or faulty: VLM108) (VLM003).",
        ),
        (
            "8xh100-fabric-down",
            {"gpus": 2},
            1,
            "Not met: 2 GPUs are wanted, 0 can be used (8 more hidden or faulty: VLM403) (VLM003).",
        ),
        (
            "some-hidden",
            {"gpus": 3},
            1,
            "Not met: 3 GPUs are wanted, 2 can be used (2 more hidden or faulty: VLM203) (VLM003).",
        ),
        (
            "out-of-range",
            {"gpus": 2},
            1,
            "Not met: CUDA_VISIBLE_DEVICES='0,9': '9' names a GPU that does not exist: the last index is 1, so only GPU 0 "
            "can be seen (VLM202); 2 GPUs are wanted, 1 can be used (1 more hidden or faulty) (VLM003).",
        ),
        ("gpu-lost", {"gpus": 2}, 0, "Met: GPUs 0, 1 ("),
        (
            "2xa10-half-taken",
            {"gpus": 2, "vram_bytes": 20 * GIB},
            1,
            "Not met: 20.0 GiB free each is wanted, GPU 0 (NVIDIA A10) has 22.1 GiB of 22.5 GiB free, GPU 1 (NVIDIA "
            "A10) has "
            "11.1 GiB of 22.5 GiB free, VLM501 (VLM004).",
        ),
        ("2xa10-half-taken", {"vram_bytes": 20 * GIB}, 0, "Met: GPU 0 (NVIDIA A10), 20.0 GiB free."),
        (
            "T4",
            {"capability": (8, 0)},
            1,
            "Not met: compute capability 8.0 is wanted, there are GPU 0 (Tesla T4) 7.5 (VLM006).",
        ),
        ("2xL4", {"gpus": 2, "nvlink": True}, 1, "Not met: 2 GPUs joined by NVLink are wanted, no two are (VLM005)."),
        (
            "4x3090:nvlink=0-1,2-3",
            {"gpus": 3, "nvlink": True},
            1,
            "Not met: 3 GPUs joined by NVLink are wanted, at most 2 are (VLM005).",
        ),
        ("L4", {"gpus": 1, "nvlink": True}, 0, "Met: GPU 0 (NVIDIA L4)."),
        (
            "cpu-torch",
            {"gpus": 1},
            1,
            "Not met: torch 2.13.0+cpu is built for the CPU only, and this machine has 2 GPUs (VLM303).",
        ),
        ("laptop-no-gpu", {}, 1, "Not met: 1 GPU is wanted, 0 can be used (VLM003)."),
        ("nvml-crashed", {}, 3, "Not known: the driver library (NVML) does not answer (VLM105)."),
    ],
)
def test_a_machine_meets_it_or_one_line_says_why_not(
    name: str, wanted: Mapping[str, Any], status: int, reason: str
) -> None:
    report = ask(name, **wanted)

    assert report.exit_status == status
    assert answered(report).reason.startswith(reason)
    assert answered(report).is_met is (status == 0)
    assert bool(answered(report).gpus) is (status == 0)


def test_what_each_gpu_lacks_alone_can_be_lacking_together() -> None:
    assert answered(ask("T4+24GiB", gpus=2)).is_met
    one = machine("L4+T4")
    small = replace(one, gpus=(replace(one.gpus[0], memory_free_bytes=GIB), one.gpus[1]))

    reason = answered(ask(small, gpus=1, vram_bytes=8 * GIB, capability=(8, 0))).reason

    assert reason == "Not met: 1 GPU is wanted, 0 meet memory and compute capability together (VLM003)."


def test_gpus_of_one_island_come_first_and_those_with_most_memory() -> None:
    bridges = machine("4x3090:nvlink=0-1,2-3")
    taken = replace(bridges, gpus=(replace(bridges.gpus[0], memory_free_bytes=GIB), *bridges.gpus[1:]))

    assert answered(ask(bridges, gpus=2)).gpus == (0, 1)
    assert answered(ask(taken, gpus=2, vram_bytes=2 * GIB, nvlink=True)).gpus == (2, 3)
    assert answered(ask(taken, gpus=1)).gpus == (1,)
    assert answered(ask(bridges, gpus=3)).gpus == (0, 1, 2)


def test_of_a_chain_of_bridges_joined_gpus_are_taken() -> None:
    chain = machine("4x3090:nvlink=0-1,1-2,2-3")
    most_on_3 = replace(chain, gpus=tuple(replace(gpu, memory_free_bytes=(10 + gpu.index) * GIB) for gpu in chain.gpus))

    assert answered(ask(most_on_3, gpus=3, nvlink=True)).gpus == (1, 2, 3)


@pytest.mark.parametrize(
    ("field", "wanted", "said"),
    [
        ("compute_capability", {"capability": (8, 0)}, "the compute capability of GPU 0 (NVIDIA L4) could not be read"),
        ("memory_free_bytes", {"vram_bytes": GIB}, "the free memory of GPU 0 (NVIDIA L4) could not be read"),
    ],
)
def test_what_could_not_be_read_is_not_known(field: str, wanted: Mapping[str, Any], said: str) -> None:
    whole = machine("2xl4-idle")
    blind = replace(whole, gpus=tuple(replace(gpu, **{field: None}) for gpu in whole.gpus))

    report = ask(blind, **wanted)

    assert (report.exit_status, answered(report).reason) == (3, f"Not known: {said}.")


def test_links_that_could_not_be_read_are_not_known() -> None:
    report = ask(replace(machine("2xl4-idle"), links=()), gpus=2, nvlink=True)

    assert (report.exit_status, answered(report).reason) == (3, "Not known: how the GPUs are joined could not be read.")


def test_memory_of_a_gpu_without_its_own_is_that_of_the_host() -> None:
    one = machine("gb10-unified")
    assert one.host is not None

    assert free_bytes(one.gpus[0], one) == one.host.memory_available_bytes
    assert answered(ask(one, vram_bytes=GIB)).is_met
    bare = replace(one, host=Host(os="x", kernel="y"))
    assert free_bytes(bare.gpus[0], bare) == 0


def test_a_model_has_to_fit_and_gives_its_map() -> None:
    answer = answered(ask("2xL4", gpus=2, model=MODEL))

    assert answer.is_met
    assert answer.gpus == (0, 1)
    assert answer.device_map
    assert answer.reason.endswith(f"{MODEL} fits.")


def test_a_model_may_need_more_gpus_than_are_asked_for() -> None:
    answer = answered(ask("4x12GiB", gpus=1, model=MODEL))

    assert answer.is_met
    assert len(answer.gpus) > 1


def test_a_model_that_does_not_fit_says_what_is_missing() -> None:
    never, later = ask("T4", model=MODEL), ask("L4:free=9GiB", model=MODEL)

    assert (never.exit_status, later.exit_status) == (1, 1)
    assert "(VLM601)" in answered(never).reason
    assert "(VLM602)" in answered(later).reason
    assert answered(never).device_map is None


def test_gpus_that_a_model_uses_come_first_so_that_its_map_counts_them_right() -> None:
    one = machine("2xL4")
    taken = replace(one, gpus=(replace(one.gpus[0], memory_free_bytes=3 * GIB), one.gpus[1]))

    answer = answered(ask(taken, gpus=2, model=MODEL))

    assert answer.gpus == (1, 0)
    assert answer.cuda_visible_devices == ",".join(taken.gpus[index].uuid for index in (1, 0))


def test_with_strict_a_warning_about_gpus_in_use_stands_against_it() -> None:
    one = machine("2xa10-half-taken")

    assert gate_report(Expectations(), one, strict=True).exit_status == 0
    report = gate_report(Expectations(gpus=2), one, strict=True)
    assert report.exit_status == 1
    assert answered(report).reason.startswith("Not met, warnings count: GPU 1 (NVIDIA A10): 11.0 GiB")
    assert gate_report(Expectations(gpus=2), one, strict=True, ignore=("VLM501",)).exit_status == 0


def test_an_error_that_is_ignored_does_not_stand_against_it() -> None:
    assert gate_report(Expectations(gpus=2), machine("cpu-torch"), ignore=("VLM303",)).exit_status == 0


NAMES = sorted(path.stem for path in MACHINES.glob("*.json"))


@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 9),
    st.none() | st.integers(1, 200).map(lambda size: size * GIB),
    st.booleans(),
    st.none() | st.sampled_from([(7, 0), (8, 0), (9, 0)]),
)
def test_gpus_that_are_given_meet_everything(
    name: str, gpus: int, vram: int | None, nvlink: bool, wanted: tuple[int, int] | None
) -> None:
    one = machine(name)
    report = ask(one, gpus=gpus, vram_bytes=vram, nvlink=nvlink, capability=wanted)
    answer = answered(report)

    assert "\n" not in answer.reason
    assert (report.exit_status == 0) is answer.is_met
    assert (report.exit_status == 1) is bool(answer.unmet)
    if answer.is_met:
        chosen = [gpu for gpu in one.gpus if gpu.index in answer.gpus]
        assert len(chosen) == gpus
        assert all(
            free_bytes(gpu, one) >= (vram or 0) and (gpu.compute_capability or ()) >= (wanted or ()) for gpu in chosen
        )
        assert all(gpu.error is None for gpu in chosen)


def test_the_terminal_has_one_line_and_only_help_that_is_about_it() -> None:
    few, taken = ask("2xa10-half-taken", gpus=3), ask("2xa10-half-taken", gpus=2, vram_bytes=20 * GIB)

    assert render(few, "terminal").count("\n") == 1
    assert render(taken, "terminal").splitlines()[0].endswith("VLM501 (VLM004).")
    assert "Do this next:" in render(taken, "terminal")
    verbose = render(ask("2xL4", gpus=2, vram_bytes=GIB, nvlink=False), "terminal", verbose=True)
    assert "vram: 1.0 GiB" in verbose
    assert "CUDA_VISIBLE_DEVICES: GPU-" in verbose


# --- outputs of a step ---


def test_outputs_are_written_so_that_no_value_can_become_another(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_text("before=1\n", "utf-8")

    write_outputs({"reason": "a\nrun-gpu-tests=true\nEOF", "gpus": "0,1"}, {"GITHUB_OUTPUT": str(path)})

    assert outputs(path.read_text("utf-8").removeprefix("before=1\n")) == {
        "reason": "a\nrun-gpu-tests=true\nEOF",
        "gpus": "0,1",
    }


def outputs(text: str) -> dict[str, str]:
    """Read the file as GitHub's runner does."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        name, mark = line.split("<<")
        value = []
        for inner in lines:
            if inner == mark:
                break
            value.append(inner)
        found[name] = "\n".join(value)
    return found


def test_every_output_is_always_there() -> None:
    met, unmet = (answered(ask("2xL4", gpus=number, model=MODEL)) for number in (2, 3))

    assert step_outputs(met).keys() == step_outputs(unmet).keys()
    assert json.loads(step_outputs(met)["device-map"]) == met.device_map
    assert step_outputs(unmet)["run-gpu-tests"] == "false"
    assert step_outputs(unmet)["device-map"] == ""


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "--github-output: GITHUB_OUTPUT is not set; GitHub Actions sets it in the steps of a job."),
        (
            {"GITHUB_OUTPUT": "/does/not/exist"},
            "--github-output: /does/not/exist cannot be written: No such file or directory.",
        ),
    ],
)
def test_outputs_that_cannot_be_written_are_bad_usage(environment: Mapping[str, str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        write_outputs({"a": "b"}, environment)

    assert str(caught.value) == sentence


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "output")

    with pytest.raises(UsageError, match="cannot be written: No such device or address"):
        write_outputs({"a": "b"}, {"GITHUB_OUTPUT": str(tmp_path / "output")})


# --- expectations and the project's file ---


def test_the_command_line_counts_more_than_the_file() -> None:
    settings = ProjectSettings(gpus=2, vram="20GiB", nvlink=True, capability=8.0, model="a/b")

    assert expectations(settings) == Expectations(gpus=2, vram_bytes=20 * GIB, nvlink=True, capability=(8, 0), model="a/b")
    assert expectations(
        settings, gpus=1, vram_bytes=GIB, nvlink=False, capability_wanted=(9, 0), model="c/d"
    ) == Expectations(gpus=1, vram_bytes=GIB, nvlink=False, capability=(9, 0), model="c/d")
    assert expectations(ProjectSettings()) == Expectations()
    assert Expectations(gpus=2, vram_bytes=GIB, nvlink=True, capability=(8, 0), model="a").described() == {
        "gpus": "2",
        "vram": "1.0 GiB",
        "nvlink": "yes",
        "capability": "8.0",
        "model": "a",
    }


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"vrm": "20GiB"}, "p.toml: [tool.vlm-doctor] has no key 'vrm'; did you mean vram?"),
        (
            {"zzz": 1},
            "p.toml: [tool.vlm-doctor] has no key 'zzz'; the keys are gpus, vram, nvlink, capability, model, ignore, "
            "strict.",
        ),
        ({"gpus": "two"}, "p.toml: [tool.vlm-doctor] gpus: 'two' is not a whole number; write gpus = 2."),
        ({"vram": 20}, "p.toml: [tool.vlm-doctor] vram: '20' is not a text with a size; write vram = \"20GiB\"."),
        (
            {"ignore": "VLM5"},
            "p.toml: [tool.vlm-doctor] ignore: 'VLM5' is not a list of texts; write ignore = [\"VLM503\"].",
        ),
        ({"strict": "yes"}, "p.toml: [tool.vlm-doctor] strict: 'yes' is not true or false; write strict = true."),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(table: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_settings(table, where="p.toml")

    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (ProjectSettings(gpus=0), "pyproject.toml: [tool.vlm-doctor] gpus: '0' is not a number of GPUs"),
        (ProjectSettings(vram="20"), "pyproject.toml: [tool.vlm-doctor] vram: '20' is not a size"),
        (
            ProjectSettings(capability="new"),
            "pyproject.toml: [tool.vlm-doctor] capability: 'new' is not a compute capability",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_one_sentence(settings: ProjectSettings, start: str) -> None:
    with pytest.raises(UsageError) as caught:
        expectations(settings)

    assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8.0", (8, 0)), (8.9, (8, 9)), (9, (9, 0)), ("sm_90", (9, 0)), ("SM120", (12, 0)), (" 7.5 ", (7, 5))],
)
def test_a_compute_capability_is_read(text: str | float, value: tuple[int, int]) -> None:
    assert capability(text, where="--capability") == value


def test_a_number_of_gpus_is_bounded() -> None:
    assert gpu_count("8", where="--gpus") == 8
    for text in ("0", "-1", "1.5", "99999", "٣", ""):
        with pytest.raises(UsageError, match=r"--gpus: .* is not a number of GPUs; write one from 1 to 1,000\."):
            gpu_count(text, where="--gpus")


TOML = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.text(max_size=3), max_size=3)
    | st.just({"a": [1]})
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*ProjectSettings.__struct_fields__, "other"]), TOML, max_size=4))
def test_any_table_is_read_or_one_sentence(table: dict[str, Any]) -> None:
    with suppress(UsageError):
        expectations(read_settings(table, where="p.toml"))


def project(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text, "utf-8")
    return folder


def test_the_nearest_file_above_counts(tmp_path: Path) -> None:
    project(tmp_path, '[tool.vlm-doctor]\ngpus = 2\nignore = ["VLM503"]\n')
    (tmp_path / "a" / "b").mkdir(parents=True)

    found = read_project(tmp_path / "a" / "b")

    assert found.settings == ProjectSettings(gpus=2, ignore=("VLM503",))
    assert found.path == tmp_path / "pyproject.toml"
    project(tmp_path / "a", "[project]\nname = 'x'\n")
    assert read_project(tmp_path / "a" / "b").path is None


@pytest.mark.parametrize("text", ["[project]\nname = 'vlm-doctor'\n", "tool = 3 # vlm-doctor", ""])
def test_a_file_without_the_table_says_nothing(tmp_path: Path, text: str) -> None:
    assert read_project(project(tmp_path, text)) == (ProjectSettings(), None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tool.vlm-doctor\n", "is not TOML ("),
        ("[tool]\nvlm-doctor = 3\n", "tool.vlm-doctor is not a table; write [tool.vlm-doctor]."),
        ("[tool.vlm-doctor]\ngpu = 2\n", "[tool.vlm-doctor] has no key 'gpu'; did you mean gpus?"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_project(project(tmp_path, text))

    assert sentence in str(caught.value)


def test_where_there_is_no_file_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []

    def nowhere(self: Path) -> bool:
        looked.append(self)
        return False

    monkeypatch.setattr(Path, "is_file", nowhere)

    assert read_project(tmp_path).path is None
    assert looked[-1] == Path("/pyproject.toml")


def test_a_pipe_and_a_file_that_may_not_be_read_are_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, "[tool.vlm-doctor]\ngpus = 2\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.mkfifo(tmp_path / "a" / "b" / "pyproject.toml")

    assert read_project(tmp_path / "a" / "b").settings.gpus == 2

    def refuse(self: Path, *_: object, **__: object) -> Any:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    assert read_project(tmp_path).path is None


def test_a_working_folder_that_was_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    assert read_project().path is None
