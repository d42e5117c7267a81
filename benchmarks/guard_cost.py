"""What the mutation guard costs a test: ``python benchmarks/guard_cost.py [--folder CHECKPOINT] [--layers N] [--runs N]``.

Without a folder: a tiny Qwen2.5-VL with as many layers as a published one, so that modules and tensors are as many; on the
GPU if there is one. With a folder: that checkpoint, where the plan of vlm-doctor puts it. Prints the time of one look at
the model (two a test at most: after it, and before it where a wider fixture was set up), the memory that it adds, and
beside it the time of an answer of one token, the least a test can ask.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pytest_vlmgpu.models.loading import LoadedVlm, load
from pytest_vlmgpu.testing import make_tiny_vlm, tiny_image
from pytest_vlmgpu.watching import fingerprint

FAMILY = "qwen2_5_vl"
PUBLISHED_LAYERS = {"text": 28, "vision": 32}
"""Of Qwen2.5-VL-7B: num_hidden_layers and depth of its config.json."""


def many_layers(folder: Path, text_layers: int) -> LoadedVlm:
    """A tiny model with many layers; its weights are drawn, not loaded."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    make_tiny_vlm(folder, FAMILY)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = text_layers
    config.text_config.layer_types = ["full_attention"] * text_layers
    config.vision_config.depth = PUBLISHED_LAYERS["vision"]
    loaded = load(str(folder), None)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    loaded.model = AutoModelForImageTextToText.from_config(config).eval().to(device)
    loaded.device_map = {"": 0} if device != "cpu" else {}
    loaded.input_device = device
    return loaded


def planned(folder: str) -> LoadedVlm:
    from vlm_doctor import load_machine, load_profile, plan

    return load(folder, plan(load_profile(folder), load_machine("live")))


def milliseconds(action: object, runs: int) -> list[float]:
    times = []
    for _ in range(runs + 2):
        synchronize()
        started = time.perf_counter()
        action()  # type: ignore[operator]
        synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return times[2:]


def synchronize() -> None:
    for ordinal in range(torch.cuda.device_count()):
        torch.cuda.synchronize(ordinal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder")
    parser.add_argument("--layers", type=int, default=PUBLISHED_LAYERS["text"])
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        vlm = planned(options.folder) if options.folder else many_layers(Path(name), options.layers)
        first = fingerprint.take(vlm.model, vlm.processor)
        assert first is not None
        ordinals = sorted(set(vlm.device_map.values()))
        before = {ordinal: torch.cuda.memory_allocated(ordinal) for ordinal in ordinals}
        for ordinal in ordinals:
            torch.cuda.reset_peak_memory_stats(ordinal)
        looks = milliseconds(lambda: fingerprint.take(vlm.model, vlm.processor), options.runs)
        added = {ordinal: torch.cuda.max_memory_allocated(ordinal) - size for ordinal, size in before.items()}
        compares = milliseconds(lambda: fingerprint.changes(first, first), options.runs)
        image = tiny_image(336, 336)
        answers = milliseconds(lambda: vlm.generate(image, "What is this?", max_new_tokens=1), max(3, options.runs // 4))
        assert fingerprint.changes(first, fingerprint.take(vlm.model, vlm.processor)).texts == ()  # type: ignore[arg-type]
        print(f"{vlm.name}: {len(first.training)} modules, {len(first.tensors)} tensors, on {vlm.input_device}")
        for label, times in (("one look", looks), ("comparing two", compares), ("an answer of one token", answers)):
            quartiles = statistics.quantiles(times, n=4)
            print(f"{label:<24}{min(times):8.2f} ms least, {quartiles[1]:8.2f} median, {quartiles[2]:8.2f} upper quartile")
        print(f"share of that answer    {min(looks) / min(answers):8.1%}")
        print(f"memory that looks take  {added} bytes on each GPU")


if __name__ == "__main__":
    main()
