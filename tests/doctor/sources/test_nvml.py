"""What the NVML program makes of what NVML says. The values of the H200 machine were measured on one."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlm_doctor.machine import Fabric, Gap, Gpu, GpuProcess, MigDevice
from vlm_doctor.sources import nvml, nvml_processes
from vlm_doctor.sources.child import Child, Outcome
from vlm_doctor.sources.nvml_answer import NvmlView, understand

from ...until import until

Double = Callable[[dict[str, Any]], ModuleType]
View = Callable[[dict[str, Any]], NvmlView]

H200: dict[str, Any] = {
    "Name": "NVIDIA H200",
    "CudaComputeCapability": [9, 0],
    "MemoryInfo": {"total": 150754820096, "free": 150109880320, "used": 0, "reserved": 644939776},
    "ComputeMode": 0,
    "TotalEccErrors": 0,
    "RemappedRows": [0, 0, 0, 0],
    "recovery_action": 0,
    "CurrPcieLinkGeneration": 5,
    "MaxPcieLinkGeneration": 5,
    "CurrPcieLinkWidth": 16,
    "MaxPcieLinkWidth": 16,
    "PersistenceMode": 1,
    "DisplayActive": 0,
    "MigMode": [0, 0],
    "link_count": 18,
    "ports": [{"state": 1, "version": 6, "type": 2, "address": "FFFFFFFF:FF:FF.0"}] * 18,
    "fabric": {"state": 3, "status": 0, "healthMask": 0, "cliqueId": 0},
    "CurrentClocksEventReasons": 1,
    "PcieReplayCounter": 0,
    "VirtualizationMode": 1,
    "link_replays": 0,
    "link_recoveries": 0,
}
CARD: dict[str, Any] = {**H200, "UUID": "GPU-1", "PciInfo": "00000000:01:00.0"}
TWO_H200: dict[str, Any] = {
    "gpus": [
        {**H200, "UUID": "GPU-e51978dd-c5cb-2c03-406a-a7a5730d3445", "PciInfo": "00000000:00:06.0"},
        {**H200, "UUID": "GPU-0bb4dec4-9b99-e4e3-4fd7-06ed5ffc42a9", "PciInfo": "00000000:00:07.0"},
    ],
    "pairs": {"0-1": {"ancestor": 30, "p2p": [0, 0, 0, 0, 5]}},
}


def rtx_3090(index: int, bridged_to: int) -> dict[str, Any]:
    port = {"state": 1, "version": 3, "type": 0, "address": f"00000000:{bridged_to + 1:02X}:00.0"}
    return {
        "Name": "NVIDIA GeForce RTX 3090",
        "UUID": f"GPU-0000000{index}-0000-0000-0000-000000000000",
        "PciInfo": f"00000000:{index + 1:02X}:00.0",
        "CudaComputeCapability": [8, 6],
        "MemoryInfo": {"total": 25769803776, "free": 25437405184, "used": 0, "reserved": 332398592},
        "ports": [port] * 4,
    }


@pytest.fixture
def view(nvml_double: Double, monkeypatch: pytest.MonkeyPatch) -> View:
    """Run the program in this process, against the double, and understand its last answer."""

    def run(scenario: dict[str, Any]) -> NvmlView:
        monkeypatch.setitem(sys.modules, "pynvml", nvml_double(scenario))
        said: list[tuple[str, dict[str, Any], bool]] = []

        def say(stage: str, answer: dict[str, Any], *, is_final: bool = False) -> None:
            said.append((stage, json.loads(json.dumps(answer)), is_final))

        nvml.main(say)
        assert [is_final for _, _, is_final in said] == [False] * (len(said) - 1) + [True]
        return understand(Outcome(state="ok", answer=said[-1][1], stage=said[-1][0]))

    return run


def changed(scenario: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The scenario with other answers of its second GPU."""
    result = copy.deepcopy(scenario)
    result["gpus"][1].update(values)
    return result


def test_two_h200_behind_nvswitch(view: View) -> None:
    seen = view(TWO_H200)
    assert seen.gaps == ()
    assert (seen.driver.nvml_state, seen.driver.driver_version, seen.driver.cuda_version) == ("ok", "580.159.04", (13, 0))
    first = seen.gpus[0]
    assert (first.uuid, first.bus_id) == ("GPU-e51978dd-c5cb-2c03-406a-a7a5730d3445", "0000:00:06.0")
    assert (first.memory_total_bytes, first.memory_free_bytes) == (150754820096, 150109880320)
    assert (first.memory_used_bytes, first.memory_reserved_bytes, first.has_unified_memory) == (0, 644939776, False)
    assert (first.compute_capability, first.compute_mode, first.recovery_action) == ((9, 0), "default", "none")
    assert (first.mig_enabled, first.mig_pending, first.remap_pending, first.remap_failed) == (False, False, False, False)
    assert (first.pcie_generation, first.pcie_width, first.persistence_mode, first.display_active) == (5, 16, True, False)
    assert first.fabric == Fabric(state="completed", status=0, health_mask=0, clique_id=0)
    assert len(first.nvlinks) == 18
    assert {(port.remote, port.remote_bus_id, port.version) for port in first.nvlinks} == {("switch", "ffff:ff:ff.0", 6)}
    assert [(link.label, link.path, link.p2p_read, link.p2p_write) for link in seen.links] == [("NV18", "PHB", "ok", "ok")]


def test_eight_gpus_are_told_in_their_order_whoever_answers_first(view: View) -> None:
    gpus = [
        {**H200, "UUID": f"GPU-{index}", "PciInfo": f"00000000:00:{index:02X}.0", "DisplayActive": {"error": 3}}
        for index in range(8)
    ]
    pairs = {f"{a}-{b}": {"ancestor": 30, "p2p": [0, 5, 0]} for a in range(8) for b in range(a + 1, 8) if (a, b) != (2, 5)}
    seen = view({"gpus": gpus, "pairs": pairs})
    assert [gpu.uuid for gpu in seen.gpus] == [f"GPU-{index}" for index in range(8)]
    assert [(link.a, link.b) for link in seen.links] == [(a, b) for a in range(8) for b in range(a + 1, 8)]
    assert {(link.label, link.p2p_read, link.p2p_write) for link in seen.links} == {
        ("NV18", "ok", "not_supported"),
        ("NV18", None, None),
    }
    displays = [f"gpus[{index}].display_active" for index in range(8)]
    assert [gap.path for gap in seen.gaps] == [
        *displays,
        *(f"links[2-5].{field}" for field in ("path", "p2p_read", "p2p_write")),
    ]


def counting(double: ModuleType, monkeypatch: pytest.MonkeyPatch, *functions: str) -> list[str]:
    """Names of these functions of the double, once for every call."""
    called: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any) -> Any:
            called.append(name)
            return function(*arguments)

        return note

    for name in functions:
        monkeypatch.setattr(double, name, noting(name, getattr(double, name)))
    return called


@pytest.mark.parametrize(
    ("second", "others", "asked"),
    [
        ({}, {}, 7),
        ({"MigMode": [1, 1]}, {}, 7 + 6),  # GPU 1 is alone: it is asked about everybody
        ({"ports": [*H200["ports"][:17], {"state": 0}]}, {}, 7 + 6),
        ({"fabric": {"state": 3, "status": 0, "cliqueId": 7}}, {}, 7 + 6),
        ({"fabric": {"state": 2, "status": 0, "cliqueId": 0}}, {}, 7 + 6),
        ({}, {"0-4": {"ancestor": 30, "p2p": [5, 0, 0]}}, 28),
        ({}, {"0-4": {"ancestor": 30, "p2p": {"error": 999}}}, 28),
    ],
)
def test_behind_a_switch_peer_access_is_asked_of_the_first_gpu(
    nvml_double: Double, monkeypatch: pytest.MonkeyPatch, second: dict[str, Any], others: dict[str, Any], asked: int
) -> None:
    gpus = [{**H200, "UUID": f"GPU-{index}", "PciInfo": f"00000000:00:{index:02X}.0"} for index in range(8)]
    gpus[1].update(second)
    pairs = {f"{a}-{b}": {"ancestor": 30, "p2p": [0, 0, 0]} for a in range(8) for b in range(a + 1, 8)} | others
    double = nvml_double({"gpus": gpus, "pairs": pairs})
    called = counting(double, monkeypatch, "nvmlDeviceGetP2PStatus", "nvmlDeviceGetTopologyCommonAncestor")
    answer: dict[str, Any] = {"gpus": []}

    nvml.read(double, answer, lambda *_: None)

    assert called.count("nvmlDeviceGetP2PStatus") == 2 * asked
    assert called.count("nvmlDeviceGetTopologyCommonAncestor") == 28
    assert [(pair["a"], pair["b"]) for pair in answer["pairs"]] == [(a, b) for a in range(8) for b in range(a + 1, 8)]
    told = {(pair["a"], pair["b"]): pair["p2p_read"] for pair in answer["pairs"]}
    assert {name for name, read in told.items() if read != "ok"} == ({(0, 4)} if others else set())


def test_ports_in_a_fabric_that_is_up_are_asked_for_what_differs(
    nvml_double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = nvml_double(changed(TWO_H200, fabric={"state": 2, "status": 0, "healthMask": 0, "cliqueId": 0}))
    names = [f"nvmlDeviceGetNvLink{what}" for what in ("State", "Version", "RemoteDeviceType", "RemotePciInfo")]
    called = counting(double, monkeypatch, *names)
    nvml.read(double, {"gpus": []}, lambda *_, **__: None)
    # The fabric of the second GPU is not up yet: its ports are asked where they lead.
    assert [called.count(name) for name in names] == [36, 2, 1 + 18, 2]


def test_one_lost_gpu_of_several_leaves_the_others_and_their_links(view: View) -> None:
    gpus = [{**H200, "UUID": f"GPU-{index}", "PciInfo": f"00000000:00:{index:02X}.0"} for index in range(4)]
    gpus[1]["ComputeMode"] = {"error": 15}
    pairs = {f"{a}-{b}": {"ancestor": 30, "p2p": [0, 0, 0]} for a in range(4) for b in range(a + 1, 4)}
    seen = view({"gpus": gpus, "pairs": pairs})
    assert [gpu.error for gpu in seen.gpus] == [None, "GPU is lost", None, None]
    assert [(link.a, link.b) for link in seen.links] == [(0, 2), (0, 3), (2, 3)]


def test_addresses_of_switches_are_asked_where_they_can_be_seen(view: View) -> None:
    ports = [{"state": 1, "version": 6, "type": 2, "address": f"00000000:C{link}:00.0"} for link in range(4)]
    seen = view(changed(TWO_H200, ports=ports, link_count=4))
    assert [port.remote_bus_id for port in seen.gpus[1].nvlinks] == [f"0000:c{link}:00.0" for link in range(4)]


def test_four_3090_with_two_bridges(view: View) -> None:
    pairs = {f"{a}-{b}": {"ancestor": 40, "p2p": [1, 1, 5]} for a in range(4) for b in range(a + 1, 4)}
    pairs["0-1"] = pairs["2-3"] = {"ancestor": 20, "p2p": [0, 0, 0]}
    seen = view({"gpus": [rtx_3090(index, index ^ 1) for index in range(4)], "pairs": pairs})
    assert [link.label for link in seen.links] == ["NV4", "NODE", "NODE", "NODE", "NODE", "NV4"]
    assert {link.p2p_read for link in seen.links} == {"ok", "chipset_not_supported"}
    # The driver of a consumer card does not count its ports: all that NVML can name were asked, and four exist.
    assert [len(gpu.nvlinks) for gpu in seen.gpus] == [4, 4, 4, 4]


def test_what_a_consumer_card_does_not_support_is_a_gap_except_what_it_cannot_have(view: View) -> None:
    card = {key: value for key, value in rtx_3090(0, 1).items() if key != "ports"}
    seen = view({"gpus": [card]})
    assert {gap.reason for gap in seen.gaps} == {"NVML: Not Supported"}
    assert [gap.path.removeprefix("gpus[0].") for gap in seen.gaps] == [
        "compute_mode",
        "ecc_uncorrected",
        "remap_pending",
        "recovery_action",
        "pcie_generation",
        "pcie_generation_max",
        "pcie_width",
        "pcie_width_max",
        "persistence_mode",
        "display_active",
        "slowdowns",
        "pcie_replays",
        "virtualization",
    ]
    gpu = seen.gpus[0]
    assert (gpu.mig_enabled, gpu.nvlinks, gpu.fabric) == (False, (), Fabric(state="not_supported"))
    assert (gpu.compute_mode, gpu.ecc_uncorrected, gpu.remap_pending) == (None, None, None)


def test_condition_of_a_gpu(view: View) -> None:
    card = {**CARD, "CurrentClocksEventReasons": 0x1 | 0x4 | 0x8 | 0x40, "PcieReplayCounter": 7}
    seen = view({"gpus": [{**card, "link_replays": 12, "link_recoveries": 3}]})
    gpu = seen.gpus[0]
    assert (gpu.slowdowns, gpu.pcie_replays, gpu.nvlink_errors) == (("hw_slowdown", "hw_thermal"), 7, 15)
    assert (gpu.virtualization, gpu.is_licensed) == ("passthrough", None)
    assert seen.gaps == ()


def test_old_driver_has_the_older_name_of_the_clocks_question(view: View) -> None:
    card = {key: value for key, value in CARD.items() if key != "CurrentClocksEventReasons"}
    seen = view({"gpus": [{**card, "CurrentClocksThrottleReasons": 0x80}]})
    assert seen.gpus[0].slowdowns == ("hw_power_brake",)
    assert seen.gaps == ()


def test_nvlink_errors_that_are_not_counted_are_a_gap(view: View) -> None:
    card = {key: value for key, value in CARD.items() if not key.startswith("link_re")}
    seen = view({"gpus": [card]})
    assert seen.gpus[0].nvlink_errors is None
    assert [gap.path for gap in seen.gaps] == ["gpus[0].nvlink_errors"]
    failing = view({"gpus": [CARD], "fail": {"nvmlDeviceGetFieldValues": 999}})
    assert failing.gpus[0].nvlink_errors is None


@pytest.mark.parametrize(("states", "is_licensed"), [([1, 0], True), ([0, 0], False), ([], None), ({"error": 3}, None)])
def test_vgpu_tells_its_licence(view: View, states: Any, is_licensed: bool | None) -> None:
    seen = view({"gpus": [{**CARD, "VirtualizationMode": 2, "licences": states}]})
    assert (seen.gpus[0].virtualization, seen.gpus[0].is_licensed) == ("vgpu", is_licensed)
    assert view({"gpus": [{**CARD, "VirtualizationMode": 77}]}).gpus[0].virtualization is None


@pytest.mark.parametrize(
    ("scenario", "is_ready", "gaps"),
    [
        ({}, None, []),
        ({"confidential": 0}, None, []),
        ({"confidential": 1, "ready": 1}, True, []),
        ({"confidential": 1, "ready": 0}, False, []),
        ({"confidential": 1}, None, ["driver.is_confidential_ready"]),
        ({"confidential": {"error": 999}}, None, ["driver.is_confidential_ready"]),
    ],
)
def test_confidential_computing(view: View, scenario: dict[str, Any], is_ready: bool | None, gaps: list[str]) -> None:
    seen = view({**TWO_H200, **scenario})
    assert seen.driver.is_confidential_ready is is_ready
    assert [gap.path for gap in seen.gaps] == gaps


def test_card_before_ampere_tells_retired_pages(view: View) -> None:
    card = {key: value for key, value in CARD.items() if key != "RemappedRows"}
    seen = view({"gpus": [{**card, "RetiredPagesPendingStatus": 1}]})
    assert (seen.gpus[0].remap_pending, seen.gpus[0].remap_failed, seen.gaps) == (True, None, ())


def test_everything_not_supported_leaves_a_gpu_without_facts(view: View) -> None:
    seen = view({"gpus": [{}, {}]})
    assert [(gpu.index, gpu.uuid, gpu.name, gpu.error) for gpu in seen.gpus] == [
        (0, "", "unknown GPU", None),
        (1, "", "unknown GPU", None),
    ]
    assert seen.gpus[0].has_unified_memory is True
    assert {gap.reason for gap in seen.gaps} == {"NVML: Not Supported"}
    assert Gap(path="gpus[1].memory_total_bytes", reason="NVML: Not Supported") in seen.gaps
    assert [(link.a, link.b, link.path, link.p2p_read) for link in seen.links] == [(0, 1, None, None)]


def test_mig_slices_are_listed_and_empty_slots_are_not(view: View) -> None:
    slices = [
        {"UUID": "MIG-1", "Name": "NVIDIA H200 MIG 1g.18gb", "MemoryInfo": {"total": 2**34, "free": 2**33}},
        None,
        {"UUID": "MIG-2", "Name": "NVIDIA H200 MIG 2g.35gb", "MemoryInfo": {"error": 4}},
    ]
    # In a container the memory of the whole card may be withheld.
    seen = view(changed(TWO_H200, MigMode=[1, 1], MaxMigDeviceCount=7, slices=slices, MemoryInfo={"error": 4}))
    gpu = seen.gpus[1]
    assert (gpu.mig_enabled, gpu.mig_pending, gpu.memory_total_bytes, gpu.has_unified_memory) == (True, False, None, None)
    assert gpu.mig_devices == (
        MigDevice(uuid="MIG-1", name="NVIDIA H200 MIG 1g.18gb", memory_total_bytes=2**34, memory_free_bytes=2**33),
        MigDevice(uuid="MIG-2", name="NVIDIA H200 MIG 2g.35gb"),
    )
    assert [(gap.path, gap.reason) for gap in seen.gaps] == [
        ("gpus[1].memory_total_bytes", "NVML: Insufficient Permissions"),
        ("gpus[1].mig_devices[1].memory_total_bytes", "NVML: Insufficient Permissions"),
    ]


def test_mig_slots_that_cannot_be_read_are_gaps(view: View) -> None:
    scenario = changed(TWO_H200, MigMode=[1, 1], MaxMigDeviceCount=1) | {
        "fail": {"nvmlDeviceGetMigDeviceHandleByIndex": 999}
    }
    assert view(scenario).gaps == (Gap(path="gpus[1].mig_devices[0]", reason="NVML: Unknown Error"),)


def test_mig_change_that_waits_for_a_reset_is_pending(view: View) -> None:
    gpu = view(changed(TWO_H200, MigMode=[0, 1])).gpus[1]
    assert (gpu.mig_enabled, gpu.mig_pending) == (False, True)


@pytest.mark.parametrize(("code", "text"), [(15, "GPU is lost"), (16, "GPU requires restart")])
def test_lost_gpu_does_not_hide_the_others(view: View, code: int, text: str) -> None:
    seen = view(changed(TWO_H200, handle=code))
    assert [(gpu.name, gpu.error) for gpu in seen.gpus] == [("NVIDIA H200", None), ("unknown GPU", text)]
    assert len(seen.gpus[0].nvlinks) == 18
    assert seen.links == ()


@pytest.mark.parametrize("field", ["MemoryInfo", "ComputeMode", "ComputeRunningProcesses", "fabric"])
def test_gpu_lost_while_it_is_asked_keeps_what_was_read(view: View, field: str) -> None:
    gpu = view(changed(TWO_H200, **{field: {"error": 15}})).gpus[1]
    assert (gpu.uuid, gpu.name, gpu.error) == (TWO_H200["gpus"][1]["UUID"], "NVIDIA H200", "GPU is lost")


@pytest.mark.parametrize("function", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetCount"])
def test_lost_gpu_that_spoils_a_question_about_the_system_is_a_gap(view: View, function: str) -> None:
    seen = view(TWO_H200 | {"fail": {function: 15}})
    assert seen.driver.nvml_state == "ok"
    assert [gap.reason for gap in seen.gaps] == ["NVML: GPU is lost"]


def test_gpu_without_a_handle_says_why(view: View) -> None:
    seen = view(changed(TWO_H200, handle=4))
    assert seen.gpus[1] == Gpu(index=1, uuid="", name="unknown GPU", error="NVML: Insufficient Permissions")
    assert seen.gaps == (Gap(path="gpus[1]", reason="NVML: Insufficient Permissions"),)


def test_pair_lost_while_it_is_asked_is_a_gap(view: View) -> None:
    scenario = TWO_H200 | {"pairs": {"0-1": {"ancestor": {"error": 15}}}}
    seen = view(scenario)
    assert seen.gaps == (Gap(path="links[0-1]", reason="NVML: GPU is lost"),)
    assert [(link.label, link.path) for link in seen.links] == [("NV18", None)]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 9, 17, 18, 27, 999])
def test_nvml_that_does_not_start_tells_its_code(view: View, code: int) -> None:
    driver = view({"init": code}).driver
    assert (driver.nvml_state, driver.nvml_error_code) == ("error", code)
    assert driver.nvml_message


def test_missing_library_has_a_state_of_its_own(view: View) -> None:
    driver = view({"init": 12}).driver
    assert (driver.nvml_state, driver.nvml_error_code) == ("no_library", 12)
    assert driver.nvml_message == "NVML Shared Library Not Found"


def test_shadowed_binding_is_told_from_a_missing_library(view: View) -> None:
    driver = view({"missing": ["nvmlDeviceGetUUID"]}).driver
    assert driver.nvml_state == "no_binding"
    assert driver.nvml_message is not None
    assert driver.nvml_message.endswith("nvml_double.py is not nvidia-ml-py: it lacks nvmlDeviceGetUUID")


@pytest.mark.parametrize("error", [ImportError("No module named 'pynvml'"), RuntimeError("broken"), OSError("disk")])
def test_binding_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "pynvml":
                raise error

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    said: list[dict[str, Any]] = []
    nvml.main(lambda stage, answer, **_: said.append(answer))
    assert said[-1]["driver"]["nvml_state"] == "no_binding"
    assert said[-1]["driver"]["nvml_message"] == f"import pynvml: {type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("function", "path"),
    [
        ("nvmlSystemGetDriverVersion", "driver.driver_version"),
        ("nvmlSystemGetCudaDriverVersion_v2", "driver.cuda_version"),
        ("nvmlDeviceGetName", "gpus[0].name"),
        ("nvmlDeviceGetMemoryInfo", "gpus[0].memory_total_bytes"),
        ("nvmlDeviceGetComputeMode", "gpus[0].compute_mode"),
        ("nvmlDeviceGetRemappedRows", "gpus[0].remap_pending"),
        ("nvmlDeviceGetFieldValues", "gpus[0].recovery_action"),
        ("nvmlDeviceGetMigMode", "gpus[0].mig_enabled"),
        ("nvmlDeviceGetMPSComputeRunningProcesses", "gpus[0].processes"),
        ("nvmlDeviceGetNvLinkState", "gpus[0].nvlinks[0]"),
        ("nvmlDeviceGetGpuFabricInfoV", "gpus[0].fabric"),
        ("c_nvmlGpuFabricInfo_v2_t", "gpus[0].fabric"),
        ("nvmlDeviceGetTopologyCommonAncestor", "links[0-1].path"),
        ("nvmlDeviceGetP2PStatus", "links[0-1].p2p_read"),
    ],
)
def test_what_an_old_binding_lacks_is_a_gap_and_the_rest_is_read(view: View, function: str, path: str) -> None:
    seen = view(TWO_H200 | {"missing": [function]})
    reasons = {gap.path: gap.reason for gap in seen.gaps}
    assert reasons[path].startswith("nvidia-ml-py: ")
    assert function in reasons[path]
    assert seen.driver.nvml_state == "ok"
    assert len(seen.gpus) == 2
    assert seen.gpus[1].uuid == TWO_H200["gpus"][1]["UUID"]


def test_old_driver_without_memory_version_2_does_not_count_its_own_share_as_used(view: View) -> None:
    seen = view(changed(TWO_H200, MemoryInfo={"total": 1000, "free": 400}))
    gpu = seen.gpus[1]
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.memory_used_bytes, gpu.memory_reserved_bytes) == (
        1000,
        400,
        None,
        None,
    )
    assert [gap.path for gap in seen.gaps] == ["gpus[1].memory_used_bytes"]


def test_binding_without_memory_version_2(view: View) -> None:
    seen = view(TWO_H200 | {"missing": ["nvmlMemory_v2"]})
    assert [(gpu.memory_free_bytes, gpu.memory_used_bytes) for gpu in seen.gpus] == [(150109880320, None)] * 2


def test_count_of_links_is_unknown_when_a_port_cannot_be_read(view: View) -> None:
    ports = [*H200["ports"][:17], {"state": {"error": 999}}]
    seen = view(changed(TWO_H200, ports=ports))
    assert [(gap.path, gap.reason) for gap in seen.gaps] == [("gpus[1].nvlinks[17]", "NVML: Unknown Error")]
    assert [(link.nvlinks, link.label) for link in seen.links] == [(None, "PHB")]


def test_link_version_that_cannot_be_read_does_not_change_the_count(view: View) -> None:
    ports = [{key: value for key, value in port.items() if key != "version"} for port in H200["ports"]]
    assert [link.label for link in view(changed(TWO_H200, ports=ports)).links] == ["NV18"]


def test_inactive_ports_are_listed_and_not_counted(view: View) -> None:
    ports = [*H200["ports"][:16], {"state": 0}, {"state": 0}]
    seen = view(changed(TWO_H200, ports=ports))
    assert [port.is_active for port in seen.gpus[1].nvlinks] == [True] * 16 + [False] * 2
    assert [link.label for link in seen.links] == ["NV16"]


def test_hidden_far_ends_are_settled_by_peer_access(view: View) -> None:
    hidden = [{"state": 1, "version": 3, "type": 0, "address": "00000000:00:00.0"}] * 4
    gpus = [{**rtx_3090(index, 0), "ports": hidden} for index in range(3)]
    pairs = {"0-1": {"ancestor": 30, "p2p": [0, 0, 0]}, "0-2": {"ancestor": 30, "p2p": [0, 0, 5]}, "1-2": {"ancestor": 30}}
    links = view({"gpus": gpus, "pairs": pairs}).links
    assert [(link.a, link.b, link.nvlinks) for link in links] == [(0, 1, None), (0, 2, 0), (1, 2, 0)]


@pytest.mark.parametrize(
    ("number", "action"),
    [(0, "none"), (1, "reset_gpu"), (2, "reboot_node"), (3, "drain_p2p"), (4, "drain_and_reset"), (7, "reboot_node")],
)
def test_recovery_action(view: View, number: int, action: str) -> None:
    assert view(changed(TWO_H200, recovery_action=number)).gpus[1].recovery_action == action


def test_recovery_action_of_a_newer_driver_is_a_gap(view: View) -> None:
    seen = view(changed(TWO_H200, recovery_action=42))
    assert seen.gpus[1].recovery_action is None
    assert seen.gaps == (Gap(path="gpus[1].recovery_action", reason="NVML: recovery action 42 is unknown to this version"),)


def test_values_of_a_newer_driver_do_not_break_the_answer(view: View) -> None:
    gpu = view(changed(TWO_H200, ComputeMode=9, fabric={"state": 77, "status": 0})).gpus[1]
    assert gpu.compute_mode is None
    assert gpu.fabric is not None
    assert gpu.fabric.state == "unknown"


def test_processes_are_counted_once_and_described_when_visible(view: View) -> None:
    scenario = changed(
        TWO_H200,
        ComputeRunningProcesses=[[os.getpid(), 5 * 2**30], [2**22 + 1, None]],
        GraphicsRunningProcesses=[[os.getpid(), 5 * 2**30], [2**22 + 2, 7]],
        MPSComputeRunningProcesses=[[2**22 + 3, 9]],
    )
    mine, *others = view(scenario).gpus[1].processes
    assert (mine.pid, mine.kind, mine.used_bytes) == (os.getpid(), "compute", 5 * 2**30)
    assert mine.user
    assert mine.command
    assert mine.started_s_ago is not None
    assert mine.started_s_ago >= 0
    assert others == [
        GpuProcess(pid=2**22 + 1, kind="compute"),
        GpuProcess(pid=2**22 + 3, kind="mps", used_bytes=9),
        GpuProcess(pid=2**22 + 2, kind="graphics", used_bytes=7),
    ]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/usr/bin/python3", "train.py", "--api-key", "s3cret"], "python3 train.py"),
        (["python", "-m", "vllm.entrypoints", "--token=x"], "python -m vllm.entrypoints"),
        (["python", "-u", "train.py"], "python"),
        (["-x"], "-x"),
        ([], None),
        (["a" * 500], "a" * 200),
        (["/opt/\udcff"], "?"),
    ],
)
def test_commands_are_told_without_their_options(arguments: list[str], command: str | None) -> None:
    assert nvml_processes.describe_command(arguments) == command


def test_libcuda_is_where_the_loader_found_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 0 0:0 1  /lib/libc.so.6\n7f02-7f03 r--p 0 0:0 2  /usr/lib/x/libcuda.so.580.1\n")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    assert nvml.find_libcuda(maps) == "/usr/lib/x/libcuda.so.580.1"
    maps.write_text("")
    assert nvml.find_libcuda(maps) is None
    assert nvml.find_libcuda(tmp_path / "absent") is None


def test_unreadable_answer_of_the_child_is_a_crash() -> None:
    seen = understand(Outcome(state="ok", answer={"gpus": [{"index": "zero"}]}))
    assert seen.driver.nvml_state == "crashed"
    assert seen.driver.nvml_message is not None
    assert seen.driver.nvml_message.startswith("unreadable answer: ")


Environment = Callable[[dict[str, Any]], dict[str, str]]


@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize(
    ("function", "stage", "known"),
    [
        ("nvmlInit", None, 0),
        ("nvmlDeviceGetName", None, 0),
        ("nvmlDeviceGetComputeMode", "names and memory of the GPUs", 2),
        ("nvmlDeviceGetGpuFabricInfoV", "processes of the GPUs", 2),
        ("nvmlDeviceGetP2PStatus", "NVLinks of the GPUs", 2),
    ],
)
def test_crash_keeps_what_was_read_before(
    double_environment: Environment, function: str, stage: str | None, known: int
) -> None:
    environment = double_environment(TWO_H200 | {"crash_in": function})
    seen = understand(Child("nvml", {}, environment=environment, deadline_s=20).outcome())
    assert seen.driver.nvml_state == "crashed"
    assert seen.driver.nvml_message == (f"SIGSEGV, after {stage}" if stage else "SIGSEGV")
    assert [gpu.memory_free_bytes for gpu in seen.gpus] == [150109880320] * known
    assert {gap.path for gap in seen.gaps} == {"gpus", "links"}


@pytest.mark.usefixtures("no_children_left")
def test_hang_keeps_what_was_read_before(double_environment: Environment, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    environment = double_environment(TWO_H200 | {"hang_in": "nvmlDeviceGetP2PStatus", "hangs": str(hangs)})
    child = Child("nvml", {}, environment=environment, deadline_s=600)
    until(hangs.exists)
    child._started -= 600
    seen = understand(child.outcome())
    assert (seen.driver.nvml_state, seen.driver.driver_version) == ("timed_out", "580.159.04")
    assert seen.driver.nvml_message == "no answer within 600 s, after NVLinks of the GPUs"
    assert [len(gpu.nvlinks) for gpu in seen.gpus] == [18, 18]


@pytest.mark.usefixtures("no_children_left")
def test_child_says_the_same_as_the_program_in_process(double_environment: Environment, view: View) -> None:
    outcome = Child("nvml", {}, environment=double_environment(TWO_H200), deadline_s=20).outcome()
    assert outcome.state == "ok"
    assert understand(outcome) == view(TWO_H200)
