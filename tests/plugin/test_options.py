"""Options, environment, ini file: what is read, which wins, and what a wrong value says."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vlmgpu import declare
from pytest_vlmgpu.options import GpuChoice, Settings, parse_gpus, resolve

GPU_FORMS = "auto, none, a count (2), positions (0,2) or UUIDs (GPU-…, MIG-…)"


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
    assert settle() == Settings(gpus=GpuChoice(), model=None, machine="live", strict="off", given=())


@pytest.mark.parametrize("prefix", ["VLMGPU_", "PYTEST_VLMGPU_"])
@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("model", "org/a", "org/a"),
        ("dtype", "float16", "float16"),
        ("dtype", "torch.bfloat16", "bfloat16"),
        ("machine", "2xL4", "2xL4"),
        ("strict", "all", "all"),
        ("strict", "1", "all"),
        ("expect_gpus", "2", 2),
        ("expect_vram", "20", 20 * 2**30),
        ("expect_vram", "24GB", 24 * 10**9),
        ("min_tests", "10", 10),
        ("baseline", "ran.json", Path.cwd() / "ran.json"),
        ("report", "/tmp/out.json", Path("/tmp/out.json")),
    ],
)
def test_each_place_of_each_setting(setting: str, text: str, value: object, prefix: str) -> None:
    from_line = settle(line={f"vlm_{setting}": text})
    from_environment = settle(env={f"{prefix}{setting.upper()}": text})
    from_ini = settle(ini={f"vlm_{setting}": text})

    assert [getattr(found, setting) for found in (from_line, from_environment, from_ini)] == [value] * 3


def test_command_line_wins_over_environment_and_environment_over_ini() -> None:
    line, env, ini = {"vlm_gpus": "1"}, {"PYTEST_VLMGPU_GPUS": "2"}, {"vlm_gpus": "3"}

    assert settle(line, env, ini).gpus.number == 1
    assert settle(None, env, ini).gpus.number == 2
    assert settle(None, None, ini).gpus.number == 3


def test_settings_say_where_they_were_given() -> None:
    settings = settle({"vlm_strict": "all"}, {"PYTEST_VLMGPU_GPUS": "0,1"}, {"vlm_model": "org/a"})

    assert settings.given == ("PYTEST_VLMGPU_GPUS=0,1", "vlm_model=org/a", "--vlm-strict")


def test_an_empty_environment_variable_counts_as_unset() -> None:
    assert settle(env={"PYTEST_VLMGPU_GPUS": ""}, ini={"vlm_gpus": "none"}).gpus.kind == "none"


def test_an_environment_variable_can_switch_strict_off() -> None:
    assert settle(env={"PYTEST_VLMGPU_STRICT": "no"}, ini={"vlm_strict": "all"}).strict == "off"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PYTEST_VLMGPU_STRICT": "maybe"}, "PYTEST_VLMGPU_STRICT: 'maybe' is no level; write gpu, all, auto or off."),
        ({"PYTEST_VLMGPU_MODEL": " "}, "PYTEST_VLMGPU_MODEL: the value is empty; leave it out, or give one."),
        ({"VLMGPU_MIN_TESTS": "0"}, "VLMGPU_MIN_TESTS: '0' is no such number; write a whole number from 1 to 999999."),
        (
            {"VLMGPU_EXPECT_VRAM": "much"},
            "VLMGPU_EXPECT_VRAM: 'much' is no amount of memory; write one such as 20GiB or 24GB.",
        ),
        (
            {"VLMGPU_EXPECT_VRAM": "999999999"},
            "VLMGPU_EXPECT_VRAM: '999999999' is no amount of memory; write one such as 20GiB or 24GB.",
        ),
        ({"VLMGPU_DTYPE": "fp16"}, "VLMGPU_DTYPE: 'fp16' is no dtype; write float16."),
        ({"VLMGPU_DTYPE": "int4"}, "VLMGPU_DTYPE: 'int4' is no dtype; write bfloat16 or float16 or float32."),
        ({"VLMGPU_ALLOW_OFFLOAD": "x"}, "VLMGPU_ALLOW_OFFLOAD: 'x' is neither on nor off; write one of these words."),
        ({"VLMGPU_REPORT": "/tmp"}, "VLMGPU_REPORT: /tmp is a folder; name a file in it."),
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

    with pytest.raises(pytest.UsageError, match=r"^VLM720: vlm_gpus: invalid truth value 'maybe'; write true or false\.$"):
        resolve(config, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"VLMGPU_EXPECT_GPU": "2"}, "VLMGPU_EXPECT_GPU: there is no such variable; write VLMGPU_EXPECT_GPUS."),
        (
            {"PYTEST_VLMGPU_MINTESTS": "2"},
            "PYTEST_VLMGPU_MINTESTS: there is no such variable; write PYTEST_VLMGPU_MIN_TESTS.",
        ),
        ({"VLMGPU_PLAN": "1"}, "VLMGPU_PLAN: it is for one run alone; write --vlm-plan on the command line."),
    ],
)
def test_a_variable_that_would_demand_nothing_is_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settle(env=env)

    assert str(caught.value) == f"VLM720: {message}"


def test_variables_of_others_and_empty_ones_are_left_alone() -> None:
    env = {"VLMGPU_HOUSE": "1", "VLMGPU_EXPECT_GPU": "", "VLMGPU_TESTING": "1", "MY_VLMGPU_GPU": "x"}

    assert settle(env=env) == settle(env={})


def test_a_misspelt_variable_ends_a_run_that_uses_nothing_else(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMGPU_EXPECT_GPU", "2")

    result = suite.run(test_x="def test_x(): pass")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: VLM720: VLMGPU_EXPECT_GPU: *"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vlm_min_tests = three", "'three' is no such number; *"),
        ("vlm_min_tests =", "the value is empty; *"),
        ("vlm_seed = -1", "'-1' is no seed; *"),
    ],
)
def test_a_number_that_is_none_is_named_in_our_words(suite: Any, text: str, message: str) -> None:
    suite.pytester.makeini(f"[pytest]\n{text}\n")

    result = suite.run(test_x="def test_x(): pass")

    result.stderr.fnmatch_lines([f"ERROR: VLM720: {text.split(maxsplit=1)[0]}: {message}"])


def test_a_seed_may_be_the_word_none_in_an_ini_file(suite: Any) -> None:
    suite.pytester.makeini("[pytest]\nvlm_seed = none\n")

    suite.run(test_x="def test_x(): pass").assert_outcomes(passed=1)


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="TOML with types came with pytest 9")
@pytest.mark.parametrize("table", ["pyproject.toml:[tool.pytest]", "pytest.toml:[pytest]"])
def test_numbers_in_toml_may_be_written_with_quotes_or_without(suite: Any, table: str) -> None:
    file, _, header = table.partition(":")
    lines = [
        "vlm_gpus = 1",
        "vlm_slots = 1",
        "vlm_min_tests = '1'",
        "vlm_seed = 'none'",
        "vlm_leak_tolerance = 1.5",
    ]
    (suite.folder / file).write_text("\n".join([header, *lines]))

    result = suite.run(test_x="def test_x(vlm_gpus): assert len(vlm_gpus) == 1")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["vlmgpu: vlm_gpus=1, vlm_min_tests=1, vlm_slots=1, vlm_leak_tolerance=1.5, vlm_seed=none"])


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
        ("MIG-1a,MIG-2b", GpuChoice(kind="uuids", uuids=("MIG-1a", "MIG-2b"), text="--vlm-gpus=MIG-1a,MIG-2b")),
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
        ("MIG-xyz", f"'MIG-xyz' is neither a position nor a UUID like the others; write {GPU_FORMS}."),
        ("MIG-1a,GPU-2b", f"'GPU-2b' is neither a position nor a UUID like the others; write {GPU_FORMS}."),
        (
            "MIG-GPU-1a/1/0",
            "'MIG-GPU-1a/1/0' is how drivers before 470 named a MIG slice; name it by its own UUID (MIG-…, see nvidia-smi "
            f"-L); write {GPU_FORMS}.",
        ),
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
    result.stdout.fnmatch_lines(["vlmgpu: vlm_gpus=none, vlm_strict=*"])


def test_pyproject(suite: Any) -> None:
    suite.pytester.makepyprojecttoml('[tool.pytest.ini_options]\nvlm_gpus = "0,1"\nvlm_strict = true\n')

    result = suite.run(test_x="def test_x(): pass")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["vlmgpu: vlm_gpus=0,1, vlm_strict=[Tt]rue"])


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["--vlm-strict", "tests"], "all"),
        (["--vlm-strict=all", "tests"], "all"),
        (["--vlm-strict=auto"], "auto"),
        (["--vlm-strict=off"], "off"),
        (["--vlm-strict", "--vlm-strict=gpu"], "gpu"),
        (["tests"], None),
    ],
)
def test_a_level_is_never_taken_from_the_word_behind(suite: Any, words: list[str], level: str | None) -> None:
    config = suite.pytester.parseconfig(*words)

    assert config.getoption("vlm_strict") == level
    assert config.args[-1:] == (["tests"] if "tests" in words else config.args[-1:])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--vlm-strict=foo", "--vlm-strict: 'foo' is no level; write gpu, all, auto or off."),
        ("--vlm-strict=", "--vlm-strict: the value is empty; leave it out, or give one."),
        ("--vlm-warm=20 minutes", "--vlm-warm: '20 minutes' is no time; write seconds (90), or 90s, 10m, 1h."),
        ("--vlm-allow-offload=2", "--vlm-allow-offload: '2' is neither on nor off; write one of these words."),
        ("--vlm-plan=x", "--vlm-plan: it takes no value, and has 'x'; write --vlm-plan alone."),
    ],
)
@pytest.mark.parametrize("place", ["command line", "addopts", "PYTEST_ADDOPTS", "@words.txt"])
def test_a_wrong_level_gets_a_sentence_of_ours(
    suite: Any, monkeypatch: pytest.MonkeyPatch, word: str, message: str, place: str
) -> None:
    if place == "addopts":
        suite.pytester.makeini(f"[pytest]\naddopts = '{word}'")
    elif place == "PYTEST_ADDOPTS":
        monkeypatch.setenv("PYTEST_ADDOPTS", f"'{word}'")
    elif place == "@words.txt":
        suite.pytester.makefile(".txt", words=f"-v\n{word}")
    given = {"command line": [word], "@words.txt": [place]}.get(place, [])

    result = suite.run(*given, test_x="def test_x(): pass")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: VLM720: {message}" in result.errlines
    assert "usage:" not in result.stderr.str()


def test_any_time_may_be_written_behind_warm(suite: Any) -> None:
    assert suite.pytester.parseconfig("--vlm-warm=20m", "tests").getoption("vlm_warm") == "20m"


def test_the_plugin_may_be_named_in_a_call_of_main(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    suite.pytester.makepyfile(test_x="def test_x(pytestconfig): assert pytestconfig.getoption('vlm_warm') == '20m'")

    result = suite.pytester.runpytest_inprocess("--vlm-warm=20m", plugins=["pytest_vlmgpu.plugin"])

    result.assert_outcomes(passed=1)


def test_words_that_come_through_a_pipe_are_left_to_pytest() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"--vlm-warm=20m")
    os.close(writing)

    assert declare.words_given(SimpleNamespace(invocation_params=SimpleNamespace(args=[f"@/dev/fd/{reading}"]))) == []

    assert os.read(reading, 100) == b"--vlm-warm=20m"
    os.close(reading)


def test_native_toml(suite: Any) -> None:
    if pytest.version_tuple < (9,):
        pytest.skip("pytest.toml came with pytest 9")
    (suite.folder / "pytest.toml").write_text('[pytest]\nvlm_strict = "all"\nvlm_min_tests = 1\n')

    result = suite.run(test_x="def test_x(): pass")

    result.stdout.fnmatch_lines(["vlmgpu: vlm_strict=all, vlm_min_tests=1"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"vlm_update_baseline": "on"},
            "--vlm-update-baseline: there is no file to write; name it with --vlm-baseline=FILE.",
        ),
        (
            {"vlm_fake_gpus": "2xL4", "vlm_machine": "L4"},
            "--vlm-fake-gpus: --vlm-machine names a machine too; give one of them.",
        ),
        (
            {"vlm_lease": "run", "vlm_lease_dir": "/mnt/leases"},
            "--vlm-lease-dir: --vlm-lease=run uses no folder; leave out one of them.",
        ),
        (
            {"vlm_fake_gpus": "2xL4", "vlm_strict": "gpu", "vlm_min_tests": "3"},
            "--vlm-fake-gpus: no GPU that is made up can satisfy --vlm-strict, --vlm-min-tests; leave out one of them, or "
            "set VLMGPU_TESTING=1 to try the wiring itself.",
        ),
    ],
)
def test_settings_that_contradict_each_other(line: dict[str, str], message: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settle(line)

    assert str(caught.value) == f"VLM720: {message}"
    if "vlm_fake_gpus" in line:
        assert settle({**line, "vlm_machine": None}, {"VLMGPU_TESTING": "1"}).fake_gpus == "2xL4"


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90", 90), ("90s", 90), ("10m", 600), ("1.5H", 5400), ("2 h", 7200), ("0.5", 0.5)]
)
def test_a_time_to_wait(text: str, seconds: float) -> None:
    assert settle({"vlm_wait": text}).wait_s == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("30m", 1800),
        ("1", 900),
        ("on", 900),
        ("TRUE", 900),
        ("0", None),
        ("off", None),
        ("0s", None),
        ("0.0m", None),
    ],
)
def test_a_time_to_keep_models(text: str, seconds: float | None) -> None:
    assert settle(env={"VLMGPU_WARM": text}).warm == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "1d", "10m5s", "1e9", "nan", "٣", "10 minutes", "99999999"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(
        pytest.UsageError, match=r"VLM720: --vlm-wait: .* is no time; write seconds \(90\), or 90s, 10m, 1h"
    ):
        settle({"vlm_wait": text})


def test_a_strict_run_waits_for_the_job_before_it() -> None:
    assert settle().wait_s == 0
    assert settle({"vlm_strict": "gpu"}).wait_s == 120
    assert settle({"vlm_strict": "gpu", "vlm_wait": "0"}).wait_s == 0


def test_slots_and_lease_folder() -> None:
    assert settle().keeps_models is settle({"vlm_slots": "1"}).keeps_models is False
    assert settle({"vlm_slots": "FIT"}).keeps_models is settle({"vlm_slots": "2"}).keeps_models is True
    assert (settle().slots, settle({"vlm_slots": "FIT"}).slots, settle({"vlm_slots": "2"}).slots) == (1, None, 2)
    assert settle().lease_dir is None
    assert settle().lease == "machine"
    assert settle({"vlm_lease": "RUN"}).lease == "run"
    assert settle(env={"VLMGPU_LEASE": "off"}).given == ("VLMGPU_LEASE=off",)
    assert settle({"vlm_lease_dir": "/mnt/leases"}).lease_dir == "/mnt/leases"
    assert settle(env={"VLMGPU_LEASE_DIR": "/mnt/leases"}).given == ()


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("slots", "0", "--vlm-slots: '0' is no such number; write a whole number from 1 to 9999, or fit."),
        ("slots", "two", "--vlm-slots: 'two' is no such number; write a whole number from 1 to 9999, or fit."),
        ("lease_dir", "leases", "--vlm-lease-dir: 'leases' is no absolute path; other runs must find the same folder."),
        (
            "lease_dir",
            "/tmp/\0",
            "--vlm-lease-dir: '/tmp/\\x00' is no absolute path; other runs must find the same folder.",
        ),
        ("lease_dir", "off", "--vlm-lease-dir: 'off' is no folder; to lease no GPUs, write --vlm-lease=off."),
        ("busy", "wait", "--vlm-busy: 'wait' is no such outcome; write error or skip."),
        ("lease", "none", "--vlm-lease: 'none' is no reach of leases; write machine, run or off."),
    ],
)
def test_a_wrong_slot_or_folder_is_refused(setting: str, text: str, message: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settle({f"vlm_{setting}": text})

    assert str(caught.value) == f"VLM720: {message}"
