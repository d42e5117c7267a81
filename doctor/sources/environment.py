"""Environment variables that decide what a CUDA program sees, and text that is fit to be shown."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = frozenset(
    {
        "ACCELERATE_USE_CPU",
        "GPU_DEVICE_ORDINAL",
        "HF_HOME",
        "HF_HUB_ENABLE_HF_TRANSFER",
        "HIP_VISIBLE_DEVICES",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HUGGINGFACE_HUB_CACHE",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "NVIDIA_DRIVER_CAPABILITIES",
        "NVIDIA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_HIP_ALLOC_CONF",
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "ROCR_VISIBLE_DEVICES",
        "SLURM_JOB_GPUS",
        "SLURM_STEP_GPUS",
        "TORCH_USE_CUDA_DSA",
        "TMPDIR",
        "VIRTUAL_ENV",
        "XDG_CACHE_HOME",
    }
)
_PREFIXES = ("CUDA_", "NCCL_", "TRANSFORMERS_")
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "KEY", "CREDENTIAL", "AUTH")
"""A second lock: no variable with such a name is ever kept, whatever the lists above say."""
MAX_VALUE_CHARS = 4096


def read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Keep the variables on the list, in order of name, home directories written as ``~``.

    Allow-list, not deny-list: a tool that dumps everything but known secrets leaks the next one.
    """
    home = environment.get("HOME", "")
    return {
        shown(name, "")[:MAX_VALUE_CHARS]: shown(environment[name], home)[:MAX_VALUE_CHARS]
        for name in sorted(environment)
        if (name in _NAMES or name.startswith(_PREFIXES)) and not is_secret(name)
    }


def is_secret(name: str) -> bool:
    """Whether a variable may hold a secret, by its name."""
    return any(word in name.upper() for word in _SECRET_WORDS)


def shown(text: str, home: str) -> str:
    """Text as it may be written down: the home directory as ``~``, bytes that are not UTF-8 replaced."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    home = home.rstrip("/")
    return text if home.count("/") < 1 or len(home) < 2 else _replace_folder(text, home)


def _replace_folder(text: str, folder: str) -> str:
    """Replace whole path components only: with home ``/home/a``, ``/home/ab`` stays."""
    parts = text.split(folder)
    shortened = parts[0]
    for part in parts[1:]:
        shortened += ("~" if not part or part[0] in "/:,;\"' " else folder) + part
    return shortened
