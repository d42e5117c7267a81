"""What a model's code joins without moving it first: the pairs that end in "Expected all tensors to be on the same device".

Hooks of accelerate move what goes into a module. They do not move a bare parameter, and nothing moves two results that a
forward pass concatenates, adds or writes into each other. Native classes of transformers move them by hand
(``.to(inputs_embeds.device)``, ``.to(image_feature)``: every ``masked_scatter`` of the image-text classes of transformers
4.57.6 and 5.23 was read); the checkpoints' own code does not always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Join(NamedTuple):
    """Two modules (or a bare parameter and a module) whose tensors meet."""

    moves: str
    """The one that is put right by moving it to the other."""
    meets: str
    where: str
    """The operation, for the message."""
    is_patched: bool
    """True when newer revisions of the checkpoint's code move one of the two themselves."""
    source: str
    result: str = ""
    """Where in ``moves`` the tensor comes from that is joined; empty for all of it."""
    when: str = ""
    """What alone fails, where others do not: the rest of a sentence. The map may do then."""
    patch: str = ""
    """Regular expression of the newer code, where ``is_patched``."""


_EVA = "torch.cat((boi, x, eoi)) in visual.py"
_MOVED = r"self\.{0}(?:\.expand\((?:[^()]|\([^()]{{0,20}}\)){{0,80}}\))?\s{{0,40}}\.to\("


def is_moved(join: Join, moved: tuple[str, ...] | None) -> bool:
    """Whether the checkpoint's code is known to move one of the two itself."""
    return join.is_patched and moved is not None and join.moves in moved


def _eva_tower(body: str, *, is_patched: bool, source: str) -> tuple[Join, ...]:
    tower = f"{body}.vision"
    return tuple(
        Join(f"{tower}.{name}", f"{tower}.linear_proj", _EVA, is_patched, source, patch=_MOVED.format(name))
        for name in ("boi", "eoi")
    )


_INTERNVL = "input_embeds[selected] * 0.0 + vit_embeds in modeling_internvl_chat.py"
_PHI3_V = "torch.cat of features and newlines in image_embedding_phi3_v.py"

JOINS: Mapping[str, tuple[Join, ...]] = {
    "cogvlm": _eva_tower("model", is_patched=False, source="CogVLM2#10, #32; CogVLM#256"),
    "cogagent": (
        *_eva_tower("model", is_patched=False, source="CogVLM2#10; the same visual.py"),
        Join(
            "model.vision.pos_embed",
            "model.vision.transformer",
            "x + self.pos_embed in visual.py",
            False,
            "visual.py",
        ),
        Join(
            "model.cross_vision.pos_embed",
            "model.cross_vision.vit",
            "enc + self.pos_embed in cross_visual.py",
            False,
            "cross_visual.py",
        ),
    ),
    "internvl_chat": tuple(
        Join("mlp1", f"language_model.model.{name}", _INTERNVL, False, "InternVL#118, #132", when="a plain forward pass, ")
        for name in ("embed_tokens", "tok_embeddings")
    ),
    "phi3_v": (
        *(
            Join(f"model.vision_embed_tokens.{name}", "model.vision_embed_tokens.img_processor", _PHI3_V, False, "its code")
            for name in ("glb_GN", "sub_GN")
        ),
        Join(
            "model.vision_embed_tokens.img_projection",
            "model.embed_tokens",
            "hidden_states.index_put(positions, image_features_proj) in image_embedding_phi3_v.py",
            False,
            "its code",
        ),
    ),
    "kimi_vl": (
        Join(
            "multi_modal_projector",
            "language_model.model.embed_tokens",
            "inputs_embeds[input_ids == image_token_index] = image_features in modeling_kimi_vl.py",
            False,
            "its code",
        ),
    ),
    "molmo": (
        Join(
            "model.vision_backbone.pad_embed",
            "model.vision_backbone.image_vit",
            "image_features + pad_embed in modeling_molmo.py",
            False,
            "its code",
        ),
    ),
    "chatglm": (
        *_eva_tower("transformer", is_patched=True, source="GLM-4#350"),
        Join(
            "transformer.vision",
            "transformer.embedding",
            "torch.cat((inputs_embeds, images_features)) in modeling_chatglm.py",
            True,
            "GLM-4#32, #67, #75, #295",
            "transformer.vision.linear_proj",
            patch=r"images_features(?:\[[^\[\]]{0,80}\])?\s{0,40}\.to\(",
        ),
    ),
    "minicpmv": (Join("resampler", "llm.model.embed_tokens", "scatter_ in modeling_minicpmv.py", False, "MiniCPM-V#100"),),
    "deepseek_vl_v2": (
        Join("image_newline", "projector", "torch.cat in modeling_deepseek_vl_v2.py", False, "DeepSeek-VL2#8, #113"),
        Join("view_seperator", "projector", "torch.cat in modeling_deepseek_vl_v2.py", False, "DeepSeek-VL2#8, #113"),
        Join(
            "projector", "language.model.embed_tokens", "masked_scatter_ of image features", False, "DeepSeek-VL2#8, #113"
        ),
    ),
    "deepseek_ocr2": tuple(
        Join(
            f"model.vision_tower.query_{name}_resolution",
            "model.vision_tower.sam_encoder.proj",
            "torch.cat((hidden_states, queries)) in modeling_deepseek_ocr2.py",
            False,
            "transformers 5.23, run on two devices",
        )
        for name in ("768", "1024")
    ),
    "pix2struct": tuple(
        Join(
            f"encoder.embeddings.{name}_embedder",
            "encoder.embeddings.patch_projection",
            "embeddings + row_embeddings + col_embeddings in modeling_pix2struct.py",
            False,
            "transformers 5.23, run on two devices",
        )
        for name in ("row", "column")
    ),
    "udop": (
        Join(
            "encoder.cell_2d_embedding",
            "shared",
            "inputs_embeds += cell_2d_embedding(bbox) in modeling_udop.py",
            False,
            "transformers 5.23, run on two devices",
        ),
    ),
    "diffusion_gemma": (
        Join(
            "model.encoder.language_model",
            "model.decoder.layers",
            "one of the layers in modeling_diffusion_gemma.py, whose weights both use,",
            False,
            "transformers 5.23, run on two devices",
        ),
    ),
    "git": (
        Join(
            "git.visual_projection",
            "git.embeddings",
            "torch.cat((projected_visual_features, embedding_output)) in modeling_git.py",
            False,
            "transformers 5.23, run on two devices",
        ),
    ),
    "unlimited_ocr": (
        Join(
            "model.vision_tower.vision_encoder",
            "model.vision_tower.sam_encoder.proj",
            "torch.cat((hidden_states, residual)) in modeling_unlimited_ocr.py",
            False,
            "transformers 5.23, run on two devices",
        ),
    ),
    "deepseek_vl_hybrid": (
        Join(
            "model.high_res_vision_alpha",
            "model.high_res_vision_proj",
            "global_hidden_state * high_res_vision_alpha in modeling_deepseek_vl_hybrid.py",
            False,
            "transformers 5.23, run on two devices",
        ),
    ),
}
"""By ``model_type``. In CogVLM image features are moved to the embeddings (``.to(device=inputs_embeds.device)``)."""

JOINED_BLOCKS: Mapping[str, str] = {
    "mllama": "torch.cat((hidden_states, intermediate_hidden_states)) in modeling_mllama.py",
    "molmo": "torch.cat(features) in modeling_molmo.py",
    "molmo2": "torch.cat of hidden_states in modeling_molmo2.py",
    "vipllava": "torch.cat(image_features) in modeling_vipllava.py",
}
"""Families that join the outputs of several blocks of their tower: they must be on one device. Run on two devices with
transformers 5.23 (molmo2: read)."""

WHOLE: Mapping[str, str] = {
    "diffusion_gemma": "its encoder and its decoder share the weights of their layers",
    "pi0": "the caches of its two text bodies are joined layer by layer",
    "vision-encoder-decoder": "its two parts are any two models, whose modules are named by their own classes",
}
"""Families that are kept on one GPU, and why. Source: modeling files of transformers 5.23."""

PAIRED_LAYERS: Mapping[str, tuple[str, str, str]] = {
    "pi0": ("model.vlm.language_model.layers", "model.dit.layers", "torch.cat of the cache in cache_utils.py"),
}
"""Families of two bodies each layer of which must be where its twin is, and the line. Run on two devices with transformers
5.23."""

NAMED_ELSEWHERE = frozenset({"pi0", "vision-encoder-decoder"})
"""Families whose modules have other names than their stored tensors, in ways that depend on what they are made of."""

ROTARY_NOT_MOVED = frozenset(
    {"glm4v", "glm4v_moe", "llama4", "mllama", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe", "qwen3_vl",
     "qwen3_vl_moe"}
)  # fmt: skip
"""Families whose ``rotary_emb`` uses its buffer where it is in transformers 4.57; in 5.x all move it to the hidden states.
Source: ``inv_freq_expanded`` in the modeling files of 4.57.6 and 5.23."""

TOWER_ENTRY: Mapping[str, str] = {
    "qwen2_vl": "patch_embed",
    "qwen2_5_vl": "patch_embed",
    "glm4v": "post_conv_layernorm",
    "glm4v_moe": "post_conv_layernorm",
}
"""Families whose tower takes positions beside pixels: the part whose result they are combined with. Once the tower has no
key of its own, only a key of its rotary module brings the two together. Found by running tiny models part by part on two
devices with 4.57.6 and 5.23 (``tests/models/test_map_truth.py``)."""

TOWER_WINDOWED = frozenset({"qwen2_5_vl"})
"""Families whose tower sorts its patches into windows and back, in 4.57 by an index that stays with the inputs: there the
first part and the merger must be at the inputs in any case."""


class Masked(NamedTuple):
    """A family that uses a mask of its inputs where the embedding is."""

    where: str
    """The operation, for the message."""
    module: str = ""
    """Whose forward it is in: where that has a key, its hook takes the mask along. Empty for the model itself."""
    in_text: bool = False
    """True where it is so for a text alone, too."""
    since: tuple[int, int] = (0, 0)
    """First transformers in which it is so."""


MASKED_AT_INPUTS: Mapping[str, Masked] = {
    "paligemma": Masked("block_sequence_ids[batch_idx, q_idx] in masking_utils.py", "model", since=(5, 0)),
    "chameleon": Masked(
        "generate with inputs_embeds.masked_scatter(special_image_mask, image_features) in modeling_chameleon.py",
        "model",
        since=(5, 18),
    ),
    "gemma3n": Masked(
        "torch.where(expanded_vision_mask, vision_embeds, inputs_embeds) in modeling_gemma3n.py", "model", in_text=True
    ),
    "git": Masked(
        "torch.cat([torch.ones_like(image_token_type_ids), attention_mask]) in modeling_git.py", "git", since=(5, 0)
    ),
    "kosmos-2": Masked("inputs_embeds[img_input_mask] in modeling_kosmos2.py", "text_model.model"),
    "kosmos-2.5": Masked("inputs_embeds[image_embeds_position_mask == 1] in modeling_kosmos2_5.py", "text_model.model"),
    "cogvlm": Masked("inputs_embeds.index_put([token_type_ids == VISION_TOKEN_TYPE]) in modeling_cogvlm.py", "model"),
    "cogagent": Masked("inputs_embeds.index_put([token_type_ids == VISION_TOKEN_TYPE]) in modeling_cogagent.py", "model"),
    "deepseek_vl_v2": Masked("masked_scatter_ by images_seq_mask in modeling_deepseek_vl_v2.py"),
    "internvl_chat": Masked("input_embeds[input_ids == img_context_token_id] in modeling_internvl_chat.py"),
    "kimi_vl": Masked("inputs_embeds[input_ids == image_token_index] in modeling_kimi_vl.py"),
    "molmo": Masked("x[batch_idx[valid], image_input_idx[valid]] in modeling_molmo.py"),
}
"""Families that mark the places of an image by token ids or types, which stay with the inputs, and use the mark where the
embedding is; or whose ``generate`` has made the image's features before, which then come with the inputs (Chameleon:
in 5.20, not yet in 5.17). Run on two devices with transformers 5.17 or 5.23, of the checkpoints' own code stand-ins."""


class AtInputs(NamedTuple):
    """A part of a vision tower whose result the tower joins with what it has made of its inputs."""

    part: str
    """Path below the tower; the module around it makes the other side, where its own inputs are."""
    what: str
    """The other side, in words, with its verb."""
    where: str
    """The operation, for the message."""
    since: tuple[int, int] = (0, 0)
    """First transformers that does so."""


def _weighed(family: str, part: str = "pos_embed") -> AtInputs:
    where = f"self.{part.rpartition('.')[2]}(interp_indices) * interp_weights in modeling_{family}.py"
    return AtInputs(part, "the weights of its positions stay", where, (5, 0))


TOWER_AT_INPUTS: Mapping[str, AtInputs] = {
    "kimi_k25": AtInputs(
        "final_layernorm", "the index that sorts its result stays", "hidden_states[merge_index] in modeling_kimi_k25.py"
    ),
    **{family: _weighed(family) for family in ("cohere_compass", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")},
    "qwen4_exp": _weighed("qwen4_exp"),
    "cosmos3_omni": _weighed("qwen3_vl"),
    "qwen3_omni_moe_thinker": _weighed("qwen3_omni_moe"),
    **{name: _weighed(name, "position_embedding_table") for name in ("muse_glimmer", "muse_spark")},
}
"""Families whose tower joins the result of a part with a tensor made of its inputs, which stays where they are: only a key
of the tower itself, whose hook moves the inputs, brings the two together. Run on two devices with transformers 5.17 and
5.23 (muse_spark: read); 4.57 makes the weights where the table is."""

FED_IN_TURN: Mapping[str, str] = {"kimi_k25": "patch_embed", "kosmos-2.5": "embeddings"}
"""Families to a module of their tower that gives the result of one part to the next, or brings the results together itself,
so that it may be cut though it is called an embedding. Run on two devices with transformers 5.17 and 5.23."""

TOWER_TABLES: Mapping[str, str] = {"glm4v": "embeddings", "glm4v_moe": "embeddings"}
"""Part of such a tower that uses the weight of a module in it without calling the module, so that only a key of the part
itself brings its inputs there."""

TOWER_ROTARY = "rotary_pos_emb"
"""Module of those towers that holds no weights and whose buffer 4.57 uses where it is: on the CPU, unless it has a key."""

LOGITS_MOVED = (4, 46)
"""First transformers whose ``generate`` copies the last token's logits to the device of ``input_ids``, so that an inner
``generate`` no longer fails. Source: ``_sample`` of generation/utils.py, transformers#34076."""
