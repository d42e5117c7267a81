"""The rule of each family for images: against counts of the real processors, and against files of any content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.data.config_defaults import ARCHITECTURES
from vlm_doctor.data.image_rules import ASSUMED, IMAGE_RULES, NO_IMAGES, ImageConstants
from vlm_doctor.image_rule import ImageRule
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.image_sizes import CELLS
from vlm_doctor.planner.image_tiles import GRIDS
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.sources.catalogue import find_entry
from vlm_doctor.sources.image_files import ImageFiles, processor_settings
from vlm_doctor.sources.image_rule import image_rule
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.model_shapes import Fields, vision_fields
from vlm_doctor.workload import Workload

RECORDED: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "image_counts.json").read_text(encoding="utf-8")
)["families"]

READ = {
    *("blip", "blip-2", "git", "idefics", "idefics2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5"),
    *("pi0", "pix2struct", "pixtral", "pp_chart2table", "pp_formulanet", "udop"),
}
"""Families whose processor writes no text for an image that could be counted: their rule is read from its code."""
REMOTE = {"chatglm", "cogagent", "cogvlm", "deepseek_vl_v2", "internvl_chat", "kimi_vl", "minicpmv", "molmo", "phi3_v"}
"""Families with code of their own: read as well."""


def files(family: str, case: dict[str, Any]) -> ImageFiles:
    return ImageFiles(case["config"], vision_fields(case["config"]), case["images"], case["prompts"])


def rule_of(family: str, found: ImageFiles) -> ImageRule:
    is_plain = found.vision is not None and not isinstance(found.vision.raw("depths"), list)
    rule = image_rule(IMAGE_RULES[family], found, found.vision.get("patch") if found.vision and is_plain else None)
    assert rule is not None
    return rule


ANY_MODEL = load_profile("llava-1.5-7b")


def profile(family: str, rule: ImageRule) -> ModelProfile:
    return msgspec.structs.replace(ANY_MODEL, model_type=family, image=rule)


@pytest.mark.parametrize(
    ("family", "number"), [(name, number) for name, cases in RECORDED.items() for number in range(len(cases))]
)
def test_images_are_counted_as_the_processor_counts_them(family: str, number: int) -> None:
    case = RECORDED[family][number]
    rule = rule_of(family, files(family, case))
    model = profile(family, rule)
    for height, width, tokens, sequences, patches in case["counts"]:
        load = image_load(model, Workload(image_height=height, image_width=width))
        spare = load.tokens - tokens - case["outside"]
        assert 0 <= spare <= case["spare"], (height, width)
        assert (load.sequences, load.patches - rule.extra_patches) == (sequences, patches), (height, width)


@pytest.mark.parametrize("family", sorted(set(RECORDED) - {"fuyu"}))  # which takes one image
def test_two_images_of_one_prompt_are_counted_as_the_processor_counts_them(family: str) -> None:
    case = RECORDED[family][0]
    (height, width), (tokens, sequences, _) = case["pair"]
    model = profile(family, rule_of(family, files(family, case)))
    load = image_load(model, Workload(images=2, image_height=height, image_width=width))
    assert 0 <= load.tokens - 2 * (tokens + case["outside"]) <= 2 * case["spare"]
    assert load.sequences == 2 * sequences


def test_every_rule_is_counted_or_read() -> None:
    assert set(IMAGE_RULES) == set(RECORDED) | READ | REMOTE
    assert not set(RECORDED) & (READ | REMOTE)


def test_every_architecture_has_a_rule_or_says_why_not() -> None:
    known = set(IMAGE_RULES) | NO_IMAGES | ASSUMED
    assert set(ARCHITECTURES) - known == set(), "read its processor and add it to doctor/data/image_rules.py"
    assert known - set(ARCHITECTURES) - REMOTE == {"pixtral"}


@given(family=st.sampled_from(sorted(IMAGE_RULES)), height=st.integers(1, 9000), width=st.integers(1, 9000))
@settings(max_examples=300, deadline=None)
def test_an_image_of_any_size_has_tokens_within_the_bounds(family: str, height: int, width: int) -> None:
    vision = Fields({"image_size": 448, "patch_size": 14}, "", "")
    rule = rule_of(family, ImageFiles({"model_type": family}, vision))
    load = image_load(profile(family, rule), Workload(image_height=height, image_width=width))
    largest = image_load(profile(family, rule), Workload(image_height=20_000, image_width=20_000))
    assert min(load.tokens, load.sequences, load.patches) > 0
    if rule.kind == "tiles" and rule.method != "windows":
        grids = ((high // rule.size) * (wide // rule.size) for high, wide in rule.pinpoints)
        assert load.sequences <= max(rule.max_tiles, *grids, 1) + 1
    if rule.kind != "merge" or rule.max_pixels or rule.max_patches or rule.max_height:
        # Scaled down, not cut off: twenty thousand pixels an edge stay below a hundred thousand tokens.
        assert largest.tokens < 100_000


@pytest.mark.parametrize("family", sorted(IMAGE_RULES))
def test_without_a_size_as_many_tiles_are_counted_as_there_can_be(family: str) -> None:
    vision = Fields({"image_size": 448, "patch_size": 14}, "", "")
    rule = rule_of(family, ImageFiles({"model_type": family}, vision))
    model = profile(family, rule)
    unsized = image_load(model, Workload()).features
    if rule.kind == "tiles":
        for height, width in ((300, 400), (1000, 1000), (2500, 1500), (700, 3000)):
            assert image_load(model, Workload(image_height=height, image_width=width)).features <= unsized


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["height", "longest_edge", "width"]), inner)
    ),
    max_leaves=4,
)
KEYS = [
    *("size", "crop_size", "tile_size", "patch_size", "merge_size", "max_patches", "min_patches", "max_tiles", "max_crops"),
    *(
        "image_grid_pinpoints",
        "overlap_margins",
        "max_pixels_tolerance",
        "max_image_size",
        "scale_resolution",
        "max_pixels",
    ),
    *("min_pixels", "max_image_tokens", "max_soft_tokens", "max_model_len", "downsample_ratio", "downsample_mode"),
    *("crop_to_patches", "do_image_splitting", "use_thumbnail", "image_seq_length", "image_seq_len", "downsample_rate"),
    *("vision_aspect_ratio", "num_additional_image_tokens", "vision_feature_select_strategy", "do_center_crop"),
]


@given(
    family=st.sampled_from(sorted(IMAGE_RULES)),
    images=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6),
    prompts=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
    edges=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
)
@settings(max_examples=400, deadline=None)
def test_files_of_any_content_give_a_rule_that_counts(
    family: str, images: dict[str, Any], prompts: dict[str, Any], edges: tuple[int, int]
) -> None:
    found = ImageFiles({"model_type": family}, Fields({"image_size": 448, "patch_size": 14}, "", ""), images, prompts)
    rule = image_rule(IMAGE_RULES[family], found, 14)
    if rule is not None:
        load = image_load(profile(family, rule), Workload(image_height=edges[0], image_width=edges[1]))
        assert load.tokens >= 0
        assert load.sequences > 0


EXTREMES: dict[str, list[tuple[int, int, int, int]]] = {
    "paddleocr_vl": [(2000, 11, 185, 2), (11, 2000, 2, 185), (20, 20, 14, 14)],
    "muse_glimmer": [(1, 200_000, 1, 7143), (3000, 5000, 49, 82), (5, 5, 1, 1)],
    "gemma4": [(9000, 3, 280, 1), (3, 9000, 1, 280), (50, 50, 16, 16)],
    "perception_lm": [(20_000, 500, 36, 1), (500, 20_000, 1, 36), (20_000, 20_000, 6, 6), (20_000, 15_000, 5, 4)],
    "idefics3": [(4000, 3000, 12, 9), (3000, 4001, 9, 12)],
    "nemotron_h_omni": [(1, 9000, 1, 380), (9000, 1, 380, 1), (5000, 5000, 32, 32), (8, 8, 16, 16), (517, 4801, 10, 97)],
    "glm5_next": [(1, 9000, 1, 322), (9000, 9000, 89, 89), (5, 5, 4, 4), (4801, 7003, 74, 108)],
    "kimi_k25": [(1, 9000, 1, 256), (9000, 9000, 65, 65), (5, 5, 1, 1), (4801, 7003, 54, 78)],
    "cohere_compass": [(10, 1990, 1, 29), (9000, 9000, 35, 35), (5, 5, 2, 2), (4801, 7003, 29, 43)],
    "glm4v": [(10, 1990, 1, 199), (9000, 9000, 86, 86), (5, 5, 3, 3), (4801, 7003, 71, 104)],
    "mistral3": [(10, 1990, 1, 55), (4801, 3003, 55, 35), (5, 5, 1, 1)],
}
"""Height, width, rows and columns (of tokens, or of tiles) by the functions of transformers 5.23 that the rules follow."""
EXTREME_FILES: dict[str, dict[str, Any]] = {
    "idefics3": {"size": {"longest_edge": 5000}, "max_image_size": {"longest_edge": 364}},
    "mistral3": {"size": {"longest_edge": 1540}, "patch_size": 14},
    "nemotron_h_omni": {"max_num_patches": 4096, "patch_size": 16},
}


@pytest.mark.parametrize("family", sorted(EXTREMES))
def test_images_of_extreme_sizes_are_scaled_as_the_family_does(family: str) -> None:
    merge = {"merge_size": 2} if family == "mistral3" else {}
    vision = Fields({"image_size": 448, "patch_size": 16 if family == "gemma4" else 14}, "", "")
    rule = rule_of(family, ImageFiles({"model_type": family, **merge}, vision, EXTREME_FILES.get(family, {})))
    for height, width, rows, columns in EXTREMES[family]:
        if rule.kind == "tiles":
            assert GRIDS[rule.method](rule, height, width) == (rows, columns), (height, width)
        else:
            assert CELLS[rule.method](rule, height, width) == (rows, columns), (height, width)


def test_settings_come_from_either_file() -> None:
    assert processor_settings(None, None) == (None, {})
    assert processor_settings({"a": 1}, None) == ({"a": 1}, {})
    assert processor_settings(None, {"min_pixels": 4}) == ({"min_pixels": 4}, {"min_pixels": 4})
    new = {"image_processor": {"a": 2}, "image_seq_length": 256}
    assert processor_settings(None, new) == ({"a": 2}, {"image_seq_length": 256})
    assert processor_settings({"a": 1}, new) == ({"a": 1}, {"image_seq_length": 256})
    assert processor_settings({"image_processor": {"a": 3}}, new) == ({"a": 3}, {"image_seq_length": 256})


def test_a_tower_that_brings_its_processor_outdoes_the_family() -> None:
    pixtral = ImageFiles({"model_type": "llava"}, Fields({"patch_size": 16}, "pixtral", ""))
    rule = image_rule(IMAGE_RULES["llava"], pixtral, 16)
    assert rule is not None
    assert (rule.kind, rule.method, rule.max_height) == ("merge", "shrunk", 1024)
    own = image_rule(ImageConstants("fixed", size=320), pixtral, 16)
    assert own is not None
    assert own.size == 320


def test_the_note_says_what_the_family_does() -> None:
    def note(family: str, **changes: Any) -> str | None:
        vision = Fields({"image_size": 448, "patch_size": 14}, "", "")
        rule = rule_of(family, ImageFiles({"model_type": family}, vision))
        return image_load(profile(family, rule), Workload(**changes)).note

    assert note("step3p7", image_height=1000) == (
        "Images are cut into 4 tiles of 504 x 504 pixels beside the whole: 504 tokens each."
    )
    assert note("llama4", image_height=1000, image_width=400) == (
        "Images are cut into 4 tiles of 448 x 448 pixels: 1,030 tokens each."
    )
    assert note("llama4", image_height=400) == "Images are resized to 448 x 448 pixels: 259 tokens each."
    assert note("mistral3", image_height=100, image_width=3000) == (
        "Images of 42 x 1036 pixels (height x width): 225 tokens each."
    )
    assert note("udop") == "Images are resized to 224 x 224 pixels: at most 256 tokens each."
    assert note("llava_onevision", images=2) == "Images are resized to 448 x 448 pixels: 1,025 tokens each."


def test_a_catalogue_entry_has_the_rule_of_its_family() -> None:
    entry = find_entry("qwen2.5-vl-7b")
    assert entry is not None
    rule = load_profile("qwen2.5-vl-7b").image
    assert rule is not None
    assert (rule.kind, rule.max_pixels) == ("merge", 12845056)
