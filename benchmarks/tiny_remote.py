"""Tiny checkpoints of the families that bring code of their own: a folder that ``trust_remote_code=True`` loads.

The code is ``remote_code/``: published module names and order of registration, written anew. config.json has the published
keys at small sizes; weights are random and come in shards.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CODE = Path(__file__).resolve().parent / "remote_code"
HIDDEN, LAYERS, VOCABULARY = 64, 6, 128
IMAGE_TOKEN = 5
_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_EVA: dict[str, Any] = {
    "hidden_size": 32,
    "image_size": 56,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_hidden_layers": 4,
    "num_positions": 17,
    "patch_size": 14,
}
_DEEPSEEK: dict[str, Any] = {
    **_TEXT,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


class Family(NamedTuple):
    """One family: what its config.json says beside the classes, and inputs."""

    module: str
    """File with the classes."""
    classes: tuple[str, str]
    """Of the config and of the model."""
    config: dict[str, Any]
    image: Callable[[], dict[str, Any]]
    auto: str = "AutoModelForCausalLM"
    size: str = ""
    """The published model whose keys and names these are."""


def _ids(*runs: tuple[int, int]) -> Any:
    """A prompt of runs (token, how many), then a few words."""
    import torch

    tokens = [token for token, count in runs for _ in range(count)]
    return torch.tensor([[1, *tokens, *range(20, 28)]])


def _pixels(*shape: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _cogvlm(places: int) -> dict[str, Any]:
    """``places``: of the image, whose marks and patches are of type 1; one token before it."""
    import torch

    ids = _ids((7, places))
    types = torch.zeros_like(ids)
    types[:, 1 : 1 + places] = 1
    return {"input_ids": ids, "images": _pixels(1, 3, 56, 56), "token_type_ids": types}


def _cogagent() -> dict[str, Any]:
    return {**_cogvlm(18), "cross_images": _pixels(1, 3, 56, 56)}


def _internvl() -> dict[str, Any]:
    return {"input_ids": _ids((IMAGE_TOKEN, 8)), "pixel_values": _pixels(2, 3, 56, 56)}


def _minicpmv() -> dict[str, Any]:
    import torch

    return {
        "input_ids": _ids((7, 4)),
        "pixel_values": _pixels(1, 3, 56, 56),
        "image_bound": torch.tensor([[[1, 5]]]),
    }


def _deepseek_vl_v2() -> dict[str, Any]:
    import torch

    # Tiles of 5 x 5 patches are padded to 3 x 3 features: whole 3 x 4, separator, two tiles 3 x 7.
    mask = torch.tensor([[False, *[True] * 34, *[False] * 8]])
    return {"input_ids": _ids((7, 34)), "images": _pixels(1, 3, 3, 70, 70), "images_seq_mask": mask}


def _kimi_vl() -> dict[str, Any]:
    import torch

    patches = {"pixel_values": _pixels(24, 3, 14, 14), "image_grid_hws": torch.tensor([[4, 6]])}
    return {"input_ids": _ids((IMAGE_TOKEN, 6)), **patches}


def _molmo() -> dict[str, Any]:
    import torch

    masks = torch.ones(1, 2, 16)
    masks[0, 1, 12:] = 0
    return {
        "input_ids": _ids((7, 8)),
        "images": _pixels(1, 2, 16, 588),
        "image_masks": masks,
        "image_input_idx": torch.arange(1, 9).view(1, 2, 4),
    }


def _phi3_v() -> dict[str, Any]:
    return {"input_ids": _ids((-1, 13)), "pixel_values": _pixels(1, 2, 3, 56, 56)}


FAMILIES: dict[str, Family] = {
    "cogvlm": Family(
        "modeling_cogvlm",
        ("CogVLMConfig", "CogVLMForCausalLM"),
        {**{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}, "vision_config": _EVA},
        lambda: _cogvlm(18),
        size="THUDM/cogvlm-chat-hf",
    ),
    "cogvlm2": Family(
        "modeling_cogvlm",
        ("CogVLMConfig", "CogVLMForCausalLM"),
        {
            **{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"},
            "num_multi_query_heads": 2,
            "vision_config": _EVA,
        },
        lambda: _cogvlm(6),
        size="THUDM/cogvlm2-llama3-chat-19B",
    ),
    "cogagent": Family(
        "modeling_cogvlm",
        ("CogAgentConfig", "CogAgentForCausalLM"),
        {
            **{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"},
            "cross_hidden_size": 32,
            "cross_compute_hidden_size": 32,
            "cross_image_size": 56,
            "cross_layers": 2,
            "vision_config": _EVA,
        },
        _cogagent,
        size="THUDM/cogagent-chat-hf",
    ),
    "chatglm": Family(
        "modeling_chatglm",
        ("ChatGLMConfig", "ChatGLMForConditionalGeneration"),
        {
            "model_type": "chatglm",
            "ffn_hidden_size": 96,
            "hidden_size": HIDDEN,
            "kv_channels": 16,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_attention_heads": 4,
            "num_layers": LAYERS,
            "padded_vocab_size": VOCABULARY,
            "seq_length": 512,
            "tie_word_embeddings": False,
            "vision_config": {**_EVA, "scaling_factor": 8},
        },
        lambda: {"input_ids": _ids((7, 8)), "images": _pixels(1, 3, 56, 56)},
        size="THUDM/glm-4v-9b",
    ),
    "internvl_chat": Family(
        "modeling_internvl_chat",
        ("InternVLChatConfig", "InternVLChatModel"),
        {
            "model_type": "internvl_chat",
            "downsample_ratio": 0.5,
            "force_image_size": 56,
            "img_context_token_id": IMAGE_TOKEN,
            "max_dynamic_patch": 12,
            "use_thumbnail": True,
            "llm_config": {**_TEXT, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                "hidden_size": 32,
                "image_size": 56,
                "intermediate_size": 48,
                "num_attention_heads": 2,
                "num_hidden_layers": 4,
                "patch_size": 14,
            },
        },
        _internvl,
        auto="AutoModel",
        size="OpenGVLab/InternVL3-8B",
    ),
    "minicpmv": Family(
        "modeling_minicpmv",
        ("MiniCPMVConfig", "MiniCPMV"),
        {
            **_TEXT,
            "model_type": "minicpmv",
            "drop_vision_last_layer": False,
            "image_size": 56,
            "patch_size": 14,
            "query_num": 4,
            "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
            "slice_mode": True,
            "version": 2.6,
            "vision_config": {
                "model_type": "siglip",
                "hidden_size": 32,
                "image_size": 56,
                "intermediate_size": 48,
                "num_attention_heads": 2,
                "num_hidden_layers": 4,
                "patch_size": 14,
            },
        },
        _minicpmv,
        auto="AutoModel",
        size="openbmb/MiniCPM-V-2_6",
    ),
    "deepseek_vl_v2": Family(
        "modeling_deepseek_vl_v2",
        ("DeepseekVLV2Config", "DeepseekVLV2ForCausalLM"),
        {
            "model_type": "deepseek_vl_v2",
            "candidate_resolutions": [[70, 70], [70, 140]],
            "global_view_pos": "head",
            "tile_tag": "2D",
            "language_config": {**_DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
            "projector_config": {
                "model_type": "mlp_projector",
                "depth": 2,
                "downsample_ratio": 2,
                "input_dim": 32,
                "mlp_ratio": 1,
                "n_embed": HIDDEN,
                "projector_type": "downsample_mlp_gelu",
            },
            "vision_config": {
                "model_type": "vision",
                "model_name": "siglip_so400m_patch14_384",
                "heads": 2,
                "image_size": 70,
                "layers": 4,
                "mlp_ratio": 1.5,
                "patch_size": 14,
                "width": 32,
            },
        },
        _deepseek_vl_v2,
        size="deepseek-ai/deepseek-vl2",
    ),
    "kimi_vl": Family(
        "modeling_kimi_vl",
        ("KimiVLConfig", "KimiVLForConditionalGeneration"),
        {
            "model_type": "kimi_vl",
            "media_placeholder_token_id": IMAGE_TOKEN,
            "text_config": {**_DEEPSEEK, "model_type": "deepseek_v3"},
            "vision_config": {
                "model_type": "moonvit",
                "hidden_size": 32,
                "init_pos_emb_height": 8,
                "init_pos_emb_width": 8,
                "intermediate_size": 48,
                "merge_kernel_size": [2, 2],
                "num_attention_heads": 2,
                "num_hidden_layers": 4,
                "patch_size": 14,
            },
        },
        _kimi_vl,
        size="moonshotai/Kimi-VL-A3B-Instruct",
    ),
    "molmo": Family(
        "modeling_molmo",
        ("MolmoConfig", "MolmoForCausalLM"),
        {
            **_TEXT,
            "model_type": "molmo",
            "embedding_size": VOCABULARY,
            "layer_norm_type": "rms",
            "qkv_bias": True,
            "tiny_tower": {"heads": 2, "inner": 48, "layers": 10, "positions": 17, "width": 32},
            "use_position_ids": True,
            "weight_tying": False,
        },
        _molmo,
        size="allenai/Molmo-7B-D-0924",
    ),
    "phi3_v": Family(
        "modeling_phi3_v",
        ("Phi3VConfig", "Phi3VForCausalLM"),
        {
            **_TEXT,
            "model_type": "phi3_v",
            "embd_layer": {
                "embedding_cls": "image",
                "hd_transform_order": "sub_glb",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
            "img_processor": {
                "image_dim_out": 32,
                "model_name": "openai/clip-vit-large-patch14-336",
                "name": "clip_vision_model",
                "num_img_tokens": 144,
            },
            "tiny_tower": {
                "hidden_size": 32,
                "image_size": 56,
                "intermediate_size": 48,
                "num_attention_heads": 2,
                "num_hidden_layers": 4,
            },
        },
        _phi3_v,
        size="microsoft/Phi-3.5-vision-instruct",
    ),
}


def inputs(family: str) -> dict[str, dict[str, Any]]:
    """A text and an image."""
    return {"text": {"input_ids": _ids((7, 4))}, "image": FAMILIES[family].image()}


def copy_code(module: str, folder: Path) -> None:
    """The file of a class and those that it imports."""
    text = (CODE / f"{module}.py").read_text()
    shutil.copy(CODE / f"{module}.py", folder)
    for name in re.findall(r"^from \.(\w+) import", text, re.MULTILINE):
        copy_code(name, folder)


def write_config(family: str, folder: Path, **changes: Any) -> None:
    """config.json and the code."""
    known = FAMILIES[family]
    config, model = (f"{known.module}.{name}" for name in known.classes)
    classes = {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": model}
    fields = {"architectures": [known.classes[1]], "auto_map": classes, "torch_dtype": "float32", **known.config, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    copy_code(known.module, folder)


def load(folder: Path, family: str, **options: Any) -> Any:
    """By the class of transformers that the family's examples use."""
    import torch
    import transformers

    auto = getattr(transformers, FAMILIES[family].auto)
    return auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


def write(family: str, folder: Path, *, shard_size: str = "150KB") -> Path:
    """The whole checkpoint, with random weights."""
    import torch
    import transformers
    from huggingface_hub import save_torch_state_dict

    write_config(family, folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = getattr(transformers, FAMILIES[family].auto)
    model = auto.from_config(config, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Biases and norms stay near what they are, so that nothing grows or vanishes.
            scale = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(parameter + scale * noise if parameter.dim() < 2 else scale * noise)
    save_torch_state_dict(dict(model.state_dict()), str(folder), max_shard_size=shard_size)
    return folder


__all__ = ["CODE", "FAMILIES", "copy_code", "inputs", "load", "write", "write_config"]
