"""Versions that driver, CUDA and torch demand of each other. What an installed library declares itself is not here."""

from __future__ import annotations

NEWEST_TRANSFORMERS = "5.23"
"""The newest release whose classes were read for what the planner knows of models."""

MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA major version to the oldest driver branch on Linux that runs it (minor-version compatibility).
Source: NVIDIA, CUDA Compatibility, table 1 of "Minor Version Compatibility"."""

TORCH_WHEELS: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (12, 6): ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0)),
    (12, 9): ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
    (13, 0): ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
}
"""CUDA version of a published torch wheel to the compute capabilities it has machine code for (x86-64).
Source: ``PYTORCH_RELEASES_CODE_CC`` of torch 2.13 (torch/cuda/__init__.py)."""

TORCH_INDEX = "https://download.pytorch.org/whl"
"""Where the torch project publishes wheels, one folder a CUDA version, such as ``cu126``. Source: pytorch.org."""

EMBEDDED_CAPABILITIES = ((5, 3), (6, 2), (7, 2), (8, 7), (10, 1))
"""Chips (Jetson) that run only code made for exactly them, unlike every other GPU.
Source: ``DEVICE_REQUIREMENT`` of torch 2.13 (torch/cuda/__init__.py)."""
