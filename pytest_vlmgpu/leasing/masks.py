"""CUDA_VISIBLE_DEVICES for a share of the GPUs, set where CUDA has not read it yet."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"
_NOT_INITIALIZED = 3
"""``CUDA_ERROR_NOT_INITIALIZED``. Source: cuda.h."""


def mask_for(names: Sequence[str]) -> dict[str, str]:
    """Variables under which a process sees these GPUs and no other, numbered in this order.

    torch's ``is_available`` then asks NVML, so that a ``skipif`` of a test module starts no CUDA.
    """
    return {VARIABLE: ",".join(names), "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def is_cuda_started() -> bool:
    """True when this process has read CUDA_VISIBLE_DEVICES for good (``cuInit``). It is not started by asking."""
    library = _loaded_driver()
    count = ctypes.c_int()
    return library is not None and bool(library.cuDeviceGetCount(ctypes.byref(count)) != _NOT_INITIALIZED)


def is_driver_loaded() -> bool:
    """True when something in this process has loaded CUDA's driver library, which is what starts CUDA, or tries to."""
    return _loaded_driver() is not None


def _loaded_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:  # not loaded by anything in this process
        return None


def apply(variables: Mapping[str, str]) -> Callable[[], None]:
    """Set variables in this process; returns what puts back those that nobody has set to something else since."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)

    def restore() -> None:
        for name, value in before.items():
            if os.environ.get(name) != variables[name]:
                continue
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return restore
