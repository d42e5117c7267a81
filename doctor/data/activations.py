"""Working memory of a forward pass, per architecture: how many elements live at once for each token and each patch.

Counted by ``benchmarks/trace_memory.py``: storages that are alive while the true-size models of transformers 5.23 run, with
fused attention replaced by an operation that only has its output. The counts are linear in tokens and patches to four
digits (tests/doctor/planner/test_traced.py). Confirmed for ``glm4v`` by ``max_memory_allocated`` on an H200 with prompts of
176 to 32,768 tokens and images of 336 to 4,480 pixels (tests/doctor/planner/test_measured.py).
"""

from __future__ import annotations

import msgspec


class TextCoefficient(msgspec.Struct, frozen=True):
    """Elements a token while one layer reads the prompt: multiples of the MLP's width and of the hidden size."""

    intermediate_multiple: float
    hidden_multiple: float
    """What the layer receives is part of it."""
    source: str
    lost_first: float = 0.5
    """Share of a layer's work that the allocator reserves and cannot use, on the GPU that embeds the prompt."""
    lost_later: float = 0.5
    """The same on the other GPUs. Where both come from: ``planner/memory.py``, ``FRAGMENTATION_BYTES``."""

    def elements(self, *, intermediate: int, hidden: int) -> float:
        """Elements that live at once for each token."""
        return self.intermediate_multiple * intermediate + self.hidden_multiple * hidden

    @property
    def text(self) -> str:
        """The formula and its source, for people."""
        wide, states = f"{self.intermediate_multiple:g} x intermediate", f"{self.hidden_multiple:g} x hidden"
        return f"{wide} + {states} elements a token ({self.source})"


class VisionCoefficient(msgspec.Struct, frozen=True):
    """Elements a patch while the vision tower runs, pixels not counted."""

    intermediate_multiple: float
    hidden_multiple: float
    keeps_hidden_states: bool
    """True when the outputs of all layers are kept until the end."""
    source: str
    kept_features: int = 2
    """Copies of the image features (as wide as the text body) that the caller holds while the layers read the prompt."""

    def elements(self, *, intermediate: int, hidden: int, layers: int) -> float:
        """Elements that live at once for each patch."""
        states = self.hidden_multiple + (layers if self.keeps_hidden_states else 0)
        return self.intermediate_multiple * intermediate + states * hidden

    @property
    def text(self) -> str:
        """The formula and its source, for people."""
        states = f"({self.hidden_multiple:g} + layers)" if self.keeps_hidden_states else f"{self.hidden_multiple:g}"
        wide = f"{self.intermediate_multiple:g} x intermediate + " if self.intermediate_multiple else ""
        return f"{wide}{states} x hidden elements a patch ({self.source})"


_COUNTED = "counted"
_GATE_AND_UP_APART = TextCoefficient(3, 3.07, _COUNTED, 0.49, 0.41)
_GATE_AND_UP_MERGED = TextCoefficient(4, 3.07, f"{_COUNTED}, and measured on an H200", 0.43, 0.5)

TEXT: dict[str, TextCoefficient] = {
    **dict.fromkeys(
        (
            "idefics3",
            "internvl",
            "llava",
            "llava_next",
            "llava_onevision",
            "mllama",
            "paligemma",
            "qwen2_5_vl",
            "qwen2_vl",
            "qwen3_vl",
            "smolvlm",
        ),
        _GATE_AND_UP_APART,
    ),
    "gemma3": TextCoefficient(3, 3.5, _COUNTED),
    "glm4v": _GATE_AND_UP_MERGED,
}
"""By ``model_type`` of config.json."""

ATTENTION_STATES = 5.2
"""Hidden states that live at once around attention: residual, normed input, query, and keys and values repeated for every
head. Less than the MLP needs, it counts only where scores or masks of all pairs of tokens come on top of it. Counted."""

DEFAULT_TEXT = TextCoefficient(4, 3.5, "the most of any architecture counted, since this one was not")

_ROTARY_IN_FLOAT32 = VisionCoefficient(0, 18.2, False, _COUNTED)
_KEEPS_ALL = VisionCoefficient(2, 6, True, f"{_COUNTED}; it keeps the hidden states of all layers")

_FORGETS = VisionCoefficient(2, 6, False, _COUNTED)
_TAKEN_TO_FORGET = VisionCoefficient(2, 6, False, "taken from PaliGemma, whose tower is of the same make; not counted")

VISION: dict[str, VisionCoefficient] = {
    "gemma3": VisionCoefficient(2, 4, False, _COUNTED),
    "glm4v": VisionCoefficient(0, 18.2, False, f"{_COUNTED}, and measured on an H200"),
    "idefics3": _TAKEN_TO_FORGET,
    "internvl": VisionCoefficient(2, 5.5, False, _COUNTED),
    "llava": _KEEPS_ALL,
    "llava_next": _KEEPS_ALL,
    "llava_onevision": _KEEPS_ALL,
    "mllama": VisionCoefficient(0, 57, False, f"{_COUNTED}; it joins the hidden states of six layers"),
    "paligemma": _FORGETS,
    "qwen2_5_vl": _ROTARY_IN_FLOAT32,
    "qwen2_vl": _ROTARY_IN_FLOAT32,
    "qwen3_vl": VisionCoefficient(0, 23.4, False, f"{_COUNTED}; three of its layers feed features to the text", 9),
    "smolvlm": _TAKEN_TO_FORGET,
}
"""By ``model_type`` of config.json."""

DEFAULT_VISION = VisionCoefficient(2, 6, True, "the most of any architecture counted, since this one was not")

CROSS_ATTENTION: dict[str, float] = {"mllama": 0.2}
"""Share of the text layers that read images by cross-attention, in families whose image tokens never enter the prompt: one
marker an image does. Source: ``cross_attention_layers`` of Llama 3.2 Vision: 8 of 40 layers (11B), 20 of 100 (90B)."""

FULL_LOGITS_ARCHITECTURES = ("CogVLM", "CogAgent", "ChatGLM")
"""Beginnings of class names whose own code computes the logits of every token, in float32, even in ``generate``.
Source: modeling_cogvlm.py (CogVLM, CogAgent, CogVLM2) and modeling_chatglm.py (GLM-4V-9B) of their checkpoints."""


def text_coefficient(model_type: str) -> TextCoefficient:
    """The coefficient of a text body."""
    return TEXT.get(model_type, DEFAULT_TEXT)


def vision_coefficient(model_type: str) -> VisionCoefficient:
    """The coefficient of a vision tower."""
    return VISION.get(model_type, DEFAULT_VISION)
