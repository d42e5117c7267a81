"""Traces a tiny model of each family that is named, with an image or two for each of two prompts; run as a program.

In one process of its own, since it pretends to have a GPU: ``trace_families.py FOLDER MODEL_TYPE ...`` prints a line of
JSON for each, of what the plan counts and what the trace saw.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import transformers  # noqa: E402
from formulas_and_traces import write_checkpoint  # noqa: E402
from tiny_architectures import tiny_config  # noqa: E402

from vlm_doctor import load_machine, load_profile  # noqa: E402
from vlm_doctor.planner.image_tokens import image_load  # noqa: E402
from vlm_doctor.planner.traced_footprint import trace_request  # noqa: E402
from vlm_doctor.trace import TOWER  # noqa: E402
from vlm_doctor.workload import Workload  # noqa: E402

ONE_IMAGE = {
    "blip", "git", "florence2", "gemma4", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pix2struct",
}  # fmt: skip
"""Families whose prompts have one; of Gemma 4's tiny patches more would be too many to have data."""


def traced(folder: Path) -> dict[str, Any]:
    from vlm_doctor.sources.trace_model import Tracer

    profile = load_profile(str(folder), allow_network=False)
    workload = Workload(images=1 if folder.name in ONE_IMAGE else 2, batch=2, text_tokens=32, new_tokens=2)
    request = trace_request(profile, workload, load_machine("4000GiB"))
    fields = {name: getattr(request, name) for name in ("architecture", "dtype", "attention", "cudnn_width")}
    config = json.loads((folder / "config.json").read_text())
    layers, tower = list(request.layers), list(request.tower)
    tracer = Tracer(config, layers=layers, tower=tower, folder=str(folder), code=None, **fields)
    run = tracer.trace(tokens=request.lengths[0], batch=request.batch, steps=request.steps, pictures=request.pictures)
    return {
        "planned": image_load(profile, workload).features,
        "features": tracer.features,
        "passes": len(run["passes"]),
        "tower_bytes": sum(event[1] for event in run["events"] if event[2] == TOWER and event[1] > 0),
    }


def main(folder: Path, families: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for family in families:  # before a GPU is pretended
        (folder / family).mkdir()
        write_checkpoint(folder / family, tiny_config(family))
    for family in families:
        try:
            row = traced(folder / family)
        except Exception as error:  # noqa: BLE001 - a row of a table, which the test reads
            row = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps({"family": family, **row}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
