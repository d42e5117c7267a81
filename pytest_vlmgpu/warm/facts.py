"""What decides what a load gives: a warm model is attached only where all of it is as it was when it was loaded."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vlm_doctor.placement import Plan

    from ..models.source import Source

_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "pytest-vlmgpu")
_VARIABLES = ("ACCELERATE_", "CUDA_", "HF_", "NVIDIA_", "PYTORCH_", "SAFETENSORS_", "TORCH", "TRANSFORMERS_")
"""Beginnings of variables that these libraries read while they load."""
_OTHERWISE_KNOWN = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_NVML_BASED_CUDA_CHECK", "CUDA_MODULE_LOADING")
"""GPUs are told apart by UUID; the last one torch sets itself when it starts CUDA, so that it differs within a run."""
_SET_BY_TORCH = ("CUDA_HOME", "TORCHINDUCTOR_", "TORCH_WARM_POOL")
"""torch sets them itself while a run compiles, or only gets ready to; no load reads them. Source: torch/_inductor
(cache_dir_utils.py, cpp_builder.py, async_compile.py). Of cuBLAS, which computes in the run, no variable counts."""
_CODE = ("models/first_stage.py", "models/loading.py", "models/placing.py", "models/source.py", "warm")
"""Of this package: what loads and shares. A changed line makes another model of it."""
_REPLACED = frozenset(("loader code", "python", *_LIBRARIES))
"""Where one of these differs in the same environment, it was installed anew there."""


class NotKept(Exception):  # noqa: N818 - no error: the model is loaded as without --vlm-warm
    """This model cannot be kept for the next run; the text is the end of a sentence.

    Args:
        reason: That text.
        is_for_good: It is the same the next time.
    """

    def __init__(self, reason: str, *, is_for_good: bool = False) -> None:
        super().__init__(reason)
        self.is_for_good = is_for_good


def facts_of(name: str, revision: str | None, plan: Plan | None, dtype: str | None) -> dict[str, str]:
    """All that decides what a load gives, by the words that name what changed.

    Args:
        name: Folder, or hub id.
        revision: Of the hub id; ``None`` for a folder.
        plan: ``None`` on the CPU.
        dtype: As asked for.

    Raises:
        NotKept: The checkpoint is not on this machine, so that nobody can tell whether it is the same.
    """
    torch: Any = sys.modules.get("torch")
    facts = {"checkpoint": _fingerprint_of_files(_folder_of(name, revision))}
    facts["dtype"] = str(dtype or (plan.dtype if plan is not None else "the checkpoint's"))
    if plan is None:
        facts["placement"] = "CPU"
    else:
        facts["placement"] = json.dumps([plan.device_map, [stage.uuid for stage in plan.stages]], sort_keys=True)
        facts["attention"] = plan.workload.attention
    # A conftest may have set it, and a model's own buffers follow it.
    facts["torch's default dtype"] = str(torch.get_default_dtype()) if torch is not None else ""
    facts["python"], facts["environment"] = sys.version, sys.prefix
    for library in _LIBRARIES:
        try:
            facts[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            facts[library] = ""
    facts["loader code"] = _digest_of_code()
    facts.update(_variables(os.environ))
    return facts


def is_quantized(name: str, revision: str | None) -> bool:
    """True of a checkpoint whose config says that it is quantized.

    Raises:
        NotKept: It is not on this machine.
        OSError: Its config cannot be read.
        ValueError: That is no config.
    """
    path = _folder_of(name, revision) / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    parts = [config, *config.values()] if isinstance(config, dict) else []
    return any("quantization_config" in part for part in parts if isinstance(part, dict))


def revision_of(source: Source) -> str | None:
    """Of a hub id its revision; ``None`` for a folder, whose path is absolute."""
    return None if Path(source.name).is_absolute() else source.revision


def digest_of(facts: Mapping[str, str]) -> str:
    """A name for a model, the same for the same facts."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The words of what differs."""
    return [word for word in {**old, **new} if old.get(word) != new.get(word)]


def is_stale(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """True where nobody will ask for the old model again; the models of two virtual environments live beside each other."""
    changed = set(difference(old, new))
    return "checkpoint" in changed or ("environment" not in changed and not _REPLACED.isdisjoint(changed))


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Of values only digests: some are secrets, and the facts are written to a file."""
    return {
        f"variable {name}": hashlib.sha256(os.fsencode(value)).hexdigest()[:16]
        for name, value in sorted(environment.items())
        if name.startswith(_VARIABLES) and not name.startswith((*_OTHERWISE_KNOWN, *_SET_BY_TORCH)) and "TOKEN" not in name
    }


def _folder_of(name: str, revision: str | None) -> Path:
    if revision is None:
        return Path(name)
    from vlm_doctor.sources.hub_cache import HubId, find_snapshot, hub_settings

    snapshot = find_snapshot(HubId(name, revision), hub_settings(os.environ).cache)
    if snapshot is None:
        raise NotKept("the checkpoint was not on this machine yet; it is kept from the next run on")
    return snapshot


def _fingerprint_of_files(folder: Path) -> str:
    """Name, size, time and identity of each file; of a snapshot of the hub those of the blobs behind its links."""
    lines = [str(folder.resolve())]
    for path in sorted(_files(folder)):
        info = path.stat()
        lines.append(f"{path.relative_to(folder)} {info.st_size} {info.st_mtime_ns} {info.st_dev} {info.st_ino}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _files(folder: Path) -> Iterable[Path]:
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir() and not path.name.startswith("."):
            yield from (inner for inner in path.iterdir() if inner.is_file())


def _digest_of_code() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for name in _CODE:
        path = package / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
