"""Stories of machines whose GPUs may be fine while something around them is not; each names what it was built from.

Registered here, written by ``make_machines.py``.
"""

from __future__ import annotations

from machine_builders import (
    DOCKER,
    HOST,
    LIBRARIES,
    NO_CUDA,
    driver,
    healthy,
    holding,
    machine,
    packages,
    pci,
    torch_view,
    unseen,
    with_gpu,
    with_host,
    with_libraries,
)
from msgspec.structs import replace

from vlm_doctor.machine import (
    Checkpoint,
    FileSetting,
    Gap,
    Gpu,
    GpuProcess,
    KernelEvent,
    Link,
    Machine,
    NumaNode,
    TorchBuild,
    TorchView,
    VersionRule,
)
from vlm_doctor.units import GIB, MIB

CUDNN = "/usr/local/cuda/lib64/libcudnn.so.9"
TORCH_2_9 = TorchBuild(
    version="2.9.1+cu130", cuda="13.0", archs=("sm_75", "sm_80", "sm_86", "sm_90"), has_cuda_library=True
)
TWO_SOCKETS = (
    NumaNode(node=0, cpu_count=64, allowed_cpu_count=64),
    NumaNode(node=1, cpu_count=64, allowed_cpu_count=64),
)


def every_gpu(whole: Machine, **changes: object) -> Machine:
    """Change all GPUs alike."""
    return replace(whole, gpus=tuple(replace(gpu, **changes) for gpu in whole.gpus))


def peers(links: tuple[Link, ...], answer: str) -> tuple[Link, ...]:
    """Give all pairs the same peer access."""
    return tuple(replace(link, p2p_read=answer, p2p_write=answer) for link in links)


# Healthy, and easily taken for broken


@machine
def _8xa100_nvswitch() -> Machine:
    """DGX A100: two sockets, every pair NV12. Source: NVIDIA DGX A100 user guide, ``nvidia-smi topo -m``."""
    base = with_host(healthy("8xA100:nvswitch", "8 x NVIDIA A100, NVSwitch, two sockets"), numa_nodes=TWO_SOCKETS)
    installed = packages(bitsandbytes="0.50.2", flash_attn="2.8.3")
    base = with_libraries(base, packages=installed, bitsandbytes_cuda=("12.8", "13.0"), is_virtual_environment=True)
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NVIDIA_VISIBLE_DEVICES": "all"}
    base = with_host(replace(base, environment=environment), container="docker", mps="running")
    return replace(base, gpus=tuple(replace(gpu, numa_node=gpu.index // 4) for gpu in base.gpus))


@machine
def _8xb200_nvswitch() -> Machine:
    """DGX B200. Source: NVIDIA DGX B200 user guide."""
    base = healthy("8xB200:nvswitch", "8 x NVIDIA B200, NVSwitch", driver=driver(8, is_open_kernel_module=True))
    return replace(base, pci_devices=tuple(replace(device, device_id="2901") for device in base.pci_devices))


@machine
def t4_with_half_its_lanes() -> Machine:
    """A cloud instance with one T4: 16 lanes possible, 8 in use, by design. Source: ``nvidia-smi -q`` of g4dn.xlarge."""
    base = with_host(healthy("T4", "T4 of a cloud, 8 of 16 lanes"), is_virtual_machine=True)
    return with_gpu(base, 0, pcie_width=8, pcie_generation_max=3)


@machine
def laptop_4090() -> Machine:
    """Laptop: the GPU has 8 lanes, drives the screen, is unloaded when idle. Source: ``nvidia-smi -q`` in nvtop issues."""
    closed = driver(1, is_open_kernel_module=False)
    base = healthy("4090", "laptop with an RTX 4090", driver=closed)
    compositor = GpuProcess(pid=1900, kind="graphics", used_bytes=300 * MIB, user="ana", command="gnome-shell")
    return with_gpu(
        base,
        0,
        name="NVIDIA GeForce RTX 4090 Laptop GPU",
        pcie_width=8,
        slowdowns=("hw_slowdown",),
        display_active=True,
        persistence_mode=False,
        ecc_uncorrected=0,
        **holding(base.gpus[0], 300 * MIB, compositor),
    )


@machine
def unloaded_when_idle() -> Machine:
    """A workstation without the persistence daemon."""
    return every_gpu(healthy("2xL4", "2 x NVIDIA L4, persistence mode off"), persistence_mode=False)


@machine
def nvlink_pair_behind_iommu() -> Machine:
    """An IOMMU that translates does no harm to GPUs that NVLink joins. Source: pytorch issue 84803."""
    return with_host(healthy("2x3090:nvlink=0-1", "2 x RTX 3090 with a bridge, IOMMU on"), iommu="translating")


@machine
def iommu_in_a_virtual_machine() -> Machine:
    """Inside a virtual machine the host's IOMMU translates by design."""
    return with_host(healthy("4xL4", "4 x NVIDIA L4 passed through"), iommu="translating", is_virtual_machine=True)


@machine
def cuda_toolkit_on_the_path() -> Machine:
    """A toolkit of another version than torch's, and its folder in LD_LIBRARY_PATH: normal, the wheels bring their own."""
    environment = {"CUDA_HOME": "/usr/local/cuda-12.4", "LD_LIBRARY_PATH": "/usr/local/cuda-12.4/lib64"}
    base = healthy("2xL4", "toolkit 12.4 beside torch for CUDA 13.0", environment=environment)
    return with_libraries(base, foreign_cuda_libraries=("/usr/local/cuda-12.4/lib64/libcublas.so.12",))


@machine
def wsl2_pair() -> Machine:
    """Two cards in WSL2: most of NVML is not supported there. Source: nccl issue 442."""
    fields = ("ecc_uncorrected", "remap_pending", "recovery_action", "nvlinks", "slowdowns", "virtualization", "numa_node")
    gaps = tuple(Gap(path=f"gpus[{index}].{field}", reason="NVML: Not Supported") for index in range(2) for field in fields)
    base = healthy("2x4090", "2 x RTX 4090 in WSL2", pci_devices=(), gaps=gaps)
    unread = {"ecc_uncorrected": None, "remap_pending": None, "remap_failed": None, "recovery_action": None}
    base = every_gpu(base, **unread, slowdowns=None, virtualization=None, numa_node=None, fabric=None)
    files = {"kernel_module_version": None, "device_files": (), "libcuda_path": "/usr/lib/wsl/lib/libcuda.so.1"}
    host = replace(HOST, kernel="6.6.87.2-microsoft-standard-WSL2", is_wsl=True, is_virtual_machine=True, numa_nodes=())
    links = tuple(replace(link, path=None) for link in peers(base.links, "not_supported"))
    return replace(base, driver=driver(2, **files, kernel_events=None), host=host, links=links)


@machine
def sandbox_that_hides_much() -> Machine:
    """A sandbox that hides /sys, the kernel log and the packages: what was not seen is not judged."""
    gaps = (
        Gap(path="pci_devices", reason="PermissionError: [Errno 13] Permission denied: '/sys/bus/pci/devices'"),
        Gap(path="driver.kernel_events", reason="PermissionError: [Errno 1] Operation not permitted: '/dev/kmsg'"),
        Gap(path="libraries", reason="TimeoutError: no answer within 3 s"),
        Gap(path="host", reason="TimeoutError: no answer within 3 s"),
    )
    base = healthy("2xL4", "sandbox that hides /sys", pci_devices=(), libraries=None, host=None, gaps=gaps)
    return replace(base, driver=driver(2, kernel_events=None))


@machine
def rocm_variables() -> Machine:
    """A profile that was shared with machines of another maker."""
    return healthy("2xL4", "HIP_VISIBLE_DEVICES left in the profile", environment={"HIP_VISIBLE_DEVICES": "0"})


@machine
def packages_from_home() -> Machine:
    """``pip install --user`` before the environment was made."""
    base = with_libraries(healthy("L4", "torch from the home directory"), is_virtual_environment=True)
    assert base.libraries is not None
    home = "~/.local/lib/python3.12/site-packages"
    moved = tuple(replace(one, location=home) if one.name == "torch" else one for one in base.libraries.packages)
    return with_libraries(base, packages=moved)


@machine
def offline_cluster() -> Machine:
    """Compute nodes without a network: a read-only cache that others fill, on NFS."""
    environment = {"HF_HUB_OFFLINE": "1"}
    base = healthy("2xA100", "offline, cache on NFS", environment=environment)
    return with_host(base, hf_cache="/data/hub", hf_cache_is_writable=False, hf_cache_filesystem="nfs4")


@machine
def cache_in_memory() -> Machine:
    """A live system: everything is in a tmpfs."""
    return with_host(healthy("L4", "cache in memory"), hf_cache_filesystem="tmpfs", tmp_free_bytes=500 * MIB)


@machine
def rhel8_pair() -> Machine:
    """RHEL 8 carries fixes back into an old kernel. Source: accelerate, ``check_os_kernel``."""
    base = healthy("2xA100", "2 x A100 under RHEL 8")
    return with_host(base, os="Red Hat Enterprise Linux 8.10 (Ootpa)", kernel="4.18.0-553.el8_10.x86_64")


@machine
def old_xids() -> Machine:
    """A program's fault, and a memory fault three days ago that a reset dealt with. Source: NVIDIA, Xid Errors."""
    events = (
        KernelEvent(kind="xid", code=31, bus_id="0000:01:00.0", count=3, last_s_ago=600.0),
        KernelEvent(kind="xid", code=94, bus_id="0000:02:00.0", last_s_ago=260_000.0),
        KernelEvent(kind="not_probed"),
    )
    return healthy("2xA100", "faults of programs", driver=driver(2, kernel_events=events))


@machine
def t4_with_flash_attention() -> Machine:
    """flash-attn on a Turing card: it only fails where it is asked for. Source: flash-attention, README."""
    return with_libraries(healthy("2xT4", "2 x T4, flash-attn installed"), packages=packages(flash_attn="2.8.3"))


@machine
def licensed_vgpu() -> Machine:
    """A vGPU with its licence. Source: NVIDIA, Virtual GPU Software User Guide."""
    base = with_host(healthy("A100-40", "vGPU with licence"), is_virtual_machine=True)
    return with_gpu(base, 0, name="GRID A100D-20C", virtualization="vgpu", is_licensed=True, fabric=None)


@machine
def mps_running() -> Machine:
    """The multi-process service in use. Source: NVIDIA, Multi-Process Service."""
    return with_host(healthy("A100", "multi-process service"), mps="running")


@machine
def mps_of_the_host() -> Machine:
    """A container that shares the folder of the host's daemon, but not its processes."""
    return with_host(healthy("A100", "multi-process service of the host", host=DOCKER), mps="dead")


@machine
def interrupted_download() -> Machine:
    """A download that was cut off: the next load finishes it."""
    return healthy(
        "2xL4", "half a checkpoint", checkpoints=(Checkpoint(repo="zai-org/GLM-4.1V-9B-Thinking", missing_files=1),)
    )


@machine
def confidential_ready() -> Machine:
    """Confidential computing after attestation. Source: nvtrust issue 109."""
    return healthy("H100", "confidential computing, ready", driver=driver(1, is_confidential_ready=True))


@machine
def new_nvlink_replays() -> Machine:
    """A few replays over months are harmless. Source: ``nvidia-smi nvlink -e``."""
    return with_gpu(healthy("2xA100:nvlink=0-1", "a few NVLink replays"), 0, nvlink_errors=12)


# Driver and devices


@machine
def stub_libcuda() -> Machine:
    """The toolkit's folder for linking in LD_LIBRARY_PATH: error 34. Source: CUDA runtime API, cudaErrorStubLibrary."""
    path = "/usr/local/cuda/lib64/stubs/libcuda.so.1"
    environment = {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64/stubs"}
    return healthy("2xL4", "libcuda is a stub", driver=driver(2, libcuda_path=path), torch=NO_CUDA, environment=environment)


@machine
def wsl2_linux_driver() -> Machine:
    """A Linux driver installed inside WSL2. Source: microsoft/WSL issue 8102."""
    base = healthy("4090", "Linux driver in WSL2", torch=NO_CUDA)
    files = {"kernel_module_version": None, "device_files": ()}
    return replace(with_host(base, is_wsl=True, is_virtual_machine=True), driver=driver(1, **files), pci_devices=())


@machine
def compat_on_geforce() -> Machine:
    """An image with cuda-compat on a consumer card: error 804. Source: nvidia-docker issue 1294."""
    old = {"kernel_module_version": "550.54.14", "driver_version": "550.54.14", "cuda_version": (13, 0)}
    path = "/usr/local/cuda-13.0/compat/libcuda.so.580.95.05"
    base = healthy("2x4090", "forward compatibility on consumer cards", host=DOCKER, torch=NO_CUDA)
    return replace(base, driver=driver(2, **old, libcuda_path=path))


@machine
def library_of_the_image() -> Machine:
    """The image brings a driver library of its own: error 803. Source: NVIDIA, CUDA Compatibility."""
    path = "/usr/lib/x86_64-linux-gnu/libcuda.so.590.48.01"
    base = healthy("2xL4", "driver library of the image", host=DOCKER, torch=NO_CUDA)
    return replace(base, driver=driver(2, libcuda_path=path))


@machine
def _5090_closed_modules() -> Machine:
    """RTX 5090 with the closed modules: "No devices were found". Source: open-gpu-kernel-modules issue 862."""
    events = (
        KernelEvent(kind="needs_open_modules"),
        KernelEvent(kind="init_failed", bus_id="0000:01:00.0", last_s_ago=90.0),
    )
    closed = driver(0, is_open_kernel_module=False, kernel_events=events)
    base = unseen(1, "RTX 5090, closed kernel modules", "nvidia", driver=closed)
    devices = tuple(replace(device, device_id="2b85") for device in base.pci_devices)
    return replace(base, pci_devices=devices, gaps=())


@machine
def xid_79() -> Machine:
    """A GPU fell off the bus five minutes ago. Source: gpumedic's catalogue; NVIDIA, Xid Errors."""
    base = healthy("4xA100", "Xid 79")
    lost = Gpu(index=2, uuid="", name="unknown GPU", bus_id="0000:03:00.0", error="GPU is lost")
    events = (KernelEvent(kind="xid", code=79, bus_id="0000:03:00.0", count=2, last_s_ago=300.0),)
    return replace(
        base,
        gpus=tuple(lost if gpu.index == 2 else gpu for gpu in base.gpus),
        links=tuple(link for link in base.links if 2 not in (link.a, link.b)),
        driver=driver(4, kernel_events=events),
        torch=replace(NO_CUDA, message="CUDA unknown error"),
    )


@machine
def xid_48() -> Machine:
    """An uncorrectable memory error today. Source: NVIDIA, Xid Errors."""
    events = (
        KernelEvent(kind="xid", code=48, bus_id="0000:01:00.0", last_s_ago=4000.0),
        KernelEvent(kind="gsp_failed", count=1, last_s_ago=90_000.0),
        KernelEvent(kind="xid", code=999, last_s_ago=20.0),
    )
    return healthy("2xA100", "Xid 48", driver=driver(2, kernel_events=events))


@machine
def a10_on_a_riser() -> Machine:
    """One of two cards has 4 of 16 lanes. Source: gpumedic, PCIe width."""
    return with_gpu(healthy("2xA10", "a card on a riser"), 1, pcie_width=4)


@machine
def _3090_in_a_mining_slot() -> Machine:
    """One lane through a USB riser."""
    return with_gpu(healthy("3090", "a card on a mining riser"), 0, pcie_width=1)


@machine
def hot_gpu() -> Machine:
    """A fan that stands still. Source: ``nvidia-smi -q -d PERFORMANCE``."""
    return with_gpu(healthy("2xA100", "a GPU too hot"), 0, slowdowns=("hw_slowdown", "hw_thermal"))


@machine
def unlicensed_vgpu() -> Machine:
    """A vGPU without licence. Source: NVIDIA, Virtual GPU Client Licensing."""
    base = with_host(healthy("A100-40", "vGPU without licence"), is_virtual_machine=True)
    return with_gpu(base, 0, name="GRID A100D-20C", virtualization="vgpu", is_licensed=False)


@machine
def confidential_not_ready() -> Machine:
    """Before attestation: error 802. Source: nvtrust issue 109."""
    view = replace(NO_CUDA, message="Error 802: system not yet initialized")
    return healthy("H100", "confidential computing, not ready", driver=driver(1, is_confidential_ready=False), torch=view)


@machine
def mps_dead() -> Machine:
    """The daemon died and left its files: error 805. Source: k8s-device-plugin issue 1118."""
    return with_host(healthy("A100", "multi-process service died", torch=NO_CUDA), mps="dead")


@machine
def corrupt_inforom() -> Machine:
    """NVML error 14 for one question. Source: GPU Operator, Troubleshooting."""
    gap = Gap(path="gpus[0].ecc_uncorrected", reason="NVML: infoROM is corrupted")
    return with_gpu(healthy("2xT4", "damaged infoROM", gaps=(gap,)), 0, ecc_uncorrected=None)


@machine
def t4_beside_a10() -> Machine:
    """A Turing card beside an Ampere card."""
    return healthy("A10+T4", "bfloat16 on one of two cards", environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


# Containers, schedulers


@machine
def gpus_taken_from_container() -> Machine:
    """After ``systemctl daemon-reload`` on the host. Source: nvidia-container-toolkit issue 48.

    The control group then refuses the device files, and access(2) asks it: Linux, fs/namei.c, devcgroup_inode_permission.
    """
    lost = driver(2, nvml_state="error", nvml_error_code=999, nvml_message="Unknown Error", driver_version=None)
    lost = replace(lost, forbidden_device_files=lost.device_files)
    return unseen(2, "container lost its GPUs", "nvidia", driver=lost, host=DOCKER)


@machine
def slurm_unmasked() -> Machine:
    """A job that unset CUDA_VISIBLE_DEVICES on a node without isolation. Source: Slurm, GRES scheduling."""
    return healthy("4xA100", "job with one GPU sees four", environment={"SLURM_JOB_GPUS": "2"})


@machine
def container_short_of_a_gpu() -> Machine:
    """One of two GPUs does not answer. Source: NVIDIA Container Toolkit, specialized configurations."""
    environment = {"NVIDIA_VISIBLE_DEVICES": "0,1"}
    return healthy("L4", "container short of a GPU", host=DOCKER, environment=environment, driver=driver(2))


# Libraries


@machine
def alloc_conf_ignored() -> Machine:
    """Torch 2.9.1 reads the old name only. Source: pytorch issue 183387."""
    base = healthy("2xL4", "allocator setting ignored", environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    installed = packages(torch="2.9.1+cu130", torchvision="0.24.1+cu130", nvidia_cudnn_cu13="9.21.0.82")
    return with_libraries(base, torch_build=TORCH_2_9, packages=installed)


@machine
def alloc_conf_misspelt() -> Machine:
    """torch: "Unrecognized key" at the first use of a GPU. Source: strings of libc10, torch 2.13."""
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments=True,roundup_power2_divisions:[256:1,512:2]",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:128",
    }
    return healthy("2xL4", "allocator setting misspelt", environment=environment)


@machine
def debug_switches() -> Machine:
    """Left over from looking for a fault."""
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_LAUNCH_BLOCKING": "1",
        "CUDA_MODULE_LOADING": "EAGER",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "0",
        "TORCH_USE_CUDA_DSA": "0",
    }
    return healthy("2xL4", "switches left on", environment=environment)


@machine
def flash_attn_for_another_torch() -> Machine:
    """``undefined symbol: _ZN3c10…``. Source: flash-attention issue 1717."""
    installed = packages(flash_attn="2.8.3+cu12torch2.7cxx11abiTRUE", torchvision="0.28.0+cpu", xformers="0.0.35+cu126")
    return with_libraries(healthy("2xL4", "packages for another torch"), packages=installed)


@machine
def torchvision_left_behind() -> Machine:
    """After torch was upgraded alone: "operator torchvision::nms does not exist". Source: llama-cookbook issue 710."""
    base = healthy("2xL4", "torchvision for an older torch")
    assert base.libraries is not None
    rule = VersionRule(requirer="torchvision", requirement="torch==2.5.1", source="Requires-Dist of torchvision")
    installed = packages(torchvision="0.20.1+cu124")
    return with_libraries(base, packages=installed, rules=(*base.libraries.rules, rule))


@machine
def old_bitsandbytes() -> Machine:
    """Bitsandbytes older than the CUDA of torch. Source: bitsandbytes, ``cextension.py``."""
    base = healthy("2xL4", "bitsandbytes without CUDA 13")
    return with_libraries(base, packages=packages(bitsandbytes="0.46.1"), bitsandbytes_cuda=("11.8", "12.6"))


@machine
def cudnn_twice() -> Machine:
    """cu12 and cu13 wheels over each other. Source: CodeJudge issue 2."""
    installed = packages(nvidia_cudnn_cu12="9.10.2.21", nvidia_cudnn_cu13="9.19.0.56")
    return with_libraries(healthy("2xL4", "cuDNN of two versions"), packages=installed)


@machine
def foreign_cudnn() -> Machine:
    """A system cuDNN found before the wheel's. Source: pytorch issue 119932."""
    text = "ImportError: libtorch_cuda.so: undefined symbol: cudnnGetVersion, version libcudnn.so.9"
    environment = {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}
    base = healthy("2xL4", "a foreign cuDNN", environment=environment, torch=TorchView(state="failed", message=text))
    return with_libraries(base, foreign_cuda_libraries=(CUDNN, *(f"/opt/lib/libnccl.so.{n}" for n in range(3))))


@machine
def transformers_cache_ignored() -> Machine:
    """Transformers 5 no longer reads it. Source: transformers, MIGRATION_GUIDE_V5.md."""
    environment = {"TRANSFORMERS_CACHE": "/data/models", "HF_HUB_ENABLE_HF_TRANSFER": "1"}
    base = healthy("2xL4", "TRANSFORMERS_CACHE set", environment=environment)
    return with_libraries(base, packages=packages(huggingface_hub="2.4.0"))


@machine
def no_pillow() -> Machine:
    """Nothing that opens an image: "requires the PIL library". Source: transformers, ``import_utils.py``."""
    return with_libraries(healthy("2xL4", "no image packages"), packages=packages(pillow=None, torchvision=None, av=None))


@machine
def slow_conv3d() -> Machine:
    """Torch 2.9.1 with its own cuDNN, and a transformers with two defects. Sources: pytorch issue 166643, transformers
    pull requests 44565 and 47203.
    """
    installed = packages(
        torch="2.9.1+cu130", torchvision="0.24.1+cu130", nvidia_cudnn_cu13="9.13.0.50", transformers="5.3.0"
    )
    base = healthy("2xL40S", "known defects", libraries=replace(LIBRARIES, torch_build=TORCH_2_9, packages=installed))
    return replace(base, torch=replace(torch_view(base.gpus), version="2.9.1+cu130"))


@machine
def cogvlm_in_the_cache() -> Machine:
    """Code that transformers has outgrown. Sources: zai-org/CogVLM2 issue 218, zai-org/GLM-4 issue 716."""
    lost = ("_extract_past_from_model_output",)
    found = tuple(Checkpoint(repo=repo, lost_calls=lost) for repo in ("THUDM/cogvlm2-llama3-chat-19B", "THUDM/glm-4v-9b"))
    return healthy("2xA100", "CogVLM2 and GLM-4V with transformers 5", checkpoints=found)


# Links


@machine
def _2xa6000_translating_iommu() -> Machine:
    """Peer copies over PCIe through a translating IOMMU. Sources: pytorch issue 84803, accelerate issue 4036."""
    return with_host(healthy("2xA6000", "2 x RTX A6000, IOMMU translates"), iommu="translating")


@machine
def iommu_faults() -> Machine:
    """``DMAR: [DMA Write NO_PASID] … fault``. Source: exllamav3 issue 333."""
    events = (KernelEvent(kind="iommu_fault", bus_id="0000:01:00.0", count=40, last_s_ago=5.0),)
    return healthy("2xA6000", "refused by the IOMMU", driver=driver(2, kernel_events=events))


@machine
def nccl_conf_left_over() -> Machine:
    """Settings of another cluster in a file. Source: NCCL, Environment Variables."""
    file = "/etc/nccl.conf"
    settings = (
        FileSetting(name="NCCL_P2P_DISABLE", value="1", file=file),
        FileSetting(name="NCCL_SOCKET_IFNAME", value="ens1f0", file=file),
    )
    environment = {"NCCL_SHM_DISABLE": "1", "NCCL_DEBUG": "INFO", "NCCL_TOPO_FILE": "/opt/topo.xml"}
    base = healthy("2xA100:nvlink=0-1", "NCCL set up for another machine", environment=environment)
    return replace(base, nccl_settings=settings)


@machine
def far_from_its_gpus() -> Machine:
    """Bound to the other socket. Source: ``numactl --show``."""
    nodes = (TWO_SOCKETS[0], replace(TWO_SOCKETS[1], allowed_cpu_count=0))
    base = with_host(healthy("2xA100", "GPUs on the other socket"), numa_nodes=nodes)
    return every_gpu(base, numa_node=1)


@machine
def failing_nvlink() -> Machine:
    """NVLink errors with Xid 74. Source: NVIDIA, Xid Errors."""
    events = (KernelEvent(kind="xid", code=74, bus_id="0000:02:00.0", count=9, last_s_ago=7200.0),)
    base = healthy("2xA100:nvlink=0-1", "a failing NVLink", driver=driver(2, kernel_events=events))
    return with_gpu(base, 1, nvlink_errors=18_230)


@machine
def nvlink_down_in_the_log() -> Machine:
    """One broken link, which the driver's log and the counters of both ends show, too. Source: NVIDIA, Xid Errors."""
    events = (KernelEvent(kind="xid", code=74, bus_id="0000:01:00.0", count=2, last_s_ago=300.0),)
    base = healthy("4xA100:nvlink=0-1,2-3", "an NVLink that is down", driver=driver(4, kernel_events=events))
    broken = (replace(base.gpus[0].nvlinks[0], is_active=False), *base.gpus[0].nvlinks[1:])
    for at in (0, 1):
        base = with_gpu(base, at, nvlinks=broken, nvlink_errors=700)
    return base


# Memory and host


@machine
def one_full_disk() -> Machine:
    """A cloud machine with one disk, which holds checkpoints and /tmp alike."""
    return with_host(healthy("2xL4", "one disk, and it is full"), hf_cache_free_bytes=40 * MIB, tmp_free_bytes=40 * MIB)


@machine
def limited_addresses() -> Machine:
    """``ulimit -v`` of a login node, and a container without threads left."""
    base = healthy("2xA100", "limits of the process", host=DOCKER)
    return with_host(base, address_space_limit_bytes=64 * GIB, tasks_left=40)


@machine
def full_tmp() -> Machine:
    """Someone's archive in /tmp."""
    return with_host(healthy("2xL4", "no room in /tmp"), tmp_free_bytes=12 * MIB)


@machine
def cache_of_root() -> Machine:
    """The first download was made with sudo."""
    return with_host(healthy("2xL4", "cache belongs to root"), hf_cache_is_writable=False)


@machine
def offline_without_a_shard() -> Machine:
    """Offline, and a download was cut off."""
    found = (Checkpoint(repo="Qwen/Qwen2.5-VL-7B-Instruct", missing_files=2),)
    return healthy("2xL4", "offline, checkpoint incomplete", checkpoints=found, environment={"HF_HUB_OFFLINE": "1"})


@machine
def desktop_with_spare_card() -> Machine:
    """A card without a driver beside a working one, as a display card of another generation."""
    base = healthy("4090", "desktop with an old card beside the RTX 4090")
    return replace(base, pci_devices=(*base.pci_devices, pci("0000:0a:00.0", None)))
