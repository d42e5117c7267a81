"""Which classes of the installed transformers have fused attention, and which refuse its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vlm_doctor import load_machine
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.sources.model_files import load_profile

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from formulas_and_traces import write_checkpoint  # noqa: E402 - of the benchmarks, which import torch
from tiny_architectures import families  # noqa: E402


def attention_of(config: Any, **asked: str) -> dict[str, str]:
    """Attention of each model and model within, by ``model_type`` of its config; the outermost as ``""``."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, **asked)
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    return {part.config.model_type: part.config._attn_implementation for part in parts[::-1]} | {
        "": model.config._attn_implementation
    }


@pytest.mark.parametrize("family", families())
def test_attention_is_as_the_installed_class_has_it(family: str, tmp_path: Path) -> None:
    try:
        write_checkpoint(tmp_path, family, is_tiny=True)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        by_default = attention_of(config)
    except Exception as error:  # noqa: BLE001 - some cannot be made without packages or a vocabulary that are not here
        pytest.skip(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
    is_refused = False
    try:
        attention_of(transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="sdpa")
    except ValueError as error:
        is_refused = "scaled_dot_product_attention" in str(error)

    machine = load_machine("80GiB")
    packages = (Package(name="transformers", version=transformers.__version__),)
    machine = msgspec.structs.replace(machine, libraries=Libraries(python="3.11", executable="python", packages=packages))
    loaded = as_loaded(load_profile(str(tmp_path), allow_network=False), machine)

    assert loaded.refuses_sdpa == is_refused
    if loaded.text.body in by_default:
        assert loaded.text.is_never_fused == (by_default[loaded.text.body] == "eager")
