"""Where maps and quantized models clash, and what bitsandbytes leaves as it is."""

from __future__ import annotations

import msgspec
import pytest

from vlm_doctor.formats.to_python import snippet
from vlm_doctor.machine import Libraries, Machine, Package
from vlm_doctor.model import LinearWeights, ModelProfile
from vlm_doctor.planner import plan
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.planner.quantized_rules import about_quantization, refusal, why_on_one_gpu
from vlm_doctor.planner.weights import unit_bytes
from vlm_doctor.workload import Policy, Workload

from .profiles import BODY, glm41v_9b, llava_13b, machine


@pytest.mark.parametrize(
    ("method", "workload", "place", "is_alone", "is_refused"),
    [
        (None, Workload(), "cpu", False, False),
        (None, Workload(quantization="int8"), "cpu", False, True),
        (None, Workload(quantization="nf4"), "disk", False, True),
        (None, Workload(quantization="nf4"), "cpu", True, False),
        (None, Workload(quantization="nf4"), "disk", True, True),
        ("bitsandbytes", Workload(), "cpu", False, True),
        ("torchao", Workload(), "cpu", False, False),
        ("torchao", Workload(), "disk", False, True),
        ("hqq", Workload(), "cpu", True, True),
        ("quanto", Workload(), "cpu", False, True),
        ("quanto", Workload(), "cpu", True, False),
        ("quanto", Workload(), "disk", True, True),
        ("gguf", Workload(), "cpu", False, False),
        ("awq", Workload(), "disk", False, False),
        ("compressed-tensors", Workload(), "cpu", False, False),
    ],
)
def test_what_the_quantizers_refuse(
    method: str | None, workload: Workload, place: str, is_alone: bool, is_refused: bool
) -> None:
    profile = glm41v_9b(quantization=method)
    assert (refusal(profile, workload, place, is_alone=is_alone) is not None) == is_refused


def test_a_refused_map_names_the_method_and_the_way_out() -> None:
    profile = glm41v_9b(quantization="bitsandbytes")
    planned = plan(profile, machine([80]))
    device_map = {unit.key: 0 for unit in profile.units} | {f"{BODY}.layers.39": "cpu"}

    found = next(found for found in check_map(device_map, profile, machine([80])).findings if found.code == "VLM619")

    assert planned.fits
    assert found.severity == "error"
    assert found.message == f"'{BODY}.layers.39' on the cpu: with bitsandbytes transformers refuses such a map."
    assert found.fix is not None
    assert "llm_int8_enable_fp32_cpu_offload=True" in found.fix.text
    assert "leaves what is off the GPUs unquantized" in found.fix.text


def test_a_checkpoint_whose_quantizer_takes_one_gpu_is_not_parted() -> None:
    profile = glm41v_9b(quantization="sinq")
    device_map = {unit.key: int(unit.role in ("norm", "head")) for unit in profile.units}

    assert why_on_one_gpu(profile) is not None
    assert why_on_one_gpu(glm41v_9b(quantization="gptq")) is None
    assert set(plan(profile, machine([80, 80])).device_map.values()) == {0}
    assert not plan(profile, machine([80, 80]), policy=Policy(min_gpus=2)).fits
    found = check_map(device_map, profile, machine([80, 80])).findings
    assert [finding.message for finding in found if finding.code == "VLM617"] == [
        'The map parts the model over cuda:0 and cuda:1: "SINQ currently supports only a single CUDA device" '
        "(quantizer_sinq.py)."
    ]


def mixture() -> ModelProfile:
    """Of layers that are experts for nine tenths."""
    profile = glm41v_9b()
    units = [
        msgspec.structs.replace(
            unit,
            linear=LinearWeights(unit.elements // 10, 4096, 4, unit.elements // 40),
            expert_linear=LinearWeights(unit.elements * 8 // 10, 40960, 40, unit.elements // 100),
        )
        if unit.role == "layer"
        else unit
        for unit in profile.units
    ]
    return msgspec.structs.replace(profile, units=tuple(units))


@pytest.mark.parametrize(("version", "is_quantized"), [("4.57.6", True), ("5.23.0", False), (None, False)])
def test_experts_are_quantized_where_they_are_layers(version: str | None, is_quantized: bool) -> None:
    where = machine([80])
    if version is not None:
        packages = (Package(name="transformers", version=version),)
        where = msgspec.structs.replace(where, libraries=Libraries(python="3.11", executable="python", packages=packages))
    profile, workload = mixture(), Workload(quantization="nf4")

    loaded = as_loaded(profile, where)

    layer = next(unit for unit in loaded.units if unit.role == "layer")
    share = unit_bytes(layer, loaded, workload) / layer.stored_bytes
    assert share == pytest.approx(0.9 * 4.5 / 16 + 0.1 if is_quantized else 0.1 * 4.5 / 16 + 0.9, abs=0.002)
    assert ("the experts, which" in about_quantization(loaded, workload)[0]) == (not is_quantized)
    assert as_loaded(glm41v_9b(), where).units == glm41v_9b().units


def test_the_plan_says_what_stays_unquantized() -> None:
    made = plan(llava_13b(), machine([80]), Workload(quantization="int8"))
    said = [note for note in made.notes if note.startswith("bitsandbytes")]
    assert said == [
        "bitsandbytes quantizes linear layers alone: 947 MiB stay in bfloat16, among them "
        "model.language_model.embed_tokens and lm_head."
    ]
    assert about_quantization(llava_13b(), Workload()) == []
    tables = [msgspec.structs.replace(unit, role="embedding", linear=LinearWeights()) for unit in llava_13b().units]
    many = about_quantization(msgspec.structs.replace(llava_13b(), units=tuple(tables)), Workload(quantization="int8"))
    assert many[0].endswith(f"{BODY}.layers.0 and 41 more.")
    bare = msgspec.structs.replace(llava_13b(), units=tuple(u for u in llava_13b().units if u.role == "layer"))
    assert about_quantization(bare, Workload(quantization="int8"))[0].endswith("stay in bfloat16.")


def test_what_a_class_keeps_in_float32_is_named_and_counted() -> None:
    profile = glm41v_9b(model_type="blip-2")
    former = msgspec.structs.replace(profile.units[0], key="qformer", role="projector")
    profile = msgspec.structs.replace(profile, units=(former, *profile.units))

    assert about_quantization(profile, Workload(dtype="float16")) == [
        "transformers loads qformer in float32 where float16 is asked for (_keep_in_fp32_modules)."
    ]
    assert about_quantization(profile, Workload(dtype="bfloat16")) == []
    assert unit_bytes(former, profile, Workload(dtype="float16")) == 4 * former.elements
    assert unit_bytes(former, profile, Workload(dtype="bfloat16")) == 2 * former.elements


def with_transformers(version: str) -> Machine:
    libraries = Libraries(python="3.11", executable="python", packages=(Package(name="transformers", version=version),))
    return msgspec.structs.replace(machine([80, 80]), libraries=libraries)


def test_hooks_that_compressed_tensors_takes_away_are_missed_where_the_model_is_parted() -> None:
    profile = glm41v_9b(quantization="compressed-tensors")
    where, old = with_transformers("5.23.0"), with_transformers("4.57.6")
    parted = {unit.key: int(unit.role in ("norm", "head")) for unit in profile.units}

    found = [finding for finding in check_map(parted, profile, where).findings if finding.code == "VLM626"]

    assert [(finding.severity, finding.message) for finding in found] == [
        (
            "warning",
            "The map parts the model over cuda:0 and cuda:1, and compressed-tensors unpacks the weights at the first pass "
            "and takes accelerate's hooks away, which a model on several GPUs needs.",
        )
    ]
    assert "CompressedTensorsConfig(dequantize=True)" in (found[0].fix.text if found[0].fix else "")
    assert "VLM626" not in {finding.code for finding in check_map(parted, profile, old).findings}
    assert "VLM626" not in {finding.code for finding in check_map({"": 0}, profile, where).findings}
    noted = [note for note in plan(profile, where, policy=Policy(min_gpus=2)).notes if "dequantize=True" in note]
    assert noted[0].startswith("Compressed-tensors unpacks the weights at the first pass and takes")
    assert not [note for note in plan(profile, where).notes if "dequantize=True" in note]


@pytest.mark.parametrize("version", ["5.0.0", "5.17.0", "5.22.1"])
def test_a_plan_parts_no_model_of_compressed_tensors_that_would_lose_its_hooks(version: str) -> None:
    profile, where = glm41v_9b(quantization="compressed-tensors"), with_transformers(version)

    made = plan(profile, where, policy=Policy(max_gpus=2))
    forced = plan(profile, where, policy=Policy(min_gpus=2, max_gpus=2))
    parted = {unit.key: int(unit.role in ("norm", "head")) for unit in profile.units}
    judged = [finding for finding in check_map(parted, profile, where).findings if finding.code == "VLM626"]

    assert made.fits
    assert set(made.device_map.values()) == {0}
    assert not forced.fits
    for found in (made, forced):
        assert any("one GPU: compressed-tensors unpacks" in note and "5.23 can" in note for note in found.notes)
    alone = plan(profile, msgspec.structs.replace(where, gpus=where.gpus[:1], links=()))
    assert not any("stays on one GPU" in note for note in alone.notes)
    assert [finding.severity for finding in judged] == ["error"]
    assert judged[0].fix is not None
    assert "one GPU" in judged[0].fix.text


@pytest.mark.parametrize(("version", "is_unpacked"), [("5.23.0", True), ("4.57.6", False)])
def test_what_a_plan_parts_all_the_same_is_unpacked_while_it_is_loaded(version: str, is_unpacked: bool) -> None:
    profile, where = glm41v_9b(quantization="compressed-tensors"), with_transformers(version)

    made = plan(profile, where, policy=Policy(min_gpus=2, max_gpus=2))
    whole = plan(profile, where)

    assert made.fits
    assert len(made.stages) == 2
    assert ("quantization_config=quantization" in snippet(made, where.libraries)) == is_unpacked
    assert (
        "import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig" in snippet(made, where.libraries)
    ) == (is_unpacked)
    assert "CompressedTensorsConfig" not in snippet(whole, where.libraries)
