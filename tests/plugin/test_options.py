"""Options, environment, ini file: what is read, which wins, and what a wrong value says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vlmgpu.options import GpuChoice, Settings, parse_gpus, resolve

GPU_FORMS = "auto, none, a count (2), positions (0,2) or UUIDs (GPU-…)"


class _Config:
    """What ``resolve`` reads of a config."""

    def __init__(self, line: dict[str, Any] | None = None, ini: dict[str, Any] | None = None) -> None:
        self.line, self.ini = line or {}, ini or {}

    def getoption(self, name: str) -> Any:
        return self.line.get(name)

    def getini(self, name: str) -> Any:
        return self.ini.get(name)


def settle(
    line: dict[str, Any] | None = None, env: dict[str, str] | None = None, ini: dict[str, Any] | None = None
) -> Settings:
    return resolve(_Config(line, ini), env or {})  # type: ignore[arg-type]


def test_defaults_when_nothing_is_given() -> None:
    assert settle() == Settings(gpus=GpuChoice(), model=None, machine="live", is_strict=False, given=())


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [("model", "model", "org/a"), ("machine", "machine", "2xL4"), ("strict", "is_strict", "1")],
)
def test_each_place_of_each_setting(setting: str, field: str, value: str) -> None:
    wanted = True if field == "is_strict" else value

    from_line = settle(line={f"vlm_{setting}": True if field == "is_strict" else value})
    from_environment = settle(env={f"PYTEST_VLMGPU_{setting.upper()}": value})
    from_ini = settle(ini={f"vlm_{setting}": True if field == "is_strict" else value})

    assert [getattr(found, field) for found in (from_line, from_environment, from_ini)] == [wanted] * 3


def test_command_line_wins_over_environment_and_environment_over_ini() -> None:
    line, env, ini = {"vlm_gpus": "1"}, {"PYTEST_VLMGPU_GPUS": "2"}, {"vlm_gpus": "3"}

    assert settle(line, env, ini).gpus.number == 1
    assert settle(None, env, ini).gpus.number == 2
    assert settle(None, None, ini).gpus.number == 3


def test_settings_say_where_they_were_given() -> None:
    settings = settle({"vlm_strict": True}, {"PYTEST_VLMGPU_GPUS": "0,1"}, {"vlm_model": "org/a"})

    assert settings.given == ("PYTEST_VLMGPU_GPUS=0,1", "vlm_model=org/a", "--vlm-strict")


def test_an_empty_environment_variable_counts_as_unset() -> None:
    assert settle(env={"PYTEST_VLMGPU_GPUS": ""}, ini={"vlm_gpus": "none"}).gpus.kind == "none"


def test_an_environment_variable_can_switch_strict_off() -> None:
    assert settle(env={"PYTEST_VLMGPU_STRICT": "no"}, ini={"vlm_strict": True}).is_strict is False


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PYTEST_VLMGPU_STRICT": "maybe"}, "PYTEST_VLMGPU_STRICT: 'maybe' is neither true nor false; write 1 or 0."),
        ({"PYTEST_VLMGPU_MODEL": " "}, "PYTEST_VLMGPU_MODEL: the value is empty; leave it out, or give one."),
        ({"PYTEST_VLMGPU_GPUS": "cpu"}, "PYTEST_VLMGPU_GPUS: 'cpu' names no GPUs; write none."),
    ],
)
def test_a_wrong_value_names_its_place(env: dict[str, str], message: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settle(env=env)

    assert str(caught.value) == f"VLM720: {message}"


def test_a_conversion_error_of_pytest_itself_is_a_usage_error() -> None:
    def getini(name: str) -> Any:
        raise ValueError("invalid truth value 'maybe'")

    config = SimpleNamespace(getoption=lambda name: None, getini=getini)

    with pytest.raises(pytest.UsageError, match=r"^VLM720: vlm_gpus: invalid truth value 'maybe'\.$"):
        resolve(config, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("auto", GpuChoice(text="--vlm-gpus=auto")),
        ("AUTO", GpuChoice(text="--vlm-gpus=AUTO")),
        ("none", GpuChoice(kind="none", text="--vlm-gpus=none")),
        ("2", GpuChoice(kind="count", number=2, text="--vlm-gpus=2")),
        ("0,2", GpuChoice(kind="positions", positions=(0, 2), text="--vlm-gpus=0,2")),
        ("2,", GpuChoice(kind="positions", positions=(2,), text="--vlm-gpus=2,")),
        ("0,", GpuChoice(kind="positions", positions=(0,), text="--vlm-gpus=0,")),
        ("1, 0", GpuChoice(kind="positions", positions=(1, 0), text="--vlm-gpus=1, 0")),
        ("GPU-1a2b", GpuChoice(kind="uuids", uuids=("GPU-1a2b",), text="--vlm-gpus=GPU-1a2b")),
        ("GPU-1a,GPU-2b", GpuChoice(kind="uuids", uuids=("GPU-1a", "GPU-2b"), text="--vlm-gpus=GPU-1a,GPU-2b")),
    ],
)
def test_forms_of_a_gpu_choice(text: str, choice: GpuChoice) -> None:
    assert parse_gpus(text, "--vlm-gpus") == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all", "'all' names no GPUs; write auto."),
        ("-1", "'-1' names no GPUs; write auto."),
        ("0", "'0' names no GPUs; write none for the CPU, or 0, for the first GPU."),
        ("1.5", f"'1.5' names no GPUs; write {GPU_FORMS}."),
        ("٣", f"'٣' names no GPUs; write {GPU_FORMS}."),
        ("99999", f"'99999' names no GPUs; write {GPU_FORMS}."),
        (",", f"',' names no GPUs; write {GPU_FORMS}."),
        ("0,,1", f"'' is neither a position nor a UUID like the others; write {GPU_FORMS}."),
        ("0;1", f"'0;1' names no GPUs; write {GPU_FORMS}."),
        ("01,2", f"'01' is neither a position nor a UUID like the others; write {GPU_FORMS}."),
        ("0,GPU-1a", f"'GPU-1a' is neither a position nor a UUID like the others; write {GPU_FORMS}."),
        ("GPU-1a,0", f"'0' is neither a position nor a UUID like the others; write {GPU_FORMS}."),
        ("GPU-", f"'GPU-' is neither a position nor a UUID like the others; write {GPU_FORMS}."),
        ("1,1", f"a GPU is named twice; write {GPU_FORMS}."),
        ("MIG-1a", f"a MIG slice is chosen with CUDA_VISIBLE_DEVICES; write {GPU_FORMS}."),
    ],
)
def test_what_is_no_gpu_choice(text: str, message: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        parse_gpus(text, "--vlm-gpus")

    assert str(caught.value) == f"VLM720: --vlm-gpus: {message}"


def test_a_wrong_option_ends_pytest_with_status_4(suite: Any) -> None:
    result = suite.run("--vlm-gpus=cpu", test_x="def test_x(): pass")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: VLM720: --vlm-gpus: 'cpu' names no GPUs; write none."])


def test_a_wrong_machine_ends_pytest_with_status_4(suite: Any) -> None:
    result = suite.run("--vlm-machine=nowhere.json", test_x="def test_x(): pass")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: VLM720: --vlm-machine: *nowhere.json*"])


@pytest.mark.parametrize(
    "section", ["[pytest]\nvlm_gpus = none\nvlm_strict = true", "[pytest]\nvlm_gpus=none\nvlm_strict=1"]
)
def test_ini_file(suite: Any, section: str) -> None:
    suite.pytester.makeini(section)

    result = suite.run(test_x="def test_x(): pass")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["vlmgpu: vlm_gpus=none, vlm_strict=true"])


def test_pyproject(suite: Any) -> None:
    suite.pytester.makepyprojecttoml('[tool.pytest.ini_options]\nvlm_gpus = "0,1"\nvlm_strict = true\n')

    result = suite.run(test_x="def test_x(): pass")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["vlmgpu: vlm_gpus=0,1, vlm_strict=true"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90", 90), ("90s", 90), ("10m", 600), ("1.5H", 5400), ("2 h", 7200), ("0.5", 0.5)]
)
def test_a_time_to_wait(text: str, seconds: float) -> None:
    assert settle({"vlm_wait": text}).wait_s == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "1d", "10m5s", "1e9", "nan", "٣", "10 minutes", "99999999"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(
        pytest.UsageError, match=r"VLM720: --vlm-wait: .* is no time; write seconds \(90\), or 90s, 10m, 1h"
    ):
        settle({"vlm_wait": text})


def test_a_strict_run_waits_for_the_job_before_it() -> None:
    assert settle().wait_s == 0
    assert settle({"vlm_strict": True}).wait_s == 120
    assert settle({"vlm_strict": True, "vlm_wait": "0"}).wait_s == 0


def test_slots_and_lease_folder() -> None:
    assert settle().keeps_models is settle({"vlm_slots": "1"}).keeps_models is False
    assert settle({"vlm_slots": "FIT"}).keeps_models is True
    assert settle().lease_dir is None
    assert settle({"vlm_lease_dir": "OFF"}).lease_dir == "off"
    assert settle({"vlm_lease_dir": "/mnt/leases"}).lease_dir == "/mnt/leases"
    assert settle(env={"PYTEST_VLMGPU_LEASE_DIR": "/mnt/leases"}).given == ()


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("slots", "2", "--vlm-slots: '2' is neither 1 nor fit."),
        ("lease_dir", "leases", "--vlm-lease-dir: 'leases' is no absolute path; other runs must find the same folder."),
        (
            "lease_dir",
            "/tmp/\0",
            "--vlm-lease-dir: '/tmp/\\x00' is no absolute path; other runs must find the same folder.",
        ),
    ],
)
def test_a_wrong_slot_or_folder_is_refused(setting: str, text: str, message: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settle({f"vlm_{setting}": text})

    assert str(caught.value) == f"VLM720: {message}"
