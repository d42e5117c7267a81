"""The chain of stages as a picture, and what ``auto`` would have done: texts of real plans, and what each must obey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from vlm_doctor import Policy, Workload, load_machine, load_profile
from vlm_doctor.answer import plan_report as report_of
from vlm_doctor.formats import render
from vlm_doctor.formats.chain_text import parts_of, parts_of_keys, write_auto, write_chain
from vlm_doctor.formats.page import Page
from vlm_doctor.machine import Host
from vlm_doctor.placement import AutoPlacement, Cut, LedgerLine, Offload, Plan, Stage
from vlm_doctor.report import Report
from vlm_doctor.units import GIB
from vlm_doctor.workload import Training

Golden = Callable[[str, str], None]


def report(model: str, spec: str, policy: Policy, **workload: Any) -> Report:
    machine = load_machine(spec)
    if policy.offload:
        machine = msgspec.structs.replace(machine, host=Host(os="Linux", kernel="6", memory_available_bytes=64 * GIB))
    profile = load_profile(model, allow_network=False)
    return report_of(profile, machine, Workload(**workload), policy)


@pytest.mark.parametrize(
    ("name", "model", "spec", "policy"),
    [
        ("chain_glm4v_4x24", "THUDM/glm-4v-9b", "4x24GiB", Policy(min_gpus=4)),
        ("chain_72b_8x24", "Qwen/Qwen2.5-VL-72B-Instruct", "8x24GiB", Policy()),
        ("chain_llava_offload", "llava-hf/llava-1.5-13b-hf", "2x12GiB", Policy(offload=True)),
        ("chain_internvl_nvlink", "OpenGVLab/InternVL3-8B", "4x3090:nvlink=0-1,2-3", Policy(min_gpus=3)),
    ],
)
def test_whole_text_of_a_real_plan(name: str, model: str, spec: str, policy: Policy, golden: Golden) -> None:
    golden(f"terminal/{name}.txt", render(report(model, spec, policy), "terminal"))


@pytest.mark.parametrize(
    ("training", "line"),
    [
        (Training(), "Training  LoRA adapters of rank 16, adamw, gradient checkpointing"),
        (
            Training(method="full", optimizer="adamw_8bit", gradient_checkpointing=False),
            "Training  all weights, adamw_8bit, all activations kept",
        ),
    ],
)
def test_a_training_step_is_described_and_makes_no_tokens(training: Training, line: str) -> None:
    text = render(report("zai-org/GLM-4.1V-9B-Thinking", "8x80GiB", Policy(), images=0, training=training), "terminal")
    assert f"  {line}\n" in text
    assert "new tokens" not in text
    assert "Or, with the rest as asked: batch " in text


def test_what_no_split_can_avoid_is_named_after_what_is_asked() -> None:
    model, machine = "Qwen/Qwen2.5-VL-72B-Instruct", "4x24GiB"
    text = render(report(model, machine, Policy(), training=Training(method="full")), "terminal")
    assert " Weights and optimizer states alone take " in " ".join(text.split())
    assert " Weights and KV cache alone take " in " ".join(render(report(model, machine, Policy()), "terminal").split())


def chain(plan: Plan, *, width: int = 80) -> list[str]:
    page = Page(width=width, is_unicode=False)
    write_chain(page, plan)
    return page.render().splitlines()


def test_one_line_where_it_fits(plan: Plan) -> None:
    assert chain(plan) == [
        "Chain",
        "  GPU 0 [vision, embedding, layers 0-9] --PHB--> GPU 1 [layers 10-39, head]",
    ]


def test_it_breaks_before_an_arrow_and_between_parts(plan: Plan) -> None:
    assert chain(plan, width=40) == [
        "Chain",
        "  GPU 0 [vision, embedding, layers 0-9]",
        "  --PHB--> GPU 1 [layers 10-39, head]",
    ]
    tight = plan.stages[0].ledger
    long = msgspec.structs.replace(
        plan.stages[0], ledger=(*tight, *(line(f"weights: part number {number}") for number in range(3)))
    )
    lines = chain(msgspec.structs.replace(plan, stages=(long, plan.stages[1])), width=40)
    assert lines[2].startswith("      part number")
    assert max(map(len, lines)) <= 40


def line(label: str) -> LedgerLine:
    return LedgerLine(kind="weights", label=label, size_bytes=1, source="")


def test_one_gpu_is_no_chain(plan: Plan) -> None:
    page = Page()
    write_chain(page, msgspec.structs.replace(plan, stages=plan.stages[:1], cuts=()))

    assert page.render() == "\n"


def test_host_memory_is_the_last_link(plan: Plan) -> None:
    offloaded = Offload(
        keys=("model.layers.30", "model.layers.31", "model.norm", "lm_head"),
        weights_bytes=1, copy_bytes=1, host_left_bytes=None, reason="", cost="",
    )  # fmt: skip
    one = msgspec.structs.replace(plan, stages=plan.stages[:1], cuts=(), offloaded=offloaded)

    assert chain(one)[1:] == [
        "  GPU 0 [vision, embedding, layers 0-9]",
        "  --host--> CPU [layers 30-31, norm, lm_head]",
    ]


def stage(keys: tuple[str, ...], *labels: str) -> Stage:
    ledger = tuple(line(f"weights: {label}") for label in labels)
    return Stage(gpu=0, uuid="", name="", keys=keys, ledger=ledger, total_bytes=1)


def test_parts_are_short_and_in_the_order_of_the_ledger() -> None:
    layers = tuple(f"model.layers.{number}" for number in (7, 0, 1, 2))
    keys = ("model.visual", "model.proj", "model.x", "model.embed", *layers, "model.norm", "lm_head")
    whole = stage(keys, "vision tower", "projector", "other", "embedding", "4 layers", "final norm", "head")

    assert parts_of(whole) == ["vision", "projector", "embedding", "layers 0-2 and 7", "norm", "head"]
    assert parts_of(stage((), "4 layers")) == ["4 layers"]
    assert parts_of(stage(("model.layers.3",), "1 layer")) == ["layer 3"]
    assert parts_of(stage(())) == []


def test_a_broken_tower_names_its_blocks() -> None:
    blocks = tuple(f"model.visual.blocks.{number}" for number in range(16))

    assert parts_of(stage(blocks, "vision tower")) == ["vision blocks 0-15"]
    assert parts_of(stage((*blocks, "m.layers.0", "m.layers.1"), "vision tower", "2 layers")) == [
        "vision blocks 0-15",
        "layers 0-1",
    ]


def test_keys_alone_name_layers_and_the_rest() -> None:
    assert parts_of_keys(("m.layers.8", "m.layers.9", "m.norm", "lm_head")) == ["layers 8-9", "norm", "lm_head"]


def test_an_empty_stage_is_drawn(plan: Plan) -> None:
    empty = msgspec.structs.replace(plan.stages[1], keys=(), ledger=())
    text = "\n".join(chain(msgspec.structs.replace(plan, stages=(plan.stages[0], empty))))

    assert "GPU 1 [nothing]" in text


@pytest.mark.parametrize("count", [2, 9, 64])
def test_many_gpus_never_exceed_the_width(plan: Plan, count: int) -> None:
    stages = tuple(msgspec.structs.replace(plan.stages[1], gpu=gpu) for gpu in range(count))
    cuts = tuple(Cut(before="a", after="b", link="NV18", reason="") for _ in range(count - 1))
    many = msgspec.structs.replace(plan, stages=stages, cuts=cuts)
    for width in (40, 80, 110):
        lines = chain(many, width=width)
        assert max(map(len, lines)) <= width
        assert "\n".join(lines).count("--NV18-->") == count - 1


def auto_text(auto: AutoPlacement | None) -> str:
    page = Page(is_unicode=False)
    write_auto(page, auto)
    return page.render()


def test_what_is_not_known_is_said_and_no_table_drawn() -> None:
    unknown = AutoPlacement(library="transformers 5", unknown="x", verdict="Not known: x.")

    assert auto_text(None) == "\n"
    assert auto_text(unknown) == 'What device_map="auto" would do (transformers 5)\n  Not known: x.\n'


def test_cpu_and_disk_have_rows_of_their_own(plan: Plan) -> None:
    assert plan.auto is not None
    text = auto_text(msgspec.structs.replace(plan.auto, cpu_bytes=3 * GIB, disk_bytes=GIB))

    assert [words.split() for words in text.splitlines()[-2:]] == [["CPU", "3.0", "GiB"], ["disk", "1.0", "GiB"]]
