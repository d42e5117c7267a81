"""The tiny checkpoints: real classes, real processors, no network, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vlmgpu.testing import TINY_FAMILIES, make_tiny_vlm, tiny_image, write_processor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.models

_MIB = 2**20


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_checkpoint_is_loaded_by_the_auto_class_as_its_own_family(family: str, tiny_vlms: Mapping[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText

    folder = tiny_vlms[family]
    model, problems = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)

    assert model.config.model_type == family
    assert not any(problems.values())
    assert sum(file.stat().st_size for file in folder.iterdir()) < _MIB


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_parameter_is_in_the_profile_that_the_doctor_reads(family: str, tiny_vlms: Mapping[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText

    from vlm_doctor.sources.model_files import load_profile

    folder = tiny_vlms[family]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    profile = load_profile(str(folder), allow_network=False)

    assert profile.elements == sum(parameter.numel() for parameter in model.parameters())
    keys = tuple(unit.key for unit in profile.units)
    uncovered = [name for name, _ in model.named_parameters() if not _is_covered(name, keys)]
    assert uncovered == []


def _is_covered(name: str, keys: tuple[str, ...]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def test_a_seed_gives_the_same_weights_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (make_tiny_vlm(tmp_path / str(i), "llava", seed=7) / "model.safetensors" for i in range(2))
    other = make_tiny_vlm(tmp_path / "other", "llava", seed=8) / "model.safetensors"

    assert torch.rand(1) == expected
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^no tiny model of family 'bert'; there are llava, qwen2_vl, .*$"):
        make_tiny_vlm(tmp_path / "model", "bert")
    assert not (tmp_path / "model").exists()


def test_any_text_can_be_encoded_and_decoded(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    token_ids = write_processor(tmp_path, "internvl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert tokenizer.decode(tokenizer("Grüße, 你好!\n")["input_ids"]) == "Grüße, 你好!\n"
    assert tokenizer("<IMG_CONTEXT>")["input_ids"] == [token_ids["<IMG_CONTEXT>"]]


def test_an_image_depends_on_size_and_seed_alone() -> None:
    image = tiny_image(31, 17, seed=3)

    assert (image.size, image.mode) == ((31, 17), "RGB")
    assert image.tobytes() == tiny_image(31, 17, seed=3).tobytes()
    assert image.tobytes() != tiny_image(31, 17, seed=4).tobytes()
