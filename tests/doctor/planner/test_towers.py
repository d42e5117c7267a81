"""Work of vision towers against what their code was seen to allocate, by families that no true-size model was counted of.

Each class of transformers 5.23 was built with blocks 1,024 wide (MLP 4,096, four blocks), and its tower traced without a
GPU in bfloat16 (``doctor/sources/trace_child.py``); the figures are the most that lived at once, in multiples of a patch's
hidden state, pixels not counted.
"""

from __future__ import annotations

import pytest

from vlm_doctor.data.activations import VISION
from vlm_doctor.model import VisionShape
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import ImageLoad, image_load
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.vision_work import vision_bytes
from vlm_doctor.workload import Workload

from .profiles import llava_13b

WIDTH, MLP_WIDTH, BLOCKS = 1024, 4096, 4


@pytest.mark.parametrize(
    ("family", "patches", "traced"),
    [
        ("blip-2", 1025, 12.0),
        ("cohere_compass", 3844, 19.844),
        ("cosmos3_edge", 4096, 12.0),
        ("cosmos3_omni", 3844, 19.844),
        ("deepseek_vl", 1024, 12.0),
        ("diffusion_gemma", 2520, 17.263),
        ("dots3_note", 4900, 19.07),
        ("ernie4_5_vl_moe", 5184, 17.07),
        ("exaone4_5", 4900, 15.071),
        ("gemma4", 2520, 17.263),
        ("glm5_next", 5184, 19.07),
        ("glm_ocr", 5184, 19.07),
        ("glmga", 5184, 17.07),
        ("granite_docling", 33792, 13.75),
        ("hunyuan_vl", 4096, 11.0),
        ("hyperclovax_vision_v2", 4900, 17.071),
        ("inkling2", 2704, 17.081),
        ("instructblip", 1025, 12.0),
        ("janus", 1024, 12.0),
        ("kimi_k25", 5184, 17.07),
        ("lfm2_vl", 11264, 12.0),
        ("lfm3_vl", 3844, 15.07),
        ("lighton_ocr", 5184, 22.102),
        ("llama4", 17425, 16.0),
        ("minimax_m3_vl", 2304, 12.035),
        ("mistral3", 5184, 22.102),
        ("mistral_large4", 5184, 22.102),
        ("muse_glimmer", 5184, 18.102),
        ("muse_spark", 5184, 18.102),
        ("ovis2", 1024, 17.0),
        ("paddleocr_vl", 5184, 18.07),
        ("qianfan_ocr", 13325, 11.0),
        ("qwen2_5_omni_thinker", 5184, 17.07),
        ("qwen3_omni_moe_thinker", 4096, 19.844),
        ("qwen4_exp", 4096, 19.094),
        ("shieldgemma2", 1024, 12.0),
        ("video_llama_3", 3844, 18.07),
    ],
)
def test_towers_take_what_was_traced_and_little_more(family: str, patches: int, traced: float) -> None:
    coefficient = VISION[family]
    elements = coefficient.elements(intermediate=MLP_WIDTH, hidden=WIDTH, layers=BLOCKS)
    told = elements / WIDTH + coefficient.pair_elements * patches / WIDTH
    assert traced <= told * 1.001
    assert told <= traced * 1.19


def load(patches: int, edge: int) -> ImageLoad:
    return ImageLoad(tokens=64, features=64, sequences=1, patches=patches, patch=16, run_height=edge, run_width=edge)


def test_scores_that_are_never_fused_count_whatever_attention_is_asked_for() -> None:
    """GOT-OCR 2 with its default dimensions and an image of 1,024 pixels: 2.32 GiB beside the weights, traced."""
    tower = VisionShape(layers=12, hidden=768, intermediate=3072, heads=12, patch=16)
    image, workload = load(4096, 1024), Workload(text_tokens=32)
    fused = vision_bytes(llava_13b(vision=tower), workload, image, 2)[1]
    biased = vision_bytes(llava_13b(model_type="got_ocr2", vision=tower), workload, image, 2)[1]
    assert biased - fused > 12 * 4096**2 * 11
    assert 2.2 < biased / 2**30 < 2.5
    eager = Workload(text_tokens=32, attention="eager")
    assert vision_bytes(llava_13b(model_type="got_ocr2", vision=tower), eager, image, 2)[1] == biased


def test_a_tower_that_is_no_stack_of_blocks_is_priced_by_the_pixel() -> None:
    pixels, whole, kept = vision_bytes(llava_13b(model_type="chameleon", vision=None), Workload(), load(1024, 512), 2)
    assert (whole - pixels, kept) == (512 * 512 * 580 * 2, 0)
    model, parts = llava_13b(model_type="chameleon", vision=None), chain(llava_13b()).atoms
    with_image, without = (
        Footprint(model, asked, image_load(model, asked), parts).source for asked in (Workload(), Workload(images=0))
    )
    assert with_image == f"{without}; 580 elements a pixel (counted: convolutions, 128 channels at first)"
    pixels, whole, _ = vision_bytes(llava_13b(model_type="fuyu", vision=None), Workload(), load(1024, 512), 2)
    assert whole == pixels
