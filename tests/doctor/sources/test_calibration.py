"""Calibration with doubles of torch; the real one is in ``tests/gpu``."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vlm_doctor import check_map, cli, codec, collect, load_machine, load_profile, plan
from vlm_doctor.answer import check_report, with_suggestion
from vlm_doctor.calibration import Calibration, calibration_of
from vlm_doctor.errors import MachineError
from vlm_doctor.formats.calibration_text import calibration_text
from vlm_doctor.machine import Driver, GpuProcess, Machine
from vlm_doctor.placement import Stage
from vlm_doctor.planner.budget import CONTEXT_BYTES, budgets
from vlm_doctor.redaction import redact
from vlm_doctor.sources import calibration as source
from vlm_doctor.sources.calibration import Reading, calibrate, load_calibrations
from vlm_doctor.sources.nvml_answer import NvmlView
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Policy

pytestmark = pytest.mark.usefixtures("no_children_left")

TORCH = '''
"""A torch whose CUDA takes 500 MiB for a context, 80 for libraries, 8 for cuBLAS."""
import os, types
__version__ = "2.13.0+cu130"
TOTAL, MIB = 24 * 2**30, 2**20
outside, held, reserved = 0, 0, 0
bfloat16 = float32 = int64 = uint8 = bool = None

class Tensor:
    def __init__(self, size): self.size = size
    def __matmul__(self, other):
        global held, reserved, outside
        if not os.environ.get("MULTIPLIED"):
            os.environ["MULTIPLIED"] = "1"
            held += 8 * MIB; reserved += 20 * MIB; outside += 50 * MIB
        return self
    def __getattr__(self, name): return lambda *args, **kwargs: self

def empty(size, device=None, dtype=None):
    global outside, held, reserved
    if not outside:
        outside = int(os.environ.get("CONTEXT_MIB", "500")) * MIB
        held += 512; reserved += 2 * MIB
    elif size > 1: reserved += 20 * MIB
    return Tensor(size)

def ones(*args, **kwargs): return Tensor(1)
zeros = ones
def cat(*args, **kwargs): return Tensor(1)
def conv(*args, **kwargs):
    global outside
    outside += 30 * MIB
class no_grad:
    def __enter__(self): pass
    def __exit__(self, *args): pass
device = lambda kind, index: (kind, index)
nothing = lambda *args, **kwargs: None
names = ("scaled_dot_product_attention", "linear", "layer_norm", "gelu", "silu", "softmax", "embedding")
nn = types.SimpleNamespace(functional=types.SimpleNamespace(conv2d=conv, **dict.fromkeys(names, nothing)))
cuda = types.SimpleNamespace(
    set_device=nothing, synchronize=nothing, empty_cache=nothing,
    memory_allocated=lambda gpu: held, memory_reserved=lambda gpu: reserved,
    mem_get_info=lambda gpu: (20 * 2**30 - outside - reserved, TOTAL),
)
'''
READING = Calibration(
    gpu_name="NVIDIA L4",
    driver_version="580.1",
    torch_version="2.13.0+cu130",
    date="2026-11-25",
    context_bytes=580 * MIB,
    bare_context_bytes=500 * MIB,
    workspace_bytes=8 * MIB,
    rounding_bytes=512,
    small_segment_bytes=2 * MIB,
    large_segment_bytes=20 * MIB,
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "fake/torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TORCH)
    return {**os.environ, "PYTHONPATH": str(package.parent)}


def machine(**fields: Any) -> Machine:
    """Two L4 of which one has 20 GiB free."""
    made: Machine = load_machine("2xL4")
    gpu = msgspec.structs.replace(made.gpus[0], memory_free_bytes=20 * GIB, **fields)
    return msgspec.structs.replace(
        made, gpus=(gpu, made.gpus[1]), driver=Driver(kernel_module_version="580.1", nvml_state="ok")
    )


def test_what_torch_takes_is_measured_and_kept(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (reading,) = calibrate(machine(), gpus=[0], environment=environment, cache_folder=tmp_path / "cache")
    assert reading.reason is None
    assert reading.calibration is not None
    assert msgspec.structs.replace(reading.calibration, date=READING.date, gpu_name="NVIDIA L4") == READING
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    assert load_calibrations(tmp_path / "cache") == (reading.calibration,)
    monkeypatch.setattr(metadata, "version", lambda name: "2.14.0")
    assert load_calibrations(tmp_path / "cache") == ()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"error": "GPU is lost"}, "it fails when asked (GPU is lost)"),
        ({"mig_enabled": True}, "MIG is enabled"),
        ({"compute_mode": "prohibited"}, "its compute mode is prohibited"),
        (
            {"compute_mode": "exclusive_process", "processes": (GpuProcess(pid=1, kind="compute"),)},
            "its compute mode is exclusive_process",
        ),
    ],
)
def test_a_gpu_that_must_not_be_touched(
    fields: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "Child", None)
    (reading,) = calibrate(machine(**fields), gpus=[0], cache_folder=tmp_path)
    assert (reading.reason, reading.calibration) == (reason, None)


@pytest.mark.parametrize(
    ("free_bytes", "driver", "reason"),
    [
        (GIB, "580.1", "only 1.0 GiB are free, and 2 GiB are needed"),
        (None, "580.1", "its free memory is unknown"),
        (20 * GIB, None, "the driver's version is unknown"),
    ],
)
def test_what_has_to_be_known(
    free_bytes: int | None, driver: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "Child", None)
    made = machine()
    gpu = msgspec.structs.replace(made.gpus[0], memory_free_bytes=free_bytes)
    made = msgspec.structs.replace(made, gpus=(gpu,), driver=Driver(kernel_module_version=driver))
    assert [reading.reason for reading in calibrate(made, cache_folder=tmp_path)] == [reason]


@pytest.mark.parametrize("context", ["-300", "8000"])
def test_a_neighbor_that_takes_or_gives_memory_spoils_it(environment: dict[str, str], context: str, tmp_path: Path) -> None:
    environment["CONTEXT_MIB"] = context
    (reading,) = calibrate(machine(), gpus=[0], environment=environment, cache_folder=tmp_path / "cache")
    assert reading.reason == "its free memory changed while it was measured; try again when no other process works there"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('no')", "ImportError: no"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        (TORCH.replace("synchronize=nothing", "synchronize=lambda gpu: os._exit(3)"), "exit status 3, after import torch"),
        (TORCH.replace('"2.13.0+cu130"', "None").replace("lambda gpu: held", "lambda gpu: 'much'"), "TypeError"),
    ],
)
def test_a_child_that_fails(environment: dict[str, str], text: str, reason: str, tmp_path: Path) -> None:
    (Path(environment["PYTHONPATH"]) / "torch/__init__.py").write_text(text)
    (reading,) = calibrate(machine(), gpus=[0], environment=environment, cache_folder=tmp_path / "cache")
    assert reading.reason is not None
    assert reading.reason.startswith(reason)


def test_the_child_looks_at_free_memory_itself(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LEAST_FREE_BYTES", 0)
    made = machine()
    gpu = msgspec.structs.replace(made.gpus[0], memory_free_bytes=GIB)
    made = msgspec.structs.replace(made, gpus=(gpu,))
    (reading,) = calibrate(made, environment=environment, cache_folder=tmp_path)
    assert reading.reason == "RuntimeError: only 1024 MiB are free"


@pytest.mark.parametrize("damage", ["{", "link"])
def test_a_damaged_cache_is_no_cache(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    path = tmp_path / "calibration-1.json"
    if damage == "link":
        (tmp_path / "other").write_bytes(msgspec.json.encode(READING))
        path.symlink_to(tmp_path / "other")
    else:
        path.write_text(damage)
    assert load_calibrations(tmp_path) == ()


def test_without_torch_or_home_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(source, "default_folder", lambda: None)
    assert load_calibrations() == ()
    monkeypatch.setattr(metadata, "version", missing)
    assert load_calibrations(tmp_path) == ()


def test_the_budget_uses_what_was_measured_on_the_same_card_and_driver() -> None:
    made = machine()
    reading = msgspec.structs.replace(READING, gpu_name=made.gpus[0].name)
    assert calibration_of((reading,), made.gpus[0].name, "580.1") == reading
    assert calibration_of((reading,), made.gpus[0].name, "570.0") is None
    budget = budgets(made, Policy(calibrations=(reading,))).usable[0]
    assert (budget.context_bytes, budget.workspace_bytes) == (580 * MIB, 8 * MIB)
    assert budget.context_source == budget.workspace_source == "calibrated on this machine, 2026-11-25"
    chosen = budgets(made, Policy(calibrations=(reading,), context_bytes=GIB)).usable[0]
    assert (chosen.context_bytes, chosen.context_source) == (GIB, "policy")
    other = msgspec.structs.replace(reading, gpu_name="another")
    assert budgets(made, Policy(calibrations=(other,))).usable[0].context_bytes == CONTEXT_BYTES


def test_what_is_printed() -> None:
    text = calibration_text([(0, "NVIDIA L4", READING, None), (1, "NVIDIA L4", None, "MIG is enabled")])
    assert text == (
        "GPU 0 (NVIDIA L4), driver 580.1, torch 2.13.0+cu130:\n"
        "  CUDA context                      500 MiB\n"
        "  libraries and kernels              80 MiB\n"
        "  cuBLAS workspace                  8.0 MiB\n"
        "  allocator: smallest block 512 bytes, segments of 2 and 20 MiB\n"
        "GPU 1 (NVIDIA L4): not measured, MIG is enabled.\n"
    )
    assert calibration_text([]) == "There is no GPU to measure.\n"


@pytest.mark.parametrize(("readings", "status"), [((), 3), ((Reading(gpu=0, name="L4", calibration=READING),), 0)])
def test_the_command(
    readings: tuple[Reading, ...], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlm_doctor.sources.collect", lambda **_: load_machine("2xL4"))
    monkeypatch.setattr(source, "calibrate", lambda *_, **__: readings)
    for words in (["calibrate"], ["calibrate", "--json", "--gpus", "0"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == status
        out = capsys.readouterr().out
    written = json.loads(out)
    assert [one["gpu"] for one in written["readings"]] == [one.gpu for one in readings]
    assert written["exit_status"] == status


def test_a_machine_brings_the_readings_of_its_own_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = msgspec.structs.replace(READING, gpu_name="another")
    for reading in (READING, other):
        source._store(tmp_path, reading)
    monkeypatch.setattr(metadata, "version", lambda _: "2.13.0")
    card = msgspec.structs.replace(machine().gpus[0], name=READING.gpu_name)
    view = NvmlView(driver=Driver(kernel_module_version="580.1"), gpus=(card,))
    monkeypatch.setattr("vlm_doctor.sources.collection.understand", lambda _: view)

    seen = collect(with_torch=False, root=tmp_path, environment={}, cache_folder=tmp_path)
    elsewhere = collect(with_torch=False, root=tmp_path, environment={}, cache_folder=tmp_path / "none")

    assert (seen.calibrations, elsewhere.calibrations) == ((READING,), ())
    assert not [gap for gap in seen.gaps if gap.path == "calibrations"]
    again = codec.machine_from_json(codec.to_json(redact(seen)).encode(), where="snapshot")
    assert again.calibrations == (READING,)


def context_bytes(stage: Stage) -> int:
    return next(line.size_bytes for line in stage.ledger if line.kind == "context")


def test_every_plan_of_the_machine_counts_with_its_readings_and_a_policy_goes_before_them() -> None:
    profile = load_profile("zai-org/GLM-4.1V-9B-Thinking", allow_network=False)
    made = machine()
    reading = msgspec.structs.replace(READING, gpu_name=made.gpus[0].name, context_bytes=2 * GIB)
    known = msgspec.structs.replace(made, calibrations=(reading,))

    stage, checked = plan(profile, known).stages[0], check_map({"": 0}, profile, known)
    suggested = with_suggestion(check_report(known), profile).plan

    assert context_bytes(stage) == context_bytes(checked.best.stages[0]) == 2 * GIB
    assert context_bytes(plan(profile, made).stages[0]) == CONTEXT_BYTES
    assert suggested is not None
    assert context_bytes(suggested.stages[0]) == 2 * GIB
    chosen = msgspec.structs.replace(reading, context_bytes=GIB)
    assert budgets(known, Policy(calibrations=(chosen,))).usable[0].context_bytes == GIB


def test_a_snapshot_with_impossible_readings_is_refused() -> None:
    wrong = msgspec.structs.replace(machine(), calibrations=(msgspec.structs.replace(READING, context_bytes=-1),))
    with pytest.raises(MachineError, match=r"^snapshot: the calibration of NVIDIA L4 has a size out of range; record it"):
        codec.machine_from_json(codec.to_json(wrong).encode(), where="snapshot")
