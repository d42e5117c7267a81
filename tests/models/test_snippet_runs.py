"""The Python that a plan prints is run, on tiny checkpoints, with every GPU played by the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pytest_vlmgpu.testing import TINY_FAMILIES
from vlm_doctor import Plan, Policy, Workload, load_machine, load_profile, plan
from vlm_doctor.formats.to_python import snippet
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.placement import Offload

pytestmark = pytest.mark.models


def planned(folder: Path, gpus: int) -> Plan:
    profile = load_profile(str(folder), allow_network=False)
    return plan(profile, load_machine("2x24GiB"), Workload(images=0, attention="eager"), Policy(min_gpus=gpus))


def installed() -> Libraries:
    import transformers

    packages = (Package(name="transformers", version=transformers.__version__),)
    return Libraries(python="3.11", executable="", packages=packages)


def run(source: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute a snippet; its device numbers become the CPU on the way into ``from_pretrained``."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    original = AutoModelForImageTextToText.from_pretrained
    processor = AutoProcessor.from_pretrained
    asked: list[dict[str, Any]] = []

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        asked.append(dict(kwargs))
        device_map = dict.fromkeys(kwargs.pop("device_map"), "cpu")
        return original(*args, device_map=device_map, **kwargs)

    def or_tokenizer(*args: Any, **kwargs: Any) -> Any:
        try:
            return processor(*args, **kwargs)
        except ImportError:  # Some families want torchvision for videos; the snippet is as good without.
            return AutoTokenizer.from_pretrained(*args, **kwargs)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", or_tokenizer)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", on_cpu)
    for name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    names: dict[str, Any] = {}
    exec(compile(source, "snippet.py", "exec"), names)
    (names["asked"],) = asked
    return names


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_snippet_loads_a_model_that_answers(
    family: str, gpus: int, tiny_vlms: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    made = planned(tiny_vlms[family], gpus)
    names = run(snippet(made, installed(), is_live=True), monkeypatch)

    model = names["model"]
    assert names["asked"]["device_map"] == made.device_map
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{made.dtype}"}
    assert model.config._attn_implementation == "eager"
    inputs = names["processor"](text="Hello", return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2


def test_offload_and_the_allocator_are_part_of_it(tiny_vlms: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    made = planned(tiny_vlms[TINY_FAMILIES[0]], 2)
    last = [key for key, device in made.device_map.items() if device == 1]
    changed = msgspec.structs.replace(
        made,
        device_map={**made.device_map, **dict.fromkeys(last, "cpu")},
        workload=msgspec.structs.replace(made.workload, allocator="expandable"),
        offloaded=Offload(
            keys=tuple(last), weights_bytes=1, copy_bytes=1, host_left_bytes=None, reason="", cost="Slow:\nso much."
        ),
    )
    source = snippet(changed, installed(), is_live=True)
    names = run(source, monkeypatch)

    assert "# Slow:\\nso much.\n" in source
    assert names["asked"]["device_map"] == changed.device_map
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
