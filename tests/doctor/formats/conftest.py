"""One set of reports, which every format renders: what differs between two golden files is the format alone."""

from __future__ import annotations

import pytest

from vlm_doctor.findings import Diagnosis, Finding, Fix, Outcome
from vlm_doctor.machine import (
    Driver,
    Gap,
    Gpu,
    GpuProcess,
    Host,
    Libraries,
    Link,
    Machine,
    Package,
    PciDevice,
    TorchBuild,
    TorchDevice,
    TorchView,
)
from vlm_doctor.placement import AutoPlacement, AutoShare, Cut, LedgerKind, LedgerLine, Lever, Limits, Plan, Shortage, Stage
from vlm_doctor.report import Report
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Workload

UUIDS = ("GPU-11111111-2222-3333-4444-555555555555", "GPU-66666666-7777-8888-9999-aaaaaaaaaaaa")
MODEL = "zai-org/GLM-4.1V-9B-Thinking"


@pytest.fixture
def machine() -> Machine:
    """Two L4: the first nearly full, torch sees both."""
    free = (2 * GIB, 22 * GIB)
    gpus = tuple(
        Gpu(
            index=index,
            uuid=UUIDS[index],
            name="NVIDIA L4",
            bus_id=f"0000:0{index + 1}:00.0",
            memory_total_bytes=23034 * MIB,
            memory_free_bytes=free[index],
            memory_used_bytes=22574 * MIB - free[index],
            memory_reserved_bytes=460 * MIB,
            compute_capability=(8, 9),
            processes=(GpuProcess(pid=4711, kind="compute", used_bytes=20 * GIB, user="eve", command="python"),)
            if index == 0
            else (),
        )
        for index in range(2)
    )
    return Machine(
        origin="recorded",
        description="2 x NVIDIA L4",
        gpus=gpus,
        links=(Link(a=0, b=1, nvlinks=0, path="PHB", p2p_read="ok"),),
        pci_devices=tuple(PciDevice(bus_id=str(gpu.bus_id), device_id="27b8", kernel_driver="nvidia") for gpu in gpus),
        driver=Driver(kernel_module_version="580.95.05", nvml_state="ok", driver_version="580.95.05", cuda_version=(13, 0)),
        host=Host(
            os="Linux",
            kernel="6.8.0-87-generic",
            cpu_count=16,
            memory_available_bytes=60 * GIB,
            shm_total_bytes=64 * MIB,
            container="docker",
        ),
        libraries=Libraries(
            python="3.11.7",
            executable="/usr/bin/python3",
            packages=(
                Package(name="torch", version="2.9.1"),
                Package(name="transformers", version="5.2.0"),
                Package(name="accelerate", version="1.12.0"),
            ),
            torch_build=TorchBuild(version="2.9.1", cuda="13.0"),
        ),
        torch=TorchView(
            state="ok",
            version="2.9.1",
            cuda="13.0",
            is_available=True,
            device_count=2,
            devices=tuple(TorchDevice(ordinal=index, uuid=UUIDS[index]) for index in range(2)),
            seconds=1.4,
        ),
        environment={"CUDA_VISIBLE_DEVICES": "0,1"},
        gaps=(Gap(path="gpus[0].numa_node", reason="NVML: Not Supported"),),
    )


@pytest.fixture
def diagnosis() -> Diagnosis:
    """One finding of each severity, and a check in each other state."""
    taken = Finding(
        code="VLM501",
        severity="error",
        title="GPU memory held by other processes",
        message="GPU 0 (NVIDIA L4) has 2.0 GiB of 22.5 GiB free: pid 4711 (python, eve) holds 20.0 GiB.",
        cause="A process that ended badly, or somebody else's job, still holds the memory.",
        evidence={"gpus[0].memory_free_bytes": "2.0 GiB"},
        fix=Fix(text="Stop the process if it is yours, or leave GPU 0 out.", commands=("kill 4711", "vlm-doctor --gpus 1")),
        gpus=(0,),
        links=("https://docs.nvidia.com/deploy/nvml-api/",),
    )
    shm = Finding(
        code="VLM503",
        severity="warning",
        title="/dev/shm too small",
        message="/dev/shm has 64 MiB; data loader workers and NCCL need about 1 GiB.",
        cause="Docker gives a container 64 MiB unless told otherwise.",
        fix=Fix(text="Start the container with more.", commands=("docker run --shm-size=8g ...",), who="administrator"),
    )
    links = Finding(
        code="VLM401",
        severity="info",
        title="What the links mean for a split",
        message="2 GPUs joined by PCIe (PHB): a split costs little while one prompt runs at a time.",
        cause="There is no NVLink.",
    )
    return Diagnosis(
        outcomes=(
            Outcome(code="VLM101", title="No NVIDIA GPU", state="passed"),
            Outcome(code="VLM303", title="CPU-only torch on a GPU machine", state="passed"),
            Outcome(code="VLM401", title=links.title, state="found", findings=(links,)),
            Outcome(code="VLM402", title="NVLink links inactive", state="skipped", reason="no GPU has NVLink"),
            Outcome(code="VLM404", title="Peer access not granted", state="crashed", reason="KeyError: 'p2p'"),
            Outcome(code="VLM501", title=taken.title, state="found", findings=(taken,)),
            Outcome(code="VLM503", title=shm.title, state="found", findings=(shm,)),
            Outcome(code="VLM504", title="Memory limit of the container", state="unknown", reason="cgroup unreadable"),
        )
    )


def _line(kind: LedgerKind, label: str, size_mib: int) -> LedgerLine:
    return LedgerLine(kind=kind, label=label, size_bytes=size_mib * MIB + 12345, source=f"where {label} comes from")


def _stage(gpu: int, keys: tuple[str, ...], *lines: LedgerLine) -> Stage:
    total_bytes = 23034 * MIB
    left = LedgerLine(
        kind="left", label="left", size_bytes=total_bytes - sum(line.size_bytes for line in lines), source="what remains"
    )
    return Stage(gpu=gpu, uuid=UUIDS[gpu], name="NVIDIA L4", keys=keys, ledger=(*lines, left), total_bytes=total_bytes)


def _layers(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"model.language_model.layers.{number}" for number in range(first, last + 1))


@pytest.fixture
def plan() -> Plan:
    """A plan over two GPUs."""
    first = ("model.visual", "model.language_model.embed_tokens", *_layers(0, 9))
    second = (*_layers(10, 39), "model.language_model.norm", "lm_head")
    return Plan(
        model=MODEL,
        machine="2 x NVIDIA L4",
        fits=True,
        workload=Workload(),
        dtype="bfloat16",
        prompt_tokens=1808,
        image_tokens=1296,
        device_map={**dict.fromkeys(first, 0), **dict.fromkeys(second, 1)},
        max_memory={0: 8 * GIB, 1: 14 * GIB},
        cuda_visible_devices=",".join(UUIDS),
        stages=(
            _stage(
                0,
                first,
                _line("driver", "driver and firmware", 460),
                _line("others", "other processes", 12_000),
                _line("context", "CUDA context", 400),
                _line("weights", "weights: vision tower", 1700),
                _line("weights", "weights: embedding", 1184),
                _line("weights", "weights: 10 layers", 3900),
                _line("kv_cache", "KV cache of 2,064 tokens", 21),
                _line("activations", "activations, largest while an image is encoded", 900),
                _line("headroom", "headroom", 461),
            ),
            _stage(
                1,
                second,
                _line("driver", "driver and firmware", 460),
                _line("context", "CUDA context", 400),
                _line("weights", "weights: 30 layers", 11_700),
                _line("weights", "weights: head", 1184),
                _line("kv_cache", "KV cache of 2,064 tokens", 62),
                _line("activations", "activations, largest while the prompt is read", 310),
                _line("headroom", "headroom", 461),
            ),
        ),
        cuts=(
            Cut(
                before="model.language_model.layers.9",
                after="model.language_model.layers.10",
                link="PHB",
                reason="GPU 0 has 10.0 GiB free: 10 layers, the vision and the embedding are what fits with 1,808 tokens.",
            ),
        ),
        reasons=("2 GPUs are needed: one GPU would lack 1.7 GiB.",),
        longest_prompt_tokens=31_744,
        limits=Limits(prompt_tokens=31_744, new_tokens=30_000, batch=9, images=17, image_edge=2016),
        auto=AutoPlacement(
            library="transformers 5.2.0",
            shares=(
                AutoShare(
                    gpu=0,
                    keys=("model.visual", "model.language_model.embed_tokens", *_layers(0, 15)),
                    layers=16,
                    weights_bytes=9100 * MIB,
                    need_bytes=10_000 * MIB,
                    left_bytes=-700 * MIB,
                ),
                AutoShare(
                    gpu=1,
                    keys=(*_layers(16, 39), "model.language_model.norm", "lm_head"),
                    layers=24,
                    weights_bytes=10_500 * MIB,
                    need_bytes=11_000 * MIB,
                    left_bytes=10_000 * MIB,
                ),
            ),
            verdict="auto lacks 700 MiB on GPU 0 for this prompt.",
        ),
        notes=("Image size 1008 x 1008 assumed.",),
    )


@pytest.fixture
def misfit() -> Plan:
    """A plan that does not fit one L4."""
    return Plan(
        model=MODEL,
        machine="1 x NVIDIA L4",
        fits=False,
        workload=Workload(images=2, image_height=1440, image_width=2560, batch=4),
        dtype="bfloat16",
        prompt_tokens=9728,
        image_tokens=9216,
        device_map={},
        max_memory={},
        cuda_visible_devices="",
        stages=(
            _stage(
                0,
                ("model.visual", *_layers(0, 39)),
                _line("driver", "driver and firmware", 460),
                _line("weights", "weights: vision tower", 1700),
                _line("weights", "weights: 40 layers", 18_000),
                _line("kv_cache", "KV cache of 9,984 tokens x 4", 1600),
                _line("activations", "activations, largest while an image is encoded", 4000),
            ),
        ),
        shortage=Shortage(
            missing_bytes=2726 * MIB,
            message="zai-org/GLM-4.1V-9B-Thinking needs 25.2 GiB of GPU 0, which has 22.5 GiB.",
            is_permanent=True,
            levers=(
                Lever(change="load in 4 bit (nf4)", saves_bytes=13 * GIB, fits=True),
                Lever(change="batch 1", saves_bytes=3 * GIB, fits=True),
                Lever(change="one image instead of 2", saves_bytes=900 * MIB, fits=False),
            ),
        ),
    )


@pytest.fixture
def check_report(machine: Machine, diagnosis: Diagnosis, plan: Plan) -> Report:
    """A check with findings and the suggestion of a plan."""
    return Report(version="0.1.0", machine=machine, diagnosis=diagnosis, plan=plan, exit_status=1, seconds=0.21)


@pytest.fixture
def plan_report(machine: Machine, plan: Plan) -> Report:
    """A plan that fits."""
    return Report(
        version="0.1.0",
        command="plan",
        machine=machine,
        diagnosis=Diagnosis(outcomes=()),
        plan=plan,
        exit_status=0,
        seconds=0.12,
    )


@pytest.fixture
def misfit_report(machine: Machine, diagnosis: Diagnosis, misfit: Plan) -> Report:
    """A plan that does not fit, on a machine with an error of its own."""
    return Report(version="0.1.0", command="plan", machine=machine, diagnosis=diagnosis, plan=misfit, exit_status=1)
