"""From a recorded machine and a catalogue model to a plan: two real GPUs, parts of them taken, and eight free ones."""

from __future__ import annotations

from pathlib import Path

from vlm_doctor import Plan, Policy, Workload, load_machine, load_profile, plan
from vlm_doctor.units import GIB

MACHINES = Path(__file__).parents[1] / "machines"
LAYERS_OF_AUTO = 16
"""On the first GPU, as device_map="auto" places this model on these machines. Measured: benchmarks/README.md."""


def planned(machine: str, *, model: str = "zai-org/GLM-4.1V-9B-Thinking", min_gpus: int = 1) -> Plan:
    profile = load_profile(model, allow_network=False)
    return plan(profile, load_machine(str(MACHINES / f"{machine}.json")), Workload(), Policy(min_gpus=min_gpus))


def test_one_gpu_with_room_is_enough_and_it_is_the_free_one() -> None:
    made = planned("2xh200-recorded-12-and-23gib-free")

    assert made.fits
    assert [stage.gpu for stage in made.stages] == [1]
    assert made.device_map == {"": 0}


def test_a_half_taken_gpu_gets_fewer_layers_than_auto_gives_it() -> None:
    made = planned("2xh200-recorded-12-and-23gib-free", min_gpus=2)

    layers = {stage.gpu: sum(".layers." in key for key in stage.keys) for stage in made.stages}
    assert made.fits
    assert sum(layers.values()) == 40
    assert layers[0] < LAYERS_OF_AUTO


def test_the_ledger_of_a_taken_gpu_adds_up_and_names_what_others_hold() -> None:
    made = planned("2xh200-recorded-23gib-free", min_gpus=2)

    for stage in made.stages:
        assert sum(line.size_bytes for line in stage.ledger) == stage.total_bytes
        (others,) = [line.size_bytes for line in stage.ledger if line.kind == "others"]
        assert 116 * GIB < others < 117 * GIB


def test_a_model_that_one_of_eight_gpus_can_hold_leaves_the_others_alone() -> None:
    made = planned("8xh200-recorded")

    assert made.fits
    assert [stage.gpu for stage in made.stages] == [0]


def test_a_model_that_needs_two_of_eight_gpus_is_cut_once_and_crosses_nvlink() -> None:
    made = planned("8xh200-recorded", model="Qwen/Qwen2.5-VL-72B-Instruct")

    assert made.fits
    assert len(made.stages) == 2
    assert {link.nvlinks for link in load_machine(str(MACHINES / "8xh200-recorded.json")).links} == {18}
