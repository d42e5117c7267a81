"""GLM-4V-9B: after ``modeling_chatglm.py``."""

from __future__ import annotations

from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from .parts import CausalBase, Config, RMSNorm, RotaryEmbedding, attended, cache_for, positions_of
from .visual import EVA2CLIPModel, with_image


class ChatGLMConfig(Config):
    model_type = "chatglm"
    names = (
        ("num_layers", "num_hidden_layers"),
        ("ffn_hidden_size", "intermediate_size"),
        ("multi_query_group_num", "num_key_value_heads"),
        ("padded_vocab_size", "vocab_size"),
    )
    sections = ("vision_config",)

    def __init__(self, **fields):
        super().__init__(**fields)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.kv_channels
        self.query_key_value = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cache, number, rotary):
        width, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = self.query_key_value(x).split((width, keys, keys), dim=-1)
        return self.dense(attended(*parts, self.heads, self.kv_heads, cache, number, rotary))


class MLP(nn.Module):
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
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x, past_key_values, number, rotary):
        x = x + self.self_attention(self.input_layernorm(x), past_key_values, number, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Module):
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
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2, is_stored=True)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision = EVA2CLIPModel(config, config.hidden_size)

    def forward(self, input_ids, images, past_key_values):
        x = self.embedding(input_ids)
        if images is not None:
            x = with_image(x, self.vision(images))
        rotary = self.rotary_pos_emb(positions_of(x, past_key_values))
        return self.encoder(x, past_key_values=past_key_values, rotary=rotary)


class ChatGLMForConditionalGeneration(CausalBase):
    config_class = ChatGLMConfig
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embedding.word_embeddings

    def forward(self, input_ids=None, images=None, past_key_values=None, use_cache=True, **_):
        past_key_values = cache_for(past_key_values, use_cache)
        x = self.transformer(input_ids, images, past_key_values)
        logits = self.transformer.output_layer(x).float()  # all of them, as the published code does
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
