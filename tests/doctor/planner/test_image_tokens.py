from __future__ import annotations

import pytest

from vlm_doctor.image_rule import ImageRule
from vlm_doctor.planner.image_tokens import NO_IMAGES, image_load
from vlm_doctor.workload import Workload

from .profiles import glm41v_9b

LLAVA = ImageRule(kind="fixed", size=336, patch=14, extra_patches=1)
GLM_4V = ImageRule(kind="fixed", size=1120, patch=14, merge=2, extra_tokens=2, extra_patches=1)
COGVLM2 = ImageRule(kind="fixed", size=1344, patch=14, merge=2, extra_tokens=2, extra_patches=1)
GEMMA3 = ImageRule(kind="fixed", size=896, patch=14, merge=4)
QWEN2_VL = ImageRule(kind="merge", size=1008, patch=14, merge=2, min_pixels=3136, max_pixels=12845056)
INTERNVL = ImageRule(kind="tiles", size=448, patch=14, merge=2, extra_patches=1, max_tiles=12, has_thumbnail=True)
ONE_TILE = ImageRule(kind="tiles", size=448, patch=14, merge=2, max_tiles=1, has_thumbnail=True)


@pytest.mark.parametrize(
    ("rule", "height", "width", "tokens", "sequences", "patches"),
    [
        (LLAVA, None, None, 576, 1, 577),
        (LLAVA, 2000, 100, 576, 1, 577),
        (GLM_4V, None, None, 1602, 1, 6401),
        (COGVLM2, None, None, 2306, 1, 9217),
        (GEMMA3, None, None, 256, 1, 4096),
        (QWEN2_VL, None, None, 1296, 1, 5184),
        (QWEN2_VL, 1036, 1036, 1369, 1, 5476),
        (QWEN2_VL, 2044, None, 5329, 1, 21316),
        (QWEN2_VL, None, 280, 100, 1, 400),
        (QWEN2_VL, 1080, 1920, 39 * 69, 1, 4 * 39 * 69),
        (QWEN2_VL, 8000, 8000, 128 * 128, 1, 256 * 256),
        (QWEN2_VL, 20, 20, 4, 1, 16),
        (QWEN2_VL, 1, 1, 4, 1, 16),
        (QWEN2_VL, 10, 2000, 29, 1, 4 * 29),
        (INTERNVL, None, None, 13 * 256, 13, 1025),
        (INTERNVL, 448, 448, 256, 1, 1025),
        (INTERNVL, 896, 896, 5 * 256, 5, 1025),
        (INTERNVL, 448, 896, 3 * 256, 3, 1025),
        (INTERNVL, 3000, 3000, 10 * 256, 10, 1025),
        (ONE_TILE, None, None, 256, 1, 1024),
    ],
)
def test_tokens_and_patches_of_one_image(
    rule: ImageRule, height: int | None, width: int | None, tokens: int, sequences: int, patches: int
) -> None:
    load = image_load(glm41v_9b(image=rule), Workload(image_height=height, image_width=width))
    assert (load.tokens, load.sequences, load.patches) == (tokens, sequences, patches)


def test_images_add_up() -> None:
    load = image_load(glm41v_9b(image=INTERNVL), Workload(images=3, image_height=896))
    assert (load.tokens, load.sequences, load.patches) == (3 * 5 * 256, 15, 1025)
    assert load.note == "Images are cut into 5 tiles of 448 x 448 pixels: 1,280 tokens each."


def test_no_images_cost_nothing() -> None:
    assert image_load(glm41v_9b(), Workload(images=0)) == NO_IMAGES


def test_an_unknown_rule_counts_every_patch_as_a_token() -> None:
    load = image_load(glm41v_9b(image=None), Workload())
    assert (load.tokens, load.patches) == (72 * 72, 72 * 72)
    assert load.note == (
        "Images of 1008 x 1008 pixels (height x width): 5,184 tokens each, one token a patch since the model's image rule "
        "is unknown."
    )


def test_a_text_model_says_that_images_are_left_out() -> None:
    load = image_load(glm41v_9b(image=None, vision=None), Workload())
    assert (load.tokens, load.note) == (0, "The model takes no images; those of the workload are left out.")


def test_the_note_says_to_what_size_images_are_resized() -> None:
    load = image_load(glm41v_9b(image=LLAVA), Workload())
    assert load.note == "Images are resized to 336 x 336 pixels: 576 tokens each."
