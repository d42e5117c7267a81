"""A stand-in for the module ``pynvml`` of nvidia-ml-py 13.615, for machines without a GPU.

It is copied into a folder as ``pynvml.py`` and put on the path of a child, or loaded into the test's own process. What
it plays is a JSON scenario in the environment variable NVML_DOUBLE:

``init``
    Code that ``nvmlInit`` fails with.
``gpus``
    A list of dictionaries. Keys are function names without ``nvmlDeviceGet``; values are results, or ``{"error": code}``.
``pairs``
    ``{"0-1": {"ancestor": 30, "p2p": [0, 0, 0]}}``; the numbers are NVML's.
``fail``
    ``{function: code}``, for all GPUs.
``missing``
    Functions and constants that this binding does not have.
``hangs``
    File that is there once it sleeps.
``crash_in``, ``hang_in``
    Name of the function in which the process dies of SIGSEGV, or sleeps.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SCENARIO: dict[str, Any] = json.loads(os.environ.get("NVML_DOUBLE", "{}"))
NVML_NVLINK_MAX_LINKS = 36
NVML_FI_DEV_NVLINK_LINK_COUNT = 91
NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
nvmlMemory_v2 = 0x02000028  # noqa: N816 - the name in nvidia-ml-py
_TEXTS = {
    1: "Uninitialized",
    2: "Invalid Argument",
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    9: "Driver Not Loaded",
    12: "NVML Shared Library Not Found",
    13: "Function Not Found",
    15: "GPU is lost",
    16: "GPU requires restart",
    17: "The operating system has blocked the request.",
    18: "RM has detected an NVML/RM version mismatch.",
    999: "Unknown Error",
}


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return _TEXTS.get(self.value, f"NVML Error with code {self.value}")


class c_nvmlGpuFabricInfo_v2_t(ctypes.Structure):  # noqa: N801 - the name in nvidia-ml-py
    _fields_ = (
        ("version", ctypes.c_uint),
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint32),
        ("state", ctypes.c_uint),
        ("healthMask", ctypes.c_uint32),
    )


def _play(function: str) -> None:
    """Do what the scenario wants of any call of that name."""
    if SCENARIO.get("crash_in") == function:
        os.kill(os.getpid(), signal.SIGSEGV)
    if SCENARIO.get("hang_in") == function:
        if "hangs" in SCENARIO:
            Path(SCENARIO["hangs"]).touch()
        time.sleep(3600)
    if function in SCENARIO.get("fail", {}):
        raise NVMLError(SCENARIO["fail"][function])


def _result(record: dict[str, Any], key: str) -> Any:
    value = record.get(key, {"error": 3})
    if isinstance(value, dict) and "error" in value:
        raise NVMLError(value["error"])
    return value


def nvmlInit() -> None:
    _play("nvmlInit")
    if "init" in SCENARIO:
        raise NVMLError(SCENARIO["init"])


def nvmlSystemGetDriverVersion() -> str:
    _play("nvmlSystemGetDriverVersion")
    return str(SCENARIO.get("driver", "580.159.04"))


def nvmlSystemGetCudaDriverVersion_v2() -> int:
    _play("nvmlSystemGetCudaDriverVersion_v2")
    return int(SCENARIO.get("cuda", 13000))


def nvmlDeviceGetCount() -> int:
    _play("nvmlDeviceGetCount")
    return len(SCENARIO.get("gpus", []))


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:
    _play("nvmlDeviceGetHandleByIndex")
    gpu: dict[str, Any] = SCENARIO["gpus"][index]
    if "handle" in gpu:
        raise NVMLError(gpu["handle"])
    return {"index": index, **gpu}


def _simple(name: str) -> Callable[..., Any]:
    def function(handle: dict[str, Any], *_: Any) -> Any:
        _play(f"nvmlDeviceGet{name}")
        value = _result(handle, name)
        return tuple(value) if isinstance(value, list) else value

    return function


for _name in (
    "Name",
    "UUID",
    "CudaComputeCapability",
    "ComputeMode",
    "TotalEccErrors",
    "RemappedRows",
    "CurrPcieLinkGeneration",
    "MaxPcieLinkGeneration",
    "CurrPcieLinkWidth",
    "MaxPcieLinkWidth",
    "PersistenceMode",
    "DisplayActive",
    "MigMode",
    "MaxMigDeviceCount",
    "RetiredPagesPendingStatus",
    "CurrentClocksEventReasons",
    "CurrentClocksThrottleReasons",
    "PcieReplayCounter",
    "VirtualizationMode",
):
    globals()[f"nvmlDeviceGet{_name}"] = _simple(_name)


def nvmlDeviceGetPciInfo(handle: dict[str, Any]) -> Any:
    _play("nvmlDeviceGetPciInfo")
    return SimpleNamespace(busId=_result(handle, "PciInfo"))


def nvmlDeviceGetMemoryInfo(handle: dict[str, Any], version: int | None = None) -> Any:
    _play("nvmlDeviceGetMemoryInfo")
    memory = _result(handle, "MemoryInfo")
    if version is None:
        return SimpleNamespace(total=memory["total"], free=memory["free"], used=memory["total"] - memory["free"])
    if "reserved" not in memory:
        raise NVMLError(13)
    return SimpleNamespace(**memory)


def nvmlDeviceGetFieldValues(handle: dict[str, Any], fields: list[int]) -> list[Any]:
    _play("nvmlDeviceGetFieldValues")
    known = {230: "recovery_action", 91: "link_count", 52: "link_replays", 59: "link_recoveries"}
    values = []
    for field in fields:
        number = handle.get(known[field])
        value = SimpleNamespace(uiVal=number or 0, ullVal=number or 0)
        values.append(SimpleNamespace(nvmlReturn=3 if number is None else 0, value=value))
    return values


def _port(handle: dict[str, Any], link: int) -> dict[str, Any]:
    ports: list[dict[str, Any]] = handle.get("ports", [])
    if link >= len(ports):
        raise NVMLError(2 if ports else 3)
    return ports[link]


def nvmlDeviceGetNvLinkState(handle: dict[str, Any], link: int) -> int:
    _play("nvmlDeviceGetNvLinkState")
    return int(_result(_port(handle, link), "state"))


def nvmlDeviceGetNvLinkVersion(handle: dict[str, Any], link: int) -> int:
    _play("nvmlDeviceGetNvLinkVersion")
    return int(_result(_port(handle, link), "version"))


def nvmlDeviceGetNvLinkRemoteDeviceType(handle: dict[str, Any], link: int) -> int:
    _play("nvmlDeviceGetNvLinkRemoteDeviceType")
    return int(_result(_port(handle, link), "type"))


def nvmlDeviceGetNvLinkRemotePciInfo(handle: dict[str, Any], link: int) -> Any:
    _play("nvmlDeviceGetNvLinkRemotePciInfo")
    return SimpleNamespace(busId=_result(_port(handle, link), "address"))


def nvmlDeviceGetGpuFabricInfoV(handle: dict[str, Any], pointer: Any) -> int:
    _play("nvmlDeviceGetGpuFabricInfoV")
    # The real call takes the process down when it is given a structure instead of a pointer to one.
    info = pointer._obj
    for field, value in _result(handle, "fabric").items():
        setattr(info, field, value)
    return 0


def _processes(name: str) -> Callable[[dict[str, Any]], list[Any]]:
    def function(handle: dict[str, Any]) -> list[Any]:
        _play(f"nvmlDeviceGet{name}")
        found = handle.get(name, [])
        if isinstance(found, dict):
            raise NVMLError(found["error"])
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found]

    return function


for _name in ("ComputeRunningProcesses", "MPSComputeRunningProcesses", "GraphicsRunningProcesses"):
    globals()[f"nvmlDeviceGet{_name}"] = _processes(_name)


def nvmlDeviceGetMigDeviceHandleByIndex(handle: dict[str, Any], slot: int) -> dict[str, Any]:
    _play("nvmlDeviceGetMigDeviceHandleByIndex")
    slices: list[dict[str, Any] | None] = handle.get("slices", [])
    found = slices[slot] if slot < len(slices) else None
    if found is None:
        raise NVMLError(6)
    return found


def nvmlDeviceGetGridLicensableFeatures(handle: dict[str, Any]) -> Any:
    _play("nvmlDeviceGetGridLicensableFeatures")
    states = _result(handle, "licences")
    features = [SimpleNamespace(featureState=state) for state in states]
    return SimpleNamespace(
        isGridLicenseSupported=int(bool(states)),
        licensableFeaturesCount=len(states),
        gridLicensableFeatures=[*features, SimpleNamespace(featureState=1)],
    )


def nvmlSystemGetConfComputeState() -> Any:
    _play("nvmlSystemGetConfComputeState")
    return SimpleNamespace(ccFeature=_result(SCENARIO, "confidential"))


def nvmlSystemGetConfComputeGpusReadyState() -> int:
    _play("nvmlSystemGetConfComputeGpusReadyState")
    return int(_result(SCENARIO, "ready"))


def _pair(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    pairs: dict[str, dict[str, Any]] = SCENARIO.get("pairs", {})
    return pairs.get(f"{first['index']}-{second['index']}", {})


def nvmlDeviceGetTopologyCommonAncestor(first: dict[str, Any], second: dict[str, Any]) -> int:
    _play("nvmlDeviceGetTopologyCommonAncestor")
    return int(_result(_pair(first, second), "ancestor"))


def nvmlDeviceGetP2PStatus(first: dict[str, Any], second: dict[str, Any], capability: int) -> int:
    _play("nvmlDeviceGetP2PStatus")
    return int(_result(_pair(first, second), "p2p")[capability])


for _name in SCENARIO.get("missing", ()):
    del globals()[_name]
