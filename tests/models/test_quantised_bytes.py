"""Planned bytes beside those that bitsandbytes really left in memory, as benchmarks/quantised.py recorded them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vlm_doctor import Workload, load_machine, load_profile
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.planner.weights import unit_bytes
from vlm_doctor.workload import Quantization

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Rotary tables of Llama 4, which are no weights; torch says so once a process.
    pytest.mark.filterwarnings("ignore:Casting complex values"),
]
pytest.importorskip("transformers", minversion="5.0", reason="the tiny models are of transformers 5")

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "benchmarks" / "results" / "quantised-cpu.json").read_text())["rows"]
METHODS: dict[str, Quantization] = {"bnb-int8": "int8", "bnb-nf4": "nf4"}
LOADED: dict[str, dict[Quantization, int]] = {}
for row in ROWS:
    if row["method"] in METHODS and row["step"] == "load":
        LOADED.setdefault(row["family"], {})[METHODS[row["method"]]] = row["loaded_bytes"]
sys.path[:0] = [str(ROOT / "benchmarks")]


@pytest.mark.parametrize("family", LOADED)
def test_planned_bytes_are_those_that_were_loaded(family: str, tmp_path: Path) -> None:
    import tiny_architectures
    import torch
    import transformers

    model: Any = tiny_architectures.tiny_model(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    packages = (Package(name="transformers", version=transformers.__version__),)
    libraries = Libraries(python="3", executable="python", packages=packages)
    profile = as_loaded(load_profile(str(tmp_path)), msgspec.structs.replace(load_machine("80GiB"), libraries=libraries))

    for quantization, loaded_bytes in LOADED[family].items():
        workload = Workload(quantization=quantization)
        planned = sum(unit_bytes(unit, profile, workload) for unit in profile.units)
        assert planned == pytest.approx(loaded_bytes, rel=0.001), quantization
