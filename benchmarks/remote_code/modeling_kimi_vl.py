"""Kimi-VL: after ``modeling_kimi_vl.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig

from .deepseek import DeepseekV3ForCausalLM
from .parts import CausalBase, Config, attended_to_all


class DeepseekV3Config(PretrainedConfig):
    model_type = "deepseek_v3_of_kimi_vl"


class KimiVLConfig(Config):
    model_type = "kimi_vl"
    sections = ("vision_config",)

    def __init__(self, text_config=None, **fields):
        self.text_config = DeepseekV3Config(**(text_config or {}))
        super().__init__(**fields)


class Learnable2DInterpPosEmb(nn.Module):
    def __init__(self, height, width, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(height, width, channels))

    def forward(self, x, grid):
        rows, columns = grid
        found = functional.interpolate(self.weight.permute(2, 0, 1)[None], size=(rows, columns), mode="bicubic")
        return x + found[0].permute(1, 2, 0).flatten(0, 1)


class MoonVisionPatchEmbed(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.proj = nn.Conv2d(3, vision.hidden_size, vision.patch_size, vision.patch_size)
        self.pos_emb = Learnable2DInterpPosEmb(vision.init_pos_emb_height, vision.init_pos_emb_width, vision.hidden_size)

    def forward(self, patches, grid):
        return self.pos_emb(self.proj(patches).flatten(1), grid)


class MLP2(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc0 = nn.Linear(width, inner)
        self.fc1 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc1(functional.gelu(self.fc0(x)))


class MoonVitEncoderLayer(nn.Module):
    def __init__(self, width, inner, heads):
        super().__init__()
        self.heads = heads
        self.norm0 = nn.LayerNorm(width)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = MLP2(width, inner)
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)

    def forward(self, x):
        parts = (part[None] for part in self.wqkv(self.norm0(x)).chunk(3, dim=-1))
        x = x + self.wo(attended_to_all(*parts, self.heads)[0])
        return x + self.mlp(self.norm1(x))


class MoonVitEncoder(nn.Module):
    def __init__(self, vision):
        super().__init__()
        sizes = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
        self.blocks = nn.ModuleList(MoonVitEncoderLayer(*sizes) for _ in range(vision.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(vision.hidden_size)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.final_layernorm(x)


class MoonVitPretrainedModel(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.merge = vision.merge_kernel_size
        self.patch_embed = MoonVisionPatchEmbed(vision)
        self.encoder = MoonVitEncoder(vision)

    def forward(self, patches, grid_hws):
        rows, columns = (int(edge) for edge in grid_hws[0])
        high, wide = self.merge
        x = self.encoder(self.patch_embed(patches, (rows, columns)))
        x = x.view(rows // high, high, columns // wide, wide, -1).transpose(1, 2)
        return x.flatten(0, 1).flatten(1, 2)


class KimiVLMultiModalProjector(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision = config.vision_config
        self.hidden_size = vision.hidden_size * vision.merge_kernel_size[0] * vision.merge_kernel_size[1]
        self.pre_norm = nn.LayerNorm(vision.hidden_size)
        self.linear_1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.linear_2 = nn.Linear(self.hidden_size, config.text_config.hidden_size)

    def forward(self, features):
        x = self.pre_norm(features).view(-1, self.hidden_size)
        return self.linear_2(functional.gelu(self.linear_1(x)))


class KimiVLForConditionalGeneration(CausalBase):
    config_class = KimiVLConfig
    _no_split_modules = ["MoonVitEncoderLayer", "DeepseekV3DecoderLayer"]  # noqa: RUF012
    images = ("pixel_values", "image_grid_hws")

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = MoonVitPretrainedModel(config.vision_config)
        self.multi_modal_projector = KimiVLMultiModalProjector(config)
        self.language_model = DeepseekV3ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def _extract_image_features(self, pixel_values, image_grid_hws):
        return self.multi_modal_projector(self.vision_tower(pixel_values, image_grid_hws))

    def forward(self, input_ids=None, pixel_values=None, image_grid_hws=None, past_key_values=None, use_cache=True, **_):
        embedded = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self._extract_image_features(pixel_values, image_grid_hws)
            flat = embedded.reshape(-1, embedded.shape[-1])
            flat[input_ids.flatten() == self.config.media_placeholder_token_id] = features
            embedded = flat.reshape(embedded.shape)
        return self.language_model(inputs_embeds=embedded, past_key_values=past_key_values, use_cache=use_cache)
