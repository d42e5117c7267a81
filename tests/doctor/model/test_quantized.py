"""Checkpoints that are quantized already: bytes and parameters from the layouts that the libraries write."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor import Workload
from vlm_doctor.errors import ModelFileError, UsageError
from vlm_doctor.machine import Gpu, Libraries, Machine, Package
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.planner.planning import plan
from vlm_doctor.planner.weights import unit_bytes
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.sources.quantized_tensors import computes_in, join_quantized
from vlm_doctor.units import GIB

from .conftest import LLAVA_CONFIG, Shapes, llava_tensors

Write = Callable[..., Path]
LINEAR = "self_attn.k_proj"
LAYER = "language_model.model.layers.{}." + LINEAR
OUT, IN, GROUP = 64, 128, 32

# What the library writes for one linear layer of OUT x IN, by hand from its documentation; the comment names the source.
GPTQ = {  # gptqmodel, BaseQuantLinear: 4 bit, groups of 32
    "qweight": ("I32", [IN // 8, OUT]),
    "qzeros": ("I32", [IN // GROUP, OUT // 8]),
    "scales": ("F16", [IN // GROUP, OUT]),
    "g_idx": ("I32", [IN]),
}
GPTQ_3BIT = {**GPTQ, "qweight": ("I32", [IN * 3 // 32, OUT]), "qzeros": ("I32", [IN // GROUP, OUT * 3 // 32])}
AWQ = {  # autoawq, WQLinear_GEMM
    "qweight": ("I32", [IN, OUT // 8]),
    "qzeros": ("I32", [IN // GROUP, OUT // 8]),
    "scales": ("F16", [IN // GROUP, OUT]),
}
FP8 = {"weight": ("F8_E4M3", [OUT, IN]), "weight_scale_inv": ("F32", [1, 1])}
CT_FP8 = {"weight": ("F8_E4M3", [OUT, IN]), "weight_scale": ("BF16", [OUT, 1]), "input_scale": ("BF16", [1])}
CT_PACKED = {
    "weight_packed": ("I32", [OUT, IN // 8]),
    "weight_scale": ("BF16", [OUT, IN // GROUP]),
    "weight_shape": ("I64", [2]),
}
NVFP4 = {
    "weight_packed": ("U8", [OUT, IN // 2]),
    "weight_scale": ("F8_E4M3", [OUT, IN // 16]),
    "weight_global_scale": ("F32", [1]),
}
BNB_4BIT = {  # bitsandbytes, QuantState.as_dict(packed=True)
    "weight": ("U8", [OUT * IN // 2, 1]),
    "weight.absmax": ("F32", [OUT * IN // 64]),
    "weight.quant_map": ("F32", [16]),
    "weight.quant_state.bitsandbytes__nf4": ("U8", [80]),
}
BNB_DOUBLE = {
    **BNB_4BIT,
    "weight.absmax": ("U8", [OUT * IN // 64]),
    "weight.nested_absmax": ("F32", [1]),
    "weight.nested_quant_map": ("F32", [256]),
}
BNB_8BIT = {"weight": ("I8", [OUT, IN]), "SCB": ("F32", [OUT]), "weight_format": ("U8", [])}
TORCHAO_INT8 = {  # torchao 0.18, as save_pretrained of transformers 5.23 wrote it
    "_weight_qdata": ("I8", [OUT, IN]),
    "_weight_scale": ("F32", [OUT, 1]),
    "_weight_zero_point": ("I8", [OUT, 1]),
}
TORCHAO_INT4 = {
    "_weight_qdata": ("U8", [OUT, IN // 2]),
    "_weight_scale": ("BF16", [IN // GROUP, OUT]),
    "_weight_zero_point": ("BF16", [IN // GROUP, OUT]),
}
TORCHAO_FP8 = {"_weight_qdata": ("F8_E4M3", [OUT, IN]), "_weight_scale": ("F32", [OUT, 1])}
WEIGHTS = OUT * IN
CT = "compressed-tensors"


def config_of(**quantization: Any) -> dict[str, Any]:
    return {**LLAVA_CONFIG, "quantization_config": quantization}


def tensors_of(linear: Shapes) -> Shapes:
    """LLaVA with ``k_proj`` of every text layer as a library stores it; all else is plain float16."""
    tensors = {name: entry for name, entry in llava_tensors().items() if LINEAR not in name}
    for layer in range(12):
        tensors.update({f"{LAYER.format(layer)}.{name}": entry for name, entry in linear.items()})
    return tensors


METHODS = [
    (GPTQ, {"quant_method": "gptq", "bits": 4}, "INT4", WEIGHTS // 2 + 4 * 4 * 8 + 2 * 4 * 64 + 4 * IN, 0),
    (GPTQ_3BIT, {"quant_method": "gptq", "bits": 3}, "INT3", WEIGHTS * 3 // 8 + 4 * 4 * 6 + 2 * 4 * 64 + 4 * IN, 0),
    (AWQ, {"quant_method": "awq", "bits": 4}, "INT4", WEIGHTS // 2 + 4 * 4 * 8 + 2 * 4 * 64, 0),
    (FP8, {"quant_method": "fp8"}, "FP8", WEIGHTS + 4, 0),
    (CT_FP8, {"quant_method": CT}, "FP8", 2 * WEIGHTS + 2 * OUT + 2, WEIGHTS),
    (
        CT_PACKED,
        {"quant_method": CT, "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        "INT4",
        2 * WEIGHTS + 2 * 4 * OUT + 16,
        2 * WEIGHTS - WEIGHTS // 2,
    ),
    (NVFP4, {"quant_method": CT}, "FP4", 2 * WEIGHTS + OUT * 8 + 4, 2 * WEIGHTS - WEIGHTS // 2),
    (BNB_4BIT, {"load_in_4bit": True}, "NF4", WEIGHTS // 2 + 4 * WEIGHTS // 64 + 64, -80),
    (BNB_DOUBLE, {"quant_method": "bitsandbytes"}, "NF4", WEIGHTS // 2 + WEIGHTS // 64 + 64 + 4 + 1024 + 4, -76),
    (TORCHAO_INT8, {"quant_method": "torchao", "quant_type": {"default": {}}}, "INT8", WEIGHTS + 5 * OUT, 0),
    (
        TORCHAO_INT4,
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        "INT4",
        WEIGHTS // 2 + 4 * WEIGHTS // GROUP,
        0,
    ),
    (TORCHAO_FP8, {"quant_method": "torchao"}, "FP8", WEIGHTS + 4 * OUT, 0),
    (BNB_8BIT, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "INT8", WEIGHTS + 4 * OUT, -1),
]


@pytest.mark.parametrize(("linear", "section", "word", "on_gpu", "more"), METHODS)
def test_a_quantized_weight_counts_what_it_stands_for_and_what_it_takes(
    write_checkpoint: Write, linear: Shapes, section: dict[str, Any], word: str, on_gpu: int, more: int
) -> None:
    found = load_profile(str(write_checkpoint(config_of(**section), tensors_of(linear))))

    layer = next(unit for unit in found.units if unit.layer == 7)
    assert layer.key == "model.language_model.layers.7"
    assert layer.parameters == {word: WEIGHTS, "F16": 16 * 8 + 8}
    assert layer.kept_bytes == on_gpu
    assert layer.stored_bytes == on_gpu - more + 2 * (16 * 8 + 8)
    assert unit_bytes(layer, found, Workload()) == on_gpu + 2 * (16 * 8 + 8)
    assert unit_bytes(layer, found, Workload(dtype="float32")) == on_gpu + 4 * (16 * 8 + 8)
    assert found.quantization == section.get("quant_method", "bitsandbytes")
    assert found.dtype == "float16"
    assert layer.linear.elements == 16 * 8
    assert f"model.language_model.layers.7.{LINEAR}.weight" in found.tensors
    assert not [name for name in found.tensors if "scale" in name or "absmax" in name or "qzeros" in name]
    assert any("unpacks the weights" in note for note in found.notes) == (section.get("quant_method") == CT)
    sizes = sum(math.prod(shape) for _, shape in linear.values())
    assert sizes != WEIGHTS or word == "FP8"


def test_packed_words_stay_with_the_libraries_of_transformers_4(write_checkpoint: Write) -> None:
    section = {"quant_method": CT, "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    found = load_profile(str(write_checkpoint(config_of(**section), tensors_of(CT_PACKED))))
    old = Libraries(python="3", executable="python", packages=(Package(name="transformers", version="4.57.6"),))
    new = Libraries(python="3", executable="python", packages=(Package(name="transformers", version="5.23.0"),))

    def kept(libraries: Libraries) -> int:
        where = msgspec.structs.replace(machine((9, 0)), libraries=libraries)
        return sum(unit.kept_bytes or 0 for unit in as_loaded(found, where).units)

    assert kept(old) - kept(new) == 12 * WEIGHTS // 2


def test_joined_experts_in_mxfp4_count_two_a_byte() -> None:
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{stem}_blocks": StoredTensor("U8", (4, 32, 2, 16), 4096),
        f"{stem}_scales": StoredTensor("U8", (4, 32, 2), 256),
        f"{stem}_bias": StoredTensor("BF16", (4, 32), 256),
        "model.lonely_blocks": StoredTensor("U8", (4,), 4),
    }
    joined = join_quantized(tensors, {"quant_method": "mxfp4"})
    assert joined == {
        stem: StoredTensor("MXFP4", (8192,), 4352, 4352),
        f"{stem}_bias": tensors[f"{stem}_bias"],
        "model.lonely_blocks": tensors["model.lonely_blocks"],
    }


def test_a_weight_that_is_stored_twice_is_left_as_it_is() -> None:
    tensors = {"a.qweight": StoredTensor("I32", (8,), 32), "a.weight": StoredTensor("F16", (8,), 16)}
    assert join_quantized(tensors, {"bits": 4}) == tensors


@pytest.mark.parametrize("bits", [0, -4, 10**30, "4", True, None, float("nan"), [4]])
def test_nonsense_for_bits_means_four(bits: Any) -> None:
    joined = join_quantized({"a.qweight": StoredTensor("I32", (8,), 32)}, {"bits": bits, "config_groups": {"x": 3}})
    assert joined["a.weight"].elements == 64


def test_parts_of_no_parameter_are_left_as_they_are() -> None:
    tensors = {"a._weight_qdata": StoredTensor("I8", (8,), 8), "a.weight": StoredTensor("F16", (8,), 16)}
    assert join_quantized(tensors, {"quant_method": "torchao"}) == tensors
    assert join_quantized({"a._qdata": StoredTensor("F16", (8,), 16)}, {"quant_method": "torchao"}).keys() == {"a._qdata"}
    joined = join_quantized(
        {"a._gate_up_proj_qdata": StoredTensor("I8", (2, 8, 4), 64)}, {"quant_method": "torchao", "quant_type": object()}
    )
    assert joined["a.gate_up_proj"].shape == (2, 8, 4)


NAMES = [*GPTQ, *TORCHAO_INT8, *FP8, *CT_FP8, *CT_PACKED, *BNB_DOUBLE, *BNB_8BIT, "bias", "w_blocks", "w_scales"]
TENSORS = st.dictionaries(
    st.builds("{}.{}".format, st.sampled_from(["a", "a.b", "c"]), st.sampled_from(NAMES)),
    st.builds(
        StoredTensor,
        st.sampled_from(["I32", "U8", "I8", "F8_E4M3", "F16", "I64"]),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.integers(0, 99),
    ),
)


@given(TENSORS, st.dictionaries(st.sampled_from(["bits", "quant_method", "config_groups"]), st.integers() | st.text()))
def test_no_byte_is_lost_however_odd_the_names(tensors: dict[str, StoredTensor], section: dict[str, Any]) -> None:
    joined = join_quantized(tensors, section)
    assert sum(tensor.stored_bytes for tensor in joined.values()) == sum(t.stored_bytes for t in tensors.values())
    assert all(tensor.elements >= 0 for tensor in joined.values())


@pytest.mark.parametrize("section", ["awq", [1], 4])
def test_a_section_that_is_no_object_is_refused(write_checkpoint: Write, section: Any) -> None:
    with pytest.raises(ModelFileError) as raised:
        load_profile(str(write_checkpoint({**LLAVA_CONFIG, "quantization_config": section})))
    assert str(raised.value).endswith(
        "/config.json: quantization_config is not a JSON object; use the config.json that belongs to this checkpoint."
    )


@pytest.mark.parametrize(
    ("method", "notes"),
    [("hqq", 1), ("\x1b[31m" * 20, 1), (5, 1), *((name, 0) for name in ("gptq", "bitsandbytes", "torchao", "fbgemm_fp8"))],
)
def test_a_method_that_is_not_counted_is_told(write_checkpoint: Write, method: Any, notes: int) -> None:
    profile = load_profile(str(write_checkpoint({**LLAVA_CONFIG, "quantization_config": {"quant_method": method}})))
    told = [note for note in profile.notes if note.endswith("its weights are counted as the files hold them.")]
    assert len(told) == notes
    assert all(note.isprintable() for note in told)


def test_the_section_may_stand_in_the_text_part() -> None:
    text = {**LLAVA_CONFIG["text_config"], "quantization_config": {"quant_method": "awq", "bits": 4}}
    assert profile_of(AWQ, {**LLAVA_CONFIG, "text_config": text}).quantization == "awq"
    assert profile_of(AWQ, {**LLAVA_CONFIG, "quantization_config": {}}).quantization is None


def profile_of(linear: Shapes, config: dict[str, Any]) -> ModelProfile:
    tensors = {
        name: StoredTensor(dtype, tuple(shape), math.prod(shape) * int(dtype.partition("_")[0].strip("BFIU")) // 8)
        for name, (dtype, shape) in tensors_of(linear).items()
    }
    return build_profile(Checkpoint(config, tensors), name="x", origin="checkpoint")


def machine(capability: tuple[int, int] | None, packages: tuple[tuple[str, str], ...] = ()) -> Machine:
    gpus = tuple(
        Gpu(
            index=n,
            uuid=f"GPU-{n}",
            name="card",
            memory_total_bytes=24 * GIB,
            memory_free_bytes=24 * GIB,
            compute_capability=capability,
        )
        for n in range(2)
    )
    libraries = Libraries(
        python="3.11", executable="python", packages=tuple(Package(name=n, version=v) for n, v in packages)
    )
    return Machine(origin="synthetic", description="cards", gpus=gpus, libraries=libraries if packages else None)


def test_quantizing_again_is_refused() -> None:
    with pytest.raises(UsageError, match=r"x is already quantized \(awq\): bitsandbytes cannot load it in nf4; leave"):
        plan(profile_of(AWQ, config_of(quant_method="awq", bits=4)), machine((9, 0)), Workload(quantization="nf4"))


@pytest.mark.parametrize(
    ("capability", "packages", "end"),
    [
        ((8, 0), (), ": transformers unpacks them to bfloat16, as counted here."),
        ((8, 6), (("transformers", "5.23.0"),), ": transformers unpacks them to bfloat16, as counted here."),
        (
            (8, 0),
            (("transformers", "4.57.6"),),
            ": transformers 4 refuses to load this checkpoint, 5 unpacks it to bfloat16, as counted here.",
        ),
    ],
)
def test_fp8_is_unpacked_on_cards_without_it(
    capability: tuple[int, int], packages: tuple[tuple[str, str], ...], end: str
) -> None:
    found = profile_of(FP8, config_of(quant_method="fp8"))
    here = machine(capability, packages)
    loaded = as_loaded(found, here)
    layers = [unit for unit in loaded.units if unit.role == "layer"]
    assert all(unit_bytes(unit, loaded, Workload()) == 2 * (WEIGHTS + 16 * 8 + 8) for unit in layers)
    words = f"fp8 weights need GPUs of compute capability 8.9, and one here has 8.{capability[1]}"
    assert loaded.notes == (*found.notes, words + end)
    assert as_loaded(loaded, here) is loaded
    assert words + end in plan(found, here, Workload(text_tokens=8, new_tokens=1)).notes


@pytest.mark.parametrize("capability", [None, (8, 9), (9, 0), (12, 0)])
def test_fp8_stays_where_it_can(capability: tuple[int, int] | None) -> None:
    found = profile_of(FP8, config_of(quant_method="fp8"))
    assert as_loaded(found, machine(capability, (("transformers", "5.23.0"),))) is found


def test_mxfp4_needs_its_kernels() -> None:
    blocks = {"mlp.experts.up_proj_blocks": ("U8", [4, 16]), "mlp.experts.up_proj_scales": ("U8", [4])}
    found = profile_of({**blocks, "weight": ("F16", [8, 8])}, config_of(quant_method="mxfp4"))
    assert as_loaded(found, machine((9, 0))) is found
    assert as_loaded(found, machine((9, 0), (("kernels", "0.12"), ("triton", "3.5")))) is found
    loaded = as_loaded(found, machine((9, 0), (("triton", "3.5"),)))
    assert loaded.notes[-1].startswith("mxfp4 weights need triton and kernels, and kernels is not installed: transformers")
    assert loaded.units[-2].parameters.keys() <= {"F16", "BF16"}
    assert as_loaded(found, machine((9, 0), (("x", "1"),))).notes[-1].count("triton and kernels are not installed") == 1


@pytest.mark.models
def test_a_real_fp8_class_takes_what_its_headers_say() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    replace_with_fp8_linear = finegrained.replace_with_fp8_linear

    config = transformers.AutoConfig.for_model("qwen2_5_vl")
    config.text_config.num_hidden_layers = config.vision_config.depth = 2
    section = transformers.FineGrainedFP8Config(modules_to_not_convert=["visual", "lm_head"])
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        skipped = ["model.visual", "lm_head"]
        torch.set_default_dtype(torch.bfloat16)  # As while loading: biases are made anew.
        try:
            replace_with_fp8_linear(model, modules_to_not_convert=skipped, quantization_config=section)
        finally:
            torch.set_default_dtype(torch.float32)
    words = {"torch.float8_e4m3fn": "F8_E4M3", "torch.bfloat16": "BF16", "torch.float32": "F32"}
    state = model.state_dict()
    tensors = {
        name: StoredTensor(words[str(t.dtype)], tuple(t.shape), t.numel() * t.element_size()) for name, t in state.items()
    }
    assert any(tensor.dtype == "F8_E4M3" for tensor in tensors.values())
    fields = {**config.to_dict(), "quantization_config": section.to_dict(), "architectures": [type(model).__name__]}
    found = build_profile(Checkpoint(fields, tensors), name="x", origin="checkpoint")

    assert sum(unit_bytes(unit, found, Workload(dtype="bfloat16")) for unit in found.units) == sum(
        tensor.stored_bytes for tensor in tensors.values()
    )
    with torch.device("meta"):
        plain = transformers.AutoModelForImageTextToText.from_config(config)
    assert found.elements == sum(parameter.numel() for parameter in plain.parameters())
    assert found.quantization == "fp8"


@pytest.mark.parametrize(("version", "has_parts"), [("5.23.0", True), ("4.57.6", False), (None, False)])
def test_a_tower_of_windows_is_broken_by_transformers_5_alone(version: str | None, has_parts: bool) -> None:
    found = load_profile("Qwen/Qwen2.5-VL-7B-Instruct", allow_network=False)
    here = machine((9, 0), () if version is None else (("transformers", version),))
    loaded = as_loaded(found, here)
    assert any(unit.parts for unit in found.units)
    assert any(unit.parts for unit in loaded.units) == has_parts
    assert loaded.stored_bytes == found.stored_bytes
    other = load_profile("OpenGVLab/InternVL3-8B-hf", allow_network=False)
    assert as_loaded(other, here).units == other.units


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, None),
        ({"quant_method": "awq"}, None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_compute_dtype": "float32"}, "int8"),
        ({"load_in_4bit": True}, "float32"),
        ({"quant_method": "bitsandbytes_4bit", "bnb_4bit_compute_dtype": "torch.float32"}, "float32"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, None),
    ],
)
def test_what_layers_of_bitsandbytes_compute_in(section: dict[str, Any] | None, expected: str | None) -> None:
    assert computes_in(section) == expected
