"""GLM-4V-9B and CogVLM2 as their remote code registers them: names, order and shapes without a forward.

Written after ``modeling_chatglm.py``, ``modeling_cogvlm.py`` and ``visual.py`` of the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn


class _Norm(nn.Module):  # type: ignore[misc] # torch is not seen by the checker
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class _Named(nn.Module):  # type: ignore[misc]
    """A module with children of these names, in this order."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class TransformerLayer(_Named):
    """Vision block: on nobody's list of what must not be split."""


class GLMBlock(_Named):
    pass


class CogVLMDecoderLayer(_Named):
    pass


def _linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def _vision(hidden: int, width: int, positions: int, *, pooled: int) -> nn.Module:
    """``pooled``: channels behind the convolution."""
    vision = 1792
    blocks = [
        TransformerLayer(
            input_layernorm=nn.LayerNorm(vision),
            attention=_Named(
                query_key_value=_linear(vision, 3 * vision, bias=True), dense=_linear(vision, vision, bias=True)
            ),
            mlp=_Named(fc1=_linear(vision, 15360, bias=True), fc2=_linear(15360, vision, bias=True)),
            post_attention_layernorm=nn.LayerNorm(vision),
        )
        for _ in range(63)
    ]
    patches = _Named(proj=nn.Conv2d(3, vision, 14, 14))
    patches.cls_embedding = nn.Parameter(torch.zeros(1, vision))
    patches.add_module("position_embedding", nn.Embedding(positions, vision))
    return _with_marks(
        _Named(
            patch_embedding=patches,
            transformer=_Named(layers=nn.ModuleList(blocks)),
            linear_proj=_Named(
                linear_proj=_linear(pooled, hidden),
                norm1=nn.LayerNorm(hidden),
                dense_h_to_4h=_linear(hidden, width),
                gate_proj=_linear(hidden, width),
                dense_4h_to_h=_linear(width, hidden),
            ),
            conv=nn.Conv2d(vision, pooled, 2, 2),
        ),
        hidden,
    )


def _with_marks(tower: nn.Module, hidden: int) -> nn.Module:
    tower.boi = nn.Parameter(torch.zeros(1, 1, hidden))
    tower.eoi = nn.Parameter(torch.zeros(1, 1, hidden))
    return tower


def glm_4v_9b() -> nn.Module:
    hidden, width, vocabulary = 4096, 13696, 151552
    blocks = [
        GLMBlock(
            input_layernorm=_Norm(hidden),
            self_attention=_Named(query_key_value=_linear(hidden, 4608, bias=True), dense=_linear(hidden, hidden)),
            post_attention_layernorm=_Norm(hidden),
            mlp=_Named(dense_h_to_4h=_linear(hidden, 2 * width), dense_4h_to_h=_linear(width, hidden)),
        )
        for _ in range(40)
    ]
    return _Named(
        transformer=_Named(
            embedding=_Named(word_embeddings=nn.Embedding(vocabulary, hidden)),
            encoder=_Named(layers=nn.ModuleList(blocks), final_layernorm=_Norm(hidden)),
            output_layer=_linear(hidden, vocabulary),
            vision=_vision(hidden, width, 6401, pooled=hidden),
        )
    )


def cogvlm2_19b() -> nn.Module:
    hidden, width, vocabulary, keys = 4096, 14336, 128256, 1024

    def mlp() -> nn.Module:
        return _Named(gate_proj=_linear(hidden, width), up_proj=_linear(hidden, width), down_proj=_linear(width, hidden))

    blocks = [
        CogVLMDecoderLayer(
            self_attn=_Named(
                vision_expert_query_key_value=_linear(hidden, hidden + 2 * keys, bias=True),
                vision_expert_dense=_linear(hidden, hidden),
                language_expert_query_key_value=_linear(hidden, hidden + 2 * keys),
                language_expert_dense=_linear(hidden, hidden),
            ),
            mlp=_Named(language_mlp=mlp(), vision_mlp=mlp()),
            input_layernorm=_Norm(hidden),
            post_attention_layernorm=_Norm(hidden),
        )
        for _ in range(32)
    ]
    return _Named(
        model=_Named(
            embed_tokens=nn.Embedding(vocabulary, hidden),
            layers=nn.ModuleList(blocks),
            norm=_Norm(hidden),
            vision=_vision(hidden, width, 9217, pooled=1792),
        ),
        lm_head=_linear(hidden, vocabulary),
    )
