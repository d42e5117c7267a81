"""The machines of tests/machines as a whole: which verdict each gets, and that nothing else is said of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import CHECKS, diagnose
from vlm_doctor.findings import Finding
from vlm_doctor.machine import Driver, Gpu, Machine, TorchView

ROOT = Path(__file__).parents[3]
NAMES = sorted(path.stem for path in (ROOT / "tests" / "machines").glob("*.json"))

EXPECTED = {
    # Name of the machine to every finding above info.
    "2xa10-half-taken": ["warning VLM501"],
    "2xa6000-translating-iommu": ["warning VLM406"],
    "2xh200-recorded-12-and-23gib-free": ["warning VLM501"],
    "2xh200-recorded-23gib-free": ["warning VLM501"],
    "3090-in-a-mining-slot": ["warning VLM115"],
    "5090-closed-modules": ["error VLM113"],
    "8xh100-fabric-down": ["error VLM403"],
    "a10-on-a-riser": ["warning VLM115"],
    "a100-mig": ["warning VLM110"],
    "alloc-conf-ignored": ["warning VLM311"],
    "alloc-conf-misspelt": ["warning VLM311"],
    "badly-joined": ["warning VLM405"],
    "cache-of-root": ["warning VLM509"],
    "cgroup-limit": ["warning VLM504"],
    "cogvlm-in-the-cache": ["warning VLM321"],
    "compat-on-geforce": ["error VLM112"],
    "confidential-not-ready": ["error VLM118"],
    "container-hidden-pids": ["warning VLM502"],
    "container-lacks-compute": ["error VLM205"],
    "container-no-injection": ["error VLM205"],
    "container-short-of-a-gpu": ["warning VLM208"],
    "corrupt-inforom": ["warning VLM121"],
    "cpu-torch": ["error VLM303"],
    "cudnn-twice": ["warning VLM315"],
    "debug-switches": ["warning VLM312", "warning VLM312"],
    "desktop-with-spare-card": ["warning VLM107"],
    "device-files-forbidden": ["error VLM106"],
    "driver-mismatch": ["error VLM104"],
    "driver-missing": ["error VLM102"],
    "exclusive-process": ["error VLM109"],
    "failing-nvlink": ["warning VLM409"],
    "far-from-its-gpus": ["warning VLM408"],
    "flash-attn-for-another-torch": ["error VLM313", "warning VLM313", "warning VLM313"],
    "foreign-cudnn": ["error VLM316"],
    "full-disk": ["warning VLM505"],
    "full-tmp": ["warning VLM508"],
    "gpu-lost": ["error VLM108"],
    "gpu-off-the-bus": ["error VLM107"],
    "gpus-taken-from-container": ["error VLM105"],
    "hot-gpu": ["warning VLM116"],
    "iommu-faults": ["warning VLM406"],
    "library-of-the-image": ["error VLM112"],
    "limited-addresses": ["warning VLM507", "warning VLM507"],
    "masked": ["error VLM201"],
    "mixed-order": ["warning VLM204"],
    "mps-dead": ["error VLM119"],
    "nccl-conf-left-over": ["warning VLM407", "warning VLM407", "warning VLM407"],
    "no-pillow": ["warning VLM319"],
    "nouveau": ["error VLM103"],
    "nvlink-down-in-the-log": ["warning VLM402"],
    "nvlink-half-dead": ["warning VLM402"],
    "nvml-crashed": ["error VLM105"],
    "offline-without-a-shard": ["warning VLM511"],
    "one-full-disk": ["warning VLM505"],
    "old-accelerate": ["error VLM309"],
    "old-bitsandbytes": ["warning VLM314"],
    "old-driver": ["error VLM306"],
    "orphaned-memory": ["warning VLM502"],
    "out-of-range": ["error VLM202"],
    "pynvml-shadowed": ["error VLM310"],
    "remap-failed": ["error VLM111"],
    "slow-conv3d": ["warning VLM320"],
    "slurm-unmasked": ["warning VLM207"],
    "small-shm": ["warning VLM503"],
    "stub-libcuda": ["error VLM112"],
    "t4-beside-a10": ["warning VLM122"],
    "torch-half-installed": ["error VLM302"],
    "torch-hang": ["error VLM305"],
    "torch-import-error": ["error VLM304"],
    "torch-missing": ["error VLM301"],
    "torch-sees-fewer": ["error VLM206"],
    "torchvision-left-behind": ["error VLM309"],
    "torch-segfault": ["error VLM305"],
    "transformers-cache-ignored": ["warning VLM318"],
    "transformers-missing": ["warning VLM308"],
    "unlicensed-vgpu": ["warning VLM117"],
    "v100-missing-sm": ["error VLM307"],
    "wsl2-linux-driver": ["error VLM112"],
    "xid-48": ["warning VLM114", "warning VLM114"],
    "xid-79": ["error VLM108"],
}
SEVERAL = {
    # Machines that have several faults, and which.
    "debug-switches": "two variables, each set for itself",
    "flash-attn-for-another-torch": "three packages from three places",
    "limited-addresses": "a limit of the process and one of the container",
    "nccl-conf-left-over": "three settings, in a file and in the environment",
    "xid-48": "memory of a GPU, and an Xid that the list does not have",
}
HEALTHY = [
    "2x4090-no-p2p",
    "2xh200-nvswitch",
    "2xh200-recorded",
    "2xh200-recorded-in-full",
    "2xl4-idle",
    "4x3090-two-bridges",
    "8xa100-nvswitch",
    "8xb200-nvswitch",
    "8xh200-recorded",
    "cache-in-memory",
    "ci-container",
    "confidential-ready",
    "container-with-some-gpus",
    "cuda-toolkit-on-the-path",
    "gb10-unified",
    "interrupted-download",
    "iommu-in-a-virtual-machine",
    "laptop-4090",
    "laptop-no-gpu",
    "licensed-vgpu",
    "links-unread",
    "mps-of-the-host",
    "mps-running",
    "new-nvlink-replays",
    "nvlink-pair-behind-iommu",
    "offline-cluster",
    "old-xids",
    "one-gpu-passed-through",
    "packages-from-home",
    "rhel8-pair",
    "rocm-variables",
    "sandbox-that-hides-much",
    "scheduled-job",
    "some-hidden",
    "t4-with-flash-attention",
    "t4-with-half-its-lanes",
    "unloaded-when-idle",
    "wsl2",
    "wsl2-pair",
]


TRAPS = {
    # What a hasty doctor takes for a fault, to a machine that has it and is fine.
    "fabric manager absent where there is no NVSwitch": "2xl4-idle",
    "PCIe generation low while idle": "8xa100-nvswitch",
    "half the PCIe lanes by design": "t4-with-half-its-lanes",
    "CUDA_HOME and LD_LIBRARY_PATH not set": "2xl4-idle",
    "CUDA_HOME and LD_LIBRARY_PATH set": "cuda-toolkit-on-the-path",
    "toolkit of another version than torch's CUDA": "cuda-toolkit-on-the-path",
    "hardware slowdown of a laptop on battery": "laptop-4090",
    "fields not supported on a consumer card": "2x4090-no-p2p",
    "fields not supported in WSL2": "wsl2-pair",
    "no memory figure on unified memory": "gb10-unified",
    "no GPU, and none expected": "ci-container",
    "no GPU in a laptop": "laptop-no-gpu",
    "GPUs of the host that the container was not given": "container-with-some-gpus",
    "GPUs of other jobs whose files are forbidden": "scheduled-job",
    "IOMMU on, and only NVLink between the GPUs": "nvlink-pair-behind-iommu",
    "IOMMU on inside a virtual machine": "iommu-in-a-virtual-machine",
    "optional packages absent": "2xl4-idle",
    "expandable segments under the old name": "8xa100-nvswitch",
    "Xid of a program, and an old one": "old-xids",
    "daemon of the host seen from a container": "mps-of-the-host",
    "read-only cache of an offline node": "offline-cluster",
    "persistence mode off": "unloaded-when-idle",
    "vGPU with its licence": "licensed-vgpu",
    "GPUs hidden on purpose": "some-hidden",
    "links that could not be read": "links-unread",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_no_fault(trap: str, load: Callable[..., Machine]) -> None:
    assert TRAPS[trap] in HEALTHY

    diagnosis = diagnose(load(TRAPS[trap]))

    assert diagnosis.count("error") == diagnosis.count("warning") == 0
    assert all(outcome.state != "crashed" for outcome in diagnosis.outcomes)


def test_every_machine_is_judged_here() -> None:
    assert {*EXPECTED, *HEALTHY} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_machine_gets_its_cause_and_a_healthy_one_nothing(name: str, load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(load(name))

    assert [f"{f.severity} {f.code}" for f in diagnosis.findings if f.severity != "info"] == EXPECTED.get(name, [])


@pytest.mark.parametrize("name", NAMES)
def test_one_fault_is_said_once(name: str, load: Callable[..., Machine]) -> None:
    """A broken machine has one finding above info, the cause; several only where there are several faults."""
    findings = [finding for finding in diagnose(load(name)).findings if finding.severity != "info"]

    assert sum(finding.severity == "error" for finding in findings) <= 1
    if name in SEVERAL:
        assert len(findings) > 1
        assert len({finding.message for finding in findings}) == len(findings)
    else:
        assert [finding.message for finding in findings][1:] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_check_has_an_outcome_and_none_crashes(name: str, load: Callable[..., Machine]) -> None:
    outcomes = diagnose(load(name)).outcomes

    assert [outcome.code for outcome in outcomes] == [check.code for check in CHECKS]
    assert [outcome.reason for outcome in outcomes if outcome.state == "crashed"] == []
    assert all(outcome.reason for outcome in outcomes if outcome.state in ("skipped", "unknown"))


@pytest.mark.parametrize("name", NAMES)
def test_findings_are_complete_and_their_evidence_is_real(name: str, load: Callable[..., Machine]) -> None:
    machine = load(name)

    for finding in diagnose(machine).findings:
        assert_complete(finding, machine)


def assert_complete(finding: Finding, machine: Machine) -> None:
    assert finding.message.endswith(".")
    assert "\n" not in finding.message
    assert finding.evidence
    for path in finding.evidence:
        first = path.replace("[", ".").split(".")[0]
        assert hasattr(machine, first), path
    assert set(finding.gpus) <= {gpu.index for gpu in machine.gpus}
    if finding.severity != "info":
        assert finding.fix is not None
        assert finding.fix.text.endswith(".")
        assert finding.fix.commands or finding.fix.who == "administrator"


@pytest.mark.parametrize("name", ["laptop-no-gpu", "ci-container"])
def test_a_machine_without_gpu_gets_one_info_and_reasons(name: str, load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(load(name))

    assert [(f.severity, f.code) for f in diagnosis.findings] == [("info", "VLM101")]
    reasons = {outcome.code: outcome.reason for outcome in diagnosis.outcomes if outcome.state == "skipped"}
    assert {reasons[code] for code in ("VLM109", "VLM206", "VLM301", "VLM402", "VLM501", "VLM505")} == {"no GPU"}


def test_driver_missing_says_so_once_and_explains_the_rest(load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(load("driver-missing"))

    assert [finding.code for finding in diagnosis.findings] == ["VLM102"]
    explained = {o.code for o in diagnosis.outcomes if o.reason == "explained by VLM102"}
    assert {"VLM105", "VLM107", "VLM206", "VLM301", "VLM501"} <= explained


def test_a_blind_laptop_is_not_explained_by_a_shadowed_pynvml(load: Callable[..., Machine]) -> None:
    libraries = load("pynvml-shadowed").libraries
    diagnosis = diagnose(load("laptop-no-gpu", libraries=libraries, driver=Driver(nvml_state="no_binding")))

    assert [(f.severity, f.code) for f in diagnosis.findings] == [("warning", "VLM310"), ("info", "VLM101")]
    assert next(o.reason for o in diagnosis.outcomes if o.code == "VLM109") == "no GPU"


@pytest.mark.parametrize("name", NAMES)
def test_no_check_crashes_when_facts_are_missing(name: str, load: Callable[..., Machine]) -> None:
    machine = load(name)
    bare = tuple(Gpu(index=gpu.index, uuid=gpu.uuid, name=gpu.name) for gpu in machine.gpus)
    poorer = [
        replace(machine, host=None),
        replace(machine, libraries=None),
        replace(machine, driver=Driver()),
        replace(machine, links=(), pci_devices=()),
        replace(machine, torch=TorchView(state="ok")),
        replace(machine, torch=TorchView(state="not_asked", message="still being asked")),
        replace(machine, gpus=bare),
        replace(machine, gpus=(), links=()),
        replace(machine, origin="synthetic"),
    ]

    for one in poorer:
        assert [o.reason for o in diagnose(one).outcomes if o.state == "crashed"] == []


def test_a_bare_machine_is_never_called_broken(load: Callable[..., Machine]) -> None:
    machine = load("2xl4-idle")
    bare = tuple(Gpu(index=gpu.index, uuid=gpu.uuid, name=gpu.name) for gpu in machine.gpus)

    diagnosis = diagnose(replace(machine, gpus=bare, links=()))

    assert diagnosis.count("error") == diagnosis.count("warning") == 0


@pytest.mark.parametrize(
    "spec", ["2xL4", "8xH100:nvswitch", "4x3090:nvlink=0-1,2-3", "L4+A10", "24GiB,12GiB", "2xL4:free=9GiB"]
)
def test_a_made_up_machine_is_healthy_and_nothing_about_it_is_unknown(spec: str) -> None:
    from vlm_doctor.sources.synthetic import parse_machine

    diagnosis = diagnose(parse_machine(spec))

    assert diagnosis.count("error") == diagnosis.count("warning") == 0
    assert {outcome.state for outcome in diagnosis.outcomes} <= {"passed", "found", "skipped"}


def test_files_are_those_that_the_generator_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    written = importlib.import_module("make_machines").machines()

    assert {f"{name}.json" for name in NAMES if "recorded" not in name} == set(written)
    stale = [name for name, text in written.items() if (ROOT / "tests" / "machines" / name).read_text("utf-8") != text]
    assert stale == [], "run python tools/make_machines.py"
