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
    experts_hidden_multiple: float = 6
    """With a mixture of experts: copies of the hidden state for each expert that a token passes. 4 where weights of the
    router have the model's type (tokens sorted, output, weighed, sorted back), 6 where they are float32, which makes the
    weighed output and its sorted copy float32 too. Source: grouped_mm_experts_forward of integrations/moe.py, transformers
    5.23."""
    beside_experts: float = 4.4
    """Hidden states that live beside the experts."""
    runs_all_experts: bool = False
    """True when every token is copied for every expert (Llama 4)."""
    attention_multiple: float = 5.1
    """Copies of the queries of all heads that live at once around fused attention, beside two hidden states."""
    linear_multiple: float = 26.3
    """The same for a layer of linear attention, in multiples of the values of all heads. Source: counted for
    torch_chunk_gated_delta_rule, which runs where the kernels of flash-linear-attention are not installed."""
    pair_bytes: tuple[int, int] = (0, 0)
    """Bytes for each pair of tokens that the class's own masks take: through all layers, and while one attends."""
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
    pair_elements: float = 0
    """For each pair of patches of all images: a mask that keeps them apart, and its copy with aligned rows."""
    score_bytes: float = 0
    """Bytes for each head and pair of patches of a run, whatever attention is asked for: of code that cannot fuse it."""
    second_states: float = 0
    """Hidden states of a patch that a second tower keeps of all its blocks, where this one keeps none."""
    eager_scores: float = 0
    """Elements for each head and pair of patches in eager attention, of code that makes no softmax in float32."""
    kept_of_taken: int = 0
    """Hidden states of a patch that the caller holds as long, for each block whose states are features; at least one."""
    joins_runs: bool = False
    """The runs (tiles) of an image see each other."""
    pixel_elements: int = 0
    """For each pixel, of towers that are no stack of equal blocks of patches; as the published models are made."""

    def elements(self, *, intermediate: int, hidden: int, layers: int) -> float:
        """Elements that live at once for each patch."""
        states = self.hidden_multiple
        if self.keeps_hidden_states:
            states += self.second_states or layers
        return self.intermediate_multiple * intermediate + states * hidden

    @property
    def text(self) -> str:
        """The formula and its source, for people."""
        if self.pixel_elements:
            return f"{self.pixel_elements} elements a pixel ({self.source})"
        kept = f"{self.second_states:g}" if self.second_states else "layers"
        states = f"({self.hidden_multiple:g} + {kept})" if self.keeps_hidden_states else f"{self.hidden_multiple:g}"
        wide = f"{self.intermediate_multiple:g} x intermediate + " if self.intermediate_multiple else ""
        return f"{wide}{states} x hidden elements a patch ({self.source})"


_COUNTED = "counted"
_GATE_AND_UP_APART = TextCoefficient(3, 3.07, _COUNTED, lost_first=0.49, lost_later=0.41)
_GATE_AND_UP_MERGED = TextCoefficient(4, 3.07, f"{_COUNTED}, and measured on an H200", lost_first=0.43, lost_later=0.5)
_MERGED = TextCoefficient(4, 3.1, _COUNTED)
_EXPERTS = TextCoefficient(3, 3.1, _COUNTED, experts_hidden_multiple=4, beside_experts=3.3)
_EXPERTS_IN_FLOAT32 = TextCoefficient(3, 3.1, _COUNTED, experts_hidden_multiple=6, beside_experts=3.2)
_EXPERTS_BESIDE_SHARED = TextCoefficient(3, 3.1, _COUNTED, experts_hidden_multiple=4, beside_experts=4.31)
_FROM_ITS_CODE = "read in the code of its checkpoint, not counted"

TEXT: dict[str, TextCoefficient] = {
    **dict.fromkeys(
        (
            "deepseek_vl",
            "idefics2",
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
    "chatglm": TextCoefficient(4, 3.5, _FROM_ITS_CODE),
    "cogvlm": TextCoefficient(3, 6, _FROM_ITS_CODE, pair_bytes=(2, 11)),
    "molmo": TextCoefficient(2, 3.5, f"{_FROM_ITS_CODE}; its intermediate_size is that of gate and up together"),
    "gemma3": TextCoefficient(3, 3.5, _COUNTED),
    "glm4v": _GATE_AND_UP_MERGED,
}
"""By ``model_type`` of config.json."""

BODIES: dict[str, TextCoefficient] = {
    **dict.fromkeys(
        (
            "granite", "granite_docling_text", "llama", "mistral", "muse_glimmer_text", "paddleocr_vl_text", "qwen2",
            "qwen3", "qwen3_5_text", "smollm3",
        ),
        msgspec.structs.replace(_GATE_AND_UP_APART, linear_multiple=26.3),
    ),
    # Layers without attention are short convolutions, which need less than their MLP.
    **dict.fromkeys(("lfm2", "lfm3"), msgspec.structs.replace(_GATE_AND_UP_APART, linear_multiple=3)),
    **dict.fromkeys(("glm", "glm4", "phi", "phi3"), _MERGED),
    **dict.fromkeys(("mixtral", "qwen3_moe", "qwen3_vl_moe_text", "aria_text"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4v_moe_text", "kimi_k2"), _EXPERTS_IN_FLOAT32),
    **dict.fromkeys(("ernie4_5_vl_moe_text", "qwen3_5_moe_text", "qwen3_next"), _EXPERTS_BESIDE_SHARED),
    "cohere2": TextCoefficient(3, 3.07, f"{_COUNTED}; it rotates in float32", attention_multiple=13.1),
    "gemma3n_text": TextCoefficient(4, 21, f"{_COUNTED}; it carries four hidden states"),
    "gemma4_text": TextCoefficient(3, 3.8, _COUNTED),
    "llama4_text": TextCoefficient(
        3, 4.1, f"{_COUNTED}; every expert sees every token", experts_hidden_multiple=2, beside_experts=4.1,
        runs_all_experts=True,
    ),
    "minicpm3": TextCoefficient(3, 3.1, _COUNTED),
    "olmo2": TextCoefficient(3, 2.2, _COUNTED),
}  # fmt: skip
"""By ``model_type`` of the text body, for families that :data:`TEXT` does not name. Counted with true dimensions (one layer
of each kind, 2,048 and 4,096 tokens) under transformers 5.23; tests/doctor/planner/test_families.py holds the figures."""

DENSE_EXPERTS_BEFORE_5 = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text", "llama4", "llama4_text"})
"""Classes whose experts all see every token under transformers 4; the others loop over the experts there, one by one.
Source: Qwen3VLMoeTextExperts and Llama4TextExperts of transformers 4.57."""

ATTENTION_STATES = 5.2
"""Hidden states that live at once around attention: residual, normed input, query, and keys and values repeated for every
head. Less than the MLP needs, it counts only where scores or masks of all pairs of tokens come on top of it. Counted."""

DEFAULT_TEXT = TextCoefficient(4, 3.5, "the most of any architecture counted, since this one was not")

_ROTARY_IN_FLOAT32 = VisionCoefficient(0, 18.2, False, _COUNTED)
_CLIP = VisionCoefficient(3, 4.6, False, f"{_COUNTED}; its activation function makes two copies", kept_of_taken=2)

_FORGETS = VisionCoefficient(2, 6, False, _COUNTED)
_COUNTED_SMALL = "counted with blocks 1,024 wide"
_PLAIN = VisionCoefficient(2, 4.6, False, _COUNTED_SMALL)
_GATED = VisionCoefficient(3, 5.8, False, _COUNTED_SMALL)
_ROTATED = VisionCoefficient(0, 18.2, False, _COUNTED_SMALL)
_NORMED_AND_ROTATED = VisionCoefficient(0, 20.7, False, _COUNTED_SMALL)
"""With norms of queries and keys, or a sum of positions beside."""
_PIXTRAL = VisionCoefficient(3, 5.8, False, _COUNTED, pair_elements=1)
"""It joins the patches of all images in one sequence, with a mask that keeps images apart."""

_OF_EVA = VisionCoefficient(2, 4, False, "counted, and measured on an H200")
"""EVA2-CLIP of CogVLM, CogVLM2 and GLM-4V-9B: 6,401 patches take 497 MiB, 9,217 take 667."""

VISION: dict[str, VisionCoefficient] = {
    **dict.fromkeys(
        (
            "blip-2",
            "cosmos3_edge",
            "deepseek_vl",
            "hunyuan_vl",
            "instructblip",
            "janus",
            "lfm2_vl",
            "minimax_m3_vl",
            "qianfan_ocr",
            "shieldgemma2",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(("diffusion_gemma", "exaone4_5", "gemma4", "lfm3_vl", "ovis2"), _GATED),
    **dict.fromkeys(
        ("ernie4_5_vl_moe", "glmga", "hyperclovax_vision_v2", "inkling2", "kimi_k25", "llama4", "qwen2_5_omni_thinker"),
        _ROTATED,
    ),
    **dict.fromkeys(
        ("dots3_note", "glm5_next", "glm_ocr", "muse_glimmer", "muse_spark", "paddleocr_vl", "qwen4_exp", "video_llama_3"),
        _NORMED_AND_ROTATED,
    ),
    "aria": VisionCoefficient(0, 13.9, False, _COUNTED),
    "aya_vision": VisionCoefficient(2, 4.6, False, _COUNTED),
    **dict.fromkeys(
        ("blip", "git"), msgspec.structs.replace(_PLAIN, score_bytes=10, source=f"{_COUNTED}; its attention is never fused")
    ),
    "chameleon": VisionCoefficient(0, 0, False, f"{_COUNTED}: convolutions, 128 channels at first", pixel_elements=580),
    "cohere2_vision": VisionCoefficient(2, 11.3, False, f"{_COUNTED}; its projector is wide"),
    "deepseek_vl_hybrid": msgspec.structs.replace(
        _PLAIN,
        score_bytes=2.1,
        eager_scores=3.5,
        second_states=8,
        source=f"{_COUNTED}; the scores of its second tower are biased",
    ),
    "emu3": VisionCoefficient(
        0,
        0,
        False,
        "taken from Chameleon, whose image tokenizer is of the same make, with 256 channels",
        pixel_elements=1160,
    ),
    "florence2": VisionCoefficient(0, 0, False, f"{_COUNTED}, and doubled for the larger model", pixel_elements=100),
    "gemma3": VisionCoefficient(2, 4, False, _COUNTED),
    **dict.fromkeys(
        ("got_ocr2", "pp_chart2table"),
        msgspec.structs.replace(_PLAIN, score_bytes=12, source=f"{_COUNTED}; its scores are biased, and never fused"),
    ),
    **dict.fromkeys(("glm46v", "glm4v_moe"), VisionCoefficient(0, 18.2, False, _COUNTED)),
    "glm4v": VisionCoefficient(0, 18.2, False, f"{_COUNTED}, and measured on an H200"),
    "granite_docling": VisionCoefficient(2, 6.2, False, _COUNTED_SMALL),
    "idefics2": VisionCoefficient(0, 39, False, f"{_COUNTED}; its connector is as wide as the text body"),
    "idefics3": VisionCoefficient(2, 4.9, False, _COUNTED),
    "internvl": VisionCoefficient(2, 5.5, False, _COUNTED, eager_scores=2),
    **dict.fromkeys(("llava", "llava_next", "llava_next_video", "video_llava"), _CLIP),
    "llava_onevision": msgspec.structs.replace(_PLAIN, kept_of_taken=2),
    **dict.fromkeys(("lighton_ocr", "mistral3", "mistral_large4"), _PIXTRAL),
    "mllama": VisionCoefficient(0, 57, False, f"{_COUNTED}; it joins the hidden states of six layers", joins_runs=True),
    "paligemma": _FORGETS,
    "qwen2_5_vl": _ROTARY_IN_FLOAT32,
    "qwen2_vl": _ROTARY_IN_FLOAT32,
    **dict.fromkeys(
        ("cohere_compass", "cosmos3_omni", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe"),
        VisionCoefficient(0, 23.4, False, f"{_COUNTED}; three of its layers feed features to the text", 9),
    ),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), VisionCoefficient(0, 20.7, False, _COUNTED)),
    "smolvlm": VisionCoefficient(2, 4.9, False, _COUNTED),
    "vipllava": msgspec.structs.replace(
        _CLIP, hidden_multiple=7.7, kept_of_taken=0, source=f"{_COUNTED}; it joins the states of five blocks"
    ),
}
"""By ``model_type`` of config.json."""

_TOWERS = {"pixtral": _PIXTRAL}
"""By ``model_type`` of the vision config, of towers whose family usually has another."""

KEPT_STATES = frozenset({
    "aria", "aya_vision", "deepseek_vl_hybrid", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3",
    "mistral_large4", "video_llava", "vipllava",
})  # fmt: skip
"""Types of models whose tower, or whose second one, keeps what every block gives (``output_hidden_states=True``) under
older releases of transformers, to take those of one block or a few."""
KEPT_STATES_BEFORE_5 = frozenset({"cohere2_vision"})
"""Types of models that do so in the fourth generation alone. Source: modeling_cohere2_vision.py of 4.57 and 5.0."""
STATES_LET_GO = (5, 23)
"""The release of transformers from which on those keep what they take. Source: ``select_hidden_states`` in
``utils/output_capturing.py``, which 5.22 does not have."""

OUTPUT_LET_GO = frozenset({
    "aria", "aya_vision", "cohere2_vision", "cosmos3_edge", "deepseek_vl", "deepseek_vl_hybrid", "diffusion_gemma",
    "ernie4_5_vl_moe", "exaone4_5", "gemma3", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "glm5_next",
    "glm_ocr", "got_ocr2", "idefics2", "idefics3", "internvl", "janus", "kimi_k25", "lfm2_vl", "lighton_ocr", "llava",
    "llava_next", "llava_next_video", "llava_onevision", "minimax_m3_vl", "mistral3", "muse_glimmer", "paddleocr_vl",
    "paligemma", "perception_lm", "qianfan_ocr", "qwen2_5_vl", "qwen2_vl", "smolvlm", "video_llama_3", "video_llava",
    "vipllava",
})  # fmt: skip
"""Types of models that under older releases of transformers hold one copy of the image features while the layers read the
prompt, and nothing else of the tower. Source: calls of ``get_image_features`` in the ``forward`` of the classes of 5.17;
seen in traces of 17 of them, and on two H200s."""
OUTPUT_KEPT = (5, 18)
"""The release of transformers from which on a model holds all that its tower gives (``mm_encoder_outputs``)."""

PIXEL_MASK_BYTES = {"aria": 1, "idefics2": 8, "idefics3": 8, "smolvlm": 8}
"""Bytes of a mask that stands beside each pixel, by ``model_type``. Source: the image processors, which make it of int64,
and Aria's of bool."""

MULTIPLIED_EMBEDDINGS = frozenset({
    "granite", "granite4_vision_text", "granite_docling_text", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hyperclovax",
})  # fmt: skip
"""Types of text bodies that multiply the embedded prompt by a number: it is there twice all through prefill. Source:
``embedding_multiplier`` in their ``forward``."""

DEFAULT_VISION = VisionCoefficient(2, 6, True, "the most of any architecture counted, since this one was not")

_FIRST, _LAST = (0, 0), (999, 0)
NEVER_FUSED = {
    **dict.fromkeys(
        (
            "blip_text_model", "bloom", "codegen", "cpmant", "deepseek_v4", "flint", "git", "gpt_neo", "gpt_neox_japanese",
            "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "hy_v4", "inkling2_text", "mimo_v2_flash", "mpt",
            "openai-gpt", "xglm",
        ),
        (_FIRST, _LAST),
    ),
    **dict.fromkeys(("gemma2", "vaultgemma"), ((5, 21), _LAST)),
    "pix2struct_text_model": (_FIRST, (5, 17)),
    "udop": (_FIRST, (5, 17)),
}  # fmt: skip
"""Types of text bodies to the release of transformers since which they have no fused attention, and the one (at the latest)
from which on they have. Source: ``_supports_sdpa`` of the classes of 4.57.6, 5.17, 5.20, 5.21 and 5.23."""
SCORE_BYTES = {"gpt_oss": 6.2}
"""Bytes for each head and pair of tokens of bodies that do not make the softmax of scores in float32. Counted."""
REFUSE_SDPA_BEFORE = {
    "blip-2": (5, 17),
    "got_ocr2": _LAST,
    "instructblip": (5, 17),
    "instructblipvideo": (5, 17),
    "pp_chart2table": _LAST,
}
"""Types of models that refuse ``attn_implementation="sdpa"``, though their text body has it by default, to the release from
which on they do not: their class, or a part beside the body, names no support. Those with a text body that is never fused
refuse it too."""

CROSS_ATTENTION = frozenset({"mllama"})
"""Families whose image tokens never enter the prompt: one marker an image does, and some layers read them by
cross-attention (``cross`` in ``TextShape.cached_layers``). Source: ``cross_attention_layers`` of Llama 3.2 Vision."""

FULL_LOGITS_ARCHITECTURES = ("CogVLM", "CogAgent", "ChatGLM")
"""Beginnings of class names whose own code computes the logits of every token, in float32, even in ``generate``.
Source: modeling_cogvlm.py (CogVLM, CogAgent, CogVLM2) and modeling_chatglm.py (GLM-4V-9B) of their checkpoints."""


ALL_LOGITS = frozenset({
    "minicpm_ocr", "minicpmv4_6", "nemotron_h_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "video_llama_3",
})  # fmt: skip
"""Types of models whose ``forward`` takes no ``logits_to_keep``, so that ``generate`` makes the logits of every token.
BLIP-2's kind is none of them: its own ``generate`` calls that of the text model, seen in traces to keep the last alone.
Source: the signatures of transformers 5.23; releases from 5.0 on are taken to be alike."""
ALL_LOGITS_BEFORE_5 = frozenset({
    "blip", "blip-2", "chameleon", "git", "idefics", "instructblip", "kosmos-2", "kosmos-2.5", "qwen2_vl",
})  # fmt: skip
"""The same, whatever their ``generate`` calls. Source: the signatures of transformers 4.57.6."""


RESCALED_LOGITS = {
    **dict.fromkeys(
        (
            "cohere_compass", "diffusion_gemma", "gemma3n", "gemma4", "gemma4_unified", "granite4_vision",
            "granite_docling", "hyperclovax_vision_v2", "mistral_large4", "muse_glimmer", "muse_spark", "t5gemma2",
        ),
        "",
    ),
    "paligemma": "gemma2",
}  # fmt: skip
"""Types of models whose ``forward`` scales or caps the logits, so that they exist twice, to the text body with which it
does; empty where it does with any. Source: their classes in transformers 5.23; PaliGemma 2 counted."""
RESCALED_SINCE = {"paligemma": (5, 23)}
"""The release from which on, where older ones do not. Source: modeling_paligemma.py of 5.22 and 5.23."""


_REMOTE_CODE = {"CogVLM": "cogvlm", "CogAgent": "cogvlm", "ChatGLM": "chatglm"}
"""Beginnings of class names. Their model types differ between releases."""
_EVA_CLASSES = ("CogVLM", "ChatGLM")
"""The same, of those with no other tower than EVA2-CLIP. CogAgent's second one was not measured, and what
``image_rules.py`` counts for it is in patches of the careful default."""


def text_coefficient(model_type: str, body: str = "", architecture: str = "") -> TextCoefficient:
    """The coefficient of a text body.

    Args:
        model_type: Of the whole model.
        body: ``model_type`` of its text body.
        architecture: Name of the class; code of checkpoints is told by it.
    """
    for beginning, family in _REMOTE_CODE.items():
        if architecture.startswith(beginning):
            return TEXT[family]
    return BODIES.get(body) or TEXT.get(model_type) or BODIES.get(model_type, DEFAULT_TEXT)


def vision_coefficient(model_type: str, architecture: str = "", tower: str = "") -> VisionCoefficient:
    """The coefficient of a vision tower.

    Args:
        model_type: Of the whole model.
        architecture: Name of the class; code of checkpoints is told by it.
        tower: ``model_type`` of its vision config.
    """
    if architecture.startswith(_EVA_CLASSES):
        return _OF_EVA
    return _TOWERS.get(tower) or VISION.get(model_type, DEFAULT_VISION)
