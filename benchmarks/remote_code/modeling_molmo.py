"""Molmo: after ``modeling_molmo.py``. Its config says nothing of the tower, whose sizes are in the code."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from .parts import CausalBase, Config, RMSNorm, attended, cache_for, heads_of, merged, positions_of

LAYERS = (-2, -9)
"""Blocks of the tower whose outputs are joined."""


class MolmoConfig(Config):
    model_type = "molmo"

    def __init__(self, **fields):
        super().__init__(**fields)


class Tower:
    """Sizes in the code; ``tiny_tower`` of the config stands for smaller ones."""

    def __init__(self, config):
        given = getattr(config, "tiny_tower", None) or {}
        self.width, self.heads = given.get("width", 1024), given.get("heads", 16)
        self.layers, self.inner = given.get("layers", 23), given.get("inner", 4096)
        self.patch, self.positions = 14, given.get("positions", 577)


class Embedding(nn.Module):
    def __init__(self, count, new, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(count, width))
        self.new_embedding = nn.Parameter(torch.zeros(new, width))

    def forward(self, ids):
        return functional.embedding(ids, torch.cat((self.embedding, self.new_embedding), dim=0))


class MolmoBlock(nn.Module):
    """The base of the published blocks, and the name that they do not go by."""


class MolmoSequentialBlock(MolmoBlock):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        head = width // self.heads
        self.sizes = (width, self.kv_heads * head, self.kv_heads * head)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_out = nn.Linear(inner // 2, width, bias=False)
        self.attn_norm = RMSNorm(width)
        self.ff_norm = RMSNorm(width)
        self.att_proj = nn.Linear(width, sum(self.sizes), bias=config.qkv_bias)
        self.ff_proj = nn.Linear(width, inner, bias=False)

    def forward(self, x, past_key_values, number, rotary):
        parts = self.att_proj(self.attn_norm(x)).split(self.sizes, dim=-1)
        x = x + self.attn_out(attended(*parts, self.heads, self.kv_heads, past_key_values, number, rotary))
        up, gate = self.ff_proj(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.ff_out(functional.silu(gate) * up)


class MultiHeadDotProductAttention(nn.Module):
    def __init__(self, width, heads, inputs):
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(inputs, width)
        self.wk = nn.Linear(inputs, width)
        self.wv = nn.Linear(inputs, width)
        self.wo = nn.Linear(width, width)

    def forward(self, query, others=None):
        others = query if others is None else others
        parts = (heads_of(part, self.heads) for part in (self.wq(query), self.wk(others), self.wv(others)))
        return self.wo(merged(functional.scaled_dot_product_attention(*parts)))


class ViTMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.w2(functional.gelu(self.w1(x)))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.attention = MultiHeadDotProductAttention(tower.width, tower.heads, tower.width)
        self.feed_forward = ViTMLP(tower.width, tower.inner)
        self.attention_norm = nn.LayerNorm(tower.width)
        self.ffn_norm = nn.LayerNorm(tower.width)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class BlockCollection(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(tower) for _ in range(tower.layers))

    def forward(self, x):
        found = []
        for block in self.resblocks:
            x = block(x)
            found.append(x)
        return found


class VisionTransformer(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(tower.width))
        self.positional_embedding = nn.Parameter(torch.zeros(tower.positions, tower.width))
        self.patch_embedding = nn.Linear(3 * tower.patch**2, tower.width, bias=False)
        self.pre_ln = nn.LayerNorm(tower.width)
        self.transformer = BlockCollection(tower)

    def forward(self, patches):
        x = self.patch_embedding(patches)
        x = torch.cat((self.class_embedding.expand(x.shape[0], 1, -1), x), dim=1) + self.positional_embedding
        return self.transformer(self.pre_ln(x))


class ImageProjector(nn.Module):
    def __init__(self, width, inputs, inner):
        super().__init__()
        self.w1 = nn.Linear(inputs, inner // 2, bias=False)
        self.w2 = nn.Linear(inner // 2, width, bias=False)
        self.w3 = nn.Linear(inputs, inner // 2, bias=False)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class VisionBackbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        tower = Tower(config)
        self.image_vit = VisionTransformer(tower)
        self.image_pooling_2d = MultiHeadDotProductAttention(tower.width, tower.heads, tower.width * len(LAYERS))
        self.image_projector = ImageProjector(config.hidden_size, tower.width, config.intermediate_size)
        self.pad_embed = nn.Parameter(torch.zeros(2, tower.width * len(LAYERS)))

    def forward(self, images, image_masks):
        crops, patches = images.shape[1:3]
        found = self.image_vit(images.flatten(0, 1))
        x = torch.cat([found[max(layer, -len(found))] for layer in LAYERS], dim=-1)[:, 1:]
        all_pad, masks = image_masks == 0, image_masks.unsqueeze(-1)
        x = x.view(-1, crops, patches, x.shape[-1])
        x = x + self.pad_embed[0] * all_pad.unsqueeze(-1) + self.pad_embed[1] * ((masks < 1) & (masks > 0))
        edge = int(patches**0.5) // 2
        x = x.view(-1, edge, 2, edge, 2, x.shape[-1]).transpose(2, 3).reshape(-1, 4, x.shape[-1])
        x = self.image_pooling_2d(x.mean(dim=1, keepdim=True), x)
        return self.image_projector(x.view(images.shape[0], crops * edge**2, -1))


class Molmo(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        parts = {"wte": Embedding(config.embedding_size, 128, width), "emb_drop": nn.Dropout(0.0), "ln_f": RMSNorm(width)}
        self.transformer = nn.ModuleDict(parts)
        blocks = nn.ModuleList(MolmoSequentialBlock(config) for _ in range(config.num_hidden_layers))
        self.transformer.update({"blocks": blocks})
        self.transformer.update({"ff_out": nn.Linear(width, config.embedding_size, bias=False)})
        self.vision_backbone = VisionBackbone(config)

    def forward(self, input_ids, images, image_masks, image_input_idx, past_key_values):
        x = self.transformer.wte(input_ids)
        if images is not None:
            features = self.vision_backbone(images, image_masks)
            places = image_input_idx.flatten(1)
            valid = places >= 0
            batch = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(places)
            features = features.to(x.device)  # the published code moves them
            x[batch[valid], places[valid]] += features[valid]
        angles = 1.0 / 1e4 ** (torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim)
        angles = positions_of(x, past_key_values)[:, None].float() * angles
        for number, block in enumerate(self.transformer.blocks):
            x = block(x, past_key_values=past_key_values, number=number, rotary=(angles.cos(), angles.sin()))
        return self.transformer.ff_out(self.transformer.ln_f(x))


class MolmoForCausalLM(CausalBase):
    config_class = MolmoConfig
    base_model_prefix = "model"
    _no_split_modules = ["MolmoBlock"]  # noqa: RUF012
    images = ("images", "image_masks", "image_input_idx")

    def __init__(self, config):
        super().__init__(config)
        self.model = Molmo(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def forward(
        self, input_ids=None, images=None, image_masks=None, image_input_idx=None, past_key_values=None, use_cache=True, **_
    ):
        past_key_values = cache_for(past_key_values, use_cache)
        # By the name of the method, as the published code does: a hook of self.model does not see this call.
        logits = self.model.forward(input_ids, images, image_masks, image_input_idx, past_key_values).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
