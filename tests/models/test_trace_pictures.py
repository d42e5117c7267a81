"""What a trace, and a trial without a processor, hand to vision towers."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from vlm_doctor import load_profile
from vlm_doctor.planner.image_tokens import pictures
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from vlm_doctor.image_rule import ImageRule
    from vlm_doctor.trace import Pictures

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]
import image_counts  # noqa: E402 - of the benchmarks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

SIZES = ((448, 448), (500, 333), (1080, 1920))
"""Height and width in pixels."""
OTHERWISE = {
    "dots3_note": "its checkpoints set one frame a patch, the class of its image processor two",
    "fuyu": "its image processor cuts no patches: its processor does",
    "internvl": "its image processor alone does not cut: its processor tells it to",
    "qianfan_ocr": "its image processor alone does not cut: its processor tells it to",
}
MODEL = load_profile("llava-1.5-7b")


def cases() -> list[Any]:
    from transformers.models.auto import modeling_auto

    return [
        pytest.param(family, case, id=f"{family}-{number}")
        for family, found in image_counts.CASES.items()
        for number, case in enumerate(found)
        if family in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ]


def made_for(family: str, rule: ImageRule, height: int, width: int) -> Pictures:
    profile = msgspec.structs.replace(MODEL, model_type=family, image=rule)
    found = pictures(profile, Workload(image_height=height, image_width=width))
    assert found is not None
    return found


def config_of(family: str, case: image_counts.Case) -> Any:
    tower = case.config.get("vision_config", {})
    return transformers.AutoConfig.for_model(family, **({"vision_config": tower} if "model_type" in tower else {}))


def taken_by(config: Any) -> set[str]:
    """Arguments of the class, and of what encodes images in it."""
    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    names = set(inspect.signature(kind.forward).parameters)
    encode = getattr(kind, "get_image_features", None)
    return names | set(inspect.signature(encode).parameters if encode else ())


def shapes(inputs: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("family", "case"), cases())
def test_inputs_have_the_shapes_that_the_processor_gives(family: str, case: image_counts.Case) -> None:
    from vlm_doctor.sources.trace_pictures import image_inputs

    if family in OTHERWISE:
        pytest.skip(OTHERWISE[family])
    try:
        processor = image_counts.image_processor(case)
    except LookupError as error:
        pytest.skip(str(error))
    rule = image_counts.rule_of_files(*image_counts.files_of(case, processor, family))
    assert rule is not None
    config = config_of(family, case)
    taken = taken_by(config)
    for height, width in SIZES:
        image = Image.new("RGB", (width, height))
        try:
            real = processor(images=[[image]], return_tensors="pt")
        except (ValueError, TypeError):
            real = processor(images=[image], return_tensors="pt")
        try:
            ours = shapes(image_inputs(config, taken, None, made_for(family, rule, height, width), 1))
        except LookupError as error:
            pytest.skip(str(error))
        wanted = {name: shape for name, shape in shapes(real).items() if name in taken or name in ours}
        assert ours == wanted, (height, width)


def test_features_that_are_an_attribute_alone_are_counted() -> None:
    """transformers 5.17 gives them so to records whose class has no such field (Mistral 3, Idefics 2 and 3)."""
    from transformers.modeling_outputs import BaseModelOutput

    from vlm_doctor.sources.trace_pictures import count_features

    def encode(pixel_values: Any) -> Any:
        record = BaseModelOutput(last_hidden_state=torch.zeros(1, 64, 8))
        record.pooler_output = (torch.zeros(16, 32), torch.zeros(16, 32))
        return record

    assert count_features(encode, {"pixel_values": torch.zeros(1)}) == 32


def test_code_of_a_checkpoint_that_is_an_image_processor_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where somebody sits at the terminal who would say yes."""
    import transformers.dynamic_module_utils as dynamic

    from vlm_doctor.sources.trace_pictures import _processed

    ran = tmp_path / "ran"
    settings = {"image_processor_type": "OwnImageProcessor", "auto_map": {"AutoImageProcessor": "own.OwnImageProcessor"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    images = made_for("own", MODEL.image, 336, 336) if MODEL.image else None

    assert images is not None
    assert _processed(str(tmp_path), None, {"pixel_values"}, images, 1) is None
    assert not ran.exists()


def test_the_image_processor_is_that_of_the_commit_whose_config_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_doctor.sources.trace_pictures import image_inputs

    repo, old, new = tmp_path / "models--some--model", "a" * 40, "b" * 40
    for commit, edge in ((old, 28), (new, 56)):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        size = {"height": edge, "width": edge}
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "size": size,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        (snapshot / "preprocessor_config.json").write_text(json.dumps(settings))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(new)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # Where transformers before 5 reads it.
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    images = made_for("own", MODEL.image, 336, 336) if MODEL.image else None

    assert images is not None
    for loaded, edge in ((old, 28), (new, 56), (None, 56)):
        config = SimpleNamespace(model_type="own", _commit_hash=loaded)
        made = image_inputs(config, {"pixel_values"}, "some/model", images, 1)
        assert made["pixel_values"].shape == (1, 3, edge, edge)


def test_no_image_looks_like_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idefics leaves out images that are all zeros, which memory that was never written to may be."""
    from vlm_doctor.sources.trace_pictures import image_inputs

    assert MODEL.image is not None
    images = made_for("idefics3", MODEL.image, 336, 336)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    made = image_inputs(SimpleNamespace(model_type="idefics3"), {"pixel_values"}, None, images, 2)
    assert made["pixel_values"].shape[:2] == (2, images.sequences)
    assert made["pixel_values"].flatten(2).any(dim=-1).all()


FAMILIES = (
    "aya_vision", "blip", "chameleon", "cosmos3_omni", "deepseek_vl_hybrid", "florence2", "fuyu", "gemma3", "gemma4",
    "gemma4_unified", "git", "granite4_vision", "granite_docling", "idefics", "idefics2", "instructblip",
    "instructblipvideo", "kimi_k25", "kosmos-2", "kosmos-2.5", "lfm2_vl", "llama4", "llava_next", "llava_onevision",
    "mllama", "mistral3", "muse_glimmer", "paddleocr_vl", "pix2struct", "qwen2_vl", "qwen3_vl", "video_llama_3",
    "video_llava",
)  # fmt: skip
"""One at least for each way in which images are taken."""


@pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="the tiny models are made of the configs of transformers 5"
)
def test_every_way_to_take_images_can_be_traced(tmp_path: Path) -> None:
    from transformers.models.auto import modeling_auto

    known = [name for name in FAMILIES if name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    program = [sys.executable, str(Path(__file__).with_name("trace_families.py")), str(tmp_path), *known]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1200, check=False)
    rows = {row.pop("family"): row for row in map(json.loads, done.stdout.splitlines())}
    assert list(rows) == known, done.stderr[-2000:]
    assert {name: row for name, row in rows.items() if "error" in row or not row["tower_bytes"]} == {}
    # Begin, end and newline tokens stand in the prompt beside the features.
    assert {name: row for name, row in rows.items() if row["features"] > row["planned"]} == {}
