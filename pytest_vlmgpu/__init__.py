"""Pytest plugin for tests with vision-language models on NVIDIA GPUs."""

from __future__ import annotations
