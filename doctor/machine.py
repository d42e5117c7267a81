"""A machine as data: what the sources saw, with no judgement in it.

A :class:`Machine` is live, recorded (a snapshot file) or synthetic (``2xL4``); every later step takes any of them, and
only a live one may be acted on. What could not be read is ``None`` and has a :class:`Gap` that says why: unknown is
never zero. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import msgspec

from .calibration import Calibration

SCHEMA = 1
"""Number of the snapshot format. It changes only when an old snapshot would be read wrongly."""

LinkPath = Literal["PIX", "PXB", "PHB", "NODE", "SYS", "INTERNAL"]
"""How two GPUs reach each other over PCIe, in the words of ``nvidia-smi topo -m``, nearest first; INTERNAL is the two
halves of one board."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Something that could not be read."""

    path: str
    """Field that is missing, such as ``gpus[0].memory_free_bytes``; a whole part is named by its first component."""
    reason: str
    """Why, in one phrase, such as ``NVML: Not Supported``."""


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds memory of a GPU."""

    pid: int
    kind: Literal["compute", "graphics", "mps"]
    used_bytes: int | None = None
    user: str | None = None
    """``None`` when the process is not visible from here (another container or user)."""
    command: str | None = None
    started_s_ago: float | None = None


class NvLink(msgspec.Struct, frozen=True, kw_only=True):
    """One NVLink port of a GPU. Source: nvmlDeviceGetNvLink*. By hand: ``nvidia-smi nvlink -s``."""

    link: int
    is_active: bool
    version: int | None = None
    remote: Literal["gpu", "switch", "ibmnpu", "unknown"] = "unknown"
    remote_bus_id: str | None = None
    """PCI address at the far end. Through NVSwitch it is ``ffff:ff:ff.0`` on virtual machines, so pairs behind a switch
    cannot be found by matching addresses (measured on H200)."""


class Fabric(msgspec.Struct, frozen=True, kw_only=True):
    """State of the NVSwitch fabric, as one GPU tells it. Source: nvmlDeviceGetGpuFabricInfoV."""

    state: Literal["not_supported", "not_started", "in_progress", "completed", "unknown"]
    status: int | None = None
    """``nvmlReturn_t``; 0 is success and only means something when ``state`` is ``completed``."""
    health_mask: int | None = None
    clique_id: int | None = None


class KernelEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel log says about NVIDIA GPUs since boot, one record a kind, number and device.

    Only these are kept of a line, never its text: names and arguments of processes stand in it.
    """

    kind: Literal["xid", "init_failed", "gsp_failed", "needs_open_modules", "not_probed", "api_mismatch", "iommu_fault"]
    """``xid``: the driver reports a fault; ``not_probed``: another driver had the device first; ``iommu_fault``: the IOMMU
    refused an access of a device."""
    code: int | None = None
    """Number of an Xid. Source: NVIDIA, Xid Errors."""
    bus_id: str | None = None
    count: int = 1
    last_s_ago: float | None = None


class MigDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A MIG slice."""

    uuid: str
    name: str | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU as the driver (NVML) describes it."""

    index: int
    """Position in NVML order (PCI bus order), which may differ from CUDA's."""
    uuid: str
    """``GPU-…``: the only name that means the same GPU everywhere. By hand: ``nvidia-smi -L``."""
    name: str
    bus_id: str | None = None
    """``dddd:bb:dd.f``, lower case, 4-digit domain."""
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_used_bytes: int | None = None
    """Held by processes; NVML memory info version 2, so the driver's own share is not in it."""
    memory_reserved_bytes: int | None = None
    """Held by the driver and firmware (615 MiB on an idle H200)."""
    compute_capability: tuple[int, int] | None = None
    compute_mode: Literal["default", "exclusive_thread", "prohibited", "exclusive_process"] | None = None
    mig_enabled: bool | None = None
    mig_pending: bool | None = None
    mig_devices: tuple[MigDevice, ...] = ()
    ecc_uncorrected: int | None = None
    """Uncorrectable ECC errors since the driver was loaded."""
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    recovery_action: Literal["none", "reset_gpu", "reboot_node", "drain_p2p", "drain_and_reset"] | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    numa_node: int | None = None
    persistence_mode: bool | None = None
    display_active: bool | None = None
    slowdowns: tuple[Literal["hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake"], ...] | None = None
    """Why the clocks are held down at this moment, without the normal reasons (idle, power cap, settings).
    By hand: ``nvidia-smi -q -d PERFORMANCE``."""
    pcie_replays: int | None = None
    """PCIe packets sent again since the driver was loaded."""
    nvlink_errors: int | None = None
    """NVLink replays and recoveries of all ports since they were last cleared. By hand: ``nvidia-smi nvlink -e``."""
    virtualization: Literal["none", "passthrough", "vgpu", "host_vgpu", "host_vsga"] | None = None
    is_licensed: bool | None = None
    """Whether a vGPU has its licence; ``None`` where none is wanted or it is not told."""
    has_unified_memory: bool | None = None
    """True where the GPU has no memory of its own (GB10, Jetson): its budget is the host's memory."""
    fabric: Fabric | None = None
    nvlinks: tuple[NvLink, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    error: str | None = None
    """Set when the driver lists the GPU but fails when asked about it, such as ``GPU is lost``."""

    @property
    def label(self) -> str:
        """``GPU 0 (NVIDIA L4)``."""
        return f"GPU {self.index} ({self.name})"


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """How one GPU reaches another. Stored once a pair, ``a < b``. By hand: ``nvidia-smi topo -m``."""

    a: int
    """GPU index."""
    b: int
    """GPU index."""
    nvlinks: int | None = None
    """Active NVLinks that join the pair, directly or through NVSwitch; 0 when there are none."""
    path: LinkPath | None = None
    p2p_read: str | None = None
    """``ok``, or why the driver does not grant peer reads: ``chipset_not_supported``, ``gpu_not_supported``,
    ``topology_not_supported``, ``disabled_by_regkey``, ``not_supported``, ``unknown``."""
    p2p_write: str | None = None

    @property
    def label(self) -> str:
        """``NV18``, ``PIX`` … as ``nvidia-smi topo -m`` prints it; ``?`` when unknown."""
        return f"NV{self.nvlinks}" if self.nvlinks else (self.path or "?")


class PciDevice(msgspec.Struct, frozen=True, kw_only=True):
    """An NVIDIA display or 3D controller on the PCI bus, driver or no driver. Source: /sys/bus/pci/devices."""

    bus_id: str
    device_id: str
    """Four hexadecimal digits, such as ``2335``."""
    kernel_driver: str | None = None
    """``nvidia``, ``nouveau``, ``vfio-pci`` …; ``None`` when no driver is bound."""
    numa_node: int | None = None
    link_width: int | None = None
    link_width_max: int | None = None


class Driver(msgspec.Struct, frozen=True, kw_only=True):
    """The NVIDIA driver: kernel module, device files and NVML."""

    kernel_module_version: str | None = None
    """From /proc/driver/nvidia/version or /sys/module/nvidia/version; ``None`` when the module is not loaded."""
    is_open_kernel_module: bool | None = None
    device_files: tuple[str, ...] = ()
    """``/dev/nvidia*`` character devices that exist."""
    forbidden_device_files: tuple[str, ...] = ()
    """Those of them that this user may not open for reading and writing."""
    libcuda_path: str | None = None
    """What ``libcuda.so.1`` resolves to; ``None`` when the loader does not find it."""
    nvml_state: Literal["ok", "no_binding", "no_library", "error", "crashed", "timed_out"] = "no_library"
    """``no_binding``: nvidia-ml-py is missing or shadowed; ``no_library``: libnvidia-ml.so.1 does not load;
    ``error``: NVML answered with an error; ``crashed`` and ``timed_out``: the child process died or hung."""
    nvml_error_code: int | None = None
    """``nvmlReturn_t``, such as 9 (driver not loaded) or 18 (library and kernel module differ)."""
    nvml_message: str | None = None
    driver_version: str | None = None
    """As NVML tells it, such as ``580.159.04``."""
    kernel_events: tuple[KernelEvent, ...] | None = None
    """``None`` when the kernel log may not be read, which is usual in containers."""
    is_confidential_ready: bool | None = None
    """Whether confidential computing lets work onto the GPUs; ``None`` where it is off or unknown."""
    cuda_version: tuple[int, int] | None = None
    """Newest CUDA that the driver supports, such as ``(13, 0)``."""


class NumaNode(msgspec.Struct, frozen=True, kw_only=True):
    """Processors and memory that are near each other. By hand: ``numactl --hardware``."""

    node: int
    cpu_count: int
    allowed_cpu_count: int
    """CPUs of it that this process may run on."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The computer around the GPUs."""

    os: str
    kernel: str
    cpu_count: int | None = None
    """CPUs this process may run on."""
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    """Available to this process: the smaller of the system's figure and what the cgroup leaves."""
    cgroup_limit_bytes: int | None = None
    """Memory limit of the container or job; ``None`` when there is none."""
    shm_total_bytes: int | None = None
    shm_free_bytes: int | None = None
    hf_cache: str | None = None
    """Folder where checkpoints are kept (HF_HUB_CACHE), home directory written as ``~``."""
    hf_cache_free_bytes: int | None = None
    hf_cache_is_writable: bool | None = None
    hf_cache_filesystem: str | None = None
    """Type of the file system below it, such as ``ext4`` or ``nfs4``."""
    tmp: str | None = None
    """Folder for temporary files."""
    tmp_free_bytes: int | None = None
    address_space_limit_bytes: int | None = None
    """``ulimit -v``; ``None`` when unlimited."""
    tasks_left: int | None = None
    """Processes and threads that the control group still lets this process start; ``None`` when unlimited."""
    numa_nodes: tuple[NumaNode, ...] = ()
    network_interfaces: tuple[str, ...] = ()
    mps: Literal["absent", "running", "dead"] | None = None
    """The control daemon of CUDA's multi-process service; ``dead``: its files are there, its process is not."""
    container: str | None = None
    """``docker``, ``podman``, ``kubernetes``, ``container`` …; ``None`` outside one."""
    is_wsl: bool = False
    is_virtual_machine: bool | None = None
    iommu: Literal["off", "passthrough", "translating", "unknown"] = "unknown"


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """An installed distribution, read from its metadata, never imported."""

    name: str
    """Normalised, such as ``nvidia-ml-py``."""
    version: str
    location: str | None = None


class VersionRule(msgspec.Struct, frozen=True, kw_only=True):
    """A requirement that an installed library itself declares, so that no table of ours can go stale."""

    requirer: str
    """Distribution that asks, such as ``transformers``."""
    requirement: str
    """PEP 508, such as ``accelerate>=1.1.0``."""
    source: str
    """File or metadata field it was read from."""
    is_optional: bool = False
    """True when the rule only matters if the package is installed (an extra)."""


class TorchBuild(msgspec.Struct, frozen=True, kw_only=True):
    """What torch's files say about it, without importing it."""

    version: str
    cuda: str | None = None
    """CUDA version it was built for, such as ``13.0``; ``None`` for a CPU build."""
    hip: str | None = None
    archs: tuple[str, ...] = ()
    """``sm_XX`` that the wheel contains, when its own tables tell; empty when unknown."""
    has_cuda_library: bool | None = None
    location: str | None = None


class Libraries(msgspec.Struct, frozen=True, kw_only=True):
    """Python and the packages that matter."""

    python: str
    executable: str
    packages: tuple[Package, ...] = ()
    rules: tuple[VersionRule, ...] = ()
    torch_build: TorchBuild | None = None
    torch_problem: str | None = None
    """Set when torch is half installed: metadata without package, a namespace torso, an unreadable version file."""
    pynvml_owners: tuple[str, ...] = ()
    """Distributions that ship a module named ``pynvml``: it should be exactly ``nvidia-ml-py``."""
    bitsandbytes_cuda: tuple[str, ...] | None = None
    """CUDA versions that the installed bitsandbytes has a library for, such as ``13.0``; ``None`` when not installed."""
    foreign_cuda_libraries: tuple[str, ...] = ()
    """CUDA libraries in folders of LD_LIBRARY_PATH that torch's wheel brings, too."""
    is_virtual_environment: bool | None = None
    has_pip: bool | None = None
    """Environments that uv makes have none."""
    is_externally_managed: bool | None = None
    """Whether the operating system forbids pip to change it (PEP 668)."""

    def version(self, name: str) -> str | None:
        """Version of the installed distribution ``name``, or ``None``."""
        return next((package.version for package in self.packages if package.name == name), None)


class TorchDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU as torch counts it."""

    ordinal: int
    uuid: str | None = None
    name: str | None = None
    memory_total_bytes: int | None = None


class TorchView(msgspec.Struct, frozen=True, kw_only=True):
    """What torch itself says, asked in a child process with a deadline and without creating a CUDA context."""

    state: Literal["not_asked", "absent", "ok", "failed", "crashed", "timed_out"]
    """``failed``: the import or a call raised; ``crashed``: the child died of a signal."""
    message: str | None = None
    """Exception text, signal name, or why it was not asked."""
    version: str | None = None
    cuda: str | None = None
    is_available: bool | None = None
    device_count: int | None = None
    devices: tuple[TorchDevice, ...] = ()
    seconds: float | None = None
    is_cached: bool = False
    """True when the answer is that of a recent run on the same machine state."""


_ENDS = ("", ".", "[")
"""What may follow the path of a gap in a path that it covers."""


class FileSetting(msgspec.Struct, frozen=True, kw_only=True):
    """A variable that a settings file gives to every program, without being in the environment."""

    name: str
    value: str
    file: str


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in the cache of which something is to be said. The others are not recorded."""

    repo: str
    missing_files: int = 0
    """Files of the newest snapshot that were not, or not wholly, downloaded."""
    lost_calls: tuple[str, ...] = ()
    """Methods of transformers that code shipped with the checkpoint calls and the installed transformers does not have."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything that was seen, at one moment."""

    schema: int = SCHEMA
    origin: Literal["live", "recorded", "synthetic"]
    """Only a live machine may be acted on."""
    description: str
    """One line: what this is, such as ``2 x NVIDIA H200`` or the spec it was made from."""
    collected_at: str | None = None
    """ISO 8601, UTC; ``None`` for a synthetic machine."""
    tool_version: str | None = None
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    pci_devices: tuple[PciDevice, ...] = ()
    driver: Driver = Driver()
    host: Host | None = None
    libraries: Libraries | None = None
    torch: TorchView = TorchView(state="not_asked", message="not part of this snapshot")
    environment: dict[str, str] = {}
    """Allow-listed variables that were set, such as CUDA_VISIBLE_DEVICES. Never a secret."""
    calibrations: tuple[Calibration, ...] = ()
    """What ``vlm-doctor calibrate`` measured on these cards; the planner takes it in place of its defaults."""
    nccl_settings: tuple[FileSetting, ...] = ()
    """NCCL's settings from /etc/nccl.conf and ~/.nccl.conf."""
    checkpoints: tuple[Checkpoint, ...] = ()
    gaps: tuple[Gap, ...] = ()
    seconds: dict[str, float] = {}
    """Time each source took."""

    def gpu(self, index: int) -> Gpu | None:
        """The GPU with this index, if there is one."""
        return self._gpu_of_index.get(index)

    def link(self, a: int, b: int) -> Link | None:
        """The link between two GPU indices, in either order."""
        return self._link_of_pair.get((a, b) if a < b else (b, a))

    # Each pair is asked about, again and again: kept beside the fields, of which they are no part (``dict=True``).

    @cached_property
    def _gpu_of_index(self) -> dict[int, Gpu]:
        return {gpu.index: gpu for gpu in self.gpus}

    @cached_property
    def _link_of_pair(self) -> dict[tuple[int, int], Link]:
        return {(link.a, link.b): link for link in self.links}

    def gap(self, path: str) -> Gap | None:
        """The gap that covers ``path``: the path itself, or a part that contains it."""
        # Asked often of a large machine: the cheap comparison comes first.
        covering = (gap for gap in self.gaps if path.startswith(gap.path))
        return next((gap for gap in covering if path[len(gap.path) : len(gap.path) + 1] in _ENDS), None)
