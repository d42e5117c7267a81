"""What ``device_map="auto"`` would have done, beside a plan: real models of the catalogue on machines that were recorded or
described."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from vlm_doctor import Policy, Workload
from vlm_doctor.machine import Host, Libraries, Machine, Package
from vlm_doctor.model import ModelProfile, Registered
from vlm_doctor.placement import AutoPlacement, Plan
from vlm_doctor.planner import auto as auto_module
from vlm_doctor.planner import plan
from vlm_doctor.planner.auto_replay import AutoError
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.units import GIB, MIB

from .profiles import machine as scarce

MACHINES = Path(__file__).parents[2] / "machines"
LLAVA_7B = "llava-1.5-7b"
GLM41V, GLM4V, COGVLM2, QWEN72B, LLAVA, INTERNVL = (
    "zai-org/GLM-4.1V-9B-Thinking",
    "THUDM/glm-4v-9b",
    "THUDM/cogvlm2-llama3-chat-19B",
    "Qwen/Qwen2.5-VL-72B-Instruct",
    "llava-hf/llava-1.5-13b-hf",
    "OpenGVLab/InternVL3-8B",
)


def machine(spec: str, transformers: str | None = None, **fields: object) -> Machine:
    found = load_machine(spec)
    if transformers is not None:
        packages = (Package(name="transformers", version=transformers),)
        fields["libraries"] = Libraries(python="3.11", executable="", packages=packages)
    return msgspec.structs.replace(found, **fields)


def profile(name: str) -> ModelProfile:
    return load_profile(name, allow_network=False)


def planned(name: str, on: Machine, policy: Policy | None = None, **workload: object) -> Plan:
    asked = msgspec.convert(workload, Workload)
    return plan(profile(name), on, asked, policy or Policy())


def auto_of(name: str, on: Machine, policy: Policy | None = None, **workload: object) -> AutoPlacement:
    found = planned(name, on, policy, **workload).auto
    assert found is not None
    return found


@pytest.mark.parametrize(("free_gib", "is_embedding_apart"), [((1.6, 20), True), ((2, 20), False), ((2, 17), False)])
def test_it_needs_what_the_judge_of_its_map_says(free_gib: tuple[float, float], is_embedding_apart: bool) -> None:
    """Where the prompt is embedded on another GPU than the main one, to which logits come back; and where the plan itself
    has to cut the tower.
    """
    workload, there = Workload(text_tokens=4000, logits="forward"), scarce(free_gib)
    made = plan(profile(LLAVA_7B), there, workload)
    assert made.auto is not None
    device_map = {key: share.gpu for share in made.auto.shares for key in share.keys}
    assert (device_map.get("model.language_model") == 1) == is_embedding_apart
    judged = check_map(device_map, profile(LLAVA_7B), there, workload)
    assert [share.need_bytes for share in made.auto.shares] == [
        pytest.approx(use.need_bytes, abs=32 * MIB) for use in judged.devices
    ]


def test_the_map_that_was_measured() -> None:
    """transformers 5.17 gave GPU 0 of this machine 16 layers of this model (benchmarks/README.md)."""
    recorded = load_machine(str(MACHINES / "2xh200-recorded-12-and-23gib-free.json"))
    found = auto_of(GLM41V, recorded)

    assert found.library == "transformers 5.17.0"
    assert [share.layers for share in found.shares] == [16, 24]
    assert found.fits


@pytest.mark.parametrize(
    ("version", "weights"),
    [
        ("4.57.6", [16.71, *[17.98] * 6, 12.13]),
        ("5.17.0", [16.71, *[17.98] * 6, 12.13]),
        ("5.23.0", [16.71, *[19.62] * 6, 2.32]),
        (None, [16.71, *[19.62] * 6, 2.32]),
        ("unreadable", [16.71, *[17.98] * 6, 12.13]),
    ],
)
def test_each_version_shares_out_in_its_own_way(version: str | None, weights: list[float]) -> None:
    found = auto_of(QWEN72B, machine("8x24GiB", version))

    assert found.library == f"transformers {version or '5'}"
    assert [round(share.weights_bytes / GIB, 2) for share in found.shares] == weights
    assert found.shares[0].layers == 8


def test_keys_and_bytes_of_all_shares_are_the_model() -> None:
    found = auto_of(QWEN72B, machine("8x24GiB"))

    keys = [key for share in found.shares for key in share.keys]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "model.visual"
    assert keys[-1] == "lm_head"
    assert sum(share.weights_bytes for share in found.shares) == profile(QWEN72B).stored_bytes


def test_a_block_cut_in_two_is_predicted_to_fail() -> None:
    found = auto_of(GLM4V, machine("4x24GiB"))

    assert [(cut.key, cut.devices, cut.fails) for cut in found.cut_blocks] == [
        ("transformer.vision.transformer.layers.35", ("GPU 2", "GPU 3"), True)
    ]
    assert found.parted == ("transformer.vision.boi", "transformer.vision.eoi")
    assert not found.fits
    assert found.longest_prompt_tokens is None
    assert found.verdict == (
        "auto cuts transformer.vision.transformer.layers.35 between GPU 2 and GPU 3, which raises "
        '"Expected all tensors to be on the same device".'
    )


def test_more_than_one_cut_is_counted() -> None:
    assert "layers.0 (and 1 more) between" in auto_of(COGVLM2, machine("8x24GiB")).verdict


def test_a_bare_parameter_parted_from_what_it_is_joined_with_is_predicted_to_fail() -> None:
    """The border falls between two blocks; what is behind the blocks is on another GPU than boi and eoi (GLM-4#350)."""
    found = auto_of(GLM4V, machine("10GiB,10GiB,10GiB"))

    assert found.cut_blocks == ()
    assert not found.fits
    assert found.verdict == (
        "auto parts transformer.vision.boi and transformer.vision.eoi from the output they are joined with, which raises "
        '"Expected all tensors to be on the same device".'
    )


def test_a_bare_parameter_that_the_code_of_the_checkpoint_moves_itself_is_no_fault() -> None:
    where = machine("10GiB,10GiB,10GiB")
    ends = "transformer.vision.boi", "transformer.vision.eoi"
    for moved in (ends, ends[1:], ()):
        newer = msgspec.structs.replace(profile(GLM4V), moved_joins=(*moved, "transformer.vision"))
        found = plan(newer, where).auto
        assert found is not None
        assert found.parted == tuple(end for end in ends if end not in moved)


def test_what_lands_on_the_cpu_and_on_disk_is_said_with_the_gpus_sufficing() -> None:
    host = Host(os="Linux", kernel="6", memory_available_bytes=64 * GIB)
    small = msgspec.structs.replace(host, memory_available_bytes=GIB // 2)

    assert auto_of(LLAVA, machine("24GiB,12GiB", host=host)).verdict == (
        "auto lacks 929 MiB on GPU 1 for this prompt and leaves 1.5 GiB on the CPU, which slows every token, although the "
        "GPUs suffice."
    )
    on_disk = auto_of(LLAVA, machine("24GiB,12GiB", host=small))
    assert on_disk.disk_bytes > 0
    assert " on disk, which" in on_disk.verdict
    assert "although" not in auto_of(QWEN72B, machine("2x24GiB", host=host)).verdict


def test_what_lands_on_the_cpu_though_no_gpu_overflows_is_said() -> None:
    host = Host(os="Linux", kernel="6", memory_available_bytes=200 * GIB)
    found = auto_of(QWEN72B, machine("24GiB,12GiB", host=host))

    assert found.verdict.startswith("auto leaves 106.9 GiB on the CPU, which")


def test_an_offload_of_the_plans_own_is_no_reproach() -> None:
    host = Host(os="Linux", kernel="6", memory_available_bytes=64 * GIB)
    found = planned(LLAVA, machine("12GiB,12GiB", host=host), Policy(offload=True))

    assert found.offloaded is not None
    assert found.auto is not None
    assert found.auto.cpu_bytes > 0
    assert "although" not in found.auto.verdict


def test_a_gpu_that_would_overflow_is_named() -> None:
    recorded = load_machine(str(MACHINES / "2xh200-recorded-12-and-23gib-free.json"))
    found = auto_of(LLAVA, recorded)

    assert min(share.left_bytes for share in found.shares) < 0
    assert found.verdict.startswith("auto lacks ")
    assert found.verdict.endswith(" on GPU 0 for this prompt.")


def test_a_shorter_prompt_is_put_in_numbers() -> None:
    made = planned(GLM41V, machine("24GiB,12GiB"))
    found = made.auto

    assert found is not None
    assert found.longest_prompt_tokens is not None
    assert made.longest_prompt_tokens is not None
    ratio = made.longest_prompt_tokens / found.longest_prompt_tokens
    assert ratio > 1.5
    assert f"of about {found.longest_prompt_tokens:,} tokens on 2 GPUs; this plan {made.longest_prompt_tokens:,} on 1" in (
        found.verdict
    )
    assert found.verdict.endswith(f" ({ratio:.1f} x).")


def test_a_prompt_beyond_the_longest_does_not_fit() -> None:
    asked = [auto_of(GLM41V, machine("24GiB,12GiB"), text_tokens=tokens) for tokens in (*range(6000, 9001, 500), 14_000)]

    fits = [found.fits for found in asked]
    assert fits == sorted(fits, reverse=True)
    assert True in fits
    assert False in fits


def test_auto_is_not_blamed_for_what_it_does_as_well() -> None:
    assert auto_of(QWEN72B, machine("2xH200")).verdict.endswith("on 2: no worse.")
    assert auto_of(QWEN72B, machine("8x24GiB")).verdict.endswith("on 7, and each token passes 1 GPU fewer.")


def test_without_a_plan_there_is_nothing_to_compare() -> None:
    found = auto_of(GLM41V, machine("2x24GiB"), Policy(headroom_fraction=0.02, max_gpus=1), text_tokens=40_000)

    assert found.verdict == "auto would put it on 2 GPUs."


@pytest.mark.parametrize(
    ("name", "spec"), [(GLM41V, "2x24GiB"), (LLAVA, "2x24GiB"), (INTERNVL, "24GiB,12GiB"), (COGVLM2, "2x40GiB")]
)
def test_the_longest_prompt_fits_by_the_formulas(name: str, spec: str) -> None:
    """Where auto gives each GPU a run of the chain, the plan's own judge decides; elsewhere the formulas of its parts."""
    found = auto_of(name, machine(spec))

    assert found.longest_prompt_tokens is not None
    assert all(share.left_bytes >= 0 for share in found.shares)


def test_gpus_that_the_plan_must_not_use_are_not_given_to_auto() -> None:
    found = auto_of(GLM41V, machine("4x24GiB"), Policy(gpus=(2, 3)))

    assert [share.gpu for share in found.shares] == [2, 3]


def test_a_gpu_that_gets_nothing_needs_nothing() -> None:
    found = auto_of(GLM41V, machine("8x24GiB"))

    assert [share.need_bytes for share in found.shares][-2:] == [0, 0]
    assert [share.keys for share in found.shares][-2:] == [(), ()]


def test_pins_bind_the_plan_and_not_auto() -> None:
    found = auto_of(GLM41V, machine("2x24GiB"), Policy(pins=(("model.visual", 1),)))

    assert found.fits
    assert "model.visual" in found.shares[0].keys


def test_unified_memory_leaves_no_cpu_to_spill_to() -> None:
    gb10 = load_machine(str(MACHINES / "gb10-unified.json"))
    found = auto_of(QWEN72B, gb10)

    assert found.cpu_bytes == 0


@pytest.mark.parametrize(
    ("changed", "workload", "why"),
    [
        ({"quantization": "awq"}, {}, "quantized with awq"),
        ({}, {"quantization": "nf4"}, "loading in nf4"),
        ({"registered": {}}, {}, "is not known for transformers 5"),
    ],
)
def test_what_cannot_be_known_is_said(changed: dict[str, object], workload: dict[str, object], why: str) -> None:
    known = msgspec.structs.replace(profile(GLM41V), **changed)
    found = plan(known, machine("2x24GiB"), msgspec.convert(workload, Workload), Policy()).auto

    assert found is not None
    assert found.unknown is not None
    assert why in found.unknown
    assert found.verdict == f"Not known: {found.unknown}."
    assert found.shares == ()


def test_without_gpus_nothing_is_known() -> None:
    none = load_machine(str(MACHINES / "laptop-no-gpu.json"))

    assert auto_of(GLM41V, none).unknown == "no GPU can be used"


def test_where_auto_raises_that_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AutoError("looks for x")

    monkeypatch.setattr(auto_module, "replay", fails)

    found = auto_of(GLM41V, machine("2x24GiB"))
    assert found.verdict == "auto looks for x."
    assert not found.fits


def test_a_cut_layer_counts_once_and_needs_room_on_both_sides() -> None:
    """A class whose blocks are not protected: one list entry for each half of every layer."""
    whole = profile(GLM41V)
    halves: list[Registered] = []
    for item in whole.registered["5"]:
        if item.unit.role == "layer":
            for half in ("self_attn", "mlp"):
                parameters = {dtype: count // 2 for dtype, count in item.unit.parameters.items()}
                unit = msgspec.structs.replace(item.unit, key=f"{item.unit.key}.{half}", parameters=parameters)
                halves.append(msgspec.structs.replace(item, unit=unit, block=""))
        else:
            halves.append(item)
    known = msgspec.structs.replace(whole, registered={"5": tuple(halves)})
    found = [plan(known, machine(f"{free}GiB,24GiB"), Workload(), Policy()).auto for free in (9, 9.2, 9.4, 9.6, 9.8)]

    cuts = [cut for auto in found if auto is not None for cut in auto.cut_blocks]
    assert cuts
    assert all(cut.fails and cut.devices == ("GPU 1", "GPU 0") for cut in cuts)
    assert all(sum(share.layers for share in auto.shares) == 40 for auto in found if auto is not None)
