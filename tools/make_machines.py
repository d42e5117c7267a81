"""Write the made-up broken and healthy machines of tests/machines: ``python tools/make_machines.py``.

The stories of what stands around the GPUs (settings, packages, limits) are in ``machine_stories.py``.

Each is one story: a healthy machine with one thing changed. Files with ``recorded`` in their name come from real machines
(``vlm-doctor collect``) and are left alone.
"""

from __future__ import annotations

from pathlib import Path

import machine_stories  # noqa: F401 - its stories register themselves
from machine_builders import (
    DOCKER,
    DRIVER_VERSION,
    HOST,
    LIBRARIES,
    MACHINES,
    NO_CUDA,
    driver,
    healthy,
    holding,
    machine,
    packages,
    pci,
    recorded,
    torch_view,
    unseen,
    uuid,
    with_gpu,
)
from msgspec.structs import replace

from vlm_doctor.codec import to_json
from vlm_doctor.machine import (
    Driver,
    Fabric,
    Gap,
    Gpu,
    GpuProcess,
    Link,
    Machine,
    MigDevice,
    TorchBuild,
    TorchView,
)
from vlm_doctor.units import GIB, MIB

FOLDER = Path(__file__).parent.parent / "tests" / "machines"


# Healthy


@machine
def _2xh200_nvswitch() -> Machine:
    host = replace(DOCKER, is_virtual_machine=True)
    return healthy("2xH200:nvswitch", "2 x NVIDIA H200, NVSwitch, in a virtual machine", host=host)


@machine
def _2xl4_idle() -> Machine:
    return healthy("2xL4", "2 x NVIDIA L4, idle")


@machine
def _4x3090_two_bridges() -> Machine:
    return healthy("4x3090:nvlink=0-1,2-3:pcie=SYS", "4 x RTX 3090, bridges 0-1 and 2-3")


@machine
def _2x4090_no_p2p() -> Machine:
    base = healthy("2x4090", "2 x RTX 4090, no peer access by design")
    no_access = "gpu_not_supported"
    gaps = tuple(Gap(path=f"gpus[{index}].ecc_uncorrected", reason="NVML: Not Supported") for index in range(2))
    base = replace(
        base, links=tuple(replace(link, p2p_read=no_access, p2p_write=no_access) for link in base.links), gaps=gaps
    )
    gpus = tuple(replace(gpu, ecc_uncorrected=None, remap_pending=None, remap_failed=None) for gpu in base.gpus)
    return replace(base, gpus=gpus)


@machine
def _laptop_no_gpu() -> Machine:
    view = TorchView(state="ok", version="2.13.0+cpu", is_available=False, device_count=0)
    libraries = replace(LIBRARIES, torch_build=TorchBuild(version="2.13.0+cpu", has_cuda_library=False))
    base = Machine(origin="recorded", description="laptop")
    host = replace(HOST, hf_cache_free_bytes=3 * GIB)
    return recorded(base, "laptop without NVIDIA GPU", driver=Driver(), libraries=libraries, torch=view, host=host)


@machine
def _ci_container() -> Machine:
    base = Machine(origin="recorded", description="ci")
    host = replace(DOCKER, shm_total_bytes=64 * MIB, shm_free_bytes=64 * MIB, cgroup_limit_bytes=4 * GIB)
    libraries = replace(
        LIBRARIES, torch_build=None, packages=packages(torch=None, transformers=None, accelerate=None), rules=()
    )
    absent = TorchView(state="absent", message="torch is not installed")
    return recorded(
        base, "container of a CI service, no GPU", driver=Driver(), host=host, libraries=libraries, torch=absent
    )


@machine
def _wsl2() -> Machine:
    fields = ("ecc_uncorrected", "remap_pending", "recovery_action", "fabric", "nvlinks")
    gaps = tuple(Gap(path=f"gpus[0].{field}", reason="NVML: Not Supported") for field in fields)
    base = healthy("4090", "RTX 4090 in WSL2", pci_devices=(), gaps=gaps)
    base = with_gpu(
        base,
        0,
        ecc_uncorrected=None,
        remap_pending=None,
        remap_failed=None,
        recovery_action=None,
        fabric=None,
        **holding(base.gpus[0], 1200 * MIB, GpuProcess(pid=0, kind="graphics")),
    )
    files = {"kernel_module_version": None, "device_files": (), "libcuda_path": "/usr/lib/wsl/lib/libcuda.so.1"}
    host = replace(HOST, kernel="6.6.87.2-microsoft-standard-WSL2", is_wsl=True, is_virtual_machine=True)
    return replace(base, driver=driver(1, **files), host=host)


@machine
def _gb10_unified() -> Machine:
    base = healthy("24GiB", "NVIDIA GB10, memory shared with the host")
    gaps = (
        Gap(path="gpus[0].memory_total_bytes", reason="NVML: Not Supported"),
        Gap(path="gpus[0].memory_free_bytes", reason="NVML: Not Supported"),
        Gap(path="gpus[0].memory_used_bytes", reason="NVML: Not Supported"),
    )
    gpu = replace(
        base.gpus[0],
        name="NVIDIA GB10",
        compute_capability=(12, 1),
        memory_total_bytes=None,
        memory_free_bytes=None,
        memory_used_bytes=None,
        memory_reserved_bytes=None,
        has_unified_memory=True,
    )
    return replace(base, gpus=(gpu,), gaps=gaps, torch=torch_view((gpu,)))


@machine
def _scheduled_job() -> Machine:
    base = healthy("2xH100:nvswitch", "a job that was given 2 of 8 GPUs")
    others = tuple(pci(f"0000:{index + 1:02x}:00.0", "nvidia") for index in range(2, 8))
    refused = tuple(f"/dev/nvidia{index}" for index in range(2, 8))
    files = (*base.driver.device_files, *refused)
    granted = replace(base.driver, device_files=files, forbidden_device_files=refused)
    environment = {"SLURM_JOB_GPUS": "0,1"}
    return replace(base, pci_devices=base.pci_devices + others, driver=granted, environment=environment)


@machine
def _container_with_some_gpus() -> Machine:
    base = healthy("2xL4", "a container that was given 2 of 4 GPUs", host=DOCKER)
    others = tuple(pci(f"0000:{index + 1:02x}:00.0", "nvidia") for index in range(2, 4))
    return replace(base, pci_devices=base.pci_devices + others, environment={"NVIDIA_VISIBLE_DEVICES": "0,1"})


@machine
def _some_hidden() -> Machine:
    base = healthy("4xL4", "4 x NVIDIA L4, two of them hidden", environment={"CUDA_VISIBLE_DEVICES": "1,3"})
    return replace(base, torch=torch_view((base.gpus[1], base.gpus[3])))


@machine
def _one_gpu_passed_through() -> Machine:
    base = healthy("L4", "one L4 here, one set aside for a virtual machine")
    return replace(base, pci_devices=(*base.pci_devices, pci("0000:09:00.0", "vfio-pci")))


# Driver and devices


@machine
def _driver_missing() -> Machine:
    return unseen(2, "2 GPUs, no driver", None, driver=Driver(nvml_state="no_library", nvml_error_code=12))


@machine
def _nouveau() -> Machine:
    return unseen(1, "GPU owned by nouveau", "nouveau", driver=Driver(nvml_state="no_library"))


@machine
def _driver_mismatch() -> Machine:
    broken = driver(
        2,
        nvml_state="error",
        nvml_error_code=18,
        nvml_message="Driver/library version mismatch",
        driver_version=None,
        cuda_version=None,
        kernel_module_version="570.86.15",
    )
    return unseen(2, "driver updated, not rebooted", "nvidia", driver=broken)


@machine
def _nvml_crashed() -> Machine:
    broken = driver(2, nvml_state="crashed", nvml_message="SIGSEGV", driver_version=None, cuda_version=None)
    return unseen(2, "NVML crashes", "nvidia", driver=broken)


@machine
def _device_files_forbidden() -> Machine:
    broken = driver(
        1,
        nvml_state="error",
        nvml_error_code=4,
        nvml_message="Insufficient Permissions",
        forbidden_device_files=("/dev/nvidia0", "/dev/nvidiactl"),
        driver_version=None,
        cuda_version=None,
    )
    return unseen(1, "user outside the video group", "nvidia", driver=broken)


@machine
def _gpu_off_the_bus() -> Machine:
    base = healthy("7xH100:nvswitch", "8 GPUs on the bus, 7 in the driver")
    return replace(base, pci_devices=(*base.pci_devices, pci("0000:5d:00.0", "nvidia")))


@machine
def _gpu_lost() -> Machine:
    base = healthy("4xA100", "one of 4 GPUs is lost")
    lost = Gpu(index=2, uuid="", name="unknown GPU", error="GPU is lost")
    gpus = tuple(lost if gpu.index == 2 else gpu for gpu in base.gpus)
    view = TorchView(state="ok", version="2.13.0+cu130", cuda="13.0", is_available=False, device_count=0)
    return replace(base, gpus=gpus, links=tuple(link for link in base.links if 2 not in (link.a, link.b)), torch=view)


@machine
def _exclusive_process() -> Machine:
    base = healthy("A100", "exclusive GPU in use")
    process = GpuProcess(pid=4711, kind="compute", used_bytes=300 * MIB, user="ana", command="python", started_s_ago=7200)
    return with_gpu(base, 0, compute_mode="exclusive_process", **holding(base.gpus[0], 300 * MIB, process))


@machine
def _a100_mig() -> Machine:
    base = healthy("A100-40", "A100 in two MIG slices")
    slices = tuple(
        MigDevice(
            uuid=uuid(f"slice {n}", "MIG"),
            name="NVIDIA A100-SXM4-40GB MIG 3g.20gb",
            memory_total_bytes=19968 * MIB,
            memory_free_bytes=19968 * MIB,
        )
        for n in range(2)
    )
    return with_gpu(base, 0, mig_enabled=True, mig_devices=slices)


@machine
def _remap_failed() -> Machine:
    return with_gpu(healthy("2xA100", "worn-out memory"), 1, remap_failed=True, remap_pending=True, ecc_uncorrected=2)


# Visibility


@machine
def _masked() -> Machine:
    return healthy("2xL4", "every GPU hidden", environment={"CUDA_VISIBLE_DEVICES": ""}, torch=NO_CUDA)


@machine
def _out_of_range() -> Machine:
    base = healthy("2xL4", "an index that does not exist", environment={"CUDA_VISIBLE_DEVICES": "0,9"})
    return replace(base, torch=torch_view(base.gpus[:1]))


@machine
def _mixed_order() -> Machine:
    base = healthy("3090+4090", "mixed cards, CUDA counts the fast one first")
    return replace(base, torch=torch_view(base.gpus[::-1]))


@machine
def _container_no_injection() -> Machine:
    outside = Driver(kernel_module_version=DRIVER_VERSION, nvml_state="no_library")
    return unseen(4, "container started without GPUs", "nvidia", driver=outside, host=DOCKER)


@machine
def _container_lacks_compute() -> Machine:
    environment = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "utility"}
    base = healthy("2xL4", "container without libcuda", host=DOCKER, environment=environment, torch=NO_CUDA)
    return replace(base, driver=driver(2, libcuda_path=None))


@machine
def _torch_sees_fewer() -> Machine:
    base = healthy("2xL4", "CUDA misses a GPU")
    return replace(base, torch=torch_view(base.gpus[:1]))


# Libraries


@machine
def _torch_missing() -> Machine:
    libraries = replace(LIBRARIES, packages=packages(torch=None), torch_build=None)
    absent = TorchView(state="absent", message="torch is not installed")
    return healthy("2xL4", "no torch", libraries=libraries, torch=absent)


@machine
def _torch_half_installed() -> Machine:
    libraries = replace(LIBRARIES, torch_build=None, torch_problem="metadata of torch 2.13.0 without the package")
    failed = TorchView(state="failed", message="ModuleNotFoundError: No module named 'torch'")
    return healthy("2xL4", "torch half installed", libraries=libraries, torch=failed)


@machine
def _cpu_torch() -> Machine:
    libraries = replace(
        LIBRARIES,
        packages=packages(torch="2.13.0+cpu"),
        torch_build=TorchBuild(version="2.13.0+cpu", has_cuda_library=False),
    )
    view = TorchView(state="ok", version="2.13.0+cpu", is_available=False, device_count=0)
    return healthy("2xL4", "CPU build of torch", libraries=libraries, torch=view)


@machine
def _torch_import_error() -> Machine:
    text = "ImportError: libcudnn.so.9: cannot open shared object file: No such file or directory"
    return healthy("2xL4", "torch cannot be imported", torch=TorchView(state="failed", message=text))


@machine
def _torch_segfault() -> Machine:
    return healthy("2xL4", "torch crashes on import", torch=TorchView(state="crashed", message="SIGSEGV"))


@machine
def _torch_hang() -> Machine:
    return healthy("2xL4", "torch hangs on import", torch=TorchView(state="timed_out", seconds=20.0))


@machine
def _old_driver() -> Machine:
    text = "The NVIDIA driver on your system is too old (found version 12040)."
    old = driver(
        2,
        kernel_module_version="550.54.14",
        driver_version="550.54.14",
        cuda_version=(12, 4),
        libcuda_path="/usr/lib/x86_64-linux-gnu/libcuda.so.550.54.14",
    )
    return healthy("2xL4", "driver older than torch's CUDA", driver=old, torch=replace(NO_CUDA, message=text))


@machine
def _v100_missing_sm() -> Machine:
    return healthy("2xV100-16", "V100 with a torch for CUDA 13")


@machine
def _transformers_missing() -> Machine:
    libraries = replace(LIBRARIES, packages=packages(transformers=None, accelerate=None), rules=())
    return healthy("2xL4", "no transformers", libraries=libraries)


@machine
def _old_accelerate() -> Machine:
    return healthy("2xL4", "accelerate too old", libraries=replace(LIBRARIES, packages=packages(accelerate="1.0.1")))


@machine
def _pynvml_shadowed() -> Machine:
    libraries = replace(LIBRARIES, packages=packages(pynvml="11.5.0"), pynvml_owners=("nvidia-ml-py", "pynvml"))
    broken = driver(2, nvml_state="no_binding", nvml_message="pynvml.py is not nvidia-ml-py: it lacks nvmlDeviceGetUUID")
    return unseen(2, "another package named pynvml", "nvidia", driver=broken, libraries=libraries)


# Links


@machine
def _8xh100_fabric_down() -> Machine:
    base = healthy("8xH100:nvswitch", "fabric manager not running", torch=NO_CUDA)
    return replace(base, gpus=tuple(replace(gpu, fabric=Fabric(state="not_started")) for gpu in base.gpus))


@machine
def _nvlink_half_dead() -> Machine:
    base = healthy("4x3090:nvlink=0-1,2-3:pcie=SYS", "a loose bridge")
    ports = tuple(replace(port, is_active=port.link < 2) for port in base.gpus[2].nvlinks)
    links = tuple(replace(link, nvlinks=2) if (link.a, link.b) == (2, 3) else link for link in base.links)
    return replace(with_gpu(with_gpu(base, 2, nvlinks=ports), 3, nvlinks=ports), links=links)


@machine
def _badly_joined() -> Machine:
    environment = {"CUDA_VISIBLE_DEVICES": "0,2"}
    base = healthy("4x3090:nvlink=0-1,2-3:pcie=SYS", "GPUs of different bridges chosen", environment=environment)
    return replace(base, torch=torch_view((base.gpus[0], base.gpus[2])))


@machine
def _links_unread() -> Machine:
    base = healthy("2xA100", "topology could not be read")
    links = (Link(a=0, b=1),)
    return replace(base, links=links, gaps=(Gap(path="links", reason="NVML: Unknown Error"),))


# Memory and host


@machine
def _2xa10_half_taken() -> Machine:
    base = healthy("2xA10", "another user's job on GPU 1")
    process = GpuProcess(pid=4711, kind="compute", used_bytes=11 * GIB, user="ana", command="python", started_s_ago=11000)
    return with_gpu(base, 1, **holding(base.gpus[1], 11 * GIB, process))


@machine
def _orphaned_memory() -> Machine:
    base = healthy("2xL4", "memory without a process")
    return with_gpu(base, 0, **holding(base.gpus[0], 9 * GIB))


@machine
def _container_hidden_pids() -> Machine:
    base = healthy("2xL4", "memory held outside the container", host=DOCKER)
    return with_gpu(base, 1, **holding(base.gpus[1], 9 * GIB))


@machine
def _small_shm() -> Machine:
    return healthy(
        "2xL4", "docker's default /dev/shm", host=replace(DOCKER, shm_total_bytes=64 * MIB, shm_free_bytes=64 * MIB)
    )


@machine
def _cgroup_limit() -> Machine:
    host = replace(DOCKER, cgroup_limit_bytes=16 * GIB, memory_available_bytes=15 * GIB)
    return healthy("2xL40S", "container with little memory", host=host)


@machine
def _full_disk() -> Machine:
    return healthy("2xL4", "little room for checkpoints", host=replace(HOST, hf_cache_free_bytes=4300 * MIB))


def machines() -> dict[str, str]:
    """File name to text of every made-up machine."""
    return {f"{name}.json": to_json(build()) for name, build in MACHINES.items()}


def main() -> None:
    """Write the files."""
    for name, text in machines().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(MACHINES)} machines in {FOLDER}")


if __name__ == "__main__":
    main()
