"""The formulas against true-size models that were traced on a CPU.

``benchmarks/trace_memory.py`` ran the forward pass of transformers 5.23 (torch 2.13) in bfloat16 with all floating-point
arithmetic replaced by allocation, and counted live bytes: peaks of one forward pass, all on one device, without cuBLAS
workspace. Where an H200 measured the same, it agrees: GLM-4.1V with 8,192 and 32,768 tokens of text 20.60 and 24.81 GiB
with a workspace of 0.03 GiB, traced 20.572 and 24.774.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vlm_doctor.image_rule import ImageRule
from vlm_doctor.model import ModelProfile, TextShape, VisionShape
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.units import GIB
from vlm_doctor.workload import Workload

from .profiles import glm41v_9b, model

_CLIP = VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=14)
_SIGLIP = VisionShape(layers=27, hidden=1152, intermediate=4304, heads=16, patch=14)
_QWEN_TOWER = VisionShape(layers=32, hidden=1280, intermediate=3420, heads=16, patch=14)


def _profile(model_type: str, text: TextShape, vision: VisionShape, image: ImageRule) -> ModelProfile:
    """Weights do not matter here: the traced figures are without."""
    return model(
        model_type,
        text,
        vision_elements=0,
        layer_elements=3,
        fields={"model_type": model_type, "vision": vision, "image": image},
    )


def _text(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, **fields: Any
) -> TextShape:
    shape = TextShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
    )
    return msgspec.structs.replace(shape, **fields)


_ANY_SIZE = ImageRule(kind="merge", size=1008, patch=14, merge=2, extra_tokens=2)
MODELS = {
    "glm-4.1v-9b": glm41v_9b(
        image=_ANY_SIZE, vision=VisionShape(layers=24, hidden=1536, intermediate=13696, heads=12, patch=14)
    ),
    "llava-1.5-7b": _profile(
        "llava",
        _text(32, 4096, 11008, 32, 32, 32064),
        _CLIP,
        ImageRule(kind="fixed", size=336, patch=14, extra_patches=1),
    ),
    "internvl3-8b": _profile(
        "internvl",
        _text(28, 3584, 18944, 28, 4, 151674),
        _CLIP,
        ImageRule(
            kind="tiles", size=448, patch=14, merge=2, extra_tokens=2, extra_patches=1, max_tiles=12, has_thumbnail=True
        ),
    ),
    "qwen2.5-vl-7b": _profile("qwen2_5_vl", _text(28, 3584, 18944, 28, 4, 152064), _QWEN_TOWER, _ANY_SIZE),
    "qwen3-vl-8b": _profile(
        "qwen3_vl",
        _text(36, 4096, 12288, 32, 8, 151936),
        VisionShape(layers=27, hidden=1152, intermediate=4304, heads=16, patch=16),
        ImageRule(kind="merge", size=1008, patch=16, merge=2, extra_tokens=2),
    ),
    "gemma-3-4b": _profile(
        "gemma3",
        _text(34, 2560, 10240, 8, 4, 262208, head_dim=256, sliding_window=1024),
        _SIGLIP,
        ImageRule(kind="fixed", size=896, patch=14, merge=4, extra_tokens=4),
    ),
    "llama-3.2-11b-vision": _profile(
        "mllama",
        _text(
            40,
            4096,
            14336,
            32,
            8,
            128256,
            cached_layers=tuple("cross" if layer % 5 == 3 else "full" for layer in range(40)),
        ),
        VisionShape(layers=32, hidden=1280, intermediate=5120, heads=16, patch=14),
        ImageRule(kind="tiles", size=560, patch=14, extra_patches=1, max_tiles=4),
    ),
}


@pytest.mark.parametrize(
    ("name", "fields", "weights_gib", "traced_gib"),
    [
        ("glm-4.1v-9b", {"text_tokens": 1024}, 19.172, 19.347),
        ("glm-4.1v-9b", {"text_tokens": 8192}, 19.172, 20.572),
        ("glm-4.1v-9b", {"text_tokens": 32768}, 19.172, 24.774),
        ("glm-4.1v-9b", {"text_tokens": 2048, "batch": 2}, 19.172, 19.872),
        ("glm-4.1v-9b", {"text_tokens": 4096, "logits": "forward"}, 19.172, 20.516),
        ("glm-4.1v-9b", {"text_tokens": 2048, "attention": "eager"}, 19.172, 20.602),
        ("glm-4.1v-9b", {"text_tokens": 64, "images": 1, "image_height": 336}, 19.172, 19.212),
        ("glm-4.1v-9b", {"text_tokens": 64, "images": 1, "image_height": 2240}, 19.172, 20.547),
        ("glm-4.1v-9b", {"text_tokens": 512, "images": 1, "image_height": 1120, "batch": 2}, 19.172, 19.996),
        ("llava-1.5-7b", {"text_tokens": 4096}, 13.156, 15.536),
        ("llava-1.5-7b", {"text_tokens": 32768}, 13.156, 32.189),
        ("llava-1.5-7b", {"text_tokens": 4096, "logits": "forward"}, 13.156, 15.536),
        ("llava-1.5-7b", {"text_tokens": 2048, "attention": "eager"}, 13.157, 15.478),
        ("llava-1.5-7b", {"text_tokens": 512, "images": 1, "batch": 2}, 13.156, 14.443),
        ("internvl3-8b", {"text_tokens": 8192}, 13.785, 15.312),
        ("internvl3-8b", {"text_tokens": 4096, "logits": "forward"}, 13.785, 15.188),
        ("internvl3-8b", {"text_tokens": 64, "images": 1, "image_height": 1120}, 13.785, 14.322),
        ("qwen2.5-vl-7b", {"text_tokens": 32768}, 15.445, 21.555),
        ("qwen2.5-vl-7b", {"text_tokens": 2048, "attention": "eager"}, 15.445, 16.739),
        ("qwen2.5-vl-7b", {"text_tokens": 64, "images": 1, "image_height": 336}, 15.445, 15.489),
        ("qwen2.5-vl-7b", {"text_tokens": 64, "images": 1, "image_height": 2240}, 15.445, 16.854),
        ("qwen3-vl-8b", {"text_tokens": 8192}, 16.33, 18.272),
        ("qwen3-vl-8b", {"text_tokens": 64, "images": 1, "image_height": 1120}, 16.33, 16.735),
        ("qwen3-vl-8b", {"text_tokens": 64, "images": 1, "image_height": 2240}, 16.33, 17.904),
        ("gemma-3-4b", {"text_tokens": 1024}, 8.01, 8.224),
        ("gemma-3-4b", {"text_tokens": 8192}, 8.01, 9.838),
        ("gemma-3-4b", {"text_tokens": 4096, "logits": "forward"}, 8.01, 10.561),
        ("gemma-3-4b", {"text_tokens": 64, "images": 1}, 8.01, 8.116),
        ("llama-3.2-11b-vision", {"text_tokens": 4096}, 19.874, 20.83),
        ("llama-3.2-11b-vision", {"text_tokens": 64, "images": 1, "image_height": 1120}, 19.874, 20.756),
        ("llama-3.2-11b-vision", {"text_tokens": 512, "images": 1, "image_height": 1120, "batch": 2}, 19.874, 21.637),
    ],
)
def test_predicted_peaks_meet_the_traced_ones(
    name: str, fields: dict[str, Any], weights_gib: float, traced_gib: float
) -> None:
    profile = MODELS[name]
    workload = Workload(**{"images": 0, "new_tokens": 0, **fields})
    prices = Footprint(profile, workload, image_load(profile, workload), chain(profile).atoms)
    need = prices.detail(0, len(prices.atoms), workload.text_tokens)
    predicted_gib = weights_gib + (need.kv_cache_bytes + need.activations_bytes) / GIB
    assert 0.99 * traced_gib <= predicted_gib <= 1.015 * traced_gib
