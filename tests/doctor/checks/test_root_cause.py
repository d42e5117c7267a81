"""One cause gives one error: what it also explains is named with it, and what is only a symptom is not said twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import CHECKS, diagnose
from vlm_doctor.findings import Diagnosis
from vlm_doctor.machine import Fabric, GpuProcess, KernelEvent, Machine, PciDevice, TorchView, VersionRule
from vlm_doctor.units import GIB, MIB

NO_CUDA = TorchView(state="ok", version="2.13.0+cu130", cuda="13.0", is_available=False, device_count=0)
"""What torch says whenever CUDA does not start, whatever the reason."""


def errors(diagnosis: Diagnosis) -> list[str]:
    return list(dict.fromkeys(finding.code for finding in diagnosis.findings if finding.severity == "error"))


@pytest.mark.parametrize(
    ("machine", "cause"),
    [
        # In the order in which the causes are asked about: the first that is there is the answer.
        ("driver-missing", "VLM102"),
        ("nouveau", "VLM103"),
        ("driver-mismatch", "VLM104"),
        ("nvml-crashed", "VLM105"),
        ("device-files-forbidden", "VLM106"),
        ("exclusive-process", "VLM109"),
        ("container-no-injection", "VLM205"),
        ("cpu-torch", "VLM303"),
        ("old-driver", "VLM306"),
        ("8xh100-fabric-down", "VLM403"),
        ("2xl4-idle", "VLM206"),
    ],
)
def test_torch_without_cuda_has_one_cause_or_is_said_to_have_none_known(
    machine: str, cause: str, load: Callable[..., Machine]
) -> None:
    diagnosis = diagnose(load(machine, torch=NO_CUDA))

    assert errors(diagnosis) == [cause]
    symptom = next(outcome for outcome in diagnosis.outcomes if outcome.code == "VLM206")
    assert symptom.state == ("found" if cause == "VLM206" else "skipped")
    if symptom.symptom_of is not None:
        assert symptom.symptom_of == cause
        assert symptom in diagnosis.symptoms(cause)


@pytest.mark.parametrize(
    ("machine", "cause"), [("cpu-torch", "VLM303"), ("old-driver", "VLM306"), ("8xh100-fabric-down", "VLM403")]
)
def test_a_cause_names_the_symptoms_that_are_there(machine: str, cause: str, load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(load(machine))

    assert [outcome.code for outcome in diagnosis.symptoms(cause)] == ["VLM206"]


def test_a_symptom_that_is_not_there_is_not_named(load: Callable[..., Machine]) -> None:
    works = TorchView(state="ok", version="2.13.0+cu130", cuda="13.0", is_available=True, device_count=2)

    diagnosis = diagnose(load("exclusive-process", torch=works))

    assert errors(diagnosis) == ["VLM109"]
    assert diagnosis.symptoms("VLM109") == ()
    assert next(outcome.reason for outcome in diagnosis.outcomes if outcome.code == "VLM206") == "explained by VLM109"


def test_two_causes_that_have_nothing_to_do_with_each_other_are_two_errors(load: Callable[..., Machine]) -> None:
    wheel = load("cpu-torch").libraries

    diagnosis = diagnose(load("8xh100-fabric-down", libraries=wheel, torch=NO_CUDA))

    assert errors(diagnosis) == ["VLM303", "VLM403"]
    assert [outcome.code for outcome in diagnosis.symptoms("VLM303")] == ["VLM206"]


def test_causes_never_explain_each_other_in_a_circle() -> None:
    explains = {check.code: {*check.explained_by, *check.told_by} for check in CHECKS}

    def reaches(code: str, wanted: str, seen: frozenset[str]) -> bool:
        return any(
            next_ == wanted or (next_ not in seen and reaches(next_, wanted, seen | {next_})) for next_ in explains[code]
        )

    assert [code for code in explains if reaches(code, code, frozenset())] == []


def test_what_was_demoted_says_by_what_and_counts_no_more(load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(load("cpu-torch"), ignore=("vlm30",))
    (finding,) = (finding for finding in diagnosis.findings if finding.code == "VLM303")

    assert (finding.severity, finding.demoted_from, finding.demoted_by) == ("info", "error", "--ignore VLM30")
    assert diagnosis.count("error") == 0
    assert replace(finding, severity="error").demoted("again").demoted_by == "again"
    assert finding.demoted("again") is finding


def above_info(diagnosis: Diagnosis) -> list[str]:
    return [finding.code for finding in diagnosis.findings if finding.severity != "info"]


def with_events(machine: Machine, *events: tuple[int, str]) -> Machine:
    logged = tuple(KernelEvent(kind="xid", code=code, bus_id=bus, last_s_ago=60.0) for code, bus in events)
    return replace(machine, driver=replace(machine.driver, kernel_events=logged))


@pytest.mark.parametrize(
    ("name", "xid", "at", "cause"),
    [
        ("gpu-off-the-bus", 79, "0000:5d:00.0", "VLM107"),
        ("gpu-lost", 79, "0000:c1:00.0", "VLM108"),
        ("xid-79", 79, 2, "VLM108"),
        ("remap-failed", 64, 1, "VLM111"),
        ("nvlink-half-dead", 74, 3, "VLM402"),
        ("new-nvlink-replays", 74, 0, "VLM409"),
    ],
)
def test_what_the_kernel_log_has_of_a_fault_is_said_with_it(
    name: str, xid: int, at: int | str, cause: str, load: Callable[..., Machine]
) -> None:
    machine = load(name)
    bus = at if isinstance(at, str) else machine.gpus[at].bus_id or ""

    diagnosis = diagnose(with_events(machine, (xid, bus)))

    assert above_info(diagnosis) == [cause]
    told = next(finding for finding in diagnosis.findings if finding.code == cause)
    assert f"Xid {xid}" in (told.cause or "")
    assert told.evidence["driver.kernel_events[0].code"] == str(xid)
    (log,) = (outcome for outcome in diagnosis.symptoms(cause) if outcome.code == "VLM114")
    assert (log.state, log.reason, log.findings) == ("skipped", f"explained by {cause}", ())


def test_another_fault_of_the_kernel_log_is_still_said(load: Callable[..., Machine]) -> None:
    machine = load("remap-failed")
    bus_ids = [gpu.bus_id or "" for gpu in machine.gpus]

    diagnosis = diagnose(with_events(machine, (64, bus_ids[1]), (64, bus_ids[0]), (74, bus_ids[1])))

    log = next(outcome for outcome in diagnosis.outcomes if outcome.code == "VLM114")
    assert (log.state, log.symptom_of) == ("found", "VLM111")
    assert [(finding.gpus, "Xid 64" in finding.message) for finding in log.findings] == [((0,), True), ((1,), False)]


def test_a_link_that_is_down_and_counts_errors_is_one_fault(load: Callable[..., Machine]) -> None:
    machine = load("nvlink-half-dead")
    counting = tuple(replace(gpu, nvlink_errors=500) if gpu.index == 2 else gpu for gpu in machine.gpus)

    diagnosis = diagnose(with_events(replace(machine, gpus=counting), (74, machine.gpus[2].bus_id or "")))

    assert above_info(diagnosis) == ["VLM402"]
    assert [outcome.code for outcome in diagnosis.symptoms("VLM402")] == ["VLM114", "VLM409"]
    assert diagnosis.findings[0].cause == "The kernel log has Xid 74 of GPU 2 (1 time, 1 min ago): a fault of an NVLink."


def test_a_fabric_that_is_down_explains_its_links(load: Callable[..., Machine]) -> None:
    machine = load("8xh100-fabric-down")
    dead = tuple(replace(port, is_active=False) for port in machine.gpus[0].nvlinks)

    diagnosis = diagnose(replace(machine, gpus=(replace(machine.gpus[0], nvlinks=dead), *machine.gpus[1:])))

    assert above_info(diagnosis) == ["VLM403"]
    assert "VLM402" in [outcome.code for outcome in diagnosis.symptoms("VLM403")]


def test_a_fabric_that_ails_on_one_gpu_does_not_hide_the_links_of_another(load: Callable[..., Machine]) -> None:
    machine = load("8xa100-nvswitch")
    dead = tuple(replace(port, is_active=False) for port in machine.gpus[5].nvlinks)
    down = Fabric(state="not_started")
    gpus = {0: replace(machine.gpus[0], fabric=down), 5: replace(machine.gpus[5], nvlinks=dead)}

    diagnosis = diagnose(replace(machine, gpus=tuple(gpus.get(gpu.index, gpu) for gpu in machine.gpus)))

    assert [(finding.code, finding.gpus) for finding in diagnosis.findings if finding.severity != "info"] == [
        ("VLM403", (0,)),
        ("VLM402", (5,)),
    ]


def test_one_full_disk_is_one_fault(load: Callable[..., Machine]) -> None:
    host = load("2xl4-idle").host
    assert host is not None

    def judged(tmp: int, cache: int) -> Diagnosis:
        return diagnose(load("2xl4-idle", host=replace(host, tmp_free_bytes=tmp, hf_cache_free_bytes=cache)))

    one = judged(12 * MIB, 12 * MIB)
    assert above_info(one) == ["VLM505"]
    assert [outcome.code for outcome in one.symptoms("VLM505")] == ["VLM508"]
    assert one.findings[0].message == (
        "The checkpoint cache ~/.cache/huggingface/hub and /tmp have 12 MiB of free disk space, on one disk."
    )
    assert above_info(judged(12 * MIB, 13 * MIB)) == ["VLM505", "VLM508"]
    assert above_info(judged(12 * MIB, 400 * GIB)) == ["VLM508"]


ALIKE: dict[str, dict[str, Any]] = {
    # The same fault of each GPU: code, and the fields that show it.
    "VLM109": {"compute_mode": "prohibited"},
    "VLM110": {"mig_enabled": True},
    "VLM115": {"pcie_width": 1, "pcie_width_max": 16},
    "VLM116": {"slowdowns": ("hw_thermal",)},
    "VLM117": {"virtualization": "vgpu", "is_licensed": False},
    "VLM502": {"memory_used_bytes": 9 * GIB},
    "VLM501": {"memory_used_bytes": 9 * GIB, "processes": (GpuProcess(pid=7, kind="compute", used_bytes=9 * GIB),)},
}


@pytest.mark.parametrize("code", ALIKE)
def test_what_all_gpus_suffer_from_is_one_finding(code: str, load: Callable[..., Machine]) -> None:
    machine = load("8xa100-nvswitch")

    findings = [
        finding
        for finding in diagnose(replace(machine, gpus=tuple(replace(gpu, **ALIKE[code]) for gpu in machine.gpus))).findings
        if finding.code == code
    ]

    assert [finding.gpus for finding in findings] == [tuple(range(8))]
    assert findings[0].message.startswith("GPUs 0, 1, 2, 3, 4, 5, 6, 7 (")


def test_a_torchvision_for_another_torch_is_one_fault_and_torch_stays(load: Callable[..., Machine]) -> None:
    libraries = load("2xl4-idle").libraries
    assert libraries is not None
    packages = tuple(
        replace(one, version="0.20.1+cu124") if one.name == "torchvision" else one for one in libraries.packages
    )
    rules = (
        VersionRule(requirer="torchvision", requirement="torch==2.5.1", source="Requires-Dist of torchvision"),
        VersionRule(requirer="torchvision", requirement="not a rule", source="Requires-Dist of torchvision"),
    )

    diagnosis = diagnose(load("2xl4-idle", libraries=replace(libraries, packages=packages, rules=rules)))

    assert above_info(diagnosis) == ["VLM309"]
    assert [outcome.code for outcome in diagnosis.symptoms("VLM309")] == ["VLM313"]
    told = diagnosis.findings[0]
    assert told.message == "torch 2.13.0+cu130 does not suit torchvision 0.20.1+cu124, which asks for torch==2.5.1."
    assert told.fix is not None
    assert told.fix.text == "Install the torchvision that goes with torch 2.13.0+cu130."
    assert told.fix.commands == (
        "python -m pip install --upgrade torchvision torch==2.13.0+cu130 "
        "--extra-index-url https://download.pytorch.org/whl/cu130",
    )
    bare = replace(libraries, packages=packages, rules=rules, torch_build=None)
    unknown = diagnose(load("2xl4-idle", libraries=bare)).findings[0].fix
    assert unknown is not None
    assert unknown.commands == ("python -m pip install --upgrade torchvision torch==2.13.0+cu130",)


def test_two_gpus_that_are_lost_are_named_by_their_addresses(load: Callable[..., Machine]) -> None:
    machine = load("gpu-off-the-bus")
    gone = PciDevice(bus_id="0000:9d:00.0", device_id="2330", kernel_driver="nvidia")
    both = replace(machine, pci_devices=(*machine.pci_devices, gone))

    told = diagnose(with_events(both, (79, "0000:9d:00.0"))).findings[0]

    assert told.code == "VLM107"
    assert told.cause == "The kernel log has Xid 79 of 0000:9d:00.0 (1 time, 1 min ago): the GPU has fallen off the bus."
