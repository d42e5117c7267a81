"""Phi-3-vision and Phi-3.5-vision: after ``modeling_phi3_v.py`` and ``image_embedding_phi3_v.py``.

The tower is inside a module that also embeds the text, by the embedding of the body, which it shares.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .parts import CausalBase, Config, RMSNorm, attended, cache_for, positions_of

TOWER = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
"""Sizes in the code; ``tiny_tower`` of the config stands for smaller ones."""


class Phi3VConfig(Config):
    model_type = "phi3_v"

    def __init__(self, **fields):
        super().__init__(**fields)


class Phi3ImageEmbedding(nn.Module):
    def __init__(self, config, wte):
        super().__init__()
        tower = {**TOWER, **(getattr(config, "tiny_tower", None) or {})}
        width = config.img_processor["image_dim_out"]
        self.wte = wte
        self.drop = nn.Dropout(0.0)
        self.img_processor = CLIPVisionModel(CLIPVisionConfig(**tower))
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, 4 * width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, 4 * width))
        hidden = config.hidden_size
        self.img_projection = nn.Sequential(nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, input_ids, pixel_values):
        """The tokens of the image are negative; the whole view comes last, as ``sub_glb`` says."""
        states = self.img_processor(pixel_values[0], output_hidden_states=True).hidden_states[-2][:, 1:]
        edge = int(states.shape[1] ** 0.5) // 2
        x = states.view(states.shape[0], edge, 2, edge, 2, -1).transpose(2, 3).reshape(states.shape[0], edge, edge, -1)
        marks = self.sub_GN[0].expand(edge, 1, -1)
        whole, tile = (torch.cat((rows, marks), dim=1).flatten(0, 1) for rows in (x[0], x[1]))
        found = self.img_projection(torch.cat((tile, self.glb_GN[0], whole), dim=0))
        places = torch.nonzero(input_ids < 0, as_tuple=True)
        hidden = self.wte(input_ids.clamp(min=0))
        return self.drop(hidden.index_put(places, found.to(hidden.dtype), accumulate=False))


class Phi3MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Phi3Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads, self.kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        head = width // self.heads
        self.sizes = (width, self.kv_heads * head, self.kv_heads * head)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.qkv_proj = nn.Linear(width, sum(self.sizes), bias=False)

    def forward(self, x, cache, number, rotary):
        parts = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.o_proj(attended(*parts, self.heads, self.kv_heads, cache, number, rotary))


class Phi3DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Phi3Attention(config)
        self.mlp = Phi3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x, past_key_values, number, positions):
        width = x.shape[-1] // self.self_attn.heads
        # The published class makes its frequencies at the first call.
        angles = 1.0 / 1e4 ** (torch.arange(0, width, 2, device=x.device).float() / width)
        angles = positions[:, None].float() * angles
        x = x + self.self_attn(self.input_layernorm(x), past_key_values, number, (angles.cos(), angles.sin()))
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3VModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_dropout = nn.Dropout(0.0)
        self.vision_embed_tokens = Phi3ImageEmbedding(config, wte=self.embed_tokens)
        self.layers = nn.ModuleList(Phi3DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, input_ids, pixel_values, past_key_values):
        x = self.embed_tokens(input_ids) if pixel_values is None else self.vision_embed_tokens(input_ids, pixel_values)
        positions = positions_of(x, past_key_values)
        for number, layer in enumerate(self.layers):
            x = layer(x, past_key_values=past_key_values, number=number, positions=positions)
        return self.norm(x)


class Phi3VForCausalLM(CausalBase):
    config_class = Phi3VConfig
    base_model_prefix = "model"
    _no_split_modules = ["Phi3DecoderLayer"]  # noqa: RUF012
    images = ("pixel_values",)

    def __init__(self, config):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids=None, pixel_values=None, past_key_values=None, use_cache=True, **_):
        past_key_values = cache_for(past_key_values, use_cache)
        logits = self.lm_head(self.model(input_ids, pixel_values, past_key_values)).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
