"""Work of vision towers against what their code was seen to allocate, by families that no true-size model was counted of.

Each class of transformers 5.23 was built with blocks 1,024 wide (MLP 4,096, four blocks), and its tower traced without a
GPU in bfloat16 (``doctor/sources/trace_child.py``); the figures are the most that lived at once, in multiples of a patch's
hidden state, pixels not counted.
"""

from __future__ import annotations

import msgspec
import pytest

from vlm_doctor import load_profile
from vlm_doctor.data.activations import VISION
from vlm_doctor.model import VisionShape
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import ImageLoad, image_load
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.settle import replay_of
from vlm_doctor.planner.vision_work import pixels_bytes, tower_coefficient, vision_bytes
from vlm_doctor.workload import Training, Workload

from .profiles import glm41v_9b, gpu, llava_13b, machine, with_transformers

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


TRUE_SIZES = [
    # Family, tower, width, MLP, blocks, patches of two images; traced under 5.23 and under 4.57, where it can be.
    ("aya_vision", "siglip_vision_model", 1152, 4304, 27, 17_576, 10.944, 35.960),
    ("llava", "clip_vision_model", 1024, 4096, 24, 1_154, 15.501, 37.574),
    ("llava", "pixtral", 1024, 4096, 24, 7_938, 24.071, 46.302),
    ("llava_next", "clip_vision_model", 1024, 4096, 24, 5_770, 16.387, 38.981),
    ("llava_next_video", "clip_vision_model", 1024, 4096, 24, 5_770, 16.387, 38.981),
    ("llava_onevision", "siglip_vision_model", 1152, 4304, 26, 1_458, 11.413, None),
    ("mistral3", "pixtral", 1024, 4096, 24, 10_368, 26.896, 49.112),
    ("video_llava", "clip_vision_model", 1024, 4096, 24, 514, 15.994, None),
    ("vipllava", "clip_vision_model", 1024, 4096, 24, 1_154, 19.501, 37.574),
]


@pytest.mark.parametrize(("family", "kind", "width", "mlp", "blocks", "patches", "now", "before"), TRUE_SIZES)
def test_before_5_23_towers_of_some_families_keep_the_states_of_all_blocks(
    family: str, kind: str, width: int, mlp: int, blocks: int, patches: int, now: float, before: float | None
) -> None:
    """Each with the published dimensions of its tower and a tiny text body, traced in bfloat16."""
    vision = VisionShape(layers=blocks, hidden=width, intermediate=mlp, heads=16, patch=14, kind=kind)
    profile = llava_13b(model_type=family, vision=vision)
    for version, traced in ((None, now), ("5.23.0", now), ("5.22.1", before), ("4.57.6", before)):
        held = as_loaded(profile, machine([80.0]) if version is None else with_transformers(machine([80.0]), version))
        coefficient = tower_coefficient(held)
        told = coefficient.elements(intermediate=mlp, hidden=width, layers=blocks) / width
        told += coefficient.pair_elements * patches / width
        if traced is not None:
            assert traced <= told * 1.001
            assert told <= traced * 1.19
        assert ("keeps" in coefficient.source) == (traced is not now)


def test_other_towers_are_as_they_were_under_any_release() -> None:
    vision = as_loaded(glm41v_9b(), with_transformers(machine([80.0]), "4.57.6")).vision
    assert vision is not None
    assert not vision.keeps_states
    bare = llava_13b(vision=None)
    assert as_loaded(bare, with_transformers(machine([80.0]), "4.57.6")).vision is None


@pytest.mark.parametrize(("version", "traced"), [("5.23.0", 39_349_760), ("4.57.6", 91_515_904)])
def test_the_replayed_tower_of_llava_keeps_them_too(version: str, traced: int) -> None:
    """CLIP at 336 pixels, two images, in front of a body 64 wide: the tower is the peak, pixels counted."""
    profile = load_profile("llava-1.5-7b", allow_network=False)
    small = msgspec.structs.replace(
        profile.text, layers=1, hidden=64, intermediate=128, heads=2, kv_heads=2, head_dim=32, vocabulary=128
    )
    there = with_transformers(machine([80.0]), version)
    profile = as_loaded(msgspec.structs.replace(profile, text=small), there)
    workload = Workload(images=2, text_tokens=32, new_tokens=2)
    images = image_load(profile, workload)
    atoms = chain(profile).atoms
    footprint = Footprint(profile, workload, images, atoms)
    found = replay_of(footprint, [gpu(0, 80 * 2**30, 80 * 2**30, compute_capability=(9, 0))], there.libraries)
    assert found is not None
    need = found.need((0, len(atoms)), 0, 80 * 2**30)
    # The cache comes when the tower is done; what is not its own of the peak is activations.
    assert need.activations_bytes + need.kv_cache_bytes == pytest.approx(traced, rel=0.01)


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


def test_tiles_that_see_each_other_have_scores_of_all_their_pairs() -> None:
    """Llama 3.2 Vision: four tiles of 1,601 patches; 6.97 GiB beside the weights of the 11B model, traced."""
    tower = VisionShape(layers=40, hidden=1280, intermediate=5120, heads=16, patch=14)
    tiles = ImageLoad(tokens=1, features=6404, sequences=4, patches=1601, patch=14, run_height=560, run_width=560)
    eager = Workload(text_tokens=1024, attention="eager")
    one, two = (
        vision_bytes(
            llava_13b(model_type="mllama", vision=tower),
            msgspec.structs.replace(eager, images=images),
            msgspec.structs.replace(tiles, features=6404 * images, sequences=4 * images),
            2,
        )[1]
        for images in (1, 2)
    )
    assert 6.7 < one / 2**30 < 7.1
    assert two == pytest.approx(2 * one, rel=1e-6)


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


@pytest.mark.parametrize(("version", "is_held"), [("4.57.6", False), ("5.17.0", False), ("5.18.0", True), (None, True)])
def test_before_5_18_one_copy_of_the_features_is_all_that_stays(version: str | None, is_held: bool) -> None:
    """InternVL3-1B, four images of 3,328 patches: 22.8 MiB beside pixels and prompt under 5.17, 149.6 MiB told before."""
    vision = VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=14, frames=1)
    images = ImageLoad(tokens=13_312, features=13_312, sequences=52, patches=1025, patch=14)
    where = machine([80.0]) if version is None else with_transformers(machine([80.0]), version)
    kept = {}
    for family in ("internvl", "made_up"):
        profile = llava_13b(model_type=family, vision=vision)
        kept[family] = vision_bytes(as_loaded(profile, where), Workload(images=4), images, 2)[2]
    features, states = images.features * llava_13b().text.hidden * 2, 52 * 1025 * 1024 * 2
    assert kept["internvl"] == (2 * features + states if is_held else features)
    # What is not known keeps the most, and so does code of a checkpoint.
    assert kept["made_up"] == 2 * features + states
    own = llava_13b(model_type="internvl", vision=vision, is_remote_code=True)
    assert as_loaded(own, where).vision == vision


def test_from_5_18_to_5_22_the_states_of_all_blocks_stay_until_the_answer() -> None:
    """LLaVA-1.5 with four images, told and traced under 5.20: 15,174 and 15,180 MiB with the weights."""
    vision = VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=14, kind="clip_vision_model", frames=1)
    images = ImageLoad(tokens=2304, features=2304, sequences=4, patches=577, patch=14)
    state = 4 * 577 * 1024 * 2
    held = {}
    for version in ("5.17.0", "5.20.0", "5.23.0"):
        profile = as_loaded(llava_13b(vision=vision), with_transformers(machine([80.0]), version))
        held[version] = vision_bytes(profile, Workload(images=4), images, 2)[2]
    assert held["5.20.0"] - held["5.23.0"] == 24 * state
    assert held["5.17.0"] < held["5.23.0"]


def test_the_replay_holds_them_too() -> None:
    profile = load_profile("llava-1.5-7b", allow_network=False)
    # Short enough that what stays of the tower decides, and not the tower at work.
    workload = Workload(images=1, text_tokens=4000, new_tokens=2)
    images, atoms = image_load(profile, workload), chain(profile).atoms
    need = {}
    for version in ("5.20.0", "5.23.0"):
        there = with_transformers(machine([80.0]), version)
        footprint = Footprint(as_loaded(profile, there), workload, images, atoms)
        found = replay_of(footprint, [gpu(0, 80 * 2**30, 80 * 2**30, compute_capability=(9, 0))], there.libraries)
        assert found is not None
        need[version] = found.need((0, len(atoms)), 0, 80 * 2**30).activations_bytes
    assert need["5.20.0"] - need["5.23.0"] == pytest.approx(24 * 577 * 1024 * 2, rel=0.05)


def test_a_training_step_holds_what_the_projector_read() -> None:
    vision = VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=14)
    older = as_loaded(llava_13b(vision=vision), with_transformers(machine([80.0]), "4.57.6"))
    call, step = (
        vision_bytes(older, workload, load(1024, 448), 2)[2] for workload in (Workload(), Workload(training=Training()))
    )
    assert step > call + 1024 * 1024 * 2


@pytest.mark.parametrize(("version", "keeps"), [("4.57.6", True), ("5.0.0", False), ("5.23.0", False)])
def test_cohere_2_keeps_states_in_the_fourth_generation_alone(version: str, keeps: bool) -> None:
    vision = VisionShape(layers=27, hidden=1152, intermediate=4304, heads=16, patch=14)
    profile = as_loaded(llava_13b(model_type="cohere2_vision", vision=vision), with_transformers(machine([80.0]), version))
    assert profile.vision is not None
    assert profile.vision.keeps_states == keeps


def test_towers_of_older_releases_have_scripts_of_their_own() -> None:
    profile = load_profile("OpenGVLab/InternVL3-8B-hf", allow_network=False)
    older, newer = (as_loaded(profile, with_transformers(machine([80.0]), version)) for version in ("5.17.0", "5.18.0"))
    assert older.tower_script == profile.older_tower_script != profile.tower_script
    assert newer.tower_script == profile.tower_script
    assert as_loaded(older, with_transformers(machine([80.0]), "5.17.0")) is older


def test_the_second_tower_of_deepseek_vl_keeps_its_states_before_5_23() -> None:
    """The hybrid 7B with one image: 7,168 MiB on the first of two GPUs, where 50 MiB less were told."""
    vision = VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=16)
    profile = llava_13b(model_type="deepseek_vl_hybrid", vision=vision)
    older, newer = (
        tower_coefficient(as_loaded(profile, with_transformers(machine([80.0]), version)))
        for version in ("5.17.0", "5.23.0")
    )
    whole, less = (one.elements(intermediate=4096, hidden=1024, layers=24) for one in (older, newer))
    assert whole - less == pytest.approx(8 * 1024)
    assert older.text.startswith("2 x intermediate + (4.6 + 8) x hidden elements a patch")


@pytest.mark.parametrize(
    ("family", "frames", "bytes_a_pixel"), [("llava", 1, 6), ("qwen2_vl", 2, 12), ("smolvlm", 1, 14), ("aria", 1, 7)]
)
def test_pixels_have_their_frames_and_a_mask(family: str, frames: int, bytes_a_pixel: int) -> None:
    vision = VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=16, frames=frames)
    assert pixels_bytes(llava_13b(model_type=family, vision=vision), load(1024, 512), 2) == 1024 * 256 * bytes_a_pixel
    # A tower that nothing is known of may stack two.
    assert pixels_bytes(llava_13b(model_type="x", vision=None), load(1024, 512), 2) == 1024 * 256 * 12


def test_the_mlp_of_a_tower_works_when_eager_scores_are_gone() -> None:
    tower = VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=16)
    image = load(1024, 512)
    pixels, fused, _ = vision_bytes(llava_13b(model_type="internvl", vision=tower), Workload(), image, 2)
    _, eager, _ = vision_bytes(llava_13b(model_type="internvl", vision=tower), Workload(attention="eager"), image, 2)
    scores, mlp, states = 16 * 1024**2 * 4, 1024 * 2 * 4096 * 2, 1024 * 2 * 1024 * 2
    assert eager == fused - mlp + states + scores > fused
    # Few pairs: what the MLP takes is more.
    small = msgspec.structs.replace(image, sequences=64, patches=16)
    asked = [Workload(), Workload(attention="eager")]
    bodies = [vision_bytes(llava_13b(model_type="internvl", vision=tower), workload, small, 2) for workload in asked]
    assert bodies[0] == bodies[1]
    assert pixels == 1024 * 256 * 12
