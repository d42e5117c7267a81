"""The files of the tiny checkpoints, family by family: the one place to add another (see :mod:`pytest_vlmgpu.testing`).

They are written in the form that hubs publish, not the one that ``save_pretrained`` of the day writes, so that one table
serves every supported version of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_POSITIONS = 4096
_PATCH = 14
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
# Half of the head's 8 dimensions rotate in pairs: one pair for time, one for height, two for width.
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_MERGING_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": _PATCH, "spatial_merge_size": 2}
_CLIP_COLORS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
PRINTABLE = 94
"""Ids below are ``!`` to ``~``: the first of the byte-level letters in order of code point."""
# The %s takes what stands for one image.
CHAT_TEMPLATE = (
    "{%% for message in messages %%}<|{{ message.role }}|>"
    "{%% if message.content is string %%}{{ message.content }}{%% else %%}{%% for part in message.content %%}"
    "{%% if part.type == 'image' %%}%s{%% elif part.type == 'text' %%}{{ part.text }}{%% endif %%}"
    "{%% endfor %%}{%% endif %%}{%% endfor %%}{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)


@dataclass(frozen=True)
class Family:
    """What differs between families, in the words of their published files."""

    config: dict[str, Any]
    """config.json, without token ids and vocabulary size."""
    token_ids: dict[str, str]
    """Key of config.json to the special token whose id belongs there."""
    named_tokens: dict[str, str]
    """Attribute of the tokenizer to its special token."""
    image_prompt: str
    """What stands for one image in a prompt."""
    processor_class: str
    image_processor: dict[str, Any]
    """preprocessor_config.json."""
    processor: dict[str, Any]
    """processor_config.json."""
    video_processor: str | None = None
    tokenizer_class: str = "PreTrainedTokenizerFast"


def _qwen(processor_class: str, vision: dict[str, Any], *, is_tied: bool) -> Family:
    return Family(
        config={
            "tie_word_embeddings": is_tied,
            "text_config": {**_TEXT, "rope_scaling": _MROPE, "tie_word_embeddings": is_tied},
            "vision_config": {**_MERGING_VISION, "temporal_patch_size": 2, **vision},
        },
        token_ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        named_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        image_prompt="<|vision_start|><|image_pad|><|vision_end|>",
        processor_class=processor_class,
        # transformers 4.57 accepts no other class for this family.
        tokenizer_class="Qwen2Tokenizer",
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 12845056,
            "patch_size": _PATCH,
            "temporal_patch_size": 2,
            "merge_size": 2,
            **_CLIP_COLORS,
        },
        processor={},
        video_processor="Qwen2VLVideoProcessor",
    )


FAMILIES = {
    "llava": Family(
        config={
            "image_seq_length": 4,
            "vision_feature_select_strategy": "default",
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 2 * _PATCH,
                "patch_size": _PATCH,
                "projection_dim": 32,
            },
        },
        token_ids={"image_token_index": "<image>"},
        named_tokens={"image_token": "<image>"},
        image_prompt="<image>\n",
        processor_class="LlavaProcessor",
        image_processor={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 2 * _PATCH},
            "crop_size": {"height": 2 * _PATCH, "width": 2 * _PATCH},
            **_CLIP_COLORS,
        },
        # The class token is an additional one and "default" drops it again.
        processor={"patch_size": _PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "qwen2_vl": _qwen("Qwen2VLProcessor", {"embed_dim": 32, "mlp_ratio": 2}, is_tied=True),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor",
        {"out_hidden_size": 32, "intermediate_size": 64, "window_size": 4 * _PATCH, "fullatt_block_indexes": [1]},
        is_tied=False,
    ),
    "glm4v": Family(
        config={
            "text_config": {**_TEXT, "rope_scaling": _MROPE},
            "vision_config": {
                **_MERGING_VISION,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                "intermediate_size": 64,
                "image_size": 8 * _PATCH,
            },
        },
        token_ids={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
        named_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        image_prompt="<|begin_of_image|><|image|><|end_of_image|>",
        processor_class="Glm4vProcessor",
        image_processor={
            "image_processor_type": "Glm4vImageProcessor",
            "size": {"shortest_edge": 112 * 112, "longest_edge": 47040000},
            "patch_size": _PATCH,
            "temporal_patch_size": 2,
            "merge_size": 2,
            **_CLIP_COLORS,
        },
        processor={},
        video_processor="Glm4vVideoProcessor",
    ),
    "internvl": Family(
        config={
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [4 * _PATCH, 4 * _PATCH],
                "patch_size": [_PATCH, _PATCH],
            },
        },
        token_ids={"image_token_id": "<IMG_CONTEXT>"},
        named_tokens={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        image_prompt="<IMG_CONTEXT>\n",
        processor_class="InternVLProcessor",
        image_processor={
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 4 * _PATCH, "width": 4 * _PATCH},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
            **_CLIP_COLORS,
        },
        processor={"image_seq_length": 4},
        video_processor="InternVLVideoProcessor",
    ),
}
