from __future__ import annotations

import pytest
from msgspec.structs import replace

from vlm_doctor.machine import PciDevice

from .asking import Ask, Load, Said


def test_gpu_lost_between_bus_and_driver(ask: Ask, said: Said) -> None:
    outcome = ask("VLM107", "gpu-off-the-bus")

    assert said(outcome) == [("error", "The PCI bus has 8 NVIDIA GPUs, the driver lists 7: 0000:5d:00.0 is missing.")]
    assert outcome.findings[0].evidence == {
        "pci_devices[7].bus_id": "0000:5d:00.0",
        "pci_devices[7].kernel_driver": "nvidia",
    }
    assert ask("VLM107", "2xl4-idle").state == "passed"
    assert ask("VLM107", "nvml-crashed").reason == "explained by VLM105"


def test_the_only_gpu_is_lost(ask: Ask, load: Load, said: Said) -> None:
    machine = load("2xl4-idle")
    machine = replace(machine, gpus=(), links=(), pci_devices=machine.pci_devices[:1])

    assert said(ask("VLM107", machine)) == [
        ("error", "The PCI bus has 1 NVIDIA GPU, the driver lists 0: 0000:01:00.0 is missing.")
    ]


def test_cards_without_a_driver_beside_working_ones_are_a_warning(ask: Ask, load: Load, said: Said) -> None:
    old = tuple(PciDevice(bus_id=f"0000:0{n}:00.0", device_id="128b") for n in (8, 9))
    devices = (*load("2xl4-idle").pci_devices, *old)

    assert said(ask("VLM107", "2xl4-idle", pci_devices=devices)) == [
        ("warning", "The PCI bus has 4 NVIDIA GPUs, the driver lists 2: 0000:08:00.0, 0000:09:00.0 are missing.")
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("container-with-some-gpus", "a container need not be given every GPU: it has 2 of 4"),
        ("scheduled-job", "this job was not given 6 of the GPUs"),
        ("wsl2", "PCI bus and driver cannot be compared"),
    ],
)
def test_gpus_that_were_not_given_are_not_lost(name: str, reason: str, ask: Ask) -> None:
    outcome = ask("VLM107", name)

    assert (outcome.state, outcome.reason) == ("skipped", reason)


def test_a_gpu_set_aside_for_a_virtual_machine_is_not_lost(ask: Ask) -> None:
    assert ask("VLM107", "one-gpu-passed-through").state == "passed"


def test_gpu_fails(ask: Ask, said: Said) -> None:
    outcome = ask("VLM108", "gpu-lost")

    assert said(outcome) == [("error", "GPU 2 (unknown GPU) fails when asked: GPU is lost.")]
    fix = outcome.findings[0].fix
    assert fix is not None
    assert fix.commands == ("sudo dmesg | grep -iE 'nvrm|xid'", "sudo poweroff")
    assert ask("VLM108", "2xl4-idle").state == "passed"


def test_gpu_that_needs_a_reset(ask: Ask) -> None:
    finding = ask("VLM108", "2xl4-idle", gpu=(1, {"error": "GPU requires reset"})).findings[0]

    assert finding.message == "GPU 1 (NVIDIA L4) fails when asked: GPU requires reset."
    assert finding.fix is not None
    assert finding.fix.commands == ("sudo nvidia-smi --gpu-reset -i 1",)


def test_exclusive_gpu_in_use(ask: Ask, said: Said) -> None:
    outcome = ask("VLM109", "exclusive-process")

    assert said(outcome) == [("error", "GPU 0 (NVIDIA A100-SXM4-80GB) takes one process only, and process 4711 has it.")]
    fix = outcome.findings[0].fix
    assert fix is not None
    assert (fix.commands, fix.who) == (("sudo nvidia-smi -i 0 -c DEFAULT",), "administrator")


@pytest.mark.parametrize(
    ("mode", "severity", "message"),
    [
        (
            "exclusive_process",
            "warning",
            "GPU 0 (NVIDIA L4) takes one process only: its compute mode is exclusive_process.",
        ),
        ("prohibited", "error", "GPU 0 (NVIDIA L4) takes no process: its compute mode is prohibited."),
    ],
)
def test_compute_modes(mode: str, severity: str, message: str, ask: Ask, said: Said) -> None:
    assert said(ask("VLM109", "2xl4-idle", gpu=(0, {"compute_mode": mode}))) == [(severity, message)]


def test_compute_mode_of_a_hidden_gpu_does_not_matter(ask: Ask) -> None:
    assert ask("VLM109", "some-hidden", gpu=(0, {"compute_mode": "prohibited"})).state == "passed"


def test_compute_mode_unread(ask: Ask) -> None:
    outcome = ask("VLM109", "2xl4-idle", gpu=(0, {"compute_mode": None}))

    assert (outcome.state, outcome.reason) == ("unknown", "gpus[0].compute_mode is not known")


@pytest.mark.parametrize(
    ("fields", "severity", "message"),
    [
        ({}, "warning", "is cut into 2 MIG slices: a process can use one of them, 19.5 GiB at most."),
        ({"mig_devices": ()}, "error", "is in MIG mode without any slice, so CUDA cannot use it."),
        (
            {"mig_enabled": False, "mig_pending": True, "mig_devices": ()},
            "warning",
            "will be cut into MIG slices at its next reset.",
        ),
    ],
)
def test_mig(fields: dict[str, object], severity: str, message: str, ask: Ask, said: Said) -> None:
    outcome = ask("VLM110", "a100-mig", gpu=(0, fields))

    assert said(outcome) == [(severity, f"GPU 0 (NVIDIA A100-SXM4-40GB) {message}")]
    assert ask("VLM110", "2xl4-idle").state == "passed"


def test_one_slice_of_unknown_size(ask: Ask, load: Load) -> None:
    part = replace(load("a100-mig").gpus[0].mig_devices[0], memory_total_bytes=None)

    assert ask("VLM110", "a100-mig", gpu=(0, {"mig_devices": (part,)})).findings[0].message == (
        "GPU 0 (NVIDIA A100-SXM4-40GB) is cut into 1 MIG slice: a process can use one of them."
    )


@pytest.mark.parametrize(
    ("fields", "severity", "message", "command"),
    [
        (
            {"remap_failed": True, "remap_pending": True, "ecc_uncorrected": 2},
            "error",
            "row remapping has failed, row remapping is pending, 2 uncorrectable ECC errors.",
            "nvidia-smi -q -d ROW_REMAPPER -i 1",
        ),
        ({"ecc_uncorrected": 1}, "warning", "1 uncorrectable ECC error.", "sudo nvidia-smi --gpu-reset -i 1"),
        ({"remap_pending": True}, "warning", "row remapping is pending.", "sudo nvidia-smi --gpu-reset -i 1"),
        ({"recovery_action": "reboot_node"}, "error", "the driver asks for a reboot.", "sudo reboot"),
        (
            {"recovery_action": "drain_and_reset"},
            "error",
            "the driver asks for a reset of the GPU when it is idle.",
            "sudo nvidia-smi --gpu-reset -i 1",
        ),
    ],
)
def test_memory_faults(fields: dict[str, object], severity: str, message: str, command: str, ask: Ask, said: Said) -> None:
    outcome = ask("VLM111", "2xl4-idle", gpu=(1, fields))

    assert said(outcome) == [(severity, f"GPU 1 (NVIDIA L4): {message}")]
    fix = outcome.findings[0].fix
    assert fix is not None
    assert fix.commands == (command,)


def test_no_memory_faults(ask: Ask) -> None:
    assert ask("VLM111", "2xl4-idle").state == "passed"
    assert ask("VLM111", "2x4090-no-p2p").state == "passed"
    assert ask("VLM111", "wsl2").reason == "GPU 0 does not report memory faults"
    assert ask("VLM111", "laptop-no-gpu").reason == "no GPU"


def test_two_gpus_that_do_not_tell(ask: Ask, load: Load) -> None:
    silent = {"ecc_uncorrected": None, "remap_failed": None, "recovery_action": None}
    gpus = tuple(replace(gpu, **silent) for gpu in load("2xl4-idle").gpus)

    assert ask("VLM111", "2xl4-idle", gpus=gpus).reason == "GPUs 0, 1 do not report memory faults"


def test_an_mps_daemon_that_may_run_elsewhere_is_not_called_dead(ask: Ask, said: Said) -> None:
    assert said(ask("VLM119", "mps-dead")) == [("error", "The MPS control daemon has died and left its files behind.")]
    assert said(ask("VLM119", "mps-of-the-host")) == [
        ("info", "The files of an MPS control daemon are here, but not the daemon: it may run on the host.")
    ]
