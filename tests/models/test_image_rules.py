"""The rule of each family for images, against the processors of the installed transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pytest_vlmgpu.testing import TINY_FAMILIES
from vlm_doctor.cli import main
from vlm_doctor.data.image_rules import ASSUMED, IMAGE_RULES, NO_IMAGES
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.probes.loading import load_processor, prompt_text
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlm_doctor.image_rule import ImageRule

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]
import image_counts  # noqa: E402 - of the benchmarks

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")
IS_NEW = int(transformers.__version__.partition(".")[0]) >= 5

SIZES = ((30, 500), (448, 448), (97, 31), (500, 333), (1080, 1920), (2000, 300))
"""Height and width in pixels; ``tests/doctor/model`` holds the rules against recorded counts of more."""
DEAF = {("glm4v", True), ("idefics3", True)}
MANY = tuple((height, width) for height in (64, 211, 640, 1333, 4096, 7000) for width in (50, 333, 720, 2160, 3841, 9001))
"""For processors that count without pixels."""


def families() -> list[str]:
    from transformers.models.auto import modeling_auto

    return sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def cases() -> list[Any]:
    known = set(families())
    return [
        pytest.param(family, case, id=f"{family}-{number}")
        for family, found in image_counts.CASES.items()
        for number, case in enumerate(found)
        if family in known
    ]


def built(family: str, case: image_counts.Case) -> tuple[Any, ImageRule]:
    try:
        images = image_counts.image_processor(case)
        around = image_counts.processor(case, images)
    except LookupError as error:
        pytest.skip(str(error))
    rule = image_counts.rule_of_files(*image_counts.files_of(case, images, family))
    assert rule is not None
    return around, rule


ANY_MODEL = load_profile("llava-1.5-7b")


def load(family: str, rule: ImageRule, height: int, width: int) -> Any:
    profile = msgspec.structs.replace(ANY_MODEL, model_type=family, image=rule)
    return image_load(profile, Workload(image_height=height, image_width=width))


@pytest.mark.parametrize(("family", "case"), cases())
def test_images_are_counted_as_the_processor_counts_them(family: str, case: image_counts.Case) -> None:
    around, rule = built(family, case)
    for height, width in SIZES:
        real = image_counts.taken(around, rule.patch, height, width)
        if real is None:
            continue
        tokens, sequences, patches = real
        ours = load(family, rule, height, width)
        if tokens is not None:
            assert 0 <= ours.tokens - tokens - case.outside <= case.spare, (height, width)
        assert (ours.sequences, ours.patches - rule.extra_patches) == (sequences, patches), (height, width)


@pytest.mark.parametrize(("family", "case"), cases())
def test_images_are_counted_as_the_processor_plans_them(family: str, case: image_counts.Case) -> None:
    around, rule = built(family, case)
    planned = image_counts.planned(around, MANY)
    if not IS_NEW and (family, bool(case.settings)) in DEAF:
        pytest.skip("4.57 plans without the settings of its own image processor")
    if not planned:
        pytest.skip(f"{case.processor} counts no images without pixels")
    gaps = {load(family, rule, *size).tokens - tokens for size, tokens in planned.items()}
    # What the processor leaves to the template, or to its own text, is the same for every size.
    assert len(gaps) == 1 or case.spare, sorted(gaps)
    assert min(gaps) >= 0


def test_every_architecture_of_the_installed_version_has_a_rule() -> None:
    assert set(families()) - set(IMAGE_RULES) - NO_IMAGES - ASSUMED == set(), (
        "a new architecture: read its processor and add it to doctor/data/image_rules.py and benchmarks/image_counts.py"
    )


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize(("width", "height"), [(40, 40), (100, 300), (700, 500)])
def test_a_plan_counts_images_as_the_checkpoint_s_own_processor(
    tiny_vlms: Mapping[str, Path], family: str, width: int, height: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder = tiny_vlms[family]
    config = transformers.AutoConfig.from_pretrained(folder)
    processor = load_processor(transformers, str(folder), None, config, trust_remote_code=False)
    picture = Image.new("RGB", (width, height))
    prompt = processor(text=[prompt_text(processor, 1, "x")], images=[[picture]], return_tensors="pt")["input_ids"][0]
    bare = processor.tokenizer(prompt_text(processor, 0, "x"))["input_ids"]

    size = f"{width}x{height}"
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(folder), "--machine", "24GiB", "--images", "1", "--image-size", size, "--json"])

    planned = json.loads(capsys.readouterr().out)["plan"]["image_tokens"]
    newline = int(family in ("llava", "internvl"))  # Of their template, behind the image.
    assert planned == len(prompt) - len(bare) - newline
