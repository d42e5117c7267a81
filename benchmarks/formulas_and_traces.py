"""Every architecture at true size: what the formulas say beside what its real code allocates, without a GPU.

    python benchmarks/formulas_and_traces.py [--out FILE] [--images N [--edge PIXELS]] [--tiny] [MODEL_TYPE ...]
    python benchmarks/formulas_and_traces.py --published [--out FILE] [NAME ...]

A checkpoint of each image-text-to-text architecture of the installed transformers is made of the dimensions that its own
configuration has by default (which do not always go together, those of towers least): headers alone, in sparse files.
Planned on one made-up GPU that takes it whole, once by formulas and scripts, once by ``--trace``: peaks without weights,
and how far apart they are. With ``--published`` the models are those of ``published_dimensions.py``, with several workloads
each. The plans are for the transformers that traces them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from published_dimensions import PUBLISHED, WORKLOADS
from tiny_architectures import families, tiny_config
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_doctor import load_machine
from vlm_doctor.machine import Libraries, Machine, Package
from vlm_doctor.planner import plan
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.tracing import trace_model
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Workload

MACHINE = "4000GiB"
POLICY = Policy(max_gpus=1, headroom_fraction=0.0, headroom_min_bytes=0)
_ITEM = {torch.bfloat16: ("BF16", 2), torch.float32: ("F32", 4), torch.int64: ("I64", 8), torch.bool: ("BOOL", 1)}


def write_checkpoint(folder: Path, config: Any) -> None:
    """A folder with config and headers: the weights are holes in the file."""
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    header: dict[str, Any] = {}
    at = 0
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        code, width = _ITEM[tensor.dtype]
        size = tensor.numel() * width
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def machine_here() -> Machine:
    """One large card, and the transformers that is installed here."""
    packages = (Package(name="transformers", version=transformers.__version__),)
    libraries = Libraries(python=platform.python_version(), executable=sys.executable, packages=packages)
    return msgspec.structs.replace(load_machine(MACHINE), libraries=libraries)


def compare(folder: Path, workload: Workload) -> dict[str, Any]:
    """A checkpoint in a folder, told and traced."""
    profile, machine = load_profile(str(folder), allow_network=False), machine_here()
    told = plan(profile, machine, workload, POLICY)
    tracing = trace_model(str(folder), profile, machine, workload, allow_network=False, deadline_s=240)
    if tracing.traces is None:
        return {"untraced": tracing.reason}
    traced = plan(profile, machine, workload, POLICY, traces=tracing.traces)
    weights = traced.stages[0].weights_bytes
    return {
        "has_script": profile.body_script is not None,
        "weights_bytes": weights,
        "told_bytes": told.stages[0].peak_bytes - weights,
        "traced_bytes": traced.stages[0].peak_bytes - weights,
    }


def compare_all(config: Any, workloads: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One checkpoint with each workload."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config)
        return {kind: compare(Path(folder), Workload(new_tokens=8, **fields)) for kind, fields in workloads.items()}


def line_of(family: str, row: dict[str, Any]) -> str:
    if "told_bytes" not in row:
        return f"{family:24} {row.get('untraced') or row.get('failed')}"
    told, traced, weights = row["told_bytes"], row["traced_bytes"], row["weights_bytes"]
    return (
        f"{family:24} weights {weights / GIB:7.2f} GiB, the rest {told / GIB:6.3f} told, {traced / GIB:6.3f} traced: "
        f"{told / traced - 1:+6.1%} of the rest, {(told - traced) / (traced + weights):+6.2%} of the peak"
    )


def published_config(name: str) -> Any:
    family, fields = PUBLISHED[name]
    return AutoConfig.for_model(family, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--text", type=int, default=2048, help="text tokens")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--edge", type=int, help="of the images, in pixels; the family's own when it is not given")
    parser.add_argument("--tiny", action="store_true", help="tiny dimensions, which always go together")
    parser.add_argument("--published", action="store_true", help="models by name, with the dimensions that they have")
    parser.add_argument("families", nargs="*")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    edges = {"image_height": options.edge, "image_width": options.edge}
    asked = {"": {"images": options.images, "text_tokens": options.text, **edges}}
    names, configs, workloads = families(), tiny_config if options.tiny else AutoConfig.for_model, asked
    if options.published:
        names, configs, workloads = list(PUBLISHED), published_config, WORKLOADS
    rows: dict[str, dict[str, Any]] = {}
    for name in options.families or names:
        try:
            found = compare_all(configs(name), workloads)
        except Exception as error:  # noqa: BLE001 - one row of a table: what failed is what it says
            found = {"": {"failed": f"{type(error).__name__}: {error}"[:300]}}
        for kind, row in found.items():
            case = f"{name}, {kind}" if kind else name
            rows[case] = row
            print(line_of(case, row), flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
