"""EVA2-CLIP: the tower of CogVLM, CogVLM2, CogAgent and GLM-4V-9B, after ``visual.py`` of their checkpoints."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .parts import MLP, attended_to_all


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


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        return self.dense(attended_to_all(*self.query_key_value(x).chunk(3, dim=-1), self.heads))


class TransformerLayer(nn.Module):
    """Norms behind; on nobody's list of blocks."""

    def __init__(self, width, inner, heads):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, inner)
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
    """``conv_width``: channels behind the convolution; 0 for the first CogVLM and CogAgent, which have none. ``pos_embed``:
    CogAgent's, behind the blocks."""

    def __init__(self, config, conv_width, *, has_pos_embed=False):
        super().__init__()
        vision, hidden = config.vision_config, config.hidden_size
        width = vision.hidden_size
        self.patch_embedding = PatchEmbedding(width, vision.patch_size, vision.num_positions)
        self.transformer = Transformer(vision.num_hidden_layers, width, vision.intermediate_size, vision.num_heads)
        self.linear_proj = GLU(conv_width or width, hidden, config.intermediate_size)
        if conv_width:
            self.conv = nn.Conv2d(width, conv_width, 2, 2)
        self.boi = nn.Parameter(torch.zeros(1, 1, hidden))
        self.eoi = nn.Parameter(torch.zeros(1, 1, hidden))
        if has_pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(vision.num_positions - 1, width))

    def forward(self, images):
        x = self.transformer(self.patch_embedding(images))[:, 1:]
        if hasattr(self, "conv"):
            edge = int(x.shape[1] ** 0.5)
            x = self.conv(x.transpose(1, 2).reshape(x.shape[0], -1, edge, edge)).flatten(2).transpose(1, 2)
        x = self.linear_proj(x + self.pos_embed.unsqueeze(0) if hasattr(self, "pos_embed") else x)
        boi, eoi = (mark.expand(x.shape[0], -1, -1) for mark in (self.boi, self.eoi))
        return torch.cat((boi, x, eoi), dim=1)


def with_image(embedded, features):
    """The first places of the prompt are those of the image."""
    return torch.cat((features, embedded[:, features.shape[1] :]), dim=1)
