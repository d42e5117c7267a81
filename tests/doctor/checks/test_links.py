from __future__ import annotations

import pytest
from msgspec.structs import replace

from vlm_doctor.machine import Fabric, Gpu, Link, Machine

from .asking import Ask, Load, Said, commands


def test_what_links_mean(ask: Ask, said: Said) -> None:
    outcome = ask("VLM401", "4x3090-two-bridges")

    assert said(outcome) == [
        (
            "info",
            "4 GPUs with two NVLink pairs (0-1, 2-3): keep a split inside one pair; between pairs a hop crosses "
            "PCIe (SYS).",
        )
    ]
    assert outcome.findings[0].evidence == {"links[1].nvlinks": "0", "links[1].path": "SYS"}
    assert ask("VLM401", "wsl2").reason == "fewer than 2 visible GPUs"
    assert ask("VLM401", "links-unread").reason == "how the GPUs are joined is not known: NVML: Unknown Error"
    assert ask("VLM401", "2xl4-idle", links=()).reason == "how the GPUs are joined is not known"


def test_links_are_described_for_visible_gpus_only(ask: Ask, load: Load) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    torch = replace(load("2xl4-idle").torch, devices=())

    assert ask("VLM401", "4x3090-two-bridges", environment=environment, torch=torch).findings[0].message == (
        "2 GPUs joined by NV4: any split may cross them freely."
    )


def test_nvlink_inactive(ask: Ask, said: Said) -> None:
    outcome = ask("VLM402", "nvlink-half-dead")

    assert said(outcome) == [
        ("warning", "GPUs 2, 3 (NVIDIA GeForce RTX 3090) have 2 of 4 NVLinks active."),
    ]
    assert outcome.findings[0].evidence == {
        "gpus[2].nvlinks[2].is_active": "false",
        "gpus[3].nvlinks[2].is_active": "false",
    }
    assert commands(outcome) == ("nvidia-smi nvlink --status", "nvidia-smi nvlink -e")
    assert ask("VLM402", "4x3090-two-bridges").state == "passed"
    assert ask("VLM402", "2xl4-idle").reason == "no NVLink"


def without_links(machine: Machine, index: int) -> tuple[Gpu, ...]:
    return tuple(
        replace(gpu, nvlinks=tuple(replace(port, is_active=False, remote="unknown") for port in gpu.nvlinks))
        if gpu.index == index
        else gpu
        for gpu in machine.gpus
    )


def test_a_card_without_a_bridge_is_fine_a_silent_card_behind_a_switch_is_not(ask: Ask, load: Load, said: Said) -> None:
    bridged, switched = load("4x3090-two-bridges"), load("2xh200-nvswitch")

    assert ask("VLM402", replace(bridged, gpus=without_links(bridged, 3))).state == "passed"
    assert said(ask("VLM402", replace(switched, gpus=without_links(switched, 1)))) == [
        ("warning", "GPU 1 (NVIDIA H200) has 0 of 18 NVLinks active.")
    ]


def test_links_that_no_gpu_of_the_model_uses_are_off_by_design(ask: Ask, load: Load) -> None:
    machine = load("2xh200-nvswitch")
    gpus = tuple(
        replace(gpu, nvlinks=tuple(replace(port, is_active=port.link < 8) for port in gpu.nvlinks)) for gpu in machine.gpus
    )

    assert ask("VLM402", replace(machine, gpus=gpus)).state == "passed"


def test_ports_missing_altogether_have_no_inactive_one_to_show(ask: Ask, load: Load) -> None:
    machine = load("4x3090-two-bridges")
    gpus = tuple(replace(gpu, nvlinks=gpu.nvlinks[:3]) if gpu.index == 0 else gpu for gpu in machine.gpus)

    assert [f.gpus for f in ask("VLM402", replace(machine, gpus=gpus)).findings] == [(0,)]


def test_fabric_not_up(ask: Ask, said: Said) -> None:
    outcome = ask("VLM403", "8xh100-fabric-down")

    assert said(outcome) == [("error", "The NVSwitch fabric of GPUs 0, 1, 2, 3, 4, 5, 6, 7 is not up: not started.")]
    assert commands(outcome) == (
        "systemctl status --no-pager nvidia-fabricmanager",
        "sudo systemctl enable --now nvidia-fabricmanager",
    )
    assert ask("VLM403", "2xh200-recorded").state == "passed"
    assert ask("VLM403", "8xh200-recorded").state == "passed"
    assert ask("VLM403", "2xl4-idle").reason == "no NVSwitch fabric"
    assert ask("VLM403", "wsl2").reason == "no NVSwitch fabric"


@pytest.mark.parametrize(
    ("fabric", "severity", "message"),
    [
        (Fabric(state="in_progress"), "error", "is not up: in progress."),
        (Fabric(state="completed", status=999), "error", "failed with NVML error 999."),
        (Fabric(state="completed", status=0, health_mask=0b01), "warning", "is not healthy: bandwidth is degraded."),
        (
            Fabric(state="completed", status=0, health_mask=0b01_01_01_10),
            "warning",
            "is not healthy: a route is being recovered, a route is unhealthy, it recovers from an access timeout.",
        ),
    ],
)
def test_fabric_trouble_of_one_gpu(fabric: Fabric, severity: str, message: str, ask: Ask, said: Said) -> None:
    outcome = ask("VLM403", "2xh200-nvswitch", gpu=(1, {"fabric": fabric}))

    assert said(outcome) == [(severity, f"The NVSwitch fabric of GPU 1 {message}")]


@pytest.mark.parametrize("mask", [None, 0, 0b10_10_10_10])
def test_a_healthy_fabric(mask: int | None, ask: Ask) -> None:
    fabric = Fabric(state="completed", status=0, health_mask=mask)

    assert ask("VLM403", "2xh200-nvswitch", gpu=(1, {"fabric": fabric})).state == "passed"


def test_an_unknown_fabric(ask: Ask) -> None:
    outcome = ask("VLM403", "2xh200-nvswitch", gpu=(1, {"fabric": Fabric(state="unknown")}))

    assert outcome.reason == "the fabric state of GPU 1 is not known"


def test_no_peer_access_by_design(ask: Ask, said: Said) -> None:
    outcome = ask("VLM404", "2x4090-no-p2p")

    assert said(outcome) == [("info", "No peer access between 1 pair of GPUs (0-1): these GPUs do not support it.")]
    assert outcome.findings[0].fix is None
    assert ask("VLM404", "2xl4-idle").state == "passed"
    assert ask("VLM404", "links-unread").reason == "peer access is not known"
    assert ask("VLM404", "wsl2").reason == "fewer than 2 visible GPUs"


@pytest.mark.parametrize(
    ("nvlinks", "reason", "severity", "why"),
    [
        (0, "disabled_by_regkey", "warning", "the driver's settings disable it"),
        (4, "not_supported", "warning", "it is not supported here"),
        (0, "topology_not_supported", "info", "it is not supported across this PCIe topology"),
        (0, "chipset_not_supported", "info", "the chipset does not support it"),
    ],
)
def test_peer_access_that_should_be_there(nvlinks: int, reason: str, severity: str, why: str, ask: Ask, said: Said) -> None:
    links = (Link(a=0, b=1, nvlinks=nvlinks, path="PHB", p2p_read="ok", p2p_write=reason),)

    outcome = ask("VLM404", "2xl4-idle", links=links)

    assert said(outcome) == [(severity, f"No peer access between 1 pair of GPUs (0-1): {why}.")]
    assert (outcome.findings[0].fix is not None) == (severity == "warning")


def test_many_pairs_are_one_finding(ask: Ask, load: Load) -> None:
    links = tuple(replace(link, p2p_read="not_supported", nvlinks=0) for link in load("4x3090-two-bridges").links)

    assert [f.message for f in ask("VLM404", "4x3090-two-bridges", links=links).findings] == [
        "No peer access between 6 pairs of GPUs (0-1, 0-2, 0-3, 1-2, ...): it is not supported here."
    ]


def test_badly_joined(ask: Ask, load: Load, said: Said) -> None:
    outcome = ask("VLM405", "badly-joined")
    machine = load("badly-joined")

    assert said(outcome) == [("warning", "GPUs 0, 2 are joined by SYS only, while GPUs 0, 1 share NV4.")]
    assert commands(outcome) == (f"export CUDA_VISIBLE_DEVICES={machine.gpus[0].uuid},{machine.gpus[1].uuid}",)
    assert ask("VLM405", "2xl4-idle").state == "passed"
    assert ask("VLM405", "wsl2").reason == "fewer than 2 visible GPUs"


def test_badly_joined_on_a_made_up_machine_is_told_by_index(ask: Ask) -> None:
    assert commands(ask("VLM405", "badly-joined", origin="synthetic")) == ("export CUDA_VISIBLE_DEVICES=0,1",)


def test_better_gpus_that_are_busy_are_no_advice(ask: Ask) -> None:
    assert ask("VLM405", "badly-joined", gpu=(1, {"memory_free_bytes": 2**30})).state == "passed"


def test_a_nearer_pcie_path(ask: Ask, load: Load, said: Said) -> None:
    machine = load("badly-joined")
    links = tuple(replace(link, nvlinks=0, path="PIX" if (link.a, link.b) == (1, 3) else "SYS") for link in machine.links)

    assert said(ask("VLM405", "badly-joined", links=links)) == [
        ("warning", "GPUs 0, 2 are joined by SYS only, while GPUs 1, 3 share PIX.")
    ]


def test_nothing_is_better(ask: Ask, load: Load) -> None:
    assert ask("VLM405", "some-hidden").state == "passed"
    torch = replace(load("2xl4-idle").torch, devices=())
    three = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert ask("VLM405", "4x3090-two-bridges", environment=three, torch=torch).state == "passed"


def test_links_unknown(ask: Ask, load: Load) -> None:
    machine = load("badly-joined")
    bare = tuple(Link(a=link.a, b=link.b) for link in machine.links)
    partly = tuple(Link(a=link.a, b=link.b) if (link.a, link.b) == (0, 2) else link for link in machine.links)

    for links in ((), bare, partly):
        assert ask("VLM405", "badly-joined", links=links).reason == "how the GPUs are joined is not known"
