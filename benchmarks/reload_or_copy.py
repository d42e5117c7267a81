"""What a test that may change a shared model costs: loading the model again, against a private copy made beforehand.

``python benchmarks/reload_or_copy.py`` on a CPU, with a model of 1.6 GB that is in the page cache; ``--device cuda:0``
copies on a GPU, where the copy takes as much memory again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from pytest_vlmgpu.models.loading import load, unload
from pytest_vlmgpu.testing import make_tiny_vlm

ROUNDS = 5


def large_model(folder: Path) -> int:
    """A random Qwen2.5-VL with 400 million parameters; returns its bytes."""
    make_tiny_vlm(folder, "qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text.update(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    text.update(num_key_value_heads=16, rope_scaling={"rope_type": "default", "mrope_section": [16, 8, 8]})
    text.pop("layer_types", None)
    config["vision_config"]["out_hidden_size"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    loads, copies = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = large_model(folder)

        def from_disk() -> Any:
            vlm = load(str(folder), None)
            vlm.model.to(device)
            # The weights are mapped: they are read when they are used.
            sum(float(parameter.sum()) for parameter in vlm.model.parameters())
            return vlm

        for _ in range(ROUNDS):
            seconds, vlm = timed(from_disk, device)
            loads.append(seconds)
            seconds, other = timed(partial(copy.deepcopy, vlm.model), device)
            copies.append(seconds)
            del other
            unload(vlm)
    for name, values in (("load again", loads), ("copy", copies)):
        print(f"{name}: median {statistics.median(values):.2f} s of {sorted(round(value, 2) for value in values)}")
    print(f"{size / 1e9:.1f} GB on {device}")


if __name__ == "__main__":
    main()
