"""A tiny model moved between two real GPUs answers as before. Run by hand: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_doctor import Policy, Workload, check_model, load_machine, load_profile, plan, redistribute

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pytest_vlmgpu.testing import make_tiny_vlm  # noqa: E402

if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)


def places(model: Any) -> set[int]:
    return {tensor.device.index for tensor in (*model.parameters(), *model.buffers())}


def answer(model: Any) -> Any:
    tokens = torch.arange(20, 40, device=model.device)[None]
    with torch.no_grad():
        return model(input_ids=tokens).logits.float().cpu()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_logits_are_the_same_on_one_gpu_on_two_and_back(family: str, tmp_path: Path) -> None:
    folder = make_tiny_vlm(tmp_path, family)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, device_map={"": 0}).eval()
    before = answer(model)
    profile, machine = load_profile(str(folder)), load_machine("live")
    gpus = tuple(gpu.index for gpu in machine.gpus[:2])

    for count in (2, 1, 2):
        wanted = plan(profile, machine, Workload(), Policy(min_gpus=count, max_gpus=count, gpus=gpus))
        redistribute(model, wanted)
        assert len(places(model)) == count
        assert torch.allclose(answer(model), before, rtol=1e-3, atol=1e-3)
        assert check_model(model).is_clean


def test_memory_of_the_gpu_that_was_left_is_given_back(tmp_path: Path) -> None:
    folder = make_tiny_vlm(tmp_path, "llava")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, device_map={"": 0}).eval()
    held = torch.cuda.memory_allocated(0)
    wanted = plan(load_profile(str(folder)), load_machine("live"))

    redistribute(model, wanted, devices=["cuda:1"])

    assert places(model) == {1}
    assert torch.cuda.memory_allocated(0) < held
