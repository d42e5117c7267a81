"""What the installed transformers calls its modules, without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_DECLARATION = b'"CLIPVisionModel": [PrefixChange(prefix_to_remove="vision_model")]'
"""How ``conversion_mapping.py`` of 5.x says that CLIP and SigLIP towers have lost their inner ``vision_model``."""

_MAX_BYTES = 4_000_000
"""The file has 120,000."""


def has_flat_towers() -> bool:
    """Whether CLIP and SigLIP towers have ``encoder.layers`` (5.x) or ``vision_model.encoder.layers`` (4.x).

    Without transformers the newest is assumed. Importing it to ask would take seconds, reading one file 0.3 ms.
    """
    try:
        spec = importlib.util.find_spec("transformers")
    except (ImportError, ValueError):
        return True
    if spec is None or not spec.origin:
        return True
    try:
        with Path(spec.origin).with_name("conversion_mapping.py").open("rb") as file:
            return _DECLARATION in file.read(_MAX_BYTES)
    except OSError:
        return False  # 4.x has no such file.
