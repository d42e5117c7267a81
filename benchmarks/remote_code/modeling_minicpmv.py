"""MiniCPM-V 2.6: after ``modeling_minicpmv.py``, ``modeling_navit_siglip.py`` and ``resampler.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from .parts import MLP, Base, Section, attended_to_all, heads_of, merged


class MiniCPMVConfig(Qwen2Config):
    model_type = "minicpmv"

    def __init__(self, vision_config=None, **fields):
        self.vision_config = Section(vision_config or {})
        super().__init__(**fields)


class SiglipVisionEmbeddings(nn.Module):
    def __init__(self, vision):
        super().__init__()
        width = vision.hidden_size
        self.patch_embedding = nn.Conv2d(3, width, vision.patch_size, vision.patch_size)
        self.position_embedding = nn.Embedding((vision.image_size // vision.patch_size) ** 2, width)

    def forward(self, images):
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        return x + self.position_embedding(torch.arange(x.shape[1], device=x.device))


class SiglipAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        return self.out_proj(attended_to_all(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class SiglipEncoderLayer(nn.Module):
    def __init__(self, vision):
        super().__init__()
        width = vision.hidden_size
        self.self_attn = SiglipAttention(width, vision.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = MLP(width, vision.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(vision) for _ in range(vision.num_hidden_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipVisionTransformer(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(vision)
        self.encoder = SiglipEncoder(vision)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size)

    def forward(self, images):
        return self.post_layernorm(self.encoder(self.embeddings(images)))


class MultiheadAttention(nn.Module):
    """Queries and keys by one bare parameter, as in torch's."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query, key, value):
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        pairs = zip(weights, biases, strict=True)
        parts = (functional.linear(x, *pair) for x, pair in zip((query, key, value), pairs, strict=True))
        mixed = functional.scaled_dot_product_attention(*(heads_of(part, self.heads) for part in parts))
        return self.out_proj(merged(mixed))


class Resampler(nn.Module):
    """Patches into a fixed number of queries. Its positions are a buffer that no file stores."""

    def __init__(self, queries, width, heads, kv_width, edge):
        super().__init__()
        self.edge = edge
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(kv_width, width, bias=False)
        self.attn = MultiheadAttention(width, heads)
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, width))
        self.register_buffer("pos_embed", self.positions(), persistent=False)

    def positions(self):
        width = self.query.shape[1]
        angles = torch.arange(self.edge**2)[:, None].float() / 1e4 ** (torch.arange(width // 2).float() / (width // 2))
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    def forward(self, x):
        x = self.ln_kv(self.kv_proj(x))
        query = self.ln_q(self.query).expand(x.shape[0], -1, -1)
        found = self.attn(query, x + self.pos_embed[: x.shape[1]], x)
        return self.ln_post(found) @ self.proj


class MiniCPMV(Base):
    config_class = MiniCPMVConfig
    _no_split_modules = ["Qwen2DecoderLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        vision, width = config.vision_config, config.hidden_size
        self.llm = Qwen2ForCausalLM(config)
        self.vpm = SiglipVisionTransformer(vision)
        edge = vision.image_size // vision.patch_size
        self.resampler = Resampler(config.query_num, width, max(1, width // 128), vision.hidden_size, edge)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Resampler):
            module.pos_embed.copy_(module.positions())

    @classmethod
    def can_generate(cls):
        return True

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_vllm_embedding(self, input_ids, pixel_values=None, image_bound=None):
        embedded = self.llm.model.embed_tokens(input_ids)
        if pixel_values is None:
            return embedded
        features = self.resampler(self.vpm(pixel_values))
        first = embedded[0]
        places = torch.stack([torch.arange(int(start), int(end)) for start, end in image_bound[0]]).to(embedded.device)
        index = places.view(-1, 1).repeat(1, first.shape[-1])
        first.scatter_(0, index, features.view(-1, features.shape[-1]))
        return embedded

    def forward(self, data=None, input_ids=None, pixel_values=None, image_bound=None, **more):
        data = data or {"input_ids": input_ids, "pixel_values": pixel_values, "image_bound": image_bound}
        return self.llm(input_ids=None, inputs_embeds=self.get_vllm_embedding(**data), **more)

    def generate(self, input_ids=None, pixel_values=None, image_bound=None, **more):
        """That of the text model, as the published code does."""
        with torch.inference_mode():
            embedded = self.get_vllm_embedding(input_ids, pixel_values, image_bound)
            return self.llm.generate(inputs_embeds=embedded, **more)
