"""A training step against recorded and measured ones, stage by stage."""

from __future__ import annotations

from functools import cache

import pytest

from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.memory import Footprint, StageNeed
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.units import MIB
from vlm_doctor.workload import Training, Workload

MODELS = {
    "qwen": "Qwen/Qwen2.5-VL-7B-Instruct",
    "glm": "zai-org/GLM-4.1V-9B-Thinking",
    "mha": "llava-hf/llava-1.5-13b-hf",
    "llava": "llava-hf/llava-1.5-7b-hf",
}
WORKSPACE_MB = 32 * MIB / 1e6
RECORDED = (
    ("qwen", "lora", 2048, (14, 14), ((10389, 10735, 10622), (11914, 13120, 13016))),
    ("qwen", "lora", 8192, (27, 1), ((20760, 22188, 21569), (16770, 22039, 16786))),
    ("qwen", "lora+", 2048, (15, 13), ((20266, 21200, 21003), (19773, 20772, 20686))),
    ("glm", "lora", 4096, (33, 7), ((19968, 20860, 20456), (12024, 14930, 14725))),
    ("mha", "lora", 4096, (19, 21), ((16160, 16819, 16552), (16923, 18138, 17469))),
    ("qwen", "full", 2048, (16, 12), ((44270, 44588, 44573), (33559, 37422, 33770))),
    ("qwen", "lora", 2048, (26, 2), ((16367, 16653, 16573), (5925, 7216, 7176))),
    ("qwen", "lora", 512, (14, 14), ((9589, 9693, 9654), (8928, 9198, 9084))),
    ("qwen", "lora", 4096, (20, 8), ((14573, 15125, 15099), (12811, 15206, 15155))),
    ("qwen", "lora", 8192, (24, 4), ((19134, 20758, 20085), (18409, 23465, 23426))),
    ("qwen", "lora", 16384, (14, 14), ((18138, 21401, 20114), (39821, 49895, 41188))),
    ("glm", "lora", 1024, (33, 7), ((17768, 18180, 17916), (6204, 6952, 6870))),
    ("glm", "lora", 4096, (20, 20), ((14045, 14860, 14389), (17963, 20525, 18378))),
    ("glm", "lora", 8192, (36, 4), ((24378, 26724, 25624), (18307, 23526, 18531))),
    ("mha", "lora", 1024, (20, 20), ((14811, 15181, 14921), (14151, 14684, 14318))),
    ("mha", "lora", 8192, (24, 16), ((22531, 23675, 23340), (16028, 18090, 16962))),
    ("qwen", "lora+", 512, (14, 14), ((11764, 12048, 12013), (11199, 11478, 11395))),
    ("qwen", "lora+", 2048, (20, 8), ((25974, 26430, 26366), (14062, 14909, 14287))),
    ("glm", "lora+", 1024, (22, 18), ((19527, 20347, 20238), (16377, 17023, 16846))),
    ("mha", "lora+", 2048, (21, 19), ((29809, 30734, 30221), (27028, 27970, 27477))),
    ("qwen", "full+", 1024, (16, 12), ((44261, 46330, 45805), (33554, 35654, 34374))),
    ("glm", "full", 2048, (20, 20), ((48935, 49088, 49088), (47145, 48492, 47429))),
    ("mha", "full", 2048, (20, 20), ((66075, 66679, 66462), (65401, 66448, 66195))),
    ("qwen", "full", 8192, (20, 8), ((53592, 56294, 53898), (30214, 40297, 38583))),
    ("llava", "lora", 2048, (16, 16), ((8717, 9121, 8869), (8153, 8812, 8271))),
    ("llava", "full", 512, (17, 15), ((36435, 36662, 36449), (31738, 31967, 31752))),
    ("qwen", "lora", 4096, (28,), ((25498, 27835, 27598),)),
    ("glm", "lora", 2048, (40,), ((25656, 27169, 26672),)),
    ("llava", "lora", 8192, (20, 6, 6), ((13732, 14584, 14384), (6025, 6526, 6472), (6563, 8890, 7240))),
    ("glm", "lora", 2048, (38, 2), ((20695, 21355, 20845), (5946, 7258, 7212))),
)
"""Model, method, text tokens, text layers of each stage; MB of each: peak allocated, peak reserved, and the least memory in
which two steps run. ``benchmarks/record_training.py --limit``, transformers 5.23, peft 0.21, torch 2.13."""
MEASURED = (
    ("qwen", "lora", 2048, (14, 14), ((10392, 10704), (11888, 13088))),
    ("qwen", "lora", 8192, (27, 1), ((20763, 22161), (16709, 21972))),
    ("qwen", "lora+", 2048, (15, 13), ((20270, 21169), (19774, 20739))),
    ("glm", "lora", 4096, (33, 7), ((19971, 20808), (11985, 14481))),
    ("mha", "lora", 4096, (19, 21), ((16161, 16869), (16839, 18153))),
    ("qwen", "full", 2048, (16, 12), ((44271, 44588), (33563, 37413))),
)
"""The same on two H200s: ``benchmarks/training_step.py``, transformers 5.17, torch 2.11."""


@cache
def profile_of(name: str) -> ModelProfile:
    return load_profile(MODELS[name], allow_network=False)


def needs(name: str, method: str, tokens: int, layers: tuple[int, ...]) -> list[StageNeed]:
    profile = profile_of(name)
    training = Training(method="lora" if method.startswith("lora") else "full", gradient_checkpointing="+" not in method)
    workload = Workload(images=0, text_tokens=tokens, training=training)
    made = Footprint(profile, workload, image_load(profile, workload), chain(profile).atoms)
    ends, seen, stage = [], 0, 0
    for position, atom in enumerate(made.atoms):
        # A stage ends with its last layer, the last one behind the head.
        if atom.layers and seen == sum(layers[: stage + 1]) and stage < len(layers) - 1:
            ends.append(position)
            stage += 1
        seen += atom.layers
    ends.append(len(made.atoms))
    return [made.detail(first, end, tokens) for first, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(("name", "method", "tokens", "layers", "stages"), RECORDED)
def test_a_recorded_step_runs_in_what_is_said_to_suffice(
    name: str, method: str, tokens: int, layers: tuple[int, ...], stages: tuple[tuple[int, int, int], ...]
) -> None:
    for need, (allocated, reserved, least) in zip(needs(name, method, tokens, layers), stages, strict=True):
        live = (need.total_bytes - need.fragmentation_bytes) / 1e6 + WORKSPACE_MB
        assert live == pytest.approx(allocated, rel=0.02)
        assert need.total_bytes / 1e6 + WORKSPACE_MB >= least
        assert need.reserved_bytes is not None
        assert need.reserved_bytes >= need.total_bytes
        assert 0.95 <= (need.reserved_bytes / 1e6 + WORKSPACE_MB) / reserved <= 1.13


@pytest.mark.parametrize(("name", "method", "tokens", "layers", "stages"), MEASURED)
def test_a_step_on_gpus_is_as_large_as_predicted(
    name: str, method: str, tokens: int, layers: tuple[int, ...], stages: tuple[tuple[int, int], ...]
) -> None:
    for need, (allocated, reserved) in zip(needs(name, method, tokens, layers), stages, strict=True):
        live = (need.total_bytes - need.fragmentation_bytes) / 1e6 + WORKSPACE_MB
        assert live == pytest.approx(allocated, rel=0.01)
        assert need.reserved_bytes is not None
        assert (need.reserved_bytes / 1e6 + WORKSPACE_MB) == pytest.approx(reserved, rel=0.05)
