"""GLM-4V-9B and CogVLM2 in code of our own: the published module names, shapes and order of registration.

Copied into a checkpoint folder by ``true_size.py`` and loaded with ``trust_remote_code=True``. It joins what the published
code joins and moves nothing by hand, so that a map fails here where it fails there (CogVLM2#10, GLM-4#295, #350).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

_NAMES = {
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "multi_query_group_num": "num_key_value_heads",
    "padded_vocab_size": "vocab_size",
}
"""ChatGLM's names for the usual fields."""


class TrueSizeConfig(PretrainedConfig):
    """The published config.json of either family, under its own ``model_type``."""

    def __init__(self, **fields):
        for old, new in _NAMES.items():
            if old in fields:
                fields[new] = fields[old]
        self.hidden_size = fields.pop("hidden_size", 64)
        self.num_hidden_layers = fields.pop("num_hidden_layers", 2)
        self.num_attention_heads = fields.pop("num_attention_heads", 4)
        self.num_key_value_heads = fields.pop("num_key_value_heads", 8)
        self.intermediate_size = fields.pop("intermediate_size", 128)
        self.vocab_size = fields.pop("vocab_size", 128)
        self.vision_config = fields.pop("vision_config", {})
        super().__init__(**fields)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return functional.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class RotaryEmbedding(nn.Module):
    """Positions; a buffer and no weights."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 1e4 ** (torch.arange(0, width, 2).float() / width), persistent=False)

    def forward(self, positions):
        angles = positions[:, None].float() * self.inv_freq.to(positions.device)
        return angles.cos(), angles.sin()


def rotated(x, rotary):
    cos, sin = (part.to(x.dtype)[None, None] for part in rotary)
    half = x.shape[-1] // 2
    one, other = x[..., :half], x[..., half:]
    return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1)


def attended(query, key, value, heads, kv_heads, cache, number, rotary):
    """Causal attention with a cache; ``(batch, tokens, width)`` in and out."""
    batch, tokens, _ = query.shape
    query = rotated(query.view(batch, tokens, heads, -1).transpose(1, 2), rotary)
    key = rotated(key.view(batch, tokens, kv_heads, -1).transpose(1, 2), rotary)
    value = value.view(batch, tokens, kv_heads, -1).transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, number)
    key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=tokens > 1)
    return mixed.transpose(1, 2).reshape(batch, tokens, -1)


# -- vision: EVA2-CLIP as in visual.py of both


class PatchEmbedding(nn.Module):
    def __init__(self, width, patch, positions):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_embedding = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, images):
        x = self.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_embedding.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.position_embedding.weight[None, : x.shape[1]]


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        batch, patches, width = x.shape
        parts = self.query_key_value(x).view(batch, patches, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts)
        return self.dense(mixed.transpose(1, 2).reshape(batch, patches, width))


class VisionMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class TransformerLayer(nn.Module):
    """Norms behind; on nobody's list of blocks."""

    def __init__(self, width, inner, heads):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.attention = VisionAttention(width, heads)
        self.mlp = VisionMLP(width, inner)
        self.post_attention_layernorm = nn.LayerNorm(width)

    def forward(self, hidden_states):
        attention_output = self.input_layernorm(self.attention(hidden_states))
        hidden_states = hidden_states + attention_output
        mlp_input = hidden_states
        mlp_output = self.post_attention_layernorm(self.mlp(mlp_input))
        return mlp_input + mlp_output


class Transformer(nn.Module):
    def __init__(self, count, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(*sizes) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class GLU(nn.Module):
    def __init__(self, inputs, hidden, inner):
        super().__init__()
        self.linear_proj = nn.Linear(inputs, hidden, bias=False)
        self.norm1 = nn.LayerNorm(hidden)
        self.dense_h_to_4h = nn.Linear(hidden, inner, bias=False)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        x = functional.gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(functional.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class EVA2CLIPModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision = config.vision_config
        width, hidden = vision["hidden_size"], config.hidden_size
        pooled = hidden if "scaling_factor" in vision else width  # ChatGLM's convolution widens
        edge = vision["image_size"] // vision["patch_size"]
        self.patch_embedding = PatchEmbedding(width, vision["patch_size"], edge**2 + 1)
        self.transformer = Transformer(vision["num_hidden_layers"], width, vision["intermediate_size"], vision["num_heads"])
        self.linear_proj = GLU(pooled, hidden, config.intermediate_size)
        self.conv = nn.Conv2d(width, pooled, 2, 2)
        self.boi = nn.Parameter(torch.zeros(1, 1, hidden))
        self.eoi = nn.Parameter(torch.zeros(1, 1, hidden))

    def forward(self, images):
        x = self.transformer(self.patch_embedding(images))[:, 1:]
        edge = int(x.shape[1] ** 0.5)
        x = self.conv(x.transpose(1, 2).reshape(x.shape[0], -1, edge, edge)).flatten(2).transpose(1, 2)
        x = self.linear_proj(x)
        boi, eoi = (mark.expand(x.shape[0], -1, -1) for mark in (self.boi, self.eoi))
        return torch.cat((boi, x, eoi), dim=1)


class TrueSizeBase(PreTrainedModel, GenerationMixin):
    config_class = TrueSizeConfig
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module):
        """Random weights were made already."""

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, images=None, **_):
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, "use_cache": True}
        return {"input_ids": input_ids, "images": images, "past_key_values": past_key_values, "use_cache": True}


def with_image(embedded, features):
    """The first places of the prompt are those of the image."""
    return torch.cat((features, embedded[:, features.shape[1] :]), dim=1)


# -- GLM-4V-9B: modeling_chatglm.py


class GLMAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.query_key_value = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cache, number, rotary):
        width, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = self.query_key_value(x).split((width, keys, keys), dim=-1)
        return self.dense(attended(*parts, self.heads, self.kv_heads, cache, number, rotary))


class GLMMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attention = GLMAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = GLMMLP(config)

    def forward(self, x, past_key_values, number, rotary):
        x = x + self.self_attention(self.input_layernorm(x), past_key_values, number, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class GLMEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, ids):
        return self.word_embeddings(ids)


class GLMTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x, past_key_values, rotary):
        for number, layer in enumerate(self.layers):
            x = layer(x, past_key_values=past_key_values, number=number, rotary=rotary)
        return self.final_layernorm(x)


class ChatGLMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = GLMEmbedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config.hidden_size // config.num_attention_heads)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision = EVA2CLIPModel(config)

    def forward(self, input_ids, images, past_key_values):
        x = self.embedding(input_ids)
        if images is not None:
            x = with_image(x, self.vision(images))
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        rotary = self.rotary_pos_emb(torch.arange(start, start + x.shape[1], device=x.device))
        return self.encoder(x, past_key_values=past_key_values, rotary=rotary)


class ChatGLMForConditionalGeneration(TrueSizeBase):
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embedding.word_embeddings

    def forward(self, input_ids=None, images=None, past_key_values=None, use_cache=True, **_):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.transformer(input_ids, images, past_key_values)
        logits = self.transformer.output_layer(x).float()  # all of them, as the published code does
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


# -- CogVLM2: modeling_cogvlm.py


class VisionExpertAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.vision_expert_query_key_value = nn.Linear(config.hidden_size, width, bias=True)
        self.vision_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.language_expert_query_key_value = nn.Linear(config.hidden_size, width, bias=False)
        self.language_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, seen, cache, number, rotary):
        fused = experts(x, seen, self.vision_expert_query_key_value, self.language_expert_query_key_value)
        width, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = fused.split((width, keys, keys), dim=-1)
        mixed = attended(*parts, self.heads, self.kv_heads, cache, number, rotary)
        return experts(mixed, seen, self.vision_expert_dense, self.language_expert_dense)


def experts(x, seen, vision, language):
    """The image's places by one expert, the others by the other."""
    if not seen:
        return language(x)
    return torch.cat((vision(x[:, :seen]), language(x[:, seen:])), dim=1)


class CogMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionExpertMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.language_mlp = CogMLP(config)
        self.vision_mlp = CogMLP(config)

    def forward(self, x, seen):
        return experts(x, seen, self.vision_mlp, self.language_mlp)


class CogVLMDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = VisionExpertAttention(config)
        self.mlp = VisionExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x, seen, past_key_values, number, rotary):
        x = x + self.self_attn(self.input_layernorm(x), seen, past_key_values, number, rotary)
        return x + self.mlp(self.post_attention_layernorm(x), seen)


class CogVLMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CogVLMDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.vision = EVA2CLIPModel(config)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def forward(self, input_ids, images, past_key_values):
        x, seen = self.embed_tokens(input_ids), 0
        if images is not None:
            features = self.vision(images).to(device=x.device, dtype=x.dtype)  # the published code moves these
            x, seen = with_image(x, features), features.shape[1]
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        angles = 1.0 / 1e4 ** (torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim)
        angles = torch.arange(start, start + x.shape[1], device=x.device)[:, None].float() * angles
        for number, layer in enumerate(self.layers):
            x = layer(x, seen, past_key_values=past_key_values, number=number, rotary=(angles.cos(), angles.sin()))
        return self.norm(x)


class CogVLMForCausalLM(TrueSizeBase):
    _no_split_modules = ["CogVLMDecoderLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids=None, images=None, past_key_values=None, use_cache=True, **_):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        logits = self.lm_head(self.model(input_ids, images, past_key_values)).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
