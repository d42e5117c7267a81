"""Every architecture of the installed transformers: a row in the docs, a tiny model, a profile, a plan and a clean map."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm_doctor import Policy, Workload, load_machine, plan
from vlm_doctor.data.joins import WHOLE
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.installed_transformers import families_with_stored_names, has_flat_towers
from vlm_doctor.sources.model_profile import build_profile

if TYPE_CHECKING:
    from vlm_doctor.model import ModelProfile

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

# The tiny models are made for the classes and configs of transformers 5, as the page is.
pytest.importorskip("transformers", minversion="5.0", reason="the page and the tiny models are of transformers 5")

WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "bool": "BOOL", "uint8": "U8"}


def families() -> list[str]:
    try:
        import tiny_architectures

        return list(tiny_architectures.families())
    except ImportError:
        return []


def profile_of(model: Any) -> ModelProfile:
    """From the names of the class, tied tensors once."""
    first: dict[int, str] = {}
    kept = dict(model.state_dict())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            kept.pop(name, None)
    tensors = {
        name: StoredTensor(WORDS[str(tensor.dtype)[6:]], tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for name, tensor in kept.items()
    }
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return build_profile(
        Checkpoint(config, tensors),
        name="x",
        origin="checkpoint",
        are_towers_flat=has_flat_towers(),
        stored_names=families_with_stored_names(),
    )


def test_the_page_is_fresh() -> None:
    import make_architectures

    assert PAGE.read_text() == make_architectures.render(json.loads(make_architectures.RESULTS.read_text()))


@pytest.mark.parametrize("family", families())
def test_every_architecture_has_a_row(family: str) -> None:
    assert f"\n| `{family}` |" in PAGE.read_text(), "run tools/make_config_defaults.py and tools/make_architectures.py"


@pytest.mark.parametrize("family", families())
def test_every_architecture_is_planned_and_its_map_is_clean(family: str) -> None:
    import tiny_architectures
    import torch

    try:
        with torch.device("meta"):
            model = tiny_architectures.tiny_model(family)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    model.tie_weights()
    profile = profile_of(model)
    workload = Workload(images=int(profile.vision is not None), text_tokens=16, new_tokens=4)
    machine = load_machine("24GiB,24GiB")
    if family in WHOLE:
        assert plan(profile, machine, workload).device_map == {"": 0}
        return
    planned = plan(profile, machine, workload, Policy(min_gpus=2, max_gpus=2))

    assert planned.fits
    assert set(planned.device_map.values()) == {0, 1}
    # accelerate asks for a device of each of several names of one tensor.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    keys = tuple(planned.device_map)
    assert [name for name in names if not any(name == key or name.startswith(f"{key}.") for key in keys)] == []
    modules = dict(model.named_modules())
    assert [key for key in keys if key not in modules and key not in names] == []
    found = check_map(planned.device_map, profile, machine, workload).findings
    assert [finding.message for finding in found if finding.severity != "info"] == []
