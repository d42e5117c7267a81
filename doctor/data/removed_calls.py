"""What code shipped with checkpoints relies on and transformers has dropped, or asks for since, and what takes its place.

Releases were read in the packages of transformers 4.37 to 5.23, one of each minor version; which published code is
concerned, in the code and in the threads named. Patterns are searched for in the text of that code, which is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Version = tuple[int, int]


class Break(NamedTuple):
    """One reason why code that ran does not run any more, or runs wrong."""

    since: Version
    """First release of transformers where it does."""
    file: str
    """Of transformers: tells whether the installed version has it."""
    mark: str
    code: str
    """Regular expression of the checkpoint's code that is concerned."""
    says: str
    """What the code does, after "the code of MODEL"."""
    then: str
    """What comes of it, after a colon."""
    source: str
    until: Version | None = None
    """First release that can do without again."""
    is_new: bool = False
    """False: it breaks where the file lacks the mark; true: where the file has it."""
    is_missing: bool = False
    """True: code is concerned that lacks the pattern."""
    unless: str = ""
    """Regular expression of code that has been taken care of."""


BREAKS: Mapping[str, Break] = {
    "LlamaFlashAttention2": Break(
        (4, 48),
        "models/llama/modeling_llama.py",
        "class LlamaFlashAttention2",
        r"LlamaFlashAttention2\b",
        "imports LlamaFlashAttention2",
        "ImportError when it is loaded",
        "DeepSeek-VL2 issues 45 and 87",
    ),
    "_extract_past_from_model_output": Break(
        (4, 49),
        "generation/utils.py",
        "def _extract_past_from_model_output",
        r"self\._extract_past_from_model_output\(",
        "calls _extract_past_from_model_output",
        "AttributeError at the first generate",
        "zai-org/GLM-4 issue 716, zai-org/CogVLM2 issue 218, zai-org/CogAgent issue 42",
    ),
    "get_max_length": Break(
        (4, 49),
        "cache_utils.py",
        "def get_max_length",
        r"\.get_max_length\(",
        "calls get_max_length of the cache",
        "AttributeError at the first generate",
        "transformers issue 36071",
        until=(5, 13),
    ),
    "_initialize_weights": Break(
        (4, 52),
        "modeling_utils.py",
        'if hasattr(module, "_init_weights"):',
        r"(?m)^class \w+\((?:torch\.)?(?:nn\.)?Module\):\n(?:(?!class ).*\n)*?    def _init_weights\(",
        "has a module with _init_weights that is no PreTrainedModel",
        "AttributeError: '_initialize_weights' when it is loaded",
        "transformers issue 39124",
        until=(4, 53),
        is_new=True,
    ),
    "get_usable_length": Break(
        (4, 54),
        "cache_utils.py",
        "def get_usable_length",
        r"\.get_usable_length\(",
        "calls get_usable_length of the cache",
        "AttributeError at the first call",
        "packages of 4.53.3 and 4.54.1",
    ),
    "seen_tokens": Break(
        (4, 54),
        "cache_utils.py",
        "def seen_tokens",
        r"past_key_values?\.seen_tokens\b",
        "reads seen_tokens of the cache",
        "AttributeError at the first generate",
        "GOT-OCR2.0 issue 313",
    ),
    "from_legacy_cache": Break(
        (5, 0),
        "cache_utils.py",
        "def from_legacy_cache",
        r"\.from_legacy_cache\(",
        "calls from_legacy_cache",
        "AttributeError at the first call",
        "packages of 4.57.6 and 5.0.0",
    ),
    "is_torch_fx_available": Break(
        (5, 0),
        "utils/import_utils.py",
        "def is_torch_fx_available",
        r"import[^\n]*\bis_torch_fx_available\b",
        "imports is_torch_fx_available",
        "ImportError when it is loaded",
        "transformers issue 44561",
    ),
    "post_init": Break(
        (5, 0),
        "modeling_utils.py",
        "self.all_tied_weights_keys",
        r"\.post_init\(",
        "does not call post_init",
        "AttributeError: 'all_tied_weights_keys' when it is loaded",
        "transformers issue 43883, MiniCPM-V issue 1087",
        is_new=True,
        is_missing=True,
    ),
    "register_buffer": Break(
        (5, 0),
        "modeling_utils.py",
        "def named_non_persistent_buffers",
        r"register_buffer\(\s*[\"']\w+[\"']\s*,(?!\s*None\b)[^\n]*?persistent\s*=\s*False",
        "keeps buffers that no file stores (persistent=False)",
        "they hold what memory held, and answers are wrong, unless its _init_weights computes them",
        "named_non_persistent_buffers in modeling_utils.py of 5.0 to 5.23, run with such code",
        is_new=True,
        unless=r"def _init_weights\((?:(?!\n    def )[\s\S])*?copy_\(",
    ),
}
"""By the name that a report gives."""

PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "chatglm": ("_extract_past_from_model_output",),
    "cogagent": ("_extract_past_from_model_output",),
    "cogvlm": ("_extract_past_from_model_output",),
    "deepseek_vl_v2": ("LlamaFlashAttention2", "register_buffer"),
    "internvl_chat": ("post_init",),
    "kimi_vl": ("is_torch_fx_available", "register_buffer"),
    "minicpmv": ("_initialize_weights", "post_init", "register_buffer"),
    "molmo": ("post_init",),
    "phi3_v": ("get_max_length", "get_usable_length", "from_legacy_cache"),
}
"""Family to what its code breaks by, as first published. Revisions differ: where the code is at hand, it is searched."""


class Native(NamedTuple):
    """What to take instead: a class of transformers itself."""

    model: str
    since: Version
    """First release with the class, one of each minor version read."""


NATIVE: Mapping[str, Native] = {
    "chatglm": Native("zai-org/GLM-4.1V-9B-Thinking (Glm4vForConditionalGeneration)", (4, 53)),
    "internvl_chat": Native(
        "the same weights as -hf, such as OpenGVLab/InternVL3-8B-hf (InternVLForConditionalGeneration)", (4, 52)
    ),
    "minicpmv": Native("openbmb/MiniCPM-V-4.6 (MiniCPMV4_6ForConditionalGeneration)", (5, 7)),
    "molmo": Native("allenai/Molmo2-8B (Molmo2ForConditionalGeneration)", (5, 20)),
    "phi3_v": Native("microsoft/Phi-4-multimodal-instruct (Phi4MultimodalForCausalLM)", (4, 51)),
}
"""Family to its successor. transformers 5.23 has none for CogVLM, CogAgent, DeepSeek-VL2 and Kimi-VL."""


def is_broken(name: str, release: Version) -> bool:
    """Whether a release of transformers breaks it."""
    found = BREAKS[name]
    return found.since <= release and (found.until is None or release < found.until)
