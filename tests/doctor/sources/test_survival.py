"""Whatever state torch and NVML are in, there is a machine, with the right state in it, in time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vlm_doctor.codec import machine_from_json, to_json
from vlm_doctor.machine import Gap, Machine, PciDevice, TorchView
from vlm_doctor.sources import Collection, collect, collection, libraries, load_machine
from vlm_doctor.sources.collection import describe
from vlm_doctor.sources.torch_view import TorchQuestion

pytestmark = pytest.mark.usefixtures("no_children_left")
Environment = Callable[[dict[str, Any]], dict[str, str]]

GOOD_TORCH = """
import types, warnings
__version__ = "2.13.0+cu130"
version = types.SimpleNamespace(cuda=None)
cuda = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
"""
TORCH = {
    "good": (GOOD_TORCH, "ok", None),
    "ImportError": ("raise ImportError('libcudnn.so.9: cannot open')", "failed", "ImportError: libcudnn.so.9: cannot open"),
    "OSError": ("raise OSError('libtorch.so: undefined symbol')", "failed", "OSError: libtorch.so: undefined symbol"),
    "RuntimeError": ("raise RuntimeError('numpy 2')", "failed", "RuntimeError: numpy 2"),
    "SystemExit": ("raise SystemExit(0)", "failed", "SystemExit: 0"),
    "exit": ("import os; os._exit(0)", "crashed", "exit status 0"),
    "segfault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "SIGSEGV"),
    "abort": (
        "import os, sys; print('free(): x', file=sys.stderr); sys.stderr.flush(); os.abort()",
        "crashed",
        "SIGABRT: free(): x",
    ),
    "hang": ("import time; time.sleep(3600)", "timed_out", "no answer within 1.5 s"),
    "no version": ("x = 1", "failed", "AttributeError: module 'torch' has no attribute '__version__'"),
}
"""What torch/__init__.py holds, and what becomes of it. A torso without that file ends as "no version" does."""
NVML: dict[str, tuple[dict[str, Any], str]] = {
    "ok": ({"gpus": [{}]}, "ok"),
    "no library": ({"init": 12}, "no_library"),
    "driver not loaded": ({"init": 9}, "error"),
    "version mismatch": ({"init": 18}, "error"),
    "crash": ({"crash_in": "nvmlInit"}, "crashed"),
    "hang": ({"hang_in": "nvmlInit"}, "timed_out"),
    "shadowed": ({"missing": ["nvmlInit"]}, "no_binding"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def torch_folder(tmp_path: Path) -> Callable[[str | None], str]:
    """Make a folder for PYTHONPATH with a package torch whose __init__.py holds a text."""

    def make(text: str | None) -> str:
        package = tmp_path / "fake_torch/torch"
        package.mkdir(parents=True)
        (package / "version.py").write_text("__version__ = '2.13.0'\ncuda = None\n")
        if text is not None:
            (package / "__init__.py").write_text(text)
        return str(package.parent)

    return make


def look(root: Path, tmp_path: Path, environment: dict[str, str], **options: Any) -> Machine:
    options = {"deadline_s": 20.0, "torch_deadline_s": 20.0, **options}
    machine = collect(root=root, environment=environment, cache_folder=tmp_path / "cache", **options)
    recorded = machine_from_json(to_json(machine).encode(), where="test")
    assert recorded == msgspec.structs.replace(machine, origin="recorded")
    return machine


@pytest.mark.parametrize("name", list(TORCH))
def test_any_torch(
    name: str, root: Path, tmp_path: Path, torch_folder: Callable[[str | None], str], double_environment: Environment
) -> None:
    text, state, message = TORCH[name]
    environment = double_environment({"init": 12})
    environment["PYTHONPATH"] = f"{torch_folder(text)}:{environment['PYTHONPATH']}"
    machine = look(root, tmp_path, environment, torch_deadline_s=1.5 if name == "hang" else 20.0)
    assert (machine.torch.state, machine.torch.message) == (state, message)
    assert machine.driver.nvml_state == "no_library"
    assert machine.libraries is not None
    assert machine.host is not None


def test_torso_of_torch(
    root: Path,
    tmp_path: Path,
    torch_folder: Callable[[str | None], str],
    double_environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A folder without __init__.py loses against any real torch later on the path, so none may be there.
    monkeypatch.setattr(collection, "search_path", lambda environment: [environment["PYTHONPATH"].partition(":")[0]])
    environment = double_environment({"init": 12})
    environment["PYTHONPATH"] = f"{torch_folder(None)}:{environment['PYTHONPATH']}"
    machine = look(root, tmp_path, environment, with_torch=False)
    assert machine.libraries is not None
    assert machine.libraries.torch_problem is not None
    assert machine.libraries.torch_problem.endswith("fake_torch/torch is a torso: it has no __init__.py")


def test_torch_that_is_not_installed_starts_no_child(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_doctor.sources.torch_view.find_torch", lambda path: None)
    question = TorchQuestion([], {}, root=root, deadline_s=1, is_fresh=False, cache_folder=tmp_path)
    assert question.known() == question.view() == TorchView(state="absent", message="torch is not installed")
    question.close()


def test_corrupt_version_file_of_torch(
    root: Path, tmp_path: Path, torch_folder: Callable[[str | None], str], double_environment: Environment
) -> None:
    environment = double_environment({"init": 12})
    folder = torch_folder("from .version import __version__\n")
    (Path(folder) / "torch/version.py").write_bytes(b"__version__ = '2.13\x00")
    environment["PYTHONPATH"] = f"{folder}:{environment['PYTHONPATH']}"
    machine = look(root, tmp_path, environment)
    assert machine.torch.state == "failed"
    assert machine.libraries is not None
    assert machine.libraries.torch_build is None
    assert "version.py cannot be read" in (machine.libraries.torch_problem or "")


@pytest.mark.parametrize("name", list(NVML))
def test_any_nvml(name: str, root: Path, tmp_path: Path, double_environment: Environment) -> None:
    scenario, state = NVML[name]
    machine = look(
        root, tmp_path, double_environment(scenario), with_torch=False, deadline_s=1.5 if name == "hang" else 20.0
    )
    assert machine.driver.nvml_state == state
    assert len(machine.gpus) == (1 if name == "ok" else 0)
    assert (machine.torch.state, machine.torch.message) == ("not_asked", "was not asked")
    files = {"environment", "pci_devices", "driver", "host", "libraries", "nccl_settings", "checkpoints", "calibrations"}
    assert set(machine.seconds) == {*files, "nvml", "gpus"}


def test_binding_that_is_not_installed(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "pynvml.py").write_text("raise ImportError('no such thing')")
    machine = look(root, tmp_path, {**os.environ, "PYTHONPATH": str(folder)}, with_torch=False)
    assert machine.driver.nvml_state == "no_binding"
    assert machine.driver.nvml_message == "import pynvml: ImportError: no such thing"


def test_verdict_does_not_wait_for_torch(
    root: Path, tmp_path: Path, torch_folder: Callable[[str | None], str], double_environment: Environment
) -> None:
    environment = double_environment({"init": 12})
    environment["PYTHONPATH"] = f"{torch_folder(TORCH['hang'][0])}:{environment['PYTHONPATH']}"
    with Collection(root=root, environment=environment, torch_deadline_s=600, cache_folder=tmp_path) as running:
        machine = running.without_torch()
        assert (machine.torch.state, machine.torch.message) == ("not_asked", "still being asked")
        assert "torch" not in machine.seconds
        assert running.without_torch() is machine


def test_answer_of_torch_is_remembered_and_can_be_refused(
    root: Path, tmp_path: Path, torch_folder: Callable[[str | None], str], double_environment: Environment
) -> None:
    environment = double_environment({"init": 12})
    environment["PYTHONPATH"] = f"{torch_folder(GOOD_TORCH)}:{environment['PYTHONPATH']}"
    first = look(root, tmp_path, environment)
    assert (first.torch.state, first.torch.is_cached) == ("ok", False)
    assert first.seconds["torch"] == first.torch.seconds
    with Collection(root=root, environment=environment, cache_folder=tmp_path / "cache") as running:
        assert running.without_torch().torch.is_cached
        assert running.complete().torch.is_cached
    assert not look(root, tmp_path, environment, fresh_torch=True).torch.is_cached
    assert not look(root, tmp_path, {**environment, "CUDA_VISIBLE_DEVICES": "0"}).torch.is_cached


def test_without_a_cache_folder_torch_is_asked(
    root: Path,
    tmp_path: Path,
    torch_folder: Callable[[str | None], str],
    double_environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlm_doctor.sources.torch_view.default_folder", lambda: None)
    environment = double_environment({"init": 12})
    environment["PYTHONPATH"] = f"{torch_folder(GOOD_TORCH)}:{environment['PYTHONPATH']}"
    assert collect(root=root, environment=environment).torch.state == "ok"


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("read_environment", "environment"),
        ("read_pci_devices", "pci_devices"),
        ("read_driver_files", "driver"),
        ("read_host", "host"),
        ("read_libraries", "libraries"),
        ("read_nccl_files", "nccl_settings"),
        ("read_checkpoints", "checkpoints"),
        ("understand", "gpus"),
    ],
)
def test_source_that_fails_is_a_gap_and_the_rest_is_read(
    source: str,
    part: str,
    root: Path,
    tmp_path: Path,
    double_environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bad day")

    monkeypatch.setattr(libraries if source == "read_libraries" else collection, source, broken)
    machine = look(root, tmp_path, double_environment({"gpus": [{}]}), with_torch=False)
    assert Gap(path=part, reason="RuntimeError: bad day") in machine.gaps
    assert part in machine.seconds
    assert (machine.host is None) == (part == "host")
    assert (machine.libraries is None) == (part == "libraries")
    assert (len(machine.gpus), machine.driver.nvml_state) == ((0, "crashed") if part == "gpus" else (1, "ok"))


def test_torch_that_cannot_even_be_asked_is_a_gap(
    root: Path, tmp_path: Path, double_environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("bad day")

    monkeypatch.setattr("vlm_doctor.sources.torch_view.find_torch", broken)
    machine = look(root, tmp_path, double_environment({"gpus": [{}]}))
    assert (machine.torch.state, machine.gaps[0]) == ("not_asked", Gap(path="torch", reason="RuntimeError: bad day"))
    assert len(machine.gpus) == 1


def test_numa_node_of_a_gpu_is_that_of_its_pci_device(root: Path, tmp_path: Path, double_environment: Environment) -> None:
    for address, node in (("0000:01:00.0", "1"), ("0000:02:00.0", "-1")):
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        for name, text in {"vendor": "0x10de", "class": "0x030200", "device": "0x2335", "numa_node": node}.items():
            (folder / name).write_text(text)
    gpus = [{"PciInfo": "00000000:01:00.0"}, {"PciInfo": "00000000:02:00.0"}, {}]
    machine = look(root, tmp_path, double_environment({"gpus": gpus}), with_torch=False)
    assert [gpu.numa_node for gpu in machine.gpus] == [1, None, None]
    assert machine.host is not None
    assert machine.host.iommu == "off"


def test_description_says_what_was_seen() -> None:
    mixed = load_machine("2xL4+A10")
    assert describe(mixed.gpus, ()) == "2 x NVIDIA L4 + 1 x NVIDIA A10"
    assert describe((), ()) == "no NVIDIA GPU"
    device = PciDevice(bus_id="0000:01:00.0", device_id="2335")
    assert describe((), (device,)) == "1 NVIDIA GPU on the PCI bus, none answering"
    assert describe((), (device, device)) == "2 NVIDIA GPUs on the PCI bus, none answering"


def test_live_machine_is_this_computer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vlm_doctor.sources.torch_view.find_torch", lambda path: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = load_machine("live")
    assert machine.origin == "live"
    assert machine.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert machine.libraries is not None
    assert machine.libraries.python == sys.version.split()[0]
    assert machine.collected_at is not None


@pytest.mark.models
def test_real_torch_answers(tmp_path: Path, double_environment: Environment) -> None:
    import torch

    machine = collect(cache_folder=tmp_path, environment=double_environment({"init": 12}), torch_deadline_s=120)
    assert (machine.torch.state, machine.torch.version) == ("ok", torch.__version__)
    assert machine.torch.cuda == torch.version.cuda
