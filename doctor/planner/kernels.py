"""Which kernel torch takes for attention on a GPU: it decides about tensors that come and go beside the output."""

from __future__ import annotations

import re

from ..machine import Gpu, Libraries

_PREFERRING = frozenset({(9, 0), (10, 0), (10, 3)})
"""Compute capabilities on which torch prefers cuDNN's attention, which keeps no row statistics and leaves its output in an
order that is copied at once; elsewhere flash attention keeps them and needs no copy.
Source: check_prefer_cudnn_attention of ``sdp_utils.cpp`` (torch 2.7 to 2.13); seen in histories of H100 and H200 cards."""
_PREFERRED_SINCE = (9, 15, 1)
"""Release of cuDNN from which torch prefers it (2.7 to 2.9 did from 9.9). Source: the same."""
_WIDE_GPU = (9, 0)
"""Where cuDNN's kernel takes wider heads (from 9.10); source: check_cudnn_tensor_shapes."""
_WIDTH, _GREATER_WIDTH = 128, 256
_DISTRIBUTIONS = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


def cudnn_width(gpu: Gpu, libraries: Libraries | None = None) -> int:
    """The widest head for which torch takes cuDNN's attention on a GPU; 0 where it takes it for none.

    Where the libraries are not known, they are taken to be today's.
    """
    if gpu.compute_capability not in _PREFERRING:
        return 0
    release = _cudnn(libraries)
    if release is not None and release < _PREFERRED_SINCE:
        return 0
    return _GREATER_WIDTH if gpu.compute_capability == _WIDE_GPU else _WIDTH


def _cudnn(libraries: Libraries | None) -> tuple[int, ...] | None:
    """Release of the installed cuDNN, where torch's wheel brought it along."""
    for name in _DISTRIBUTIONS:
        version = libraries.version(name) if libraries is not None else None
        found = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
        if found:
            return tuple(map(int, found.groups()))
    return None
