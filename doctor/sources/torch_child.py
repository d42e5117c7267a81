"""Child program: imports torch and asks it, and the CUDA driver, how many GPUs there are. Creates no CUDA context.

A context costs about 0.6 GiB a GPU and fails on a GPU in exclusive mode, so nothing here may make one:

* ``torch.cuda.is_available()`` and ``device_count()`` end in ``cudaGetDeviceCount``, which calls ``cuInit`` and stops
  there (torch 2.13, ``torch/cuda/__init__.py``). PYTORCH_NVML_BASED_CUDA_CHECK is left as the user has it: with it, torch
  would count through NVML and call a machine usable whose ``cuInit`` fails.
* ``torch.cuda.get_device_properties()`` runs ``_lazy_init``, which makes a context: it is not called. Order, UUID, name
  and size of the devices come from ``libcuda`` itself (``cuDeviceGetUuid`` needs ``cuInit`` only), which is also what
  numbers ``cuda:0``, ``cuda:1`` … for torch in the same process.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from typing import Any

_NICE = 5
"""Importing torch takes seconds of CPU that nobody waits for yet: the verdict goes first on a small machine."""


def main(say: Callable[..., None]) -> None:
    """Answer ``{version, cuda, is_available, device_count, devices, warnings}``."""
    os.nice(_NICE)
    import torch

    answer: dict[str, Any] = {"version": str(torch.__version__), "cuda": torch.version.cuda}
    say("import torch", answer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer["is_available"] = bool(torch.cuda.is_available())
        answer["device_count"] = int(torch.cuda.device_count()) if answer["is_available"] else 0
    # torch reports a driver that is too old as a warning, and then says "not available".
    answer["warnings"] = [" ".join(str(warning.message).split())[:500] for warning in caught][:5]
    say("torch.cuda", answer)
    if answer["cuda"] is not None:
        answer["devices"] = list_devices()
    say("libcuda", answer, is_final=True)


def list_devices(library: str = "libcuda.so.1") -> list[dict[str, Any]]:
    """Devices in CUDA's order, as the CUDA driver of this process numbers them; empty when it cannot be asked."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [_describe(cuda, ordinal) for ordinal in range(count.value)]


def _describe(cuda: Any, ordinal: int) -> dict[str, Any]:
    device, size = ctypes.c_int(), ctypes.c_size_t()
    name, raw_uuid = ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    found: dict[str, Any] = {"ordinal": ordinal}
    if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
        return found
    if cuda.cuDeviceGetName(name, len(name), device) == 0:
        found["name"] = name.value.decode("utf-8", "replace")
    if cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0:
        found["memory_total_bytes"] = size.value
    # The second version tells MIG slices apart; drivers before 11.4 lack it.
    ask_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None)
    kind = "MIG" if " MIG " in found.get("name", "") else "GPU"
    if ask_uuid is not None and ask_uuid(ctypes.byref(raw_uuid), device) == 0:
        digits = bytes(raw_uuid).hex()
        found["uuid"] = f"{kind}-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
    return found
