"""Python and the packages that matter, from their metadata and files. Nothing is imported."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..machine import Libraries, Package
from . import torch_build, version_rules
from .cuda_libraries import bitsandbytes_cuda, foreign_cuda_libraries
from .environment import shown

DISTRIBUTIONS = (
    "accelerate",
    "av",
    "bitsandbytes",
    "compressed-tensors",
    "decord",
    "flash-attn",
    "gguf",
    "huggingface-hub",
    "kernels",
    "mistral-common",
    "numpy",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-ml-py",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "peft",
    "pillow",
    "protobuf",
    "psutil",
    "pynvml",
    "pytest",
    "pytest-vlmgpu",
    "pytest-xdist",
    "qwen-vl-utils",
    "safetensors",
    "sentencepiece",
    "timm",
    "tokenizers",
    "torch",
    "torchao",
    "torchaudio",
    "torchcodec",
    "torchvision",
    "transformers",
    "triton",
    "vllm",
    "xformers",
)
"""What loading and testing a vision-language model can touch. All of an environment would be slow and nobody's business."""
_PYNVML_CANDIDATES = ("nvidia-ml-py", "nvidia-ml-py3", "pynvml")
"""Distributions known to ship a module ``pynvml``; each is looked into, since newer releases of the last no longer do."""


def read_libraries(
    search_path: Sequence[str], *, home: str = "", environment: Mapping[str, str] | None = None
) -> Libraries:
    """Read the packages on ``search_path``, folders as in ``sys.path``; ``home`` is written as ``~``."""
    found = {name: distribution for name in DISTRIBUTIONS if (distribution := _find(name, search_path)) is not None}
    packages = tuple(
        Package(name=name, version=_version(distribution), location=shown(str(distribution.locate_file("")), home))
        for name, distribution in found.items()
    )
    is_virtual = sys.prefix != sys.base_prefix
    registered = _version(found["torch"]) if "torch" in found else None
    folder = torch_build.find_torch(search_path)
    build, problem = torch_build.read_torch_build(folder, registered=registered, home=home)
    return Libraries(
        python=sys.version.split()[0],
        executable=shown(sys.executable, home),
        packages=packages,
        rules=version_rules.read_rules(found, frozenset(DISTRIBUTIONS)),
        torch_build=build,
        torch_problem=problem,
        pynvml_owners=tuple(name for name in _PYNVML_CANDIDATES if _ships_pynvml(_find(name, search_path))),
        bitsandbytes_cuda=bitsandbytes_cuda(found.get("bitsandbytes")),
        foreign_cuda_libraries=foreign_cuda_libraries(environment or {}),
        is_virtual_environment=is_virtual,
        has_pip=_find("pip", search_path) is not None,
        is_externally_managed=not is_virtual and (Path(os.__file__).parent / "EXTERNALLY-MANAGED").exists(),
    )


def _find(name: str, search_path: Sequence[str]) -> importlib.metadata.Distribution | None:
    """The distribution that an import would use: the first on the path. One whose metadata is damaged is not installed."""
    for distribution in importlib.metadata.distributions(name=name, path=list(search_path)):
        if _version(distribution):
            return distribution
    return None


def _version(distribution: importlib.metadata.Distribution) -> str:
    """Version, or an empty text when the metadata is missing or damaged."""
    # Not distribution.version: where there is none, Python 3.12 warns and later ones may raise.
    found = version_rules.fields(distribution, "Version")
    return found[0] if found else ""


def _ships_pynvml(distribution: importlib.metadata.Distribution | None) -> bool:
    if distribution is None:
        return False
    try:
        return any(Path(file).parts[0] in ("pynvml.py", "pynvml") for file in distribution.files or ())
    except (OSError, ValueError):
        return False
