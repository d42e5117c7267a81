"""Whatever the files hold that the doctor reads by itself or is given: facts, a gap or one sentence; in bounded time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from vlm_doctor.answer import check_report, error_report
from vlm_doctor.changes import with_changes
from vlm_doctor.codec import machine_from_json, to_json
from vlm_doctor.error_answer import answer_error
from vlm_doctor.errors import UsageError
from vlm_doctor.formats import render
from vlm_doctor.formats.inert import inert
from vlm_doctor.formats.look import Look
from vlm_doctor.machine import Machine
from vlm_doctor.sources import collect
from vlm_doctor.sources.checkpoints import read_checkpoints
from vlm_doctor.sources.log_file import read_log
from vlm_doctor.sources.nccl_files import read_nccl_files
from vlm_doctor.sources.project_file import read_project
from vlm_doctor.sources.saved_report import read_saved

SLOW_S = 10.0
"""Of the CPU, as in test_fuzz.py."""
MACHINES = Path(__file__).parents[2] / "machines"
BUS = "sys/bus/pci/devices/0000:01:00.0"
FILES = (
    *("proc/meminfo", "proc/uptime", "proc/cpuinfo", "proc/self/cgroup", "proc/1/cgroup", "proc/self/mounts"),
    *("proc/sys/kernel/osrelease", "proc/driver/nvidia/version", "sys/module/nvidia/version", "etc/os-release"),
    *("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat", "sys/fs/cgroup/pids.max"),
    *("sys/devices/system/node/node0/cpulist", "dev/kmsg", "dev/nvidiactl", "dev/nvidia0", "etc/nccl.conf", "etc/os"),
    *(f"{BUS}/{name}" for name in ("vendor", "class", "device", "numa_node", "current_link_width", "iommu_group/type")),
    *("tmp/nvidia-mps/control", "tmp/nvidia-mps/nvidia-cuda-mps-control.pid", "run/.containerenv", "home/u/.nccl.conf"),
)
LINES = st.sampled_from(
    [
        *(b"MemTotal: 16 kB", b"MemAvailable:", b"MemTotal: " + b"9" * 5000 + b" kB", "MemTotal: ٣ kB".encode()),
        *(b"0::/a/../b", b"4:memory:/x", b"0::/" + b"a/" * 3000, b"0::/\xff", b"max", b"-1", b"9" * 30),
        *(b"/dev/sda / ext4 rw", rb"a /\777\000 b", b"a / ", b"PRETTY_NAME=\x1b[31m", b"PRETTY_NAME="),
        *(b"0-999999999", b"0-3,8", b"3-0", b"0x10de", b"0x030200", b"flags : hypervisor", b"microsoft", b"\x00" * 40),
        *(b"NCCL_P2P_DISABLE=1", b"NCCL_\xff = \xfe # x", b"NCCL_DEBUG=" + b"A" * 9000, b"=", b";", b"4,1,5"),
        *(b"4,1,5,-;NVRM: Xid (PCI:0000:01:00): 79, x", b"4,1,x,-;NVRM: Xid (PCI:ffff:ff:ff): 99999"),
        *(b"NVRM version: NVIDIA UNIX Open Kernel Module 580.95.05", b"580.1", b"DMA", b"identity"),
    ]
)
CONTENTS = st.one_of(st.binary(max_size=60), st.lists(LINES, max_size=4).map(b"\n".join))
fuzz = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FILES), CONTENTS, max_size=12))
@example({"proc/meminfo": b"MemTotal: " + b"9" * 5000 + b" kB"})
@example({"proc/uptime": "٣".encode(), "dev/kmsg": b"4,1,5,-;NVRM: Xid (PCI:0000:01:00): 79, x"})
def test_a_machine_of_any_files_is_seen_and_judged(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name, data in files.items():
        put(root / name, data)
    started = time.process_time()
    machine = collect(
        with_torch=False,
        environment={"HOME": "/home/u", "PATH": os.environ["PATH"]},
        root=root,
        cache_folder=root / "cache",
    )
    report = check_report(machine)
    assert report.diagnosis is not None
    assert [outcome.reason for outcome in report.diagnosis.outcomes if outcome.state == "crashed"] == []
    assert machine_from_json(to_json(machine).encode(), where="m.json") == replace(machine, origin="recorded")
    # One odd figure costs that figure, not all that is known of the host.
    assert machine.host is not None
    assert time.process_time() - started < SLOW_S


@fuzz
@given(CONTENTS, CONTENTS, st.text(max_size=20))
def test_any_settings_of_nccl(tmp_path_factory: pytest.TempPathFactory, one: bytes, other: bytes, home: str) -> None:
    root = tmp_path_factory.mktemp("nccl")
    put(root / "etc/nccl.conf", one)
    put(root / "home/u/.nccl.conf", other)
    for environment in ({"HOME": "/home/u"}, {"HOME": home}, {"NCCL_CONF_FILE": home}):
        for setting in read_nccl_files(root, environment):
            assert setting.name.startswith("NCCL_")
            assert len(setting.value) <= 300


LINKS = st.sampled_from(["loop", "nowhere", "/proc/self/mem", "/dev/zero", "..", "pipe", "folder", "file", "locked"])
COMMITS = st.sampled_from(["main", "", "../../x", "\x00", "loop", "a" * 300])
NAMES = st.sampled_from(["modeling_a.py", "config.json", "a-00001-of-00002.safetensors", "a.py", "x" * 200, "\udcff.py"])


@fuzz
@given(
    st.dictionaries(NAMES, LINKS, max_size=5), st.sampled_from(["main", "", "../../x", "\x00", "loop", "a" * 300]), LINKS
)
def test_any_cache_of_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, str], commit: str, refs: str
) -> None:
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--a--b"
    snapshot = repo / "snapshots/main"
    snapshot.mkdir(parents=True)
    odd(repo / "blobs", refs)
    put(repo / "refs/main", commit.encode())
    odd(cache / "models--odd", refs)
    for name, kind in entries.items():
        odd(snapshot / name, kind)
    started = time.process_time()
    for found in read_checkpoints(cache, snapshot):
        assert found.missing_files or found.lost_calls
    assert time.process_time() - started < SLOW_S


def odd(path: Path, kind: str) -> None:
    """Make something that nobody expects there."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("file", "locked"):
        path.write_bytes(b"class A(PreTrainedModel):\n\xff\x00")
        path.chmod(0 if kind == "locked" else 0o600)
    else:
        path.symlink_to(path.name if kind == "loop" else kind)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A snapshot with one byte that is not UTF-8."""
    data = draw(st.sampled_from(sorted(MACHINES.glob("2x*.json"))[:6])).read_bytes()
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + b"\xff" + data[at + 1 :]


NO_REPORTS = [
    *(b"", b"null", b"[]", b"{}", b'{"machine": 3}', b'{"machine": {}}', b"[" * 9000, b"\xff\xfe{\x00}\x00"),
    *(b'{"machine": null, "diagnosis": 1}', b'{"exit_status": 1e400}', b'{"machine": {"machine": {}}}'),
]


@fuzz
@given(st.one_of(st.binary(max_size=60), damaged(), st.sampled_from(NO_REPORTS)))
def test_any_report_to_compare_with(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("since") / "since.json"
    path.write_bytes(data)
    try:
        saved = read_saved(path)
    except UsageError as error:
        said = str(error)
    else:
        # Of a report of another version, what nobody asks for may be anything.
        report = with_changes(check_report(Machine(origin="recorded", description="x")), saved)
        said = f"--since {report.changes.where if report.changes is not None else ''}: compared."
    assert said.startswith(f"--since {path}: ")
    assert said.endswith(".")


VALUES = st.one_of(
    st.integers(),
    st.booleans(),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=2),
    st.sampled_from(["20GiB", "8.0", "sm_90", "VLM5", "VLM999", "-1GiB", "1e9999", "\x00", "9" * 5000]),
)
KEYS = st.sampled_from(["gpus", "vram", "nvlink", "capability", "model", "ignore", "strict", "gpu", "", "\u202e", "a" * 99])


def toml(value: object) -> str:
    """TOML of a value; what TOML cannot hold is written all the same."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


@fuzz
@given(st.dictionaries(KEYS, VALUES, max_size=3), st.binary(max_size=3))
@example({"gpus": 10**30}, b"")
@example({}, b"\xff")
@example({"model": "x"}, b"[tool]\nvlm-doctor = 3")
def test_any_table_of_a_project(tmp_path_factory: pytest.TempPathFactory, table: dict[str, object], after: bytes) -> None:
    folder = tmp_path_factory.mktemp("project")  # not where other tests would find it
    lines = [f'"{key}" = {toml(value)}' for key, value in table.items()]
    text = "\n".join(["[tool.vlm-doctor]", *lines, ""])
    (folder / "pyproject.toml").write_bytes(text.encode("utf-8", "surrogatepass") + after)
    try:
        said = f"{read_project(folder).path}"
    except UsageError as error:
        said = str(error)
    assert said.startswith(str(folder / "pyproject.toml"))
    assert len(said) < 600


PIECES = st.sampled_from(
    [
        *(b"Traceback (most recent call last):\n", b'  File "a.py", line 1, in f\n', b"CUDA error: ", b"\x1b[31m"),
        *(b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n", b"NCCL WARN ", b"[rank1]: "),
        *(b"NVRM: Xid (PCI:0000:01:00): 79", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\xff\xfe", "ü\n".encode("utf-16")),
        *(b"\n", b"\\n", b"\r", b"\x00", b"E   "),
    ]
)


@fuzz
@given(st.lists(st.one_of(PIECES, st.binary(max_size=30)), min_size=1, max_size=12).map(b"".join))
@example(b"\x1f\x8b\x08\x00" + bytes(range(256)) * 40)
@example(b"\xff\xfe" + b"C\x00U\x00D\x00A\x00" * 5)
@example(bytes(range(256)) * 20_000)
def test_any_log(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "log.bin"
    path.write_bytes(data)
    started = time.process_time()
    try:
        log = read_log(str(path))
    except UsageError as error:
        shown = [inert(str(error))]
    else:
        answer = answer_error(log.text, where=str(path), skipped_bytes=log.skipped_bytes)
        report = error_report(answer, Machine(origin="recorded", description="x"))
        shown = render(report, "terminal", **asdict(Look())).splitlines()
        assert json.loads(render(report, "json", **asdict(Look())))["exit_status"] == report.exit_status
    assert all(character.isprintable() for text in shown for character in text), shown
    assert time.process_time() - started < SLOW_S
