"""What the installed transformers calls its modules, without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_DECLARATION = b'"CLIPVisionModel": [PrefixChange(prefix_to_remove="vision_model")]'
"""How ``conversion_mapping.py`` of 5.x says that CLIP and SigLIP towers have lost their inner ``vision_model``."""

_OMNI_DECLARATION = b'"qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration"'
"""In the same file where the thinkers of Qwen-Omni hold their parts in a ``model``: 5.23 does, 5.17 does not."""
_OMNI = frozenset({"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"})

_MAX_BYTES = 4_000_000
"""The file has 120,000."""


def has_flat_towers() -> bool:
    """Whether CLIP and SigLIP towers have ``encoder.layers`` (5.x) or ``vision_model.encoder.layers`` (4.x).

    Without transformers the newest is assumed. Importing it to ask would take seconds, reading one file 0.3 ms.
    """
    mapping = _conversion_mapping()
    return mapping is None or _DECLARATION in mapping


def families_with_stored_names() -> frozenset[str]:
    """Families whose class has, in the installed transformers, the names that its checkpoints store."""
    mapping = _conversion_mapping()
    return frozenset() if mapping is None or _OMNI_DECLARATION in mapping else _OMNI


def _conversion_mapping() -> bytes | None:
    """The file that renames; nothing in it for 4.x, which has none; ``None`` without transformers."""
    try:
        spec = importlib.util.find_spec("transformers")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    try:
        with Path(spec.origin).with_name("conversion_mapping.py").open("rb") as file:
            return file.read(_MAX_BYTES)
    except OSError:
        return b""
