"""DeepSeek-VL2: after ``modeling_deepseek_vl_v2.py`` and ``siglip_vit.py``. Published as a package of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig

from .deepseek import DeepseekV2ForCausalLM
from .parts import MLP, Base, Block, Config, FusedAttention, PatchEmbed


class DeepseekV2Config(PretrainedConfig):
    model_type = "deepseek_v2_of_vl2"


class DeepseekVLV2Config(Config):
    model_type = "deepseek_vl_v2"
    sections = ("vision_config", "projector_config")

    def __init__(self, language_config=None, **fields):
        self.language_config = DeepseekV2Config(**(language_config or {}))
        super().__init__(**fields)


class VisionTransformer(nn.Module):
    def __init__(self, vision):
        super().__init__()
        width = vision.width
        self.pos_embed = nn.Parameter(torch.zeros(1, (vision.image_size // vision.patch_size) ** 2, width))
        self.patch_embed = PatchEmbed(width, vision.patch_size)
        self.blocks = nn.Sequential(
            *(
                Block(width, FusedAttention(width, vision.heads), MLP(width, int(width * vision.mlp_ratio)))
                for _ in range(vision.layers)
            )
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, images):
        return self.norm(self.blocks(self.patch_embed(images) + self.pos_embed))


class MlpProjector(nn.Module):
    """Four patches into one, then two linear layers."""

    def __init__(self, config):
        super().__init__()
        self.ratio = config.downsample_ratio
        inner = config.n_embed * config.mlp_ratio
        self.layers = nn.Sequential(
            nn.Linear(config.input_dim * self.ratio**2, inner), nn.GELU(), nn.Linear(inner, config.n_embed)
        )

    def forward(self, x):
        edge = int(x.shape[1] ** 0.5)
        x = x.transpose(1, 2).reshape(x.shape[0], -1, edge, edge)
        pad = -edge % self.ratio
        x = functional.unfold(functional.pad(x, (0, pad, 0, pad)), kernel_size=self.ratio, stride=self.ratio)
        return self.layers(x.transpose(1, 2))


class DeepseekVLV2ForCausalLM(Base):
    """One image: its whole view, a separator, and its tiles in one row."""

    config_class = DeepseekVLV2Config
    _no_split_modules = []  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.vision = VisionTransformer(config.vision_config)
        self.projector = MlpProjector(config.projector_config)
        self.image_newline = nn.Parameter(torch.zeros(config.projector_config.n_embed))
        self.view_seperator = nn.Parameter(torch.zeros(config.projector_config.n_embed))
        self.language = DeepseekV2ForCausalLM(config.language_config)
        self.post_init()

    @classmethod
    def can_generate(cls):
        return True

    def get_input_embeddings(self):
        return self.language.get_input_embeddings()

    def with_newlines(self, rows):
        """``(height, width, channels)`` with a mark behind each row, in one list."""
        marks = self.image_newline[None, None].expand(rows.shape[0], -1, -1)
        return torch.cat((rows, marks), dim=1).flatten(0, 1)

    def prepare_inputs_embeds(self, input_ids, images=None, images_seq_mask=None):
        embedded = self.get_input_embeddings()(input_ids)
        if images is None:
            return embedded
        features = self.projector(self.vision(images[0]))  # tiles, the whole view first
        edge = int(features.shape[1] ** 0.5)
        whole, *tiles = features.unflatten(1, (edge, edge))
        found = torch.cat(
            (self.with_newlines(whole), self.view_seperator[None], self.with_newlines(torch.cat(tuple(tiles), dim=1))),
            dim=0,
        )
        embedded[0].masked_scatter_(images_seq_mask[0].unsqueeze(-1).to(embedded.device), found)
        return embedded

    def forward(self, input_ids=None, images=None, images_seq_mask=None, **more):
        return self.language(inputs_embeds=self.prepare_inputs_embeds(input_ids, images, images_seq_mask), **more)

    def generate(self, input_ids=None, images=None, images_seq_mask=None, **more):
        """That of the text model, as the published examples call it."""
        with torch.no_grad():
            embedded = self.prepare_inputs_embeds(input_ids, images, images_seq_mask)
            return self.language.generate(inputs_embeds=embedded, **more)
