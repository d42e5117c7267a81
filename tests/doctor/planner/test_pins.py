"""Pins: what they may say, and that the plan follows them."""

from __future__ import annotations

import msgspec
import pytest

from vlm_doctor.errors import UsageError
from vlm_doctor.machine import Link
from vlm_doctor.planner import plan
from vlm_doctor.workload import Policy

from .profiles import BODY, glm41v_9b, machine
from .test_exact import small


def pins(**gpus: int) -> Policy:
    names = {"visual": "model.visual", "layer3": f"{BODY}.layers.3", "head": "lm_head", "body": BODY, "model": "model"}
    return Policy(pins=tuple((names.get(name, name), gpu) for name, gpu in gpus.items()))


def refusal(policy: Policy, count: int = 3) -> str:
    with pytest.raises(UsageError) as caught:
        plan(glm41v_9b(), machine([40] * count), policy=policy)
    return str(caught.value)


def test_a_pin_steers_which_gpu_takes_the_stage() -> None:
    made = plan(glm41v_9b(), machine([80, 40, 60]), policy=pins(visual=1))
    assert [stage.gpu for stage in made.stages] == [1]
    assert "model.visual is pinned to GPU 1." in made.reasons


def test_pins_spread_a_model_that_would_fit_one_gpu() -> None:
    made = plan(glm41v_9b(), machine([80, 80, 80]), policy=pins(visual=2, layer3=2, head=0))
    assert [stage.gpu for stage in made.stages] == [2, 0]
    assert made.device_map[f"{BODY}.layers.3"] == 0
    assert made.device_map["lm_head"] == 1
    assert made.reasons[0] == "2 GPUs are needed: one GPU cannot follow the pins or avoid the broken links."


def test_a_border_that_a_pin_makes_says_so() -> None:
    made = plan(glm41v_9b(), machine([80, 80]), policy=Policy(pins=((f"{BODY}.layers.3", 0), (f"{BODY}.layers.4", 1))))
    assert made.cuts[0].before == f"{BODY}.layers.3"
    assert made.cuts[0].reason.endswith(": what follows is pinned to GPU 1.")


def test_a_path_covers_every_unit_in_it() -> None:
    made = plan(glm41v_9b(), machine([80, 80]), policy=pins(body=1))
    assert [stage.gpu for stage in made.stages] == [1]


def test_a_pin_on_the_tower_covers_its_parts_when_it_is_cut() -> None:
    profile, there = small([10, 10], block_mib=[300, 300]), machine([0.6, 0.9, 0.6])
    bare = Policy(headroom_min_bytes=0, headroom_fraction=0, context_bytes=0, exclude=(1,))
    made = plan(profile, there, policy=bare)
    assert made.fits
    assert made.device_map["tower.patch_embed"] == made.device_map["tower.blocks.0"] == 0
    assert made.device_map["tower.blocks.1"] == made.device_map["tower.merger"] == made.device_map["embed"] == 1
    assert made.cuts[0].reason.startswith("GPU 0 has 614 MiB free and takes 1 block of the vision tower: ")
    assert made.reasons[-1].startswith("The vision tower is cut between its blocks, since it fits on no GPU as a whole")
    short = plan(profile, there, policy=msgspec.structs.replace(bare, pins=(("tower", 0),))).shortage
    assert short is not None
    assert short.message.endswith("Cuts between the blocks of the vision tower were allowed.")
    # Neither GPU 1 nor another one would help: the pin asks for GPU 0.
    assert [lever.change for lever in short.levers if lever.fits] == ["drop --pin tower=0"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            pins(**{"model.vis": 0}),
            "Pin model.vis=0: zai-org/GLM-4.1V-9B-Thinking has no such module; did you mean model.visual or model?",
        ),
        (
            pins(**{"layers.7": 0}),
            f"Pin layers.7=0: zai-org/GLM-4.1V-9B-Thinking has no such module; did you mean {BODY}.layers.7?",
        ),
        (
            pins(xyz=0),
            "Pin xyz=0: zai-org/GLM-4.1V-9B-Thinking has no such module; its parts are below lm_head, model.",
        ),
        (
            pins(**{"model.visual.blocks.3": 0}),
            "Pin model.visual.blocks.3=0: it is inside model.visual, which is placed as a whole; pin model.visual.",
        ),
        (pins(visual=7), "There is no GPU 7 on this machine: it has GPU 0, 1, 2."),
        (
            pins(model=0, visual=1),
            "Pins model=0 and model.visual=1 contradict each other: no cut may part model.visual, "
            f"{BODY}.embed_tokens, {BODY}.rotary_emb; pin them to one GPU.",
        ),
        (
            pins(visual=0, layer3=1, head=0),
            "Pin lm_head=0: parts before it are pinned to GPU 0 and then to GPU 1, and a GPU takes one contiguous part of "
            "the model; pin in the order of execution.",
        ),
        (
            msgspec.structs.replace(pins(visual=0, head=1), max_gpus=1),
            "The pins name 2 GPUs, and at most 1 may be used: allow more GPUs.",
        ),
        (
            msgspec.structs.replace(pins(visual=1), exclude=(1,)),
            "Pin model.visual=1: GPU 1 cannot be used (it is not among the GPUs to use); GPU 0, 2 can.",
        ),
    ],
)
def test_a_pin_that_makes_no_sense_is_one_sentence(policy: Policy, message: str) -> None:
    assert refusal(policy) == message


def test_a_pin_to_a_gpu_that_cannot_be_used_says_why() -> None:
    there = machine([40])
    broken = msgspec.structs.replace(there, gpus=(msgspec.structs.replace(there.gpus[0], error="GPU is lost"),))
    with pytest.raises(UsageError) as caught:
        plan(glm41v_9b(), broken, policy=pins(visual=0))
    assert str(caught.value) == ("Pin model.visual=0: GPU 0 cannot be used (fails when asked (GPU is lost)); no GPU can.")


def test_a_contradiction_among_many_units_names_the_first() -> None:
    tied = glm41v_9b(tied=((f"{BODY}.embed_tokens", "lm_head"),))
    with pytest.raises(UsageError, match=r"rotary_emb and 1 more; pin them to one GPU\.$"):
        plan(tied, machine([40, 40]), policy=pins(visual=0, head=1))


def test_pins_that_faulty_links_make_impossible_end_as_a_shortage() -> None:
    there = machine([40, 40], links=[Link(a=0, b=1, path="PHB")])
    gpus = (there.gpus[0], msgspec.structs.replace(there.gpus[1], recovery_action="drain_p2p"))
    made = plan(glm41v_9b(), msgspec.structs.replace(there, gpus=gpus), policy=pins(visual=0, head=1))
    assert made.shortage is not None
    assert made.shortage.message == (
        "No split of zai-org/GLM-4.1V-9B-Thinking is left: every one goes against a pin or sends data over a faulty link."
    )
    assert [(lever.change, lever.fits) for lever in made.shortage.levers] == [
        ("drop --pin model.visual=0", True),
        ("drop --pin lm_head=1", True),
    ]
