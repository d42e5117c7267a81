from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.machine import Driver, TorchDevice, TorchView

from .asking import Ask, Load, Said, commands


def visible(value: str, **more: str) -> dict[str, Any]:
    return {"environment": {"CUDA_VISIBLE_DEVICES": value, **more}}


def test_every_gpu_hidden(ask: Ask, said: Said) -> None:
    outcome = ask("VLM201", "masked")

    assert said(outcome) == [("error", "CUDA_VISIBLE_DEVICES='' hides every GPU.")]
    assert commands(outcome) == ("unset CUDA_VISIBLE_DEVICES",)
    assert outcome.findings[0].evidence == {"environment.CUDA_VISIBLE_DEVICES": "''"}
    assert str(outcome.findings[0].cause).startswith("An empty value names no GPU")
    assert str(ask("VLM201", "2xl4-idle", **visible("x,0")).findings[0].cause).startswith("CUDA drops the first entry")
    assert commands(ask("VLM201", "2xl4-idle", **visible("x,0"))) == ("export CUDA_VISIBLE_DEVICES=0",)
    assert commands(ask("VLM201", "2xl4-idle", **visible("-1"))) == ("unset CUDA_VISIBLE_DEVICES",)
    assert ask("VLM201", "2xl4-idle").state == "passed"
    assert ask("VLM201", "laptop-no-gpu", **visible("")).reason == "no GPU"


def test_a_job_of_slurm_without_gpus(ask: Ask, said: Said) -> None:
    outcome = ask("VLM201", "2xl4-idle", **visible("NoDevFiles"))

    assert said(outcome) == [("error", "CUDA_VISIBLE_DEVICES='NoDevFiles' hides every GPU.")]
    assert outcome.findings[0].cause == "Slurm sets it for a job that was given no GPU."
    assert commands(outcome) == ("srun --gpus=1 --pty bash",)


def test_what_is_pasted_into_a_shell_is_quoted(ask: Ask, load: Load) -> None:
    evil = replace(load("2xl4-idle").gpus[0], uuid="GPU-$(reboot)")

    outcome = ask("VLM202", "2xl4-idle", gpus=(evil,), links=(), **visible("GPU-$(reboot),x"))

    assert commands(outcome) == ("export CUDA_VISIBLE_DEVICES='GPU-$(reboot)'",)


def test_nothing_to_set_when_no_gpu_works(ask: Ask, load: Load) -> None:
    gpus = tuple(replace(gpu, error="GPU is lost") for gpu in load("2xl4-idle").gpus)

    assert ask("VLM201", "2xl4-idle", gpus=gpus, **visible("0")).state == "skipped"


def test_list_cut(ask: Ask, said: Said) -> None:
    outcome = ask("VLM202", "out-of-range")

    assert said(outcome) == [
        (
            "error",
            "CUDA_VISIBLE_DEVICES='0,9': '9' names a GPU that does not exist: the last index is 1, so only GPU 0 "
            "can be seen.",
        )
    ]
    assert commands(outcome) == ("export CUDA_VISIBLE_DEVICES=0",)
    assert ask("VLM202", "some-hidden").state == "passed"
    assert ask("VLM202", "masked").reason == "explained by VLM201"


@pytest.mark.parametrize(("value", "corrected"), [("0,-1,1", "0,1"), ("0 1", "0,1")])
def test_a_list_that_ends_on_purpose_or_is_read_loosely_is_a_warning(value: str, corrected: str, ask: Ask) -> None:
    outcome = ask("VLM202", "2xl4-idle", **visible(value))

    assert [f.severity for f in outcome.findings] == ["warning"]
    assert commands(outcome) == (f"export CUDA_VISIBLE_DEVICES={corrected}",)


def test_some_hidden(ask: Ask, said: Said) -> None:
    outcome = ask("VLM203", "some-hidden")

    assert said(outcome) == [("info", "CUDA_VISIBLE_DEVICES shows 2 of 4 GPUs: GPUs 0, 2 are hidden.")]
    assert outcome.findings[0].gpus == (0, 2)
    assert said(ask("VLM203", "2xl4-idle", **visible("1"))) == [
        ("info", "CUDA_VISIBLE_DEVICES shows 1 of 2 GPUs: GPU 0 is hidden.")
    ]
    assert ask("VLM203", "2xl4-idle").state == "passed"


def test_order_told_by_torch(ask: Ask, said: Said) -> None:
    outcome = ask("VLM204", "mixed-order")

    assert said(outcome) == [
        ("warning", "CUDA numbers these GPUs in another order than nvidia-smi: cuda:0 is GPU 1, cuda:1 is GPU 0.")
    ]
    assert commands(outcome) == ("export CUDA_DEVICE_ORDER=PCI_BUS_ID",)


def test_order_that_nobody_tells(ask: Ask, said: Said) -> None:
    unasked = TorchView(state="not_asked", message="still being asked")

    assert said(ask("VLM204", "mixed-order", torch=unasked)) == [
        ("warning", "CUDA may number these GPUs in another order than nvidia-smi: they are of 2 models.")
    ]
    assert ask("VLM204", "mixed-order", torch=unasked, **visible("0")).state == "found"


def test_order_that_torch_shows_to_be_the_same(ask: Ask, load: Load) -> None:
    gpus = load("mixed-order").gpus
    torch = TorchView(
        state="ok", device_count=2, devices=tuple(TorchDevice(ordinal=gpu.index, uuid=gpu.uuid) for gpu in gpus)
    )

    assert ask("VLM204", "mixed-order", torch=torch).state == "passed"


def test_order_is_certain_by_address_and_by_name(ask: Ask, load: Load) -> None:
    uuid = load("mixed-order").gpus[1].uuid

    assert ask("VLM204", "mixed-order", environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).state == "passed"
    assert ask("VLM204", "mixed-order", **visible(uuid)).state == "passed"


def test_order_of_equal_gpus_and_of_a_made_up_machine(ask: Ask) -> None:
    assert ask("VLM204", "2xl4-idle").state == "passed"
    assert ask("VLM204", "mixed-order", origin="synthetic").reason == "a made-up machine does not say"


def test_container_without_gpus(ask: Ask, said: Said) -> None:
    outcome = ask("VLM205", "container-no-injection")

    assert said(outcome) == [("error", "This docker container was started without GPUs, though the computer has 4.")]
    assert commands(outcome) == ("docker run --gpus all IMAGE",)
    assert ask("VLM205", "2xh200-nvswitch").state == "passed"
    assert ask("VLM205", "2xl4-idle").reason == "not in a container"
    assert ask("VLM205", "ci-container").reason == "no GPU"


def test_container_that_sees_no_bus(ask: Ask) -> None:
    assert ask("VLM205", "container-no-injection", pci_devices=()).findings[0].message == (
        "This docker container was started without GPUs."
    )


def test_container_without_libcuda(ask: Ask, said: Said) -> None:
    outcome = ask("VLM205", "container-lacks-compute")

    assert said(outcome) == [
        (
            "error",
            "This docker container has the GPUs but not libcuda: NVIDIA_DRIVER_CAPABILITIES='utility' lacks compute.",
        )
    ]
    assert commands(outcome) == ("docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility IMAGE",)


def test_container_without_nvml(ask: Ask, said: Said) -> None:
    driver = Driver(
        kernel_module_version="580.95.05",
        device_files=("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"),
        libcuda_path="/usr/lib/libcuda.so.1",
    )
    environment = {"NVIDIA_DRIVER_CAPABILITIES": "compute, video"}

    outcome = ask("VLM205", "container-no-injection", driver=driver, environment=environment)

    assert said(outcome) == [
        (
            "error",
            "This docker container has the GPUs but not NVML: NVIDIA_DRIVER_CAPABILITIES='compute, video' lacks utility.",
        )
    ]


@pytest.mark.parametrize("value", ["all", "compute,utility", ""])
def test_container_with_all_it_asked_for(value: str, ask: Ask) -> None:
    environment = {"NVIDIA_DRIVER_CAPABILITIES": value}

    assert ask("VLM205", "container-lacks-compute", environment=environment).state == "passed"


def test_torch_sees_fewer(ask: Ask, said: Said) -> None:
    outcome = ask("VLM206", "torch-sees-fewer")

    assert said(outcome) == [("error", "torch sees 1 of 2 visible GPUs: GPU 1 (NVIDIA L4) is missing.")]
    assert outcome.findings[0].gpus == (1,)
    assert commands(outcome) == ("python -c 'import torch; torch.cuda.init()'",)
    assert ask("VLM206", "2xl4-idle").state == "passed"
    assert ask("VLM206", "cpu-torch").reason == "explained by VLM303"


@pytest.mark.parametrize(
    ("name", "torch", "message"),
    [
        (
            "2xl4-idle",
            TorchView(state="ok", cuda="13.0", device_count=0, message="CUDA unknown error"),
            "torch sees no GPU, though 2 are visible (CUDA unknown error).",
        ),
        ("wsl2", TorchView(state="ok", cuda="13.0", device_count=0), "torch sees no GPU, though 1 is visible."),
        ("some-hidden", TorchView(state="ok", cuda="13.0", device_count=1), "torch sees 1 of 2 visible GPUs."),
    ],
)
def test_torch_sees_fewer_and_does_not_name_them(name: str, torch: TorchView, message: str, ask: Ask) -> None:
    assert [finding.message for finding in ask("VLM206", name, torch=torch).findings] == [message]


def test_torch_misses_several(ask: Ask, load: Load) -> None:
    base = load("4x3090-two-bridges")
    torch = replace(base.torch, device_count=1, devices=base.torch.devices[:1])

    assert ask("VLM206", base).state == "passed"
    assert ask("VLM206", replace(base, torch=torch)).findings[0].message == (
        "torch sees 1 of 4 visible GPUs: GPU 1 (NVIDIA GeForce RTX 3090), GPU 2 (NVIDIA GeForce RTX 3090), "
        "GPU 3 (NVIDIA GeForce RTX 3090) are missing."
    )


@pytest.mark.parametrize(
    ("torch", "state", "reason"),
    [
        (TorchView(state="not_asked", message="still being asked"), "unknown", "torch: still being asked"),
        (TorchView(state="ok"), "skipped", "torch did not answer"),
    ],
)
def test_torch_that_did_not_answer(torch: TorchView, state: str, reason: str, ask: Ask) -> None:
    outcome = ask("VLM206", "2xl4-idle", torch=torch)

    assert (outcome.state, outcome.reason) == (state, reason)
