"""Child program: asks NVML everything a :class:`~vlm_doctor.machine.Machine` wants to know. The only importer of pynvml.

Every question is guarded for itself: one that is not supported, missing in an old nvidia-ml-py or an old driver, or that
fails, leaves a gap with NVML's own text. The answer grows stage by stage, plain facts first, so that a crash or a hang
costs only what comes after it. Within a stage GPUs are asked side by side (NVML is thread-safe, and ctypes lets other
threads run): a question may take milliseconds, and eight GPUs are asked several hundred. Names are those of nvidia-ml-py
13.615; what 12.560 lacks becomes a gap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from . import nvml_condition, nvml_links, nvml_processes
from .nvml_threads import side_by_side

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_NOT_SUPPORTED = 3
_NOT_FOUND = 6
_LIBRARY_NOT_FOUND = 12
_BROKEN_GPU = (15, 16)
"""NVML_ERROR_GPU_IS_LOST and NVML_ERROR_RESET_REQUIRED: such a GPU answers no other question either."""
_NEEDED = ("NVMLError", "nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID")
"""What every nvidia-ml-py has: a module ``pynvml`` without these is something else of that name."""
_COMPUTE_MODES = ("default", "exclusive_thread", "prohibited", "exclusive_process")
_RECOVERY_ACTIONS = {
    0: "none",
    1: "reset_gpu",
    2: "reboot_node",
    3: "drain_p2p",
    4: "drain_and_reset",
    6: "reset_gpu",  # NVML says "bus reset"
    7: "reboot_node",  # NVML says "system reboot"
}
"""NVML_GPU_RECOVERY_ACTION_*. 5 (recover the IMEX domain) is about several computers and left as a gap."""


class LostGpuError(Exception):
    """The driver lists the GPU but cannot reach it."""


class Reader:
    """Asks NVML, and notes what could not be read.

    Args:
        nvml: The module ``pynvml``, or a double of it.
    """

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self._gaps: dict[str, str] = {}
        self._codes: dict[str, int | None] = {}

    def ask(self, path: str, function: str, *arguments: Any, **options: Any) -> Any:
        """Call ``nvml.function(*arguments, **options)``; give ``None`` and leave a gap at ``path`` when that fails.

        Raises:
            LostGpuError: The GPU that ``path`` is about has fallen off the bus or needs a reset.
        """
        try:
            return getattr(self.nvml, function)(*arguments, **options)
        except self.nvml.NVMLError as error:
            code = getattr(error, "value", None)
            if code in _BROKEN_GPU and "[" in path:
                raise LostGpuError(str(error)) from error
            self.gap(path, f"NVML: {error}", code=code)
        except Exception as error:  # noqa: BLE001 - border: an older nvidia-ml-py lacks functions or takes other arguments
            self.gap(path, f"nvidia-ml-py: {error}")
        return None

    def gap(self, path: str, reason: str, *, code: int | None = None) -> None:
        """Note that ``path`` could not be read, and NVML's error code if that is why."""
        self._gaps[path], self._codes[path] = reason[:300], code

    def code(self, path: str) -> int | None:
        """NVML's error code (``nvmlReturn_t``) for the gap at ``path``."""
        return self._codes.get(path)

    def forget(self, path: str) -> None:
        """Take back the gap at ``path``: it was read in another way, or there is nothing to read."""
        self._gaps.pop(path, None)

    def gaps(self) -> list[dict[str, str]]:
        """All gaps, in the order in which they were found."""
        return [{"path": path, "reason": reason} for path, reason in self._gaps.items()]

    def each(self, ask: Callable[[Reader, ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
        """``ask(reader, item)`` for every item, side by side; results and gaps come in the order of the items."""
        readers = [Reader(self.nvml) for _ in items]
        results = side_by_side([partial(ask, reader, item) for reader, item in zip(readers, items, strict=True)])
        for reader in readers:
            self._gaps.update(reader._gaps)
            self._codes.update(reader._codes)
        return results


def main(say: Callable[..., None]) -> None:
    """Answer ``{driver, gpus, pairs, gaps}``."""
    answer: dict[str, Any] = {"driver": {}, "gpus": [], "pairs": [], "gaps": []}
    try:
        import pynvml
    except Exception as error:  # noqa: BLE001 - border: whatever is installed under this name may raise anything
        message = f"import pynvml: {type(error).__name__}: {error}"[:300]
        answer["driver"] = {"nvml_state": "no_binding", "nvml_message": message}
    else:
        read(pynvml, answer, say)
    say("NVML", answer)
    answer["driver"]["libcuda_path"] = find_libcuda()
    say("libcuda", answer, is_final=True)


def read(nvml: Any, answer: dict[str, Any], say: Callable[..., None]) -> None:
    """Fill ``answer`` from ``nvml``, saying it after each stage."""
    answer["driver"] = driver = start(nvml)
    if driver["nvml_state"] != "ok":
        return
    reader = Reader(nvml)
    driver["driver_version"] = reader.ask("driver.driver_version", "nvmlSystemGetDriverVersion")
    cuda = reader.ask("driver.cuda_version", "nvmlSystemGetCudaDriverVersion_v2")
    driver["cuda_version"] = [cuda // 1000, cuda % 1000 // 10] if cuda else None
    gpus: list[dict[str, Any]] = answer["gpus"]
    count = reader.ask("gpus", "nvmlDeviceGetCount") or 0
    gpus.extend({"index": index, "uuid": "", "name": "unknown GPU"} for index in range(count))
    handles = reader.each(lambda own, gpu: _ask_gpu(_identify, own, gpu, gpu["index"]), gpus)
    answer["gaps"] = reader.gaps()
    say("names and memory of the GPUs", answer)
    known = list(zip(gpus, handles, strict=True))
    for stage, ask in (("state", _ask_state), ("processes", _ask_processes), ("NVLinks", nvml_links.ask_ports)):
        _ask_alive(ask, reader, known)
        answer["gaps"] = reader.gaps()
        say(f"{stage} of the GPUs", answer)
    alive = [(gpu, handle) for gpu, handle in known if "error" not in gpu]
    answer["pairs"] = nvml_links.ask_pairs(reader, alive, LostGpuError)
    answer["gaps"] = reader.gaps()
    say("links between the GPUs", answer)
    driver["is_confidential_ready"] = nvml_condition.confidential_readiness(reader)
    _ask_alive(nvml_condition.ask, reader, known)
    answer["gaps"] = reader.gaps()


def start(nvml: Any) -> dict[str, Any]:
    """Initialise NVML; gives the driver's fields that tell whether it worked."""
    missing = [name for name in _NEEDED if not hasattr(nvml, name)]
    if missing:
        message = f"{getattr(nvml, '__file__', 'pynvml')} is not nvidia-ml-py: it lacks {missing[0]}"
        return {"nvml_state": "no_binding", "nvml_message": message}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        code = getattr(error, "value", None)
        state = "no_library" if code == _LIBRARY_NOT_FOUND else "error"
        return {"nvml_state": state, "nvml_error_code": code, "nvml_message": str(error)}
    return {"nvml_state": "ok"}


def _ask_alive(
    ask: Callable[[Reader, dict[str, Any], Any], Any], reader: Reader, known: Sequence[tuple[dict[str, Any], Any]]
) -> None:
    """Ask every GPU something that has answered everything so far."""
    alive = [(gpu, handle) for gpu, handle in known if "error" not in gpu]
    reader.each(lambda own, one: _ask_gpu(ask, own, *one), alive)


def _ask_gpu(ask: Callable[[Reader, dict[str, Any], Any], Any], reader: Reader, gpu: dict[str, Any], handle: Any) -> Any:
    """Ask one GPU something; one that is lost meanwhile is marked, and the others go on."""
    try:
        return ask(reader, gpu, handle)
    except LostGpuError as error:
        gpu["error"] = str(error)
        return None


def _identify(reader: Reader, gpu: dict[str, Any], index: int) -> Any:
    """Handle, name, UUID, address, memory and compute capability: what a plan cannot do without."""
    path = f"gpus[{index}]"
    handle = reader.ask(path, "nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        gpu["error"] = reader.gaps()[-1]["reason"]
        return None
    gpu["uuid"] = reader.ask(f"{path}.uuid", "nvmlDeviceGetUUID", handle) or ""
    gpu["name"] = reader.ask(f"{path}.name", "nvmlDeviceGetName", handle) or "unknown GPU"
    address = reader.ask(f"{path}.bus_id", "nvmlDeviceGetPciInfo", handle)
    gpu["bus_id"] = nvml_links.bus_id(address) if address is not None else None
    gpu.update(_memory(reader, path, handle))
    gpu["compute_capability"] = reader.ask(f"{path}.compute_capability", "nvmlDeviceGetCudaComputeCapability", handle)
    return handle


def _memory(reader: Reader, path: str, handle: Any) -> Mapping[str, Any]:
    """Memory in bytes. Version 2 of the call tells the driver's own share (615 MiB on an idle H200) from what is used."""
    where = f"{path}.memory_total_bytes"
    version = getattr(reader.nvml, "nvmlMemory_v2", None)
    memory = reader.ask(where, "nvmlDeviceGetMemoryInfo", handle, version=version)
    has_reserved = hasattr(memory, "reserved")
    if memory is None:
        reader.forget(where)
        memory = reader.ask(where, "nvmlDeviceGetMemoryInfo", handle)
    if memory is None:
        # GB10 and Jetson answer "Not Supported": they have no memory of their own.
        return {"has_unified_memory": True if reader.code(where) == _NOT_SUPPORTED else None}
    if not has_reserved:
        reader.gap(f"{path}.memory_used_bytes", "NVML: no memory version 2; version 1 counts the driver's own share")
    return {
        "memory_total_bytes": memory.total,
        "memory_free_bytes": memory.free,
        "memory_used_bytes": memory.used if has_reserved else None,
        "memory_reserved_bytes": memory.reserved if has_reserved else None,
        "has_unified_memory": False,
    }


def _ask_state(reader: Reader, gpu: dict[str, Any], handle: Any) -> None:
    """Modes, faults and PCIe of one GPU."""
    path = f"gpus[{gpu['index']}]"
    mode = reader.ask(f"{path}.compute_mode", "nvmlDeviceGetComputeMode", handle)
    gpu["compute_mode"] = _COMPUTE_MODES[mode] if mode in range(len(_COMPUTE_MODES)) else None
    gpu["ecc_uncorrected"] = reader.ask(f"{path}.ecc_uncorrected", "nvmlDeviceGetTotalEccErrors", handle, 1, 0)
    _ask_repairs(reader, gpu, handle)
    gpu["recovery_action"] = _recovery_action(reader, path, handle)
    for field, function in (
        ("pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration"),
        ("pcie_generation_max", "nvmlDeviceGetMaxPcieLinkGeneration"),
        ("pcie_width", "nvmlDeviceGetCurrPcieLinkWidth"),
        ("pcie_width_max", "nvmlDeviceGetMaxPcieLinkWidth"),
    ):
        gpu[field] = reader.ask(f"{path}.{field}", function, handle)
    for field, function in (
        ("persistence_mode", "nvmlDeviceGetPersistenceMode"),
        ("display_active", "nvmlDeviceGetDisplayActive"),
    ):
        value = reader.ask(f"{path}.{field}", function, handle)
        gpu[field] = None if value is None else bool(value)
    _ask_mig(reader, gpu, handle)


def _ask_repairs(reader: Reader, gpu: dict[str, Any], handle: Any) -> None:
    """Row remapping; cards before Ampere retire whole pages instead, of which only "pending" is told."""
    where = f"gpus[{gpu['index']}].remap_pending"
    rows = reader.ask(where, "nvmlDeviceGetRemappedRows", handle)
    if rows is not None:
        gpu["remap_pending"], gpu["remap_failed"] = bool(rows[2]), bool(rows[3])
    elif reader.code(where) == _NOT_SUPPORTED:
        pending = reader.ask(where, "nvmlDeviceGetRetiredPagesPendingStatus", handle)
        if pending is not None:
            reader.forget(where)
            gpu["remap_pending"] = bool(pending)


def _recovery_action(reader: Reader, path: str, handle: Any) -> str | None:
    """NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, a field value that recent drivers have."""
    where, field = f"{path}.recovery_action", getattr(reader.nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", 230)
    values = reader.ask(where, "nvmlDeviceGetFieldValues", handle, [field])
    if values is None:
        return None
    if values[0].nvmlReturn != 0:
        reader.gap(where, f"NVML: {reader.nvml.NVMLError(values[0].nvmlReturn)}")
        return None
    number = values[0].value.uiVal
    if number not in _RECOVERY_ACTIONS:
        reader.gap(where, f"NVML: recovery action {number} is unknown to this version")
    return _RECOVERY_ACTIONS.get(number)


def _ask_mig(reader: Reader, gpu: dict[str, Any], handle: Any) -> None:
    """MIG mode and slices. A card that cannot do MIG has it switched off: that is no gap."""
    path = f"gpus[{gpu['index']}]"
    modes = reader.ask(f"{path}.mig_enabled", "nvmlDeviceGetMigMode", handle)
    if modes is None:
        if reader.code(f"{path}.mig_enabled") == _NOT_SUPPORTED:
            reader.forget(f"{path}.mig_enabled")
            gpu["mig_enabled"] = gpu["mig_pending"] = False
        return
    gpu["mig_enabled"], gpu["mig_pending"] = bool(modes[0]), modes[0] != modes[1]
    slices: list[dict[str, Any]] = []
    gpu["mig_devices"] = slices
    most = reader.ask(f"{path}.mig_devices", "nvmlDeviceGetMaxMigDeviceCount", handle) if modes[0] else 0
    for slot in range(most or 0):
        where = f"{path}.mig_devices[{len(slices)}]"
        mig = reader.ask(where, "nvmlDeviceGetMigDeviceHandleByIndex", handle, slot)
        if mig is None:
            if reader.code(where) == _NOT_FOUND:  # an empty slot
                reader.forget(where)
            continue
        memory = reader.ask(f"{where}.memory_total_bytes", "nvmlDeviceGetMemoryInfo", mig)
        slices.append(
            {
                "uuid": reader.ask(f"{where}.uuid", "nvmlDeviceGetUUID", mig) or "",
                "name": reader.ask(f"{where}.name", "nvmlDeviceGetName", mig),
                "memory_total_bytes": getattr(memory, "total", None),
                "memory_free_bytes": getattr(memory, "free", None),
            }
        )


def _ask_processes(reader: Reader, gpu: dict[str, Any], handle: Any) -> None:
    gpu["processes"] = nvml_processes.ask(reader, f"gpus[{gpu['index']}].processes", handle)


def find_libcuda(maps: Path = Path("/proc/self/maps")) -> str | None:
    """What the dynamic loader finds for ``libcuda.so.1``; loading it starts nothing on a GPU (``cuInit`` would)."""
    try:
        ctypes.CDLL("libcuda.so.1")
        mapped = maps.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return next((line[line.index("/") :] for line in mapped.splitlines() if "/libcuda.so" in line), None)
