"""The part of the NVML program that asks how well a GPU does: asked last, so that nothing else is lost with it."""

from __future__ import annotations

from typing import Any

_SLOWDOWNS = ((0x8, "hw_slowdown"), (0x20, "sw_thermal"), (0x40, "hw_thermal"), (0x80, "hw_power_brake"))
"""Bits of nvmlClocksEventReason*. Idle, power cap and settings of the user are normal and left out."""
_VIRTUALIZATION = ("none", "passthrough", "vgpu", "host_vgpu", "host_vsga")
"""NVML_GPU_VIRTUALIZATION_MODE_*."""
_NVLINK_REPLAYS, _NVLINK_RECOVERIES = 52, 59
"""NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL and …_RECOVERY_ERROR_COUNT_TOTAL: all ports in one question."""
_NOT_SUPPORTED = (3, 13)
"""NVML_ERROR_NOT_SUPPORTED and NVML_ERROR_FUNCTION_NOT_FOUND."""
_CONFIDENTIAL_OFF = 0


def ask(reader: Any, gpu: dict[str, Any], handle: Any) -> None:
    """Fill ``slowdowns``, ``pcie_replays``, ``nvlink_errors``, ``virtualization`` and ``is_licensed`` of one GPU."""
    path = f"gpus[{gpu['index']}]"
    mask = _clocks_mask(reader, f"{path}.slowdowns", handle)
    gpu["slowdowns"] = None if mask is None else [name for bit, name in _SLOWDOWNS if mask & bit]
    gpu["pcie_replays"] = reader.ask(f"{path}.pcie_replays", "nvmlDeviceGetPcieReplayCounter", handle)
    if any(port["is_active"] for port in gpu.get("nvlinks", ())):
        gpu["nvlink_errors"] = _nvlink_errors(reader, f"{path}.nvlink_errors", handle)
    mode = reader.ask(f"{path}.virtualization", "nvmlDeviceGetVirtualizationMode", handle)
    gpu["virtualization"] = _VIRTUALIZATION[mode] if mode in range(len(_VIRTUALIZATION)) else None
    if gpu["virtualization"] == "vgpu":
        gpu["is_licensed"] = _is_licensed(reader, f"{path}.is_licensed", handle)


def _clocks_mask(reader: Any, where: str, handle: Any) -> int | None:
    """The call was renamed; drivers before 535 know only the older name."""
    for function in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        mask = reader.ask(where, function, handle)
        if mask is not None:
            reader.forget(where)
            return int(mask)
    return None


def _nvlink_errors(reader: Any, where: str, handle: Any) -> int | None:
    values = reader.ask(where, "nvmlDeviceGetFieldValues", handle, [_NVLINK_REPLAYS, _NVLINK_RECOVERIES])
    if values is None:
        return None
    told = [int(value.value.ullVal) for value in values if value.nvmlReturn == 0]
    if not told:
        reader.gap(where, "NVML: the driver does not count NVLink errors of all ports")
    return sum(told) if told else None


def _is_licensed(reader: Any, where: str, handle: Any) -> bool | None:
    features = reader.ask(where, "nvmlDeviceGetGridLicensableFeatures", handle)
    if features is None or not features.isGridLicenseSupported:
        return None
    listed = features.gridLicensableFeatures[: features.licensableFeaturesCount]
    return any(feature.featureState for feature in listed)


def confidential_readiness(reader: Any) -> bool | None:
    """Whether confidential computing lets work onto the GPUs; ``None``, without a gap, where there is no such mode."""
    where = "driver.is_confidential_ready"
    state = reader.ask(where, "nvmlSystemGetConfComputeState")
    if state is None:
        if reader.code(where) in _NOT_SUPPORTED:
            reader.forget(where)
        return None
    if state.ccFeature == _CONFIDENTIAL_OFF:
        return None
    ready = reader.ask(where, "nvmlSystemGetConfComputeGpusReadyState")
    return None if ready is None else bool(ready)
