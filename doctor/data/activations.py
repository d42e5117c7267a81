"""Working memory of a forward pass, per architecture: how many elements live at once for each token and each patch.

Counted on the meta device and on the CPU: storages that are alive while the true-size modules of transformers 5.23 run,
with fused attention replaced by an operation that only has its output. The counts are linear in tokens and patches to four
digits. Confirmed for ``glm4v`` by ``max_memory_allocated`` on an H200 with prompts of 176 to 32,768 tokens and images of
336 to 4,480 pixels (readings in tests/doctor/planner/test_measured.py).
"""

from __future__ import annotations

import msgspec


class TextCoefficient(msgspec.Struct, frozen=True):
    """Elements a token while one layer reads the prompt: multiples of the MLP's width and of the hidden size."""

    intermediate_multiple: float
    hidden_multiple: float
    """What the layer receives is part of it."""
    source: str

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
_GATE_AND_UP_APART = TextCoefficient(3, 3.07, _COUNTED)
_GATE_AND_UP_MERGED = TextCoefficient(4, 3.07, f"{_COUNTED}, and measured on an H200")

TEXT: dict[str, TextCoefficient] = {
    "gemma3": TextCoefficient(3, 3.5, _COUNTED),
    "glm4v": _GATE_AND_UP_MERGED,
    "internvl": _GATE_AND_UP_APART,
    "llava": _GATE_AND_UP_APART,
    "llava_next": _GATE_AND_UP_APART,
    "llava_onevision": _GATE_AND_UP_APART,
    "qwen2_5_vl": _GATE_AND_UP_APART,
    "qwen2_vl": _GATE_AND_UP_APART,
    "qwen3_vl": _GATE_AND_UP_APART,
}
"""By ``model_type`` of config.json."""

DEFAULT_TEXT = TextCoefficient(4, 3.5, "the most of any architecture counted, since this one was not")

_ROTARY_IN_FLOAT32 = VisionCoefficient(0, 18.2, False, _COUNTED)
_KEEPS_ALL = VisionCoefficient(2, 6, True, f"{_COUNTED}; it keeps the hidden states of all layers")

VISION: dict[str, VisionCoefficient] = {
    "gemma3": VisionCoefficient(2, 4, False, _COUNTED),
    "glm4v": VisionCoefficient(0, 18.2, False, f"{_COUNTED}, and measured on an H200"),
    "internvl": VisionCoefficient(2, 5, False, _COUNTED),
    "llava": _KEEPS_ALL,
    "llava_next": _KEEPS_ALL,
    "llava_onevision": _KEEPS_ALL,
    "qwen2_5_vl": _ROTARY_IN_FLOAT32,
    "qwen2_vl": _ROTARY_IN_FLOAT32,
    "qwen3_vl": VisionCoefficient(0, 23.4, False, _COUNTED),
}
"""By ``model_type`` of config.json."""

DEFAULT_VISION = VisionCoefficient(2, 6, True, "the most of any architecture counted, since this one was not")

FULL_LOGITS_ARCHITECTURES = ("CogVLM", "CogAgent", "ChatGLM")
"""Beginnings of class names whose own code computes the logits of every token, in float32, even in ``generate``.
Source: modeling_cogvlm.py (CogVLM, CogAgent, CogVLM2) and modeling_chatglm.py (GLM-4V-9B) of their checkpoints."""


def text_coefficient(model_type: str) -> TextCoefficient:
    """The coefficient of a text body."""
    return TEXT.get(model_type, DEFAULT_TEXT)


def vision_coefficient(model_type: str) -> VisionCoefficient:
    """The coefficient of a vision tower."""
    return VISION.get(model_type, DEFAULT_VISION)
