"""Which weights are those of ``nn.Linear``, which bitsandbytes quantizes: what names and shapes do not tell.

A linear weight is a matrix called ``weight``. So are tables and routers; and some linear layers stay as they are. Source:
every class behind ``AutoModelForImageTextToText`` of transformers 5.23, built on the meta device, with
``replace_with_bnb_linear`` (integrations/bitsandbytes.py) and ``get_modules_to_not_convert`` (quantizers/base.py);
``tests/doctor/model/test_meta_route.py`` holds these tables against the installed transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

TABLES = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})
"""Modules that are an ``nn.Embedding``, beside those with ``embed`` in their names."""

PATCHES = ("patch_embed", "patch_projection")
"""Beginnings of modules that turn flat patches into tokens: a linear layer where the weight is a matrix, though ``embed``
is in its name."""

ROUTERS = frozenset({"gate", "router"})
"""Modules that choose among experts: a bare parameter in a class of its own (``...TopKRouter`` in transformers 5), or a
linear layer that is too small to matter. ``gate_proj`` is none."""

UNQUANTIZED: Mapping[str, tuple[str, ...]] = {
    # ``_keep_in_fp32_modules`` of the classes: they stay in the type that the rest is loaded in.
    "blip-2": ("qformer",),
    "mistral_large4": ("indexer.weights_proj",),
    "udop": ("wo",),
    # Tables with a name of their own.
    "deepseek_ocr2": ("query_768_resolution", "query_1024_resolution"),
    "inkling_mm_model": ("model.audio_tower",),
    "kosmos-2.5": ("segment_emb",),
    "qwen2_5_omni_thinker": ("audio_bos_eos_token",),
    # Tied to the encoder's, and what is tied stays as it is.
    "diffusion_gemma": ("model.decoder.layers", "model.decoder.self_conditioning.down_proj"),
    # The layer with the last parameter of the class stays as it is.
    "molmo": ("image_projector.w3",),
    "nemotron_h_omni": ("multi_modal_projector.3", "multi_modal_projector.linear_2"),
}
"""Family to parts of names (whole components) below which nothing is quantized."""

QUANTIZED: Mapping[str, tuple[str, ...]] = {
    "blip": ("dense",),
    "diffusion_gemma": ("embedding_projection",),
    "fuyu": ("vision_embed_tokens",),
    "nemotron_h_omni": ("embedder", "video_embedder", "lm_head"),
    "step3p7": ("in_proj_weight", "out_proj"),
}
"""Family to modules or parameters that are quantized though they do not look like it: the layer before a head that is tied,
patches, a head that the class does not call its own, a weight that loading parts into three layers."""

UNTOLD_HEADS: Mapping[str, str] = {"chatglm": "output_layer"}
"""Family with code of its own to the module of its head, which that code does not name to transformers: it has neither
``get_output_embeddings`` nor an ``lm_head``, so that bitsandbytes quantizes the head as any other linear layer
(``get_keys_to_not_convert`` of 4.57, 5.0, 5.17 and 5.23). Source: modeling_chatglm.py of GLM-4V-9B; seen on two H200s with
transformers 5.17, with a stand-in for that code."""
