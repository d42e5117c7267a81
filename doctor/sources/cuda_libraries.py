"""CUDA libraries that packages bring or that the environment puts before them. Files are listed, never loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import Distribution
from pathlib import Path

from .environment import shown

_BITSANDBYTES = re.compile(r"bitsandbytes/libbitsandbytes_cuda(\d{2,3})\.so")
_OF_TORCH = re.compile(
    r"lib(cublas|cublasLt|cudart|cudnn|cufft|cupti|curand|cusolver|cusparse|cusparseLt|nccl|nvJitLink|nvrtc)\.so\.\d{1,2}"
)
"""Libraries that the wheels of torch bring in packages of their own (``nvidia-*``), by the name that a program asks for."""
_MOST_FOLDERS, _MOST_FOUND = 32, 20


def bitsandbytes_cuda(distribution: Distribution | None) -> tuple[str, ...] | None:
    """CUDA versions that the installed bitsandbytes was built for, such as ``("12.8", "13.0")``; ``None`` without it."""
    if distribution is None:
        return None
    try:
        found = {match[1] for file in distribution.files or () if (match := _BITSANDBYTES.fullmatch(str(file)))}
    except (OSError, ValueError):
        return None
    return tuple(sorted(f"{digits[:-1]}.{digits[-1]}" for digits in found))


def foreign_cuda_libraries(environment: Mapping[str, str], root: Path = Path("/")) -> tuple[str, ...]:
    """Libraries in folders of LD_LIBRARY_PATH that torch's wheel brings, too: which one is loaded depends on the loader."""
    home = environment.get("HOME", "")
    found: list[str] = []
    folders = [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder.startswith("/")]
    for folder in dict.fromkeys(folders[:_MOST_FOLDERS]):
        # The wheels' own folders may be listed there on purpose.
        if "/site-packages/nvidia" in folder or "/site-packages/torch" in folder:
            continue
        try:
            names = sorted(path.name for path in (root / folder.lstrip("/")).iterdir())
        except (OSError, ValueError):
            continue
        found += [shown(f"{folder.rstrip('/')}/{name}", home) for name in names if _OF_TORCH.fullmatch(name)]
    return tuple(found[:_MOST_FOUND])
