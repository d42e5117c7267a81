"""The plugin as its users use it, on real GPUs, with the model that PYTEST_VLMGPU_MODEL names.

Run by hand: ``PYTEST_VLMGPU_MODEL=FOLDER pytest tests/gpu``. ``benchmarks/glm4v_two_h200.py`` makes a model and runs them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.testing import tiny_image

if TYPE_CHECKING:
    from pytest_vlmgpu.models.loading import LoadedVlm

pytestmark = pytest.mark.gpu

if "PYTEST_VLMGPU_MODEL" not in os.environ:
    pytest.skip("set PYTEST_VLMGPU_MODEL to the folder of a checkpoint", allow_module_level=True)

_NO_MACHINE_HAS_IT = 1000


def _devices(model: Any) -> set[str]:
    return {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}


def test_an_image_is_described_the_same_each_time(vlm: LoadedVlm) -> None:
    answers = {vlm.generate(tiny_image(336, 336), "What is this?", max_new_tokens=8) for _ in range(2)}

    assert len(answers) == 1
    assert len(answers.pop()) == 8


def test_the_model_is_where_the_plan_puts_it(vlm: LoadedVlm) -> None:
    expected = {f"cuda:{ordinal}" for ordinal in vlm.device_map.values()} or {"cpu"}

    assert _devices(vlm.model) == expected
    assert len(vlm.gpus) == len(set(vlm.device_map.values()))


@pytest.mark.vlm_requires(gpus=2)
def test_a_model_on_two_gpus_answers_about_two_images(vlm: LoadedVlm) -> None:
    pictures = [tiny_image(336, 336, seed=seed) for seed in (1, 2)]

    assert len(vlm.generate(pictures, "What differs?", max_new_tokens=8)) == 8
    assert len(_devices(vlm.model)) >= 2


@pytest.mark.vlm_requires(gpus=2)
def test_the_predicted_peak_is_close_to_the_measured_one(vlm: LoadedVlm) -> None:
    import torch

    ordinals = vlm.ordinals
    for ordinal in ordinals:
        torch.cuda.reset_peak_memory_stats(ordinal)
    vlm.generate(tiny_image(1008, 1008), "x" * 512, max_new_tokens=256)

    measured = vlm.peak_bytes()
    for stage, ordinal in zip(vlm.gpus, ordinals, strict=True):
        assert measured[ordinal] == pytest.approx(stage.peak_bytes, rel=0.05)


@pytest.mark.vlm_requires(gpus=4, vram_gib=_NO_MACHINE_HAS_IT)
def test_what_no_machine_has_is_skipped(vlm: LoadedVlm) -> None:
    pytest.fail("this test must have been skipped")
