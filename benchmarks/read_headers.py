"""Time to read the headers of a large sharded checkpoint, beside the safetensors library, interleaved.

Run: ``python benchmarks/read_headers.py``. Needs no GPU; the shards are sparse files with the true headers of
Qwen2.5-VL-72B (1,353 tensors in 31 files, from the catalogue).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vlm_doctor.sources.catalogue import find_entry
from vlm_doctor.sources.checkpoint_folder import INDEX, join_shards, read_folder
from vlm_doctor.sources.safetensors_headers import read_header

MODEL = "Qwen/Qwen2.5-VL-72B-Instruct"
SHARDS = 31
RUNS = 15


def write(folder: Path) -> list[Path]:
    """Write the shards, each with its share of the tensors."""
    entry = find_entry(MODEL)
    if entry is None:
        raise SystemExit(f"{MODEL} is not in the catalogue")
    checkpoint = entry.checkpoint()
    tensors = list(checkpoint.tensors.items())
    weight_map: dict[str, str] = {}
    files = []
    for number in range(SHARDS):
        path = folder / f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors[number::SHARDS]:
            begin, end = end, end + tensor.stored_bytes
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        files.append(path)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
    return files


def by_library(files: list[Path]) -> int:
    """Names, types and shapes as the safetensors library gives them."""
    from safetensors import safe_open

    count = 0
    for path in files:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                count += len(part.get_shape()) > 0 and bool(part.get_dtype())
    return count


def main() -> None:
    """Print medians in milliseconds, and the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write(folder)
        rivals: dict[str, Callable[[], object]] = {
            "headers": lambda: join_shards({path.name: read_header(path) for path in files}),
            "whole folder": lambda: read_folder(folder),
            "safetensors": lambda: by_library(files),
        }
        times: dict[str, list[float]] = {rival: [] for rival in rivals}
        for _ in range(RUNS):
            for rival, call in rivals.items():
                started = time.perf_counter()
                call()
                times[rival].append(1000 * (time.perf_counter() - started))
        medians = {rival: statistics.median(values) for rival, values in times.items()}
        for rival, median in medians.items():
            print(f"{rival:14}{median:8.2f} ms   (best {min(times[rival]):.2f})")
        print(f"library / headers: {medians['safetensors'] / medians['headers']:.2f}")


if __name__ == "__main__":
    main()
