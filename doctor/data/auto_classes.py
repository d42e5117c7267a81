"""Under which names checkpoints publish a class of their own that generates."""

from __future__ import annotations

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")
"""Keys of ``auto_map``, best first (CogVLM2 and GLM-4V-9B use the second, MiniCPM-V and InternVL-Chat the second and
third)."""
