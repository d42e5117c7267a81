"""What the stand-ins for published code have in common: norms, positions, attention with a cache, and their base class.

The stand-ins are written anew. Names, order of registration, what is joined without being moved, and which lists of blocks
are declared are those of the published code, so that a map fails here where it fails there. What transformers 5 asks of a
class (``post_init``, buffers that no file stores computed in ``_init_weights``, the cache of today) they do, or they would
not load at all: ``docs/models.md`` tells what the published code lacks.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin


class Section(dict):
    """A part of a config: a JSON object whose keys are attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Config(PretrainedConfig):
    """A published config.json under the names that transformers uses, and under its own.

    transformers 5 makes a dataclass of every config: a class without an ``__init__`` of its own would get another.
    """

    # Without annotations, which would make fields of them.
    names = ()
    """Pairs: its own name, the usual one."""
    sections = ()

    def __init__(self, **fields):
        for old, new in self.names:
            if old in fields:
                fields[new] = fields[old]
        for name in self.sections:
            if isinstance(fields.get(name), dict):
                fields[name] = Section(fields[name])
        # Given to the base class, so that they are kept whatever it knows of them.
        self.num_attention_heads = fields.pop("num_attention_heads", 4)
        self.num_key_value_heads = fields.pop("num_key_value_heads", self.num_attention_heads)
        super().__init__(**fields)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return functional.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class RotaryEmbedding(nn.Module):
    """Positions; a buffer and no weights."""

    def __init__(self, width, *, is_stored):
        super().__init__()
        self.width = width
        self.register_buffer("inv_freq", self.frequencies(), persistent=is_stored)

    def frequencies(self):
        return 1.0 / 1e4 ** (torch.arange(0, self.width, 2).float() / self.width)

    def forward(self, positions):
        angles = positions[:, None].float() * self.inv_freq.to(positions.device)
        return angles.cos(), angles.sin()


def rotated(x, rotary):
    """Twice as many elements of each head as there are frequencies; what is left stays (half of it in ChatGLM)."""
    cos, sin = (part.to(x.dtype)[None, None] for part in rotary)
    half = cos.shape[-1]
    one, other, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((one * cos - other * sin, one * sin + other * cos, rest), dim=-1)


def heads_of(x, heads):
    """``(batch, tokens, width)`` to ``(batch, heads, tokens, width of a head)``."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def attended(query, key, value, heads, kv_heads, cache, number, rotary):
    """Causal attention with a cache; ``(batch, tokens, width)`` in and out."""
    query, key = rotated(heads_of(query, heads), rotary), rotated(heads_of(key, kv_heads), rotary)
    value = heads_of(value, kv_heads)
    if cache is not None:
        key, value = cache.update(key, value, number)
    key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
    return merged(functional.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1))


def merged(x):
    """Heads back into one width."""
    return x.transpose(1, 2).flatten(2)


def attended_to_all(query, key, value, heads):
    """Attention without a mask."""
    return merged(functional.scaled_dot_product_attention(*(heads_of(part, heads) for part in (query, key, value))))


def positions_of(x, cache):
    """Positions of the tokens that come now."""
    start = 0 if cache is None else cache.get_seq_length()
    return torch.arange(start, start + x.shape[1], device=x.device)


class GatedMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """``fc1`` and ``fc2``: most towers."""

    def __init__(self, width, inner):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class FusedAttention(nn.Module):
    """One matrix for queries, keys and values; every patch sees all."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attended_to_all(*self.qkv(x).chunk(3, dim=-1), self.heads))


class Block(nn.Module):
    """A block of a tower, its norms before its parts."""

    def __init__(self, width, attn, mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Pixels to patches, in a row."""

    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Base(PreTrainedModel):
    """The base of all classes here."""

    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module):
        """Weights are in the files; buffers that are not stored are computed."""
        if isinstance(module, RotaryEmbedding):
            module.inv_freq.copy_(module.frequencies())


class CausalBase(Base, GenerationMixin):
    """Those whose ``generate`` is that of transformers. Images go with the first call alone."""

    images = ("images",)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):  # generate looks for this name
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, "use_cache": True}
        found = {name: kwargs[name] for name in self.images if name in kwargs}
        return {"input_ids": input_ids, "past_key_values": past_key_values, "use_cache": True, **found}


def cache_for(past_key_values, use_cache):
    """The cache that is given, or a new one."""
    return DynamicCache() if use_cache and past_key_values is None else past_key_values
