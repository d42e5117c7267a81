"""Break a real machine with two GPUs on purpose, and see what the doctor says: ``python benchmarks/breakage.py [folder]``.

Nothing is broken for good: variables, files in a temporary folder, memory that a child process holds. Each case runs
``vlm-doctor --json`` in a process of its own and names the code that must be found. Reports go to
``folder`` (default: $OUT, or ``breakage``), one file a case. Exit status 1 when a case was not diagnosed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ballast import held

GIB = 2**30
DOCTOR = [sys.executable, "-m", "vlm_doctor", "--json", "--fresh-torch"]
CASE_TIMEOUT_S = 60
TORCH_CPU = """
import types
__version__ = "2.13.0+cpu"
version = types.SimpleNamespace(cuda=None)
cuda = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
"""


class Case(NamedTuple):
    """One way to break it."""

    name: str
    wanted: str | None
    """Code that must be found; ``None``: no error may be found that was not there before."""
    environment: Mapping[str, str] = MappingProxyType({})
    prefix: tuple[str, ...] = ()
    """Words before the command, such as ``unshare -m``."""
    limit: Callable[[], None] | None = None


def fake_torch(folder: Path, text: str, cuda: str = "None") -> dict[str, str]:
    """A package torch that is found before the real one."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(text)
    (folder / "torch/version.py").write_text(f"__version__ = '2.13.0+cpu'\ncuda = {cuda}\n")
    return in_front("PYTHONPATH", folder)


def in_front(name: str, folder: Path) -> dict[str, str]:
    """A search path with a folder before what is there."""
    return {name: os.pathsep.join(filter(None, (str(folder), os.environ.get(name))))}


def stub_libcuda(folder: Path) -> dict[str, str]:
    """Some library under the name of libcuda, in a folder named as the toolkit's for linking."""
    stubs = folder / "lib64/stubs"
    stubs.mkdir(parents=True)
    lines = Path("/proc/self/maps").read_text().splitlines()
    library = next(line[line.index("/") :] for line in lines if "/libm" in line or "/libz" in line or "/libc.so" in line)
    shutil.copy(library, stubs / "libcuda.so.1")
    return in_front("LD_LIBRARY_PATH", stubs)


def few_addresses() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (64 * GIB, 64 * GIB))


def cases(folder: Path, uuids: list[str]) -> list[Case]:
    """Every way to break this machine."""
    visible = "CUDA_VISIBLE_DEVICES"
    shadow = folder / "shadow"
    shadow.mkdir()
    (shadow / "pynvml.py").write_text("def nvmlInit():\n    pass\n")
    segfault = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    small = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    return [
        Case("nothing", None),
        Case("every GPU hidden", "VLM201", {visible: ""}),
        Case("hidden by -1", "VLM201", {visible: "-1"}),
        Case("a word of another variable", "VLM201", {visible: "all"}),
        Case("an index twice", "VLM201", {visible: "0,0"}),
        Case("an unknown UUID", "VLM201", {visible: "GPU-ffffffff-ffff"}),
        Case("an index that does not exist", "VLM202", {visible: "0,9"}),
        Case("a wrong separator", "VLM202", {visible: "0;1"}),
        Case("the beginning of a UUID", None, {visible: uuids[1][:12]}),
        Case("CPU build of torch in front", "VLM302", fake_torch(folder / "cpu", TORCH_CPU)),
        Case(
            "torch raises", "VLM304", fake_torch(folder / "raises", "raise OSError('libcudart.so.13: not found')", "'13.0'")
        ),
        Case("torch crashes", "VLM305", fake_torch(folder / "crashes", segfault, "'13.0'")),
        Case("torch hangs", "VLM305", fake_torch(folder / "hangs", "import time; time.sleep(3600)", "'13.0'")),
        Case("libcuda is a stub", "VLM112", stub_libcuda(folder / "stub")),
        Case("another module pynvml", "VLM105", in_front("PYTHONPATH", shadow)),
        Case("an allocator option misspelt", "VLM311", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments=True"}),
        Case("accelerate told to use the CPU", "VLM312", {"ACCELERATE_USE_CPU": "true"}),
        Case("an interface that does not exist", "VLM407", {"NCCL_SOCKET_IFNAME": "nosuch0"}),
        Case("peer access switched off", "VLM407", {"NCCL_P2P_DISABLE": "1"}),
        Case("more than the scheduler granted", "VLM207", {"SLURM_JOB_GPUS": "0"}),
        Case("few addresses", "VLM507", limit=few_addresses),
        Case("small /dev/shm", "VLM503", prefix=("unshare", "-m", "sh", "-c", small, "sh")),
    ]


def run(case: Case) -> dict[str, Any] | None:
    """The report of the doctor on a machine broken so; ``None`` when this case is not possible here."""
    done = subprocess.run(
        [*case.prefix, *DOCTOR],
        capture_output=True,
        text=True,
        env={**os.environ, **case.environment},
        timeout=CASE_TIMEOUT_S,
        preexec_fn=case.limit,
        check=False,
    )
    if case.prefix and not done.stdout:
        return None
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def found(report: dict[str, Any], *severities: str) -> list[str]:
    """Codes of findings of these severities, worst first."""
    outcomes = report["diagnosis"]["outcomes"]
    return [f["code"] for o in outcomes for f in o["findings"] if f["severity"] in severities]


def judge(case: Case, report: dict[str, Any] | None, seconds: float, before: set[str]) -> bool:
    """Print a line; gives whether the case was diagnosed."""
    if report is None:
        print(f"{case.name:<34}{case.wanted or 'nothing':<9}not possible here")
        return True
    serious = found(report, "error", "warning")
    fresh = [code for code in dict.fromkeys(serious) if code not in before]
    crashed = [o["code"] for o in report["diagnosis"]["outcomes"] if o["state"] == "crashed"]
    everything = found(report, "error", "warning", "info")
    is_named = case.wanted in everything if case.wanted else set(found(report, "error")) <= before
    is_right = is_named and not crashed
    shown = ", ".join(fresh) or "nothing new"
    print(f"{case.name:<34}{case.wanted or 'nothing':<9}{'ok' if is_right else 'MISSED':<8}{seconds:>6.1f} s  {shown}")
    return is_right


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OUT", "breakage"))
    folder.mkdir(parents=True, exist_ok=True)
    healthy = run(Case("nothing", None))
    assert healthy is not None
    machine = healthy["machine"]
    uuids = [gpu["uuid"] for gpu in machine["gpus"]]
    if len(uuids) < 2:
        print("needs two GPUs, not run")
        return 3
    before = set(found(healthy, "error", "warning"))
    print(f"{machine['description']}, driver {machine['driver']['driver_version']}")
    print("found before:", ", ".join(before) or "nothing")
    print("sources, seconds:", ", ".join(f"{name} {seconds}" for name, seconds in machine["seconds"].items()))
    print("gaps:", "; ".join(f"{gap['path']}: {gap['reason']}" for gap in machine["gaps"]) or "none")
    print(f"{'broken by':<34}{'wanted':<9}{'':<8}{'time':>8}  errors and warnings")
    is_right = True
    with tempfile.TemporaryDirectory() as name:
        for case in cases(Path(name), uuids):
            started = time.perf_counter()
            report = run(case)
            is_right &= judge(case, report, time.perf_counter() - started, before)
            save(folder, case.name, report)
    case, report, seconds = Case("GPU 0 half taken", "VLM501"), None, 0.0
    with contextlib.suppress(OSError), held([12.0]):
        started = time.perf_counter()
        report = run(case)
        seconds = time.perf_counter() - started
    if report is not None and "VLM502" in found(report, "warning"):
        case = case._replace(wanted="VLM502")  # in a container the holder is not visible
    is_right &= judge(case, report, seconds, before)
    save(folder, case.name, report)
    print("every case was diagnosed" if is_right else "some cases were MISSED")
    return 0 if is_right else 1


def save(folder: Path, name: str, report: dict[str, Any] | None) -> None:
    if report is not None:
        path = folder / f"{name.replace(' ', '-').replace('/', '')}.json"
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
