"""InternVL-Chat: after ``modeling_internvl_chat.py`` and ``modeling_intern_vit.py``, on the text body of Qwen2."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from .parts import MLP, Base, Config, FusedAttention


class InternVLChatConfig(Config):
    model_type = "internvl_chat"
    sections = ("vision_config",)

    def __init__(self, llm_config=None, **fields):
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**fields)


class InternVisionEmbeddings(nn.Module):
    def __init__(self, vision):
        super().__init__()
        width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, vision.patch_size, vision.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, width))

    def forward(self, images):
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        return torch.cat((self.class_embedding.expand(x.shape[0], -1, -1), x), dim=1) + self.position_embedding


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, vision):
        super().__init__()
        width = vision.hidden_size
        self.attn = FusedAttention(width, vision.num_attention_heads)
        self.mlp = MLP(width, vision.intermediate_size)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.ls1 = nn.Parameter(torch.ones(width))
        self.ls2 = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class InternVisionEncoder(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.layers = nn.ModuleList(InternVisionEncoderLayer(vision) for _ in range(vision.num_hidden_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class InternVisionModel(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.embeddings = InternVisionEmbeddings(vision)
        self.encoder = InternVisionEncoder(vision)

    def forward(self, images):
        return self.encoder(self.embeddings(images))


class InternVLChatModel(Base):
    config_class = InternVLChatConfig
    _no_split_modules = ["InternVisionModel", "LlamaDecoderLayer", "InternLM2DecoderLayer", "Qwen2DecoderLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        vision, hidden = config.vision_config, config.llm_config.hidden_size
        self.vision_model = InternVisionModel(vision)
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        merged = vision.hidden_size * int(1 / config.downsample_ratio) ** 2
        self.mlp1 = nn.Sequential(nn.LayerNorm(merged), nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        # Where the config says nothing, ``chat`` of the published code sets it.
        self.img_context_token_id = getattr(config, "img_context_token_id", None)
        self.post_init()

    @classmethod
    def can_generate(cls):
        return True

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def pixel_shuffle(self, x):
        """Four patches into one."""
        edge = int(x.shape[1] ** 0.5) // 2
        x = x.view(x.shape[0], edge, 2, edge, 2, -1).transpose(2, 3)
        return x.reshape(x.shape[0], edge**2, -1)

    def extract_feature(self, pixel_values):
        return self.mlp1(self.pixel_shuffle(self.vision_model(pixel_values)[:, 1:]))

    def forward(self, pixel_values=None, input_ids=None, **more):
        embedded = self.get_input_embeddings()(input_ids).clone()
        if pixel_values is not None:
            features = self.extract_feature(pixel_values)
            shape = embedded.shape
            embedded = embedded.reshape(-1, shape[-1])
            selected = input_ids.reshape(-1) == self.img_context_token_id
            embedded[selected] = embedded[selected] * 0.0 + features.reshape(-1, shape[-1])
            embedded = embedded.reshape(shape)
        return self.language_model(inputs_embeds=embedded, **more)

    def generate(self, pixel_values=None, input_ids=None, **more):
        """That of the text model, as the published code does."""
        with torch.no_grad():
            embedded = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                features = self.extract_feature(pixel_values)
                shape = embedded.shape
                embedded = embedded.reshape(-1, shape[-1])
                selected = input_ids.reshape(-1) == self.img_context_token_id
                embedded[selected] = features.reshape(-1, shape[-1]).to(embedded.device)  # moved here, not in forward
                embedded = embedded.reshape(shape)
            return self.language_model.generate(inputs_embeds=embedded, **more)
