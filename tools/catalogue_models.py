"""The models of the catalogue: configs, published figures, and the shapes of classes that transformers does not have."""

from __future__ import annotations

from typing import Any, NamedTuple

Shapes = dict[str, list[int]]


class Model(NamedTuple):
    """One entry, as a person writes it."""

    name: str
    aliases: list[str]
    config: dict[str, Any]
    dtype: str
    published: dict[str, Any]
    source: str
    tensors: Shapes | None = None
    """Patterns of a class that transformers does not have; ``None`` builds the native class."""
    names: tuple[tuple[str, str], ...] = ()
    """Prefix in the class, prefix in the checkpoint, for a native class."""


META = "shapes from {} of transformers 5.23 on the meta device, under the checkpoint's names"
CARD = "parameter count of the safetensors files on the model's page"
RECALLED = (
    "parameter count of the safetensors files, as known for this model; its page could not be opened when this was written"
)

LLAVA_NAMES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
INTERNVL_TEXT = {
    "model_type": "qwen2",
    "vocab_size": 151674,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
"""Of InternVL3-8B, in both of its forms."""
INTERNVL_NAMES = (("model.vision_tower.", "vision_tower."), *LLAVA_NAMES[1:])
QWEN_NAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def eva2_clip(prefix: str, *, positions: int, hidden: int, ffn: int, conv: int | None, glu_in: int) -> Shapes:
    """EVA2-CLIP-E tower with its projector, as CogVLM, CogVLM2 and GLM-4V-9B have it (their ``visual.py``)."""
    width, mlp, layers = 1792, 15360, 63
    block = f"{prefix}transformer.layers.{{0..{layers - 1}}}."
    shapes: Shapes = {
        f"{prefix}patch_embedding.cls_embedding": [1, width],
        f"{prefix}patch_embedding.proj.weight": [width, 3, 14, 14],
        f"{prefix}patch_embedding.proj.bias": [width],
        f"{prefix}patch_embedding.position_embedding.weight": [positions, width],
        f"{block}input_layernorm.weight": [width],
        f"{block}input_layernorm.bias": [width],
        f"{block}attention.query_key_value.weight": [3 * width, width],
        f"{block}attention.query_key_value.bias": [3 * width],
        f"{block}attention.dense.weight": [width, width],
        f"{block}attention.dense.bias": [width],
        f"{block}mlp.fc1.weight": [mlp, width],
        f"{block}mlp.fc1.bias": [mlp],
        f"{block}mlp.fc2.weight": [width, mlp],
        f"{block}mlp.fc2.bias": [width],
        f"{block}post_attention_layernorm.weight": [width],
        f"{block}post_attention_layernorm.bias": [width],
        f"{prefix}linear_proj.linear_proj.weight": [hidden, glu_in],
        f"{prefix}linear_proj.norm1.weight": [hidden],
        f"{prefix}linear_proj.norm1.bias": [hidden],
        f"{prefix}linear_proj.dense_h_to_4h.weight": [ffn, hidden],
        f"{prefix}linear_proj.gate_proj.weight": [ffn, hidden],
        f"{prefix}linear_proj.dense_4h_to_h.weight": [hidden, ffn],
        f"{prefix}boi": [1, 1, hidden],
        f"{prefix}eoi": [1, 1, hidden],
    }
    if conv is not None:
        shapes |= {f"{prefix}conv.weight": [conv, width, 2, 2], f"{prefix}conv.bias": [conv]}
    return shapes


def cogvlm(*, vocabulary: int, ffn: int, qkv: int, has_bias: bool, vision: Shapes) -> Shapes:
    """A Llama body with a second, visual expert in each layer (``modeling_cogvlm.py``)."""
    hidden = 4096
    layer = "model.layers.{0..31}."
    shapes: Shapes = {
        "model.embed_tokens.weight": [vocabulary, hidden],
        f"{layer}input_layernorm.weight": [hidden],
        f"{layer}self_attn.rotary_emb.inv_freq": [64],
    }
    for expert in ("vision", "language"):
        shapes |= {
            f"{layer}self_attn.{expert}_expert_query_key_value.weight": [qkv, hidden],
            f"{layer}self_attn.{expert}_expert_dense.weight": [hidden, hidden],
            f"{layer}mlp.{expert}_mlp.gate_proj.weight": [ffn, hidden],
            f"{layer}mlp.{expert}_mlp.up_proj.weight": [ffn, hidden],
            f"{layer}mlp.{expert}_mlp.down_proj.weight": [hidden, ffn],
        }
    if has_bias:
        shapes[f"{layer}self_attn.vision_expert_query_key_value.bias"] = [qkv]
    shapes |= {f"{layer}post_attention_layernorm.weight": [hidden], "model.norm.weight": [hidden]}
    return shapes | vision | {"lm_head.weight": [vocabulary, hidden]}


def glm4v_remote() -> Shapes:
    """ChatGLM body with its own vision tower (``modeling_chatglm.py``)."""
    hidden, ffn, vocabulary = 4096, 13696, 151552
    layer = "transformer.encoder.layers.{0..39}."
    return {
        "transformer.embedding.word_embeddings.weight": [vocabulary, hidden],
        "transformer.rotary_pos_emb.inv_freq": [32],
        f"{layer}input_layernorm.weight": [hidden],
        f"{layer}self_attention.query_key_value.weight": [hidden + 2 * 2 * 128, hidden],
        f"{layer}self_attention.query_key_value.bias": [hidden + 2 * 2 * 128],
        f"{layer}self_attention.dense.weight": [hidden, hidden],
        f"{layer}post_attention_layernorm.weight": [hidden],
        f"{layer}mlp.dense_h_to_4h.weight": [2 * ffn, hidden],
        f"{layer}mlp.dense_4h_to_h.weight": [hidden, ffn],
        "transformer.encoder.final_layernorm.weight": [hidden],
        "transformer.output_layer.weight": [vocabulary, hidden],
    } | eva2_clip("transformer.vision.", positions=6401, hidden=hidden, ffn=ffn, conv=hidden, glu_in=hidden)


def internvl_chat() -> Shapes:
    """InternViT-300M, a two-layer projector and Qwen2.5-7B (``modeling_internvl_chat.py``, ``modeling_intern_vit.py``)."""
    width, mlp, hidden, ffn, vocabulary, kv = 1024, 4096, 3584, 18944, 151674, 512
    tower = "vision_model.encoder.layers.{0..23}."
    layer = "language_model.model.layers.{0..27}."
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": [1, 1, width],
        "vision_model.embeddings.position_embedding": [1, 1025, width],
        "vision_model.embeddings.patch_embedding.weight": [width, 3, 14, 14],
        "vision_model.embeddings.patch_embedding.bias": [width],
        f"{tower}attn.qkv.weight": [3 * width, width],
        f"{tower}attn.qkv.bias": [3 * width],
        f"{tower}attn.proj.weight": [width, width],
        f"{tower}attn.proj.bias": [width],
        f"{tower}mlp.fc1.weight": [mlp, width],
        f"{tower}mlp.fc1.bias": [mlp],
        f"{tower}mlp.fc2.weight": [width, mlp],
        f"{tower}mlp.fc2.bias": [width],
        f"{tower}ls1": [width],
        f"{tower}ls2": [width],
    }
    for norm in ("norm1", "norm2"):
        shapes |= {f"{tower}{norm}.weight": [width], f"{tower}{norm}.bias": [width]}
    shapes |= {
        "mlp1.0.weight": [4 * width],
        "mlp1.0.bias": [4 * width],
        "mlp1.1.weight": [hidden, 4 * width],
        "mlp1.1.bias": [hidden],
        "mlp1.3.weight": [hidden, hidden],
        "mlp1.3.bias": [hidden],
        "language_model.model.embed_tokens.weight": [vocabulary, hidden],
    }
    for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
        shapes |= {f"{layer}self_attn.{name}.weight": [rows, hidden], f"{layer}self_attn.{name}.bias": [rows]}
    return shapes | {
        f"{layer}self_attn.o_proj.weight": [hidden, hidden],
        f"{layer}mlp.gate_proj.weight": [ffn, hidden],
        f"{layer}mlp.up_proj.weight": [ffn, hidden],
        f"{layer}mlp.down_proj.weight": [hidden, ffn],
        f"{layer}input_layernorm.weight": [hidden],
        f"{layer}post_attention_layernorm.weight": [hidden],
        "language_model.model.norm.weight": [hidden],
        "language_model.lm_head.weight": [vocabulary, hidden],
    }


def auto_map(module: str, config: str, model: str) -> dict[str, str]:
    """The part of config.json that says the class lives in the checkpoint."""
    return {"AutoConfig": config, "AutoModelForCausalLM": f"{module}.{model}"}


def eva2_config(positions: int, image_size: int) -> dict[str, Any]:
    """``vision_config`` of the EVA2-CLIP-E towers."""
    return {
        "num_hidden_layers": 63,
        "hidden_size": 1792,
        "patch_size": 14,
        "num_heads": 16,
        "intermediate_size": 15360,
        "num_positions": positions,
        "image_size": image_size,
    }


def llava(name: str, aliases: list[str], text: dict[str, Any], published: dict[str, Any], source: str) -> Model:
    """A LLaVA-1.5 checkpoint converted for transformers; its config.json leaves out what equals LlamaConfig's defaults."""
    return Model(
        name=name,
        aliases=aliases,
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064, **text},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        dtype="F16",
        published=published,
        source=source,
        names=LLAVA_NAMES,
    )


def qwen2_5_vl(size: str, text: dict[str, Any], tower_mlp: int, parameters: int) -> Model:
    """A Qwen2.5-VL checkpoint; config.json is flat."""
    name = f"Qwen2.5-VL-{size}-Instruct"
    return Model(
        name=f"Qwen/{name}",
        aliases=[name, f"qwen2.5-vl-{size.lower()}"],
        config={
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "max_position_embeddings": 128000,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **text,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": tower_mlp,
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": text["hidden_size"],
            },
        },
        dtype="BF16",
        published={"parameters": parameters, "source": RECALLED if "72B" in name else CARD},
        source=f"config.json of Qwen/{name}; {META.format('Qwen2_5_VLForConditionalGeneration')}",
        names=QWEN_NAMES,
    )


MODELS = [
    Model(
        name="THUDM/cogvlm-chat-hf",
        aliases=["zai-org/cogvlm-chat-hf", "cogvlm-chat-hf", "cogvlm-chat-17b"],
        config={
            "architectures": ["CogVLMForCausalLM"],
            "auto_map": auto_map("modeling_cogvlm", "configuration_cogvlm.CogVLMConfig", "CogVLMForCausalLM"),
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vision_config": eva2_config(1226, 490),
        },
        dtype="BF16",
        published={
            "parameters": 17_639_685_376,
            "source": "number of parameters printed by users of the model; buffers not counted",
        },
        source="names and shapes from modeling_cogvlm.py and visual.py of CogVLM; that inv_freq is stored, and as BF16, is "
        "inferred from the persistent buffer in the code and from the index of its successor",
        tensors=cogvlm(
            vocabulary=32000,
            ffn=11008,
            qkv=3 * 4096,
            has_bias=False,
            vision=eva2_clip("model.vision.", positions=1226, hidden=4096, ffn=11008, conv=None, glu_in=1792),
        ),
    ),
    Model(
        name="THUDM/cogvlm2-llama3-chat-19B",
        aliases=["zai-org/cogvlm2-llama3-chat-19B", "cogvlm2-llama3-chat-19B", "cogvlm2-19b"],
        config={
            "architectures": ["CogVLMForCausalLM"],
            "auto_map": auto_map("modeling_cogvlm", "configuration_cogvlm.CogVLMConfig", "CogVLMForCausalLM"),
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 8192,
            "vision_config": eva2_config(9217, 1344),
        },
        dtype="BF16",
        published={"total_size": 39_006_214_656, "source": "metadata.total_size of model.safetensors.index.json"},
        source="names from the checkpoint's index, all 1,221 compared; shapes from modeling_cogvlm.py and visual.py, whose "
        "sum equals total_size to the byte (the convolution keeps 1792 channels)",
        tensors=cogvlm(
            vocabulary=128256,
            ffn=14336,
            qkv=4096 + 2 * 8 * 128,
            has_bias=True,
            vision=eva2_clip("model.vision.", positions=9217, hidden=4096, ffn=14336, conv=1792, glu_in=1792),
        ),
    ),
    Model(
        name="THUDM/glm-4v-9b",
        aliases=["zai-org/glm-4v-9b", "glm-4v-9b"],
        config={
            "architectures": ["ChatGLMModel"],
            "auto_map": auto_map(
                "modeling_chatglm", "configuration_chatglm.ChatGLMConfig", "ChatGLMForConditionalGeneration"
            ),
            "model_type": "chatglm",
            "ffn_hidden_size": 13696,
            "hidden_size": 4096,
            "kv_channels": 128,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_attention_heads": 32,
            "num_layers": 40,
            "padded_vocab_size": 151552,
            "seq_length": 8192,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vision_config": {**eva2_config(6401, 1120), "scaling_factor": 8},
        },
        dtype="BF16",
        published={"total_size": 27_812_641_856, "source": "metadata.total_size of model.safetensors.index.json"},
        source="names from the checkpoint's index, all 1,054 compared; shapes from modeling_chatglm.py and visual.py, "
        "whose sum equals total_size to the byte",
        tensors=glm4v_remote(),
    ),
    Model(
        name="zai-org/GLM-4.1V-9B-Thinking",
        aliases=["THUDM/GLM-4.1V-9B-Thinking", "GLM-4.1V-9B-Thinking", "glm-4.1v-9b"],
        config={
            "architectures": ["Glm4vForConditionalGeneration"],
            "model_type": "glm4v",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "text_config": {
                "model_type": "glm4v_text",
                "vocab_size": 151552,
                "hidden_size": 4096,
                "intermediate_size": 13696,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 2,
                "max_position_embeddings": 65536,
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "model_type": "glm4v",
                "depth": 24,
                "hidden_size": 1536,
                "intermediate_size": 13696,
                "num_heads": 12,
                "image_size": 336,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 4096,
            },
        },
        dtype="BF16",
        published={"source": "model page: 10B; no exact figure was found"},
        source=f"config.json; {META.format('Glm4vForConditionalGeneration')}",
    ),
    qwen2_5_vl(
        "7B",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        3420,
        8_292_166_656,
    ),
    qwen2_5_vl(
        "32B",
        {
            "vocab_size": 152064,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
        3456,
        33_452_718_336,
    ),
    qwen2_5_vl(
        "72B",
        {
            "vocab_size": 152064,
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        3456,
        73_410_777_344,
    ),
    llava(
        "llava-hf/llava-1.5-7b-hf",
        ["llava-1.5-7b-hf", "llava-1.5-7b"],
        {},
        {"parameters": 7_063_427_072, "source": "number of parameters printed by users of the model"},
        f"config.json; {META.format('LlavaForConditionalGeneration')}",
    ),
    llava(
        "llava-hf/llava-1.5-13b-hf",
        ["llava-1.5-13b-hf", "llava-1.5-13b"],
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
        },
        {"source": "model page: 13B; no exact figure was found"},
        f"dimensions of lmsys/vicuna-13b-v1.5 with the vocabulary that the conversion pads to 32,064 as in the 7B; "
        f"{META.format('LlavaForConditionalGeneration')}",
    ),
    Model(
        name="OpenGVLab/InternVL3-8B",
        aliases=["InternVL3-8B"],
        config={
            "architectures": ["InternVLChatModel"],
            "auto_map": auto_map(
                "modeling_internvl_chat", "configuration_internvl_chat.InternVLChatConfig", "InternVLChatModel"
            ),
            "model_type": "internvl_chat",
            "downsample_ratio": 0.5,
            "force_image_size": 448,
            "max_dynamic_patch": 12,
            "use_thumbnail": True,
            "torch_dtype": "bfloat16",
            "llm_config": {"architectures": ["Qwen2ForCausalLM"], **INTERNVL_TEXT},
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                "hidden_size": 1024,
                "image_size": 448,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        },
        dtype="BF16",
        published={"parameters": 7_944_373_760, "source": RECALLED},
        source="names and shapes from modeling_internvl_chat.py and modeling_intern_vit.py of OpenGVLab/InternVL; the sum "
        "equals that of the native class, built on the meta device",
        tensors=internvl_chat(),
    ),
    Model(
        name="OpenGVLab/InternVL3-8B-hf",
        aliases=["InternVL3-8B-hf"],
        config={
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "text_config": INTERNVL_TEXT,
            "vision_config": {
                "model_type": "internvl_vision",
                "attention_bias": True,
                "hidden_size": 1024,
                "image_size": [448, 448],
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": [14, 14],
                "use_qk_norm": False,
            },
        },
        dtype="BF16",
        published={"parameters": 7_944_373_760, "source": RECALLED},
        source=f"config.json; {META.format('InternVLForConditionalGeneration')}",
        names=INTERNVL_NAMES,
    ),
]
