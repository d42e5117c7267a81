"""Remembers for ten minutes what torch said, so that the second ``vlm-doctor`` in a row need not import it.

The key holds everything the answer depends on; a cache that cannot be read or written is no cache, and never an error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from ..machine import TorchView
from .cache_files import load_record, store_record

MAX_AGE_S = 600.0
_MAX_BYTES = 64 * 1024
_VARIABLES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME")
_PREFIXES = ("CUDA_", "NCCL_", "NVIDIA_", "PYTORCH_", "TORCH_")


class TorchCache:
    """One cached answer, for one state of the machine.

    Args:
        folder: Where answers are kept; it is made when the first one is stored.
        key: Parts of the machine's state, from :func:`key_parts`.
    """

    def __init__(self, folder: Path, key: Iterable[str]) -> None:
        # Late: it loads OpenSSL, and a machine without torch has nothing to remember.
        import hashlib

        digest = hashlib.sha256("\0".join(key).encode("utf-8", "surrogateescape")).hexdigest()
        self._path = folder / f"torch-{digest[:32]}.json"

    def load(self) -> TorchView | None:
        """The answer, marked as cached; ``None`` when there is none, or it is too old, unreadable or somebody else's."""
        view = load_record(self._path, TorchView, most_bytes=_MAX_BYTES, max_age_s=MAX_AGE_S)
        return msgspec.structs.replace(view, is_cached=True) if view is not None and view.state == "ok" else None

    def store(self, view: TorchView) -> None:
        """Keep an answer, unless it names a trouble: the next run is likely to follow a repair, and shall see it."""
        if view.state != "ok" or (view.cuda is not None and not view.is_available):
            return
        with contextlib.suppress(OSError):
            self._forget_old()
            store_record(self._path, view)

    def _forget_old(self) -> None:
        for path in self._path.parent.glob("torch-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > MAX_AGE_S:
                    path.unlink()


def key_parts(
    *,
    torch_location: str,
    executable: str,
    environment: Mapping[str, str],
    kernel_module_version: str | None,
    device_files: Iterable[str],
    root: Path,
) -> list[str]:
    """Everything that torch's answer depends on: torch's files, Python, boot, driver, devices and CUDA's variables."""
    boot = root / "proc/sys/kernel/random/boot_id"
    parts = [torch_location, executable, str(kernel_module_version), *device_files]
    for path in (Path(torch_location) / "version.py", Path(torch_location) / "__init__.py", boot):
        try:
            parts.append(path.read_text(errors="replace") if path == boot else str(path.stat().st_mtime_ns))
        except OSError:
            parts.append("missing")
    return parts + [
        f"{name}={value}" for name, value in sorted(environment.items()) if name in _VARIABLES or name.startswith(_PREFIXES)
    ]
