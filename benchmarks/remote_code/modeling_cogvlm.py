"""CogVLM, CogVLM2 and CogAgent: after ``modeling_cogvlm.py`` and ``modeling_cogagent.py``.

An image goes through experts of its own in every layer. CogAgent reads the image a second time, at a higher resolution,
through a small tower and cross-attention.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from .parts import (
    Block,
    CausalBase,
    Config,
    GatedMLP,
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding,
    attended,
    attended_to_all,
    cache_for,
    positions_of,
)
from .visual import EVA2CLIPModel


class CogVLMConfig(Config):
    model_type = "cogvlm"
    names = (("num_multi_query_heads", "num_key_value_heads"),)
    sections = ("vision_config",)

    def __init__(self, **fields):
        super().__init__(**fields)


VISION_TOKEN_TYPE = 1
"""The places of an image and its two marks; of text, 0."""


class VisionExpertAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.rotary_emb = RotaryEmbedding(self.head_dim, is_stored=True)
        self.vision_expert_query_key_value = nn.Linear(config.hidden_size, width, bias=config.has_qkv_bias)
        self.vision_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.language_expert_query_key_value = nn.Linear(config.hidden_size, width, bias=False)
        self.language_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, token_type_ids, cache, number, positions):
        kinds = token_type_ids
        fused = experts(x, kinds, self.vision_expert_query_key_value, self.language_expert_query_key_value)
        width, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = fused.split((width, keys, keys), dim=-1)
        mixed = attended(*parts, self.heads, self.kv_heads, cache, number, self.rotary_emb(positions))
        return experts(mixed, kinds, self.vision_expert_dense, self.language_expert_dense)


def experts(x, token_type_ids, vision, language):
    """The image's places, but for its last mark, by one expert, the others by the other."""
    seen = token_type_ids == VISION_TOKEN_TYPE
    seen = seen & functional.pad(seen[:, 1:], (0, 1))
    first = language(x[~seen])
    found = torch.empty(*x.shape[:-1], first.shape[-1], dtype=x.dtype, device=x.device)
    found[~seen] = first
    found[seen] = vision(x[seen])
    return found


class VisionExpertMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.language_mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.vision_mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x, token_type_ids):
        return experts(x, token_type_ids, self.vision_mlp, self.language_mlp)


class CogVLMDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = VisionExpertAttention(config)
        self.mlp = VisionExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x, token_type_ids, past_key_values, number, positions):
        x = x + self.self_attn(self.input_layernorm(x), token_type_ids, past_key_values, number, positions)
        return x + self.mlp(self.post_attention_layernorm(x), token_type_ids)


class CogVLMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        # CogVLM2 pools by a convolution; the first CogVLM and CogAgent take every patch.
        width = config.vision_config.hidden_size if config.has_qkv_bias else 0
        self.vision = EVA2CLIPModel(config, width, has_pos_embed=hasattr(config, "cross_image_size"))

    make_layer = CogVLMDecoderLayer

    def forward(self, input_ids, images, token_type_ids, past_key_values, **more):
        x = self.embed_tokens(input_ids)
        if images is not None:
            # A list of images for each prompt, as the published code takes them, or one tensor.
            pixels = images if isinstance(images, torch.Tensor) else torch.stack([one for row in images for one in row])
            features = self.vision(pixels).flatten(0, 1)
            features = features.to(device=x.device, dtype=x.dtype)  # the published code moves these, and not the mask
            x = x.index_put([token_type_ids == VISION_TOKEN_TYPE], features)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = positions_of(x, past_key_values)
        for number, layer in enumerate(self.layers):
            x = layer(x, token_type_ids, past_key_values=past_key_values, number=number, positions=positions, **more)
        return self.norm(x)


class CogVLMForCausalLM(CausalBase):
    config_class = CogVLMConfig
    _no_split_modules = ["CogVLMDecoderLayer"]  # noqa: RUF012
    images = ("images", "token_type_ids")
    make_model = CogVLMModel

    def __init__(self, config):
        super().__init__(config)
        config.has_qkv_bias = hasattr(config, "num_multi_query_heads")
        self.model = self.make_model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self,
        input_ids=None,
        images=None,
        token_type_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=True,
        cross_images=None,
        **_,
    ):
        past_key_values = cache_for(past_key_values, use_cache)
        more = {"cross_images": cross_images} if "cross_images" in self.images else {}
        logits = self.lm_head(self.model(input_ids, images, token_type_ids, past_key_values, **more)).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


# -- CogAgent


class CogAgentConfig(CogVLMConfig):
    model_type = "cogagent"

    def __init__(self, **fields):
        super().__init__(**fields)


class CrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        inner = config.cross_compute_hidden_size
        self.query = nn.Linear(config.hidden_size, inner, bias=False)
        self.key_value = nn.Linear(config.cross_hidden_size, 2 * inner, bias=False)
        self.dense = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x, image):
        return self.dense(attended_to_all(self.query(x), *self.key_value(image).chunk(2, dim=-1), self.heads))


class CogAgentDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = VisionExpertAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = VisionExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.post_cross_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x, token_type_ids, past_key_values, number, positions, cross_features=None):
        x = x + self.self_attn(self.input_layernorm(x), token_type_ids, past_key_values, number, positions)
        if cross_features is not None:
            x = x + self.cross_attn(self.post_cross_attention_layernorm(x), cross_features)
        return x + self.mlp(self.post_attention_layernorm(x), token_type_ids)


class EvaAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        query, value = self.q_proj(x) + self.q_bias, self.v_proj(x) + self.v_bias
        return self.proj(self.inner_attn_ln(attended_to_all(query, self.k_proj(x), value, self.heads)))


class EvaMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x):
        return self.w3(self.ffn_ln(functional.silu(self.w1(x)) * self.w2(x)))


class EVAVisionTransformer(nn.Module):
    def __init__(self, width, layers, patches):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.patch_embed = PatchEmbed(width, 14)
        self.blocks = nn.ModuleList(
            Block(width, EvaAttention(width, max(1, width // 64)), EvaMLP(width, int(width * 8 / 3))) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, images):
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Eva2LargeEncoder(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.model = EVAVisionTransformer(*sizes)

    def forward(self, images):
        return self.model(images)[:, 1:]


class CrossVisionModel(nn.Module):
    """24 blocks in the published code, which its config does not say; here ``cross_layers`` may say less."""

    def __init__(self, config):
        super().__init__()
        patches = (config.cross_image_size // 14) ** 2
        self.vit = Eva2LargeEncoder(config.cross_hidden_size, getattr(config, "cross_layers", 24), patches)
        self.pos_embed = nn.Parameter(torch.zeros(patches, config.cross_hidden_size))

    def forward(self, images):
        return self.vit(images) + self.pos_embed.unsqueeze(0)


class CogAgentModel(CogVLMModel):
    make_layer = CogAgentDecoderLayer

    def __init__(self, config):
        super().__init__(config)
        self.cross_vision = CrossVisionModel(config)

    def forward(self, input_ids, images, token_type_ids, past_key_values, cross_images=None):
        features = None if cross_images is None else self.cross_vision(cross_images)
        return super().forward(input_ids, images, token_type_ids, past_key_values, cross_features=features)


class CogAgentForCausalLM(CogVLMForCausalLM):
    """The image at high resolution goes with every call: what it becomes is not cached here."""

    config_class = CogAgentConfig
    _no_split_modules = ["CogAgentDecoderLayer"]  # noqa: RUF012
    make_model = CogAgentModel
    images = ("images", "token_type_ids", "cross_images")

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        found = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        return {**found, "cross_images": kwargs.get("cross_images")}
