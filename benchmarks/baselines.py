"""What others do for the same questions, beside vlm-doctor: ten tables (E1 to E10). Needs no GPU.

    python benchmarks/baselines.py                 # all of them, as Markdown; some 15 minutes
    python benchmarks/baselines.py maps wrong      # some of them

Models are on the meta device at their true dimensions (``traced_models.py``); GLM-4V-9B and CogVLM2-19B, whose code is in
their checkpoints, are skeletons with the same names, shapes and order. Needs torch, transformers and accelerate. GPUs are
made up, 200 GiB of host memory are offered. The memory of both maps is told by the same formulas: such a table compares
maps, and says nothing of the formulas' truth (which ``glm4v_two_h200.py`` and ``frontier.py`` measure on GPUs).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

Row = list[Any]
HERE = Path(__file__).resolve().parent
RUNS = 7
RIVAL = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from traced_models import config_of
with torch.device("meta"):
    model = transformers.AutoModelForImageTextToText.from_config(config_of(sys.argv[2]), dtype=torch.bfloat16)
model.tie_weights()
memory = {number: int(size) * 2**30 for number, size in enumerate(sys.argv[3].split("+"))} | {"cpu": 200 * 2**30}
from transformers.integrations import accelerate as own
own.accelerate_max_memory = lambda *_: dict(memory)
print(own._get_device_map(model, "auto", None, None))
"""
"""The shortest way to the map of ``auto`` without weights (transformers 5)."""


def cold() -> Iterator[Row]:
    """E1: seconds to a map in a fresh process, interleaved, medians; read the ratios."""
    yield ["model, GPUs", "`auto`'s map, s", "`vlm-doctor plan`, s", "ratio", "`import torch`, s", "`python -c pass`, s"]
    doctor = [sys.executable, "-m", "vlm_doctor", "plan"]
    for name, spec, catalogued in (
        ("qwen2.5-vl-7b", "24+24", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen2.5-vl-72b", "+".join(["24"] * 8), "Qwen/Qwen2.5-VL-72B-Instruct"),
    ):
        machine = ",".join(f"{size}GiB" for size in spec.split("+"))
        commands = {
            "auto": [sys.executable, "-W", "ignore", "-c", RIVAL, str(HERE), name, spec],
            "plan": [*doctor, catalogued, "--offline", "--json", "--machine", machine],
            "torch": [sys.executable, "-c", "import torch"],
            "python": [sys.executable, "-c", "pass"],
        }
        times: dict[str, list[float]] = {which: [] for which in commands}
        for number in range(RUNS + 1):
            for which, command in commands.items():
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if number:  # the first run warms the page cache
                    times[which].append(time.perf_counter() - started)
                if done.returncode:
                    raise SystemExit(f"{which}: {done.stderr[-500:] or done.stdout[-500:]}")
        auto, plan, torch, python = (statistics.median(times[which]) for which in commands)
        yield [
            f"{name}, {len(spec.split('+'))} of 24 GiB", f"{auto:.2f}", f"{plan:.2f}", f"{auto / plan:.1f}", f"{torch:.2f}",
            f"{python:.3f}",
        ]  # fmt: skip


def _table(name: str) -> Callable[[], Iterable[Row]]:
    if name == "cold":
        return cold
    import baseline_classes
    import baseline_maps

    tables: dict[str, Callable[[], Iterable[Row]]] = {**baseline_classes.TABLES, **baseline_maps.TABLES}
    return tables[name]


NAMES = {
    "cold": "E1, time to a map",
    "maps": "E2, maps by weights",
    "recipe": "E3, CogVLM2's recipe for several GPUs",
    "hooks": "E4, hooks",
    "wrong": "E5, wrong maps",
    "headers": "E6 and E9, bytes from headers",
    "audit": "E7, classes",
    "work": "E8, work of a prompt",
    "peaks": "E10, maps at their peak",
}


def main() -> None:
    """Print tables as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(NAMES))
    wanted = parser.parse_args().tables or list(NAMES)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no table; they are {', '.join(NAMES)}")
    packages = ("torch", "transformers", "accelerate", "safetensors", "pytest-vlmgpu")
    print(f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {_version(name)}" for name in packages))
    for name in wanted:
        table = _table(name)
        print(f"\n## {NAMES[name]}\n\n{(table.__doc__ or '').partition(': ')[2]}\n", flush=True)
        for number, row in enumerate(table()):
            print("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |", flush=True)
            if not number:
                print("| " + " | ".join("---" for _ in row) + " |", flush=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of this checkout"


if __name__ == "__main__":
    main()
