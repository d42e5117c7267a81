"""The text body of DeepSeek-V2 and V3, which DeepSeek-VL2 and Kimi-VL bring along: latent attention, experts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from .parts import Base, CausalBase, GatedMLP, RMSNorm, RotaryEmbedding, cache_for, heads_of, merged, positions_of, rotated


class Attention(nn.Module):
    """Multi-head latent attention. Its positions come from buffers that no file stores."""

    def __init__(self, config):
        super().__init__()
        hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.q_proj = nn.Linear(hidden, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        self.rotary_emb = RotaryEmbedding(self.rope, is_stored=False)

    def forward(self, x, cache, number, positions):
        rotary = self.rotary_emb(positions)
        query, query_rope = heads_of(self.q_proj(x), self.heads).split((self.nope, self.rope), dim=-1)
        latent, key_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), dim=-1)
        expanded = heads_of(self.kv_b_proj(self.kv_a_layernorm(latent)), self.heads)
        key, value = expanded.split((self.nope, self.value), dim=-1)
        key_rope = rotated(heads_of(key_rope, 1), rotary).expand(-1, self.heads, -1, -1)
        query = torch.cat((query, rotated(query_rope, rotary)), dim=-1)
        key = torch.cat((key, key_rope), dim=-1)
        if cache is not None:
            key, value = cache.update(key, value, number)
        is_causal = query.shape[2] > 1
        return self.o_proj(merged(functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)))


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))

    def forward(self, x):
        return functional.linear(x, self.weight).softmax(dim=-1).topk(self.top, dim=-1)


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList(GatedMLP(config.hidden_size, inner) for _ in range(config.n_routed_experts))
        self.gate = MoEGate(config)
        self.shared_experts = GatedMLP(config.hidden_size, inner * config.n_shared_experts)

    def forward(self, x):
        weights, chosen = self.gate(x)
        result = self.shared_experts(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(dim=-1, keepdim=True)
            result = result + share * expert(x)
        return result


class DecoderLayer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.self_attn = Attention(config)
        is_dense = number < config.first_k_dense_replace
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if is_dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x, past_key_values, number, positions):
        x = x + self.self_attn(self.input_layernorm(x), past_key_values, number, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekV2DecoderLayer(DecoderLayer):
    pass


class DeepseekV3DecoderLayer(DecoderLayer):
    pass


class Model(Base):
    make_layer = DeepseekV2DecoderLayer

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, inputs_embeds, past_key_values=None):
        x, positions = inputs_embeds, positions_of(inputs_embeds, past_key_values)
        for number, layer in enumerate(self.layers):
            x = layer(x, past_key_values=past_key_values, number=number, positions=positions)
        return self.norm(x)


class DeepseekV3Model(Model):
    make_layer = DeepseekV3DecoderLayer


class DeepseekV2ForCausalLM(CausalBase):
    _no_split_modules = ["DeepseekV2DecoderLayer"]  # noqa: RUF012
    make_model = Model

    def __init__(self, config):
        super().__init__(config)
        self.model = self.make_model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        found = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        is_first = past_key_values is None or past_key_values.get_seq_length() == 0
        return (
            {**found, "input_ids": None, "inputs_embeds": inputs_embeds}
            if is_first and inputs_embeds is not None
            else found
        )

    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None, use_cache=True, **_):
        past_key_values = cache_for(past_key_values, use_cache)
        embedded = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        logits = self.lm_head(self.model(embedded, past_key_values=past_key_values)).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    _no_split_modules = ["DeepseekV3DecoderLayer"]  # noqa: RUF012
    make_model = DeepseekV3Model
