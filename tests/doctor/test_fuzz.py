"""Whatever a snapshot or an environment holds: a verdict, or one clear sentence; never a traceback, in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlm_doctor.answer import check_report
from vlm_doctor.checks import diagnose
from vlm_doctor.codec import MAX_SNAPSHOT_BYTES, machine_from_json, to_json
from vlm_doctor.errors import MachineError, UsageError
from vlm_doctor.formats import FORMATS, render
from vlm_doctor.formats.look import Look
from vlm_doctor.machine import Gpu, Machine
from vlm_doctor.planner import plan
from vlm_doctor.redaction import redact
from vlm_doctor.report import Report
from vlm_doctor.sources.environment import MAX_VALUE_CHARS, read_environment
from vlm_doctor.sources.host import read_host
from vlm_doctor.sources.limits import mps
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.nccl_files import read_nccl_files
from vlm_doctor.visibility import visible_gpus

MACHINES = sorted((Path(__file__).parents[1] / "machines").glob("*.json"))
TEXTS = [path.read_bytes() for path in MACHINES]
SLOW_S = 5.0
"""Of the CPU, so that it does not matter what else the machine does. A verdict takes a few milliseconds."""
MEMORY_BYTES = 2 * 2**30

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, -(10**40), 1e308, -0.0]),
    st.floats(),
    st.text(max_size=40),
    st.sampled_from(
        ["", "\x00", "\x1b[31m", "\u202e", "💥", "../../etc/passwd", "$(reboot)", "`id`", "%s%n", "'\"\n", "A" * 5000]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    # Made anew each time: a mutation may append to it.
    st.builds(lambda: [[[[[[]]]]]]),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*at, key))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A recorded machine in which some places hold something else, are gone, or are there twice."""
    data = json.loads(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 4))):
        all_places = places(data)
        if not all_places:
            break
        *parents, last = draw(st.sampled_from(all_places))
        target = data
        for key in parents:
            target = target[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "unknown"]))
        if how == "replace":
            target[last] = draw(HOSTILE)
        elif how == "remove":
            del target[last]
        elif isinstance(target, list):
            target.append(target[last] if how == "repeat" else draw(HOSTILE))
        else:
            target[draw(st.text(max_size=8))] = draw(HOSTILE)
    return json.dumps(data).encode("utf-8", "surrogatepass")


def judged(data: bytes, *, formats: bool = True) -> Report | None:
    """Read, judge and print; ``None`` when the snapshot was refused, in one sentence."""
    started = time.process_time()
    report = None
    try:
        machine = machine_from_json(data, where="m.json")
    except MachineError as error:
        message = str(error)
        assert message.startswith("m.json: ")
        assert message.endswith(".")
        assert "\n" not in message.replace(repr(data), "") or len(message) < 600
        assert len(message) < 600
    else:
        report = check_report(machine)
        assert report.diagnosis is not None
        assert [o.reason for o in report.diagnosis.outcomes if o.state == "crashed"] == []
        for finding in report.diagnosis.findings:
            assert "\n" not in finding.message
            assert all(character.isprintable() for character in finding.message), finding.message
        if formats:
            for name in FORMATS:
                with contextlib.suppress(UsageError):  # a format for plans only says so
                    assert "\x1b[31m" not in render(report, name, **msgspec.structs.asdict(Look()))
        machine_from_json(to_json(redact(machine)).encode(), where="m.json")
    assert time.process_time() - started < SLOW_S
    return report


fuzz = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))


@fuzz
@given(mutated())
def test_a_mutated_snapshot(data: bytes) -> None:
    judged(data)


@fuzz
@given(st.sampled_from(TEXTS), st.floats(0, 1, exclude_max=True))
def test_a_snapshot_that_was_cut_off(data: bytes, share: float) -> None:
    assert judged(data[: int(len(data.rstrip()) * share)], formats=False) is None


@fuzz
@given(st.sampled_from(TEXTS), st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_a_snapshot_with_bytes_written_over_it(data: bytes, place: int, other: bytes) -> None:
    place %= len(data)
    judged(data[:place] + other + data[place + len(other) :], formats=False)


@fuzz
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff\xfe{\x00}\x00")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"NaN")
@example(b'{"schema": NaN}')
@example(b'{"schema": 1e400}')
@example(b'{"schema": 1' + b"0" * 100_000 + b"}")
@example(b"null")
@example(b'"text"')
@example(b" " * (MAX_SNAPSHOT_BYTES + 1))
def test_what_is_no_snapshot(data: bytes) -> None:
    assert judged(data) is None


MINIMAL = {"origin": "recorded", "description": "x"}


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": [{"index": 0, "uuid": "", "name": "", "slowdowns": ["on_fire"]}]},
        {"gpus": [{"index": 2**70, "uuid": "u", "name": "n"}]},
        {"gpus": [{"index": 0, "uuid": "u", "name": "n", "memory_total_bytes": -1}]},
        {"gpus": [{"index": 0, "uuid": "u", "name": "n", "compute_capability": [9]}]},
        {"links": [{"a": 0, "b": 1}]},
        {"driver": {"kernel_events": [{"kind": "poem"}]}},
        {"host": {"os": "x", "kernel": 5}},
        {"environment": {"A": 1}},
        {"environment": [["A", "b"]]},
        {"schema": 2},
        {"schema": "1"},
        {"gaps": [{"path": "x", "reason": "y"}] * 4097},
        {"pci_devices": [{"bus_id": "x", "device_id": "y"}] * 1025},
        {"driver": {"kernel_events": [{"kind": "xid"}] * 1025}},
        {"gpus": [{"index": 0, "uuid": "u", "name": "n", "processes": [{"pid": 1, "kind": "compute"}] * 4097}]},
    ],
)
def test_what_no_source_would_write_is_refused(fields: dict[str, Any]) -> None:
    assert judged(json.dumps({**MINIMAL, **fields}).encode()) is None


def test_unknown_and_duplicate_keys() -> None:
    text = '{"origin": "synthetic", "origin": "recorded", "description": "x", "colour": "red", "gpus": [], "gpus": []}'
    report = judged(text.encode())
    assert report is not None
    assert report.machine.origin == "recorded"


def test_the_largest_machine_is_judged_in_time() -> None:
    gpus = [{"index": n, "uuid": f"GPU-{n:08x}", "name": f"card {n % 7}", "memory_total_bytes": 2**35} for n in range(256)]
    links = [{"a": a, "b": b, "path": "SYS", "p2p_read": "ok"} for a in range(256) for b in range(a + 1, 256)]
    processes = [{"pid": n, "kind": "compute", "used_bytes": 2**20} for n in range(4096)]
    gaps = [{"path": f"gpus[{n}].name", "reason": "x"} for n in range(4096)]
    events = [{"kind": "xid", "code": n} for n in range(1024)]
    settings_ = [{"name": f"NCCL_{n}", "value": "1", "file": "f"} for n in range(1024)]
    checkpoints = [{"repo": f"a/{n}", "missing_files": 1} for n in range(1024)]
    data = {
        **MINIMAL,
        "gpus": [{**gpu, "processes": processes if gpu["index"] == 0 else []} for gpu in gpus],
        "links": links,
        "gaps": gaps,
        "driver": {"kernel_events": events, "nvml_state": "ok", "kernel_module_version": "580"},
        "pci_devices": [{"bus_id": f"{n:x}", "device_id": "2901"} for n in range(1024)],
        "environment": {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(100_000)))},
        "nccl_settings": settings_,
        "checkpoints": checkpoints,
    }
    started = time.perf_counter()
    machine = machine_from_json(json.dumps(data).encode(), where="m.json")
    outcomes = diagnose(machine).outcomes
    assert [outcome.reason for outcome in outcomes if outcome.state == "crashed"] == []
    assert time.perf_counter() - started < 6 * SLOW_S


def test_the_largest_machine_is_planned_for_in_time() -> None:
    """Each of 32,640 pairs is asked about: what looks through all links each time takes minutes."""
    memory = {"memory_total_bytes": 2**33, "memory_free_bytes": 2**33}
    gpus = [{"index": n, "uuid": f"GPU-{n:08x}", "name": "NVIDIA L4", **memory} for n in range(256)]
    links = [{"a": a, "b": b, "path": "SYS"} for a in range(256) for b in range(a + 1, 256)]
    machine = machine_from_json(json.dumps({**MINIMAL, "gpus": gpus, "links": links}).encode(), where="m.json")
    started = time.perf_counter()
    made = plan(load_profile("Qwen/Qwen2.5-VL-7B-Instruct", allow_network=False), machine)
    assert made.fits
    assert len(made.stages) > 1
    assert time.perf_counter() - started < 6 * SLOW_S


# Environment

VARIABLES = [
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
    *("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_CONF_FILE", "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE"),
    *("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_MPS_PIPE_DIRECTORY", "ACCELERATE_USE_CPU", "HF_HUB_OFFLINE"),
    *("TRANSFORMERS_CACHE", "CUDA_MODULE_LOADING", "NCCL_DEBUG", "container", "KUBERNETES_SERVICE_HOST"),
    *("CUDA_\udcff", "NCCL_" + "A" * 5000),
]
VALUES = st.one_of(
    st.text(max_size=60),
    st.from_regex(r"[0-9,;: \-+GMPUIa-f/.~=]{0,40}", fullmatch=True),
    st.sampled_from(["A" * 100_000, "0," * 50_000, ":" * 50_000, "/" * 5000, "~", "~/x", "\udcff\udcfe", "\x1b]0;x\x07"]),
)


@fuzz
@given(st.dictionaries(st.sampled_from(VARIABLES), VALUES, max_size=6), st.sampled_from(TEXTS))
def test_any_environment_is_read_and_judged(
    tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], data: bytes
) -> None:
    started = time.process_time()
    kept = read_environment(env)
    assert all(len(value) <= MAX_VALUE_CHARS for value in kept.values())
    root = tmp_path_factory.getbasetemp()
    machine = machine_from_json(data, where="m.json")
    machine = msgspec.structs.replace(machine, environment=kept, nccl_settings=read_nccl_files(root, env))
    try:
        machine = msgspec.structs.replace(machine, host=read_host(root, env), links=machine.links)
        mps(root, env)
    except (OSError, ValueError):
        pass  # becomes a gap, see Collection
    report = judged(to_json(machine).encode())
    assert report is not None
    assert time.process_time() - started < SLOW_S


@fuzz
@given(VALUES)
def test_any_choice_of_gpus_is_explained(value: str) -> None:
    gpus = tuple(Gpu(index=n, uuid=f"GPU-{n}a{n}b", name="L4", bus_id=f"0000:0{n}:00.0") for n in range(3))
    environment = read_environment({"CUDA_VISIBLE_DEVICES": value})
    seen = visible_gpus(Machine(origin="recorded", description="x", gpus=gpus, environment=environment))
    assert set(seen.gpus) <= {0, 1, 2}
    assert len(set(seen.gpus)) == len(seen.gpus)
    if seen.problem is not None:
        assert seen.corrected
        fixed = {"CUDA_VISIBLE_DEVICES": seen.corrected}
        again = visible_gpus(Machine(origin="recorded", description="x", gpus=gpus, environment=fixed))
        assert again.problem is None
        assert again.gpus


# The whole process

Run = Callable[..., subprocess.CompletedProcess[str]]


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run ``vlm-doctor`` with bounded memory, a minute at most."""

    def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vlm_doctor", *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            cwd=tmp_path,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment},
            preexec_fn=limited,
            check=False,
        )

    return start


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[" * 200_000,
        b'{"schema": ' + b"9" * 200_000 + b"}",
        b"\x00" * 1000,
        b'{"origin": "recorded", "description": "\xff"}',
        b'{"origin": "recorded", "description": "x", "seconds": {"a": NaN}}',
        b" " * (MAX_SNAPSHOT_BYTES + 1),
    ],
    ids=["empty", "cut", "deep", "giant number", "zeros", "no UTF-8", "NaN", "huge"],
)
def test_a_hostile_file_ends_in_one_sentence(run: Run, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.json").write_bytes(data)
    plain, as_json = run("--machine", "m.json"), run("--machine", "m.json", "--json")
    assert (plain.returncode, plain.stdout, plain.stderr.count("\n")) == (2, "", 1)
    assert plain.stderr.startswith("vlm-doctor: m.json")
    assert "Traceback" not in plain.stderr
    assert as_json.returncode == 2
    assert json.loads(as_json.stdout)["error"]["message"].startswith("m.json")
    assert as_json.stderr == ""


def test_a_hostile_machine_is_judged_by_the_whole_process(run: Run, tmp_path: Path) -> None:
    data = json.loads((MACHINES[0].parent / "2xl4-idle.json").read_bytes())
    data["gpus"][0]["name"] = "\x1b[31mevil\u202e\n" * 1000
    data["environment"] = {"CUDA_VISIBLE_DEVICES": "$(reboot),`id`\x07" * 100}
    (tmp_path / "m.json").write_text(json.dumps(data))
    seen = run("--machine", "m.json")
    assert seen.returncode == 1
    assert "VLM201" in seen.stdout
    assert not {"\x1b", "\x07", "\u202e"} & set(seen.stdout)
    assert json.loads(run("--machine", "m.json", "--json").stdout)["exit_status"] == 1


@pytest.mark.parametrize("value", ["", "0,9", "\x1b[31m", "A" * 100_000, "0," * 20_000, "\udcff"])
def test_a_hostile_environment_of_the_whole_process(run: Run, value: str) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_CONF_FILE", "TMPDIR", "LD_LIBRARY_PATH")
    done = run("--no-torch", "--json", **dict.fromkeys(names, value))
    assert done.returncode in (0, 1, 3), done.stderr
    report = json.loads(done.stdout)
    assert [o for o in report["diagnosis"]["outcomes"] if o["state"] == "crashed"] == []
    assert "Traceback" not in done.stderr
