"""Builds whole machines from a short spec: what a collector would have recorded around such GPUs, all of it healthy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from vlm_doctor.machine import (
    Driver,
    Fabric,
    Gap,
    Gpu,
    GpuProcess,
    Host,
    Libraries,
    Machine,
    NumaNode,
    Package,
    PciDevice,
    TorchBuild,
    TorchDevice,
    TorchView,
    VersionRule,
)
from vlm_doctor.sources.synthetic import parse_machine
from vlm_doctor.units import GIB

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
RULES = (
    VersionRule(
        requirer="transformers",
        requirement="accelerate>=1.1.0",
        source="transformers/utils/import_utils.py",
        is_optional=True,
    ),
    VersionRule(requirer="transformers", requirement="tokenizers>=0.23.1,<0.24", source="Requires-Dist of transformers"),
    VersionRule(
        requirer="transformers",
        requirement="bitsandbytes>=0.46.1",
        source="transformers/utils/import_utils.py",
        is_optional=True,
    ),
)
PACKAGES = {
    "accelerate": "1.15.0",
    "av": "16.0.1",
    "nvidia-ml-py": "13.615.71",
    "pillow": "12.0.0",
    "tokenizers": "0.23.1",
    "torch": "2.13.0+cu130",
    "torchvision": "0.28.0+cu130",
    "transformers": "5.23.0",
}
DRIVER_VERSION = "580.95.05"


MACHINES: dict[str, Callable[[], Machine]] = {}
"""Every story by the name of its file."""


def machine(build: Callable[[], Machine]) -> Callable[[], Machine]:
    """Register a story under its name in kebab case; a leading underscore lets it begin with a digit."""
    MACHINES[build.__name__.removeprefix("_").replace("_", "-")] = build
    return build


def uuid(text: str, kind: str = "GPU") -> str:
    """A pseudonym, always the same for the same text."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{kind}-{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"


def healthy(spec: str, name: str, **changes: Any) -> Machine:
    """A machine of a spec as a collector would record it: nothing wrong, everything known."""
    made = parse_machine(spec)
    gpus = tuple(
        replace(
            gpu,
            uuid=uuid(f"{name} {gpu.index}"),
            ecc_uncorrected=0,
            remap_pending=False,
            remap_failed=False,
            recovery_action="none",
            pcie_generation=1,
            pcie_generation_max=4,
            pcie_width=16,
            pcie_width_max=16,
            persistence_mode=True,
            display_active=False,
            fabric=gpu.fabric or Fabric(state="not_supported"),
            slowdowns=(),
            pcie_replays=0,
            nvlink_errors=0 if gpu.nvlinks else None,
            virtualization="none",
            numa_node=0,
        )
        for gpu in made.gpus
    )
    links = tuple(replace(link, p2p_read="ok", p2p_write="ok") for link in made.links)
    return recorded(replace(made, gpus=gpus, links=links), name, **changes)


def recorded(base: Machine, name: str, **changes: Any) -> Machine:
    """Put host, driver, libraries and torch's view around the GPUs of ``base``."""
    gpus = base.gpus
    whole = replace(
        base,
        origin="recorded",
        description=name,
        collected_at="2026-11-22T12:00:00Z",
        tool_version="0.1.0",
        pci_devices=tuple(pci(gpu.bus_id or "", "nvidia") for gpu in gpus),
        driver=driver(len(gpus)),
        host=HOST,
        libraries=LIBRARIES,
        torch=torch_view(gpus),
    )
    return replace(whole, **changes)


def pci(bus_id: str, kernel_driver: str | None) -> PciDevice:
    """An NVIDIA device on the bus."""
    return PciDevice(bus_id=bus_id, device_id="27b8", kernel_driver=kernel_driver, link_width=16, link_width_max=16)


def driver(count: int, **changes: Any) -> Driver:
    """A driver that works."""
    files = (*(f"/dev/nvidia{index}" for index in range(count)), "/dev/nvidiactl", "/dev/nvidia-uvm")
    works = Driver(
        kernel_module_version=DRIVER_VERSION,
        is_open_kernel_module=True,
        device_files=files,
        libcuda_path="/usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05",
        nvml_state="ok",
        driver_version=DRIVER_VERSION,
        kernel_events=(),
        cuda_version=(13, 0),
    )
    return replace(works, **changes)


def torch_view(gpus: tuple[Gpu, ...]) -> TorchView:
    """What torch says when all is well. It prints UUIDs without ``GPU-``."""
    devices = tuple(
        TorchDevice(ordinal=ordinal, uuid=gpu.uuid.removeprefix("GPU-"), name=gpu.name) for ordinal, gpu in enumerate(gpus)
    )
    return TorchView(
        state="ok",
        version="2.13.0+cu130",
        cuda="13.0",
        is_available=bool(gpus),
        device_count=len(gpus),
        devices=devices,
        seconds=2.1,
    )


def packages(**changes: str | None) -> tuple[Package, ...]:
    """The usual packages; ``None`` takes one away."""
    versions = PACKAGES | {name.replace("_", "-"): version for name, version in changes.items()}
    return tuple(Package(name=name, version=version) for name, version in sorted(versions.items()) if version is not None)


HOST = Host(
    os="Ubuntu 24.04.3 LTS",
    kernel="6.8.0-85-generic",
    cpu_count=32,
    memory_total_bytes=251 * GIB,
    memory_available_bytes=240 * GIB,
    shm_total_bytes=125 * GIB,
    shm_free_bytes=125 * GIB,
    hf_cache="~/.cache/huggingface/hub",
    hf_cache_free_bytes=800 * GIB,
    hf_cache_is_writable=True,
    hf_cache_filesystem="ext4",
    tmp="/tmp",
    tmp_free_bytes=200 * GIB,
    numa_nodes=(NumaNode(node=0, cpu_count=32, allowed_cpu_count=32),),
    network_interfaces=("eno1", "lo"),
    mps="absent",
    is_virtual_machine=False,
    iommu="off",
)
DOCKER = replace(HOST, container="docker")
LIBRARIES = Libraries(
    python="3.12.3",
    executable="/usr/bin/python3",
    packages=packages(),
    rules=RULES,
    torch_build=TorchBuild(version="2.13.0+cu130", cuda="13.0", archs=ARCHS, has_cuda_library=True),
    pynvml_owners=("nvidia-ml-py",),
)
NO_CUDA = TorchView(state="ok", version="2.13.0+cu130", cuda="13.0", is_available=False, device_count=0, seconds=1.9)
BLIND = (Gap(path="gpus", reason="NVML could not be used"),)


def unseen(count: int, name: str, kernel_driver: str | None, **changes: Any) -> Machine:
    """A machine whose GPUs only the PCI bus shows."""
    devices = tuple(pci(f"0000:{index + 1:02x}:00.0", kernel_driver) for index in range(count))
    base = Machine(origin="recorded", description=name)
    return recorded(base, name, pci_devices=devices, torch=NO_CUDA, gaps=BLIND, **changes)


def with_libraries(whole: Machine, **changes: Any) -> Machine:
    """Change what is installed; ``packages`` stay as they are unless given."""
    assert whole.libraries is not None
    return replace(whole, libraries=replace(whole.libraries, **changes))


def with_host(whole: Machine, **changes: Any) -> Machine:
    """Change the computer around the GPUs."""
    assert whole.host is not None
    return replace(whole, host=replace(whole.host, **changes))


def with_gpu(whole: Machine, index: int, **changes: Any) -> Machine:
    """Change one GPU."""
    return replace(whole, gpus=tuple(replace(gpu, **changes) if gpu.index == index else gpu for gpu in whole.gpus))


def holding(gpu: Gpu, used_bytes: int, *processes: GpuProcess) -> dict[str, Any]:
    """Fields of a GPU part of whose memory is taken."""
    total, reserved = gpu.memory_total_bytes or 0, gpu.memory_reserved_bytes or 0
    return {"memory_used_bytes": used_bytes, "memory_free_bytes": total - reserved - used_bytes, "processes": processes}
