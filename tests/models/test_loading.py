"""Loading on the CPU: every family answers, every way to fail is one sentence, and memory is given back."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.models.loading import LoadFailure, load, torch_ordinals, unload
from pytest_vlmgpu.testing import TINY_FAMILIES, tiny_image
from vlm_doctor.errors import UsageError
from vlm_doctor.placement import Plan, Shortage, Stage
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

pytestmark = [
    pytest.mark.models,
    # transformers 5 on numpy 2.4 (GLM-4V) and 4.57 on numpy 2 (InternVL) hand tensors to numpy in a way that it will drop.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


@pytest.fixture
def damaged(tmp_path: Path, tiny_vlms: Mapping[str, Path]) -> Path:
    """A copy of the tiny LLaVA, to be damaged."""
    return shutil.copytree(tiny_vlms["llava"], tmp_path / "llava")


def _plan(model: str, **fields: Any) -> Plan:
    settings: dict[str, Any] = {
        "model": model,
        "machine": "1 x L4",
        "fits": True,
        "workload": Workload(),
        "dtype": "float32",
        "prompt_tokens": 8,
        "image_tokens": 4,
        "device_map": {"model": 0, "lm_head": 0},
        "max_memory": {},
        "cuda_visible_devices": "GPU-a",
        "stages": (Stage(gpu=0, uuid="GPU-a", name="L4", keys=("model", "lm_head"), ledger=(), total_bytes=0),),
        **fields,
    }
    return Plan(**settings)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_answers_about_an_image_the_same_each_time(family: str, tiny_vlms: Mapping[str, Path]) -> None:
    vlm = load(str(tiny_vlms[family]), None)
    again = load(str(tiny_vlms[family]), None)

    answer = vlm.generate(tiny_image(), "What is this?", max_new_tokens=4)

    assert len(answer) == 4
    assert all(33 <= ord(letter) <= 126 for letter in answer)
    assert vlm.generate(tiny_image(), "What is this?", max_new_tokens=4) == answer
    assert again.generate(tiny_image(), "What is this?", max_new_tokens=4) == answer
    assert len(vlm.generate(None, "Hello", max_new_tokens=4)) == 4
    assert (vlm.device_map, vlm.gpus, vlm.input_device, vlm.peak_bytes(), vlm.vram_gib) == ({}, (), "cpu", {}, 0.0)
    assert vlm.load_seconds > 0


def test_the_answer_depends_on_each_of_several_images(tiny_vlms: Mapping[str, Path]) -> None:
    vlm = load(str(tiny_vlms["qwen2_5_vl"]), None)

    one, two, three = (tiny_image(112, 112, seed=seed) for seed in range(3))
    answers = {
        vlm.generate(pictures, "Compare.", max_new_tokens=8) for pictures in ([one, two], [one, three], [three, two])
    }

    assert len(answers) == 3


def test_sampling_follows_the_seed_and_leaves_the_random_state_alone(tiny_vlms: Mapping[str, Path]) -> None:
    import torch

    vlm = load(str(tiny_vlms["llava"]), None)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    answers = [vlm.generate(None, "Hello", max_new_tokens=16, do_sample=True, seed=seed) for seed in (1, 1, 2)]

    assert torch.rand(1) == expected
    assert answers[0] == answers[1] != answers[2]


def test_pixels_take_the_type_of_the_weights(tiny_vlms: Mapping[str, Path]) -> None:
    vlm = load(str(tiny_vlms["glm4v"]), None, dtype="bfloat16")

    assert str(vlm.model.dtype) == "torch.bfloat16"
    assert len(vlm.generate(tiny_image(), "What is this?", max_new_tokens=4)) == 4


def test_without_a_chat_template_the_image_stands_before_the_text(damaged: Path) -> None:
    (damaged / "chat_template.jinja").unlink()
    vlm = load(str(damaged), None)

    assert len(vlm.generate(tiny_image(), "What is this?", max_new_tokens=4)) == 4


def test_a_processor_that_takes_no_images_says_so(tiny_vlms: Mapping[str, Path]) -> None:
    vlm = load(str(tiny_vlms["llava"]), None)
    vlm.processor = vlm.processor.tokenizer

    assert len(vlm.generate(None, "Hello", max_new_tokens=4)) == 4
    with pytest.raises(
        UsageError, match=r" has no image processor: use vlm\.model and vlm\.processor as its model card says\."
    ):
        vlm.generate(tiny_image(), "Hello")


def test_unloading_frees_every_weight_unless_somebody_holds_one(tiny_vlms: Mapping[str, Path]) -> None:
    vlm = load(str(tiny_vlms["llava"]), None)
    vlm.generate(tiny_image(), "Hello", max_new_tokens=1)
    assert unload(vlm) == 0
    assert unload(vlm) == 0
    with pytest.raises(UsageError, match=r"llava.* was unloaded: ask before the fixture is torn down\."):
        vlm.generate(None, "Hello")

    other = load(str(tiny_vlms["llava"]), None)
    head = other.model.lm_head
    assert unload(other) == head.weight.nbytes


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(LoadFailure) as caught:
        load("./no/such/folder", None)
    assert caught.value.code == "VLM713"
    assert caught.value.message == "there is no folder no/such/folder: check the path of the checkpoint."


def test_missing_weights_are_refused_although_transformers_would_make_them_up(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(damaged / "model.safetensors")
    del weights[next(name for name in sorted(weights) if "layers.0.mlp" in name)]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(LoadFailure) as caught:
        load(str(damaged), None)
    assert caught.value.code == "VLM713"
    assert caught.value.message == (
        f"the checkpoint of {damaged} lacks 1 of its weights, such as model.language_model.layers.0.mlp.down_proj.weight: "
        "download it again, or install the transformers version it was saved with."
    )


def _truncate_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"short")


def _delete_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _delete_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def _delete_image_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()


@pytest.mark.parametrize(
    "damage", [_truncate_weights, _delete_weights, _break_config, _delete_tokenizer, _delete_image_processor]
)
def test_a_damaged_checkpoint_is_one_sentence(damaged: Path, damage: Callable[[Path], None]) -> None:
    damage(damaged)
    with pytest.raises(LoadFailure) as caught:
        load(str(damaged), None)
    assert caught.value.code == "VLM713"
    assert caught.value.message.startswith(f"{damaged} ")
    assert "\n" not in caught.value.message


def test_a_failure_holds_no_part_of_the_model(damaged: Path) -> None:
    _delete_tokenizer(damaged)
    with pytest.raises(LoadFailure) as caught:
        load(str(damaged), None)

    assert caught.value.__cause__ is caught.value.__context__ is None
    assert caught.value.details.startswith("Traceback (most recent call last):")
    frames = [entry.frame.f_locals for entry in caught.traceback]
    assert not any("model" in names for names in frames)


def test_a_language_model_is_not_a_vlm(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        LoadFailure, match=r"^VLM713: .* has model_type 'bert', which transformers [\d.]+ does not know as a "
    ):
        load(str(damaged), None)


def test_code_of_the_checkpoint_runs_only_when_allowed(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(damaged.parent / "modules"))
    monkeypatch.syspath_prepend(str(damaged.parent / "modules"))
    # transformers translates the published names of weights for its own families only.
    weights = load(str(damaged), None).model.state_dict()
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((damaged / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (damaged / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    (damaged / "own.py").write_text(
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    refusal = (
        f"{damaged} brings its own Python code (auto_map in config.json), which was not run: read that code, and if you "
        "trust it, allow it with trust_remote_code=True."
    )

    with pytest.raises(LoadFailure) as caught:
        load(str(damaged), None)
    assert (caught.value.code, caught.value.message) == ("VLM713", refusal)
    with pytest.raises(LoadFailure) as caught:
        load(str(damaged), _plan(str(damaged), is_remote_code=True))
    assert (caught.value.code, caught.value.message) == ("VLM713", refusal)

    vlm = load(str(damaged), None, trust_remote_code=True)
    assert type(vlm.model).__name__ == "OwnModel"
    assert len(vlm.generate(tiny_image(), "What is this?", max_new_tokens=4)) == 4


def test_a_plan_that_does_not_fit_is_not_tried() -> None:
    shortage = Shortage(missing_bytes=1, message="it lacks 1 byte.", is_permanent=True)
    with pytest.raises(LoadFailure) as caught:
        load("any/model", _plan("any/model", fits=False, shortage=shortage))
    assert (caught.value.code, caught.value.message) == ("VLM705", "it lacks 1 byte.")


def test_a_plan_for_gpus_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tiny_vlms: Mapping[str, Path]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadFailure) as caught:
        load(str(tiny_vlms["llava"]), _plan("llava"))
    assert caught.value.code == "VLM712"
    assert caught.value.message == (
        f"torch {torch.__version__} sees no usable GPU in this process: run vlm-doctor to see why."
    )


def device(uuid: str, name: str = "NVIDIA L4") -> SimpleNamespace:
    """What torch says of a device: a slice's UUID is the slice's own, and its name says that it is one."""
    return SimpleNamespace(uuid=uuid, name=name)


def test_ordinals_are_found_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda ordinal: device("ba"[ordinal]))
    assert torch_ordinals({"GPU-other": 0}) == {"GPU-b": 0, "GPU-a": 1}

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device("c", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"))
    assert torch_ordinals({"MIG-other": 0}) == {"MIG-c": 1}

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert torch_ordinals({"GPU-other": 0}) == {"GPU-other": 0}


def _meta_tower(model: Any) -> None:
    model.model.vision_tower.to("meta")


def _disk_module(model: Any) -> None:
    model.hf_device_map = {"model": 0, "lm_head": "disk"}


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (lambda _: None, "class_embedding is on cpu, planned cuda:0; "),
        (_meta_tower, "class_embedding is on meta, planned cuda:0; "),
        (_disk_module, "1 part of model landed elsewhere than planned (lm_head is on disk, planned cuda:0): "),
    ],
    ids=["cpu", "meta", "disk"],
)
def test_a_model_that_did_not_land_on_its_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_vlms: Mapping[str, Path], move: Callable[[Any], None], expected: str
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    model, problems = AutoModelForImageTextToText.from_pretrained(tiny_vlms["llava"], output_loading_info=True)
    move(model)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: (model, problems))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device("a"))
    folder = str(tiny_vlms["llava"])

    with pytest.raises(LoadFailure) as caught:
        load(folder, _plan(folder))
    assert caught.value.code == "VLM714"
    assert expected in caught.value.message.replace(folder, "model")


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        (Workload(), {}),
        (Workload(attention="eager"), {"attn_implementation": "eager"}),
        (Workload(quantization="int8"), {"load_in_8bit": True, "load_in_4bit": False}),
        (Workload(quantization="nf4"), {"load_in_8bit": False, "load_in_4bit": True}),
    ],
    ids=["default", "eager", "int8", "nf4"],
)
def test_the_library_is_told_what_the_plan_rests_on(
    monkeypatch: pytest.MonkeyPatch, tiny_vlms: Mapping[str, Path], workload: Workload, expected: dict[str, Any]
) -> None:
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText

    if workload.quantization == "nf4" and transformers.__version__.startswith("4."):
        pytest.importorskip("bitsandbytes", reason="transformers 4 wants it for the config alone")
    asked: dict[str, Any] = {}

    def refuse(*_: object, **options: Any) -> None:
        asked.update(options)
        raise OSError("seen enough")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device("a"))
    folder = str(tiny_vlms["llava"])
    with pytest.raises(LoadFailure, match="seen enough"):
        load(folder, _plan(folder, workload=workload, dtype="bfloat16"))

    quantization = asked.pop("quantization_config", None)
    found = {key: value for key, value in asked.items() if key == "attn_implementation"}
    if quantization is not None:
        found = {key: getattr(quantization, key) for key in ("load_in_8bit", "load_in_4bit")}
        assert quantization.bnb_4bit_compute_dtype is torch.bfloat16
    assert found == expected
    assert (asked["device_map"], asked["dtype"], asked["trust_remote_code"]) == ({"": 0}, torch.bfloat16, False)


def test_transformers_own_placement_without_a_gpu_is_refused_unless_it_is_allowed(
    tiny_vlms: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine ``auto`` can only choose the CPU, which is what the check is about."""
    monkeypatch.setattr("pytest_vlmgpu.models.loading.torch_ordinals", lambda _fallback=None: {"GPU-a": 0})
    folder = str(tiny_vlms["llava"])
    plan = _plan(folder)

    for how in ("auto", "balanced"):
        with pytest.raises(LoadFailure) as caught:
            load(folder, plan, device_map=how)
        assert caught.value.code == "VLM714"
        assert f'device_map="{how}" has put ' in caught.value.message
        assert " is on cpu" in caught.value.message

    vlm = load(folder, plan, device_map="auto", may_offload=True)

    assert (vlm.device_map, vlm.gpus, vlm.plan, vlm.input_device) == ({"": "cpu"}, (), None, "cpu")
    assert vlm.offloaded_bytes == sum(tensor.nbytes for tensor in (*vlm.model.parameters(), *vlm.model.buffers()))
    assert len(vlm.generate(tiny_image(), "Hello", max_new_tokens=4)) == 4
    assert vlm.peak_bytes() == {}
    assert unload(vlm) == 0


def test_layers_that_a_plan_leaves_in_host_memory_are_counted(
    tiny_vlms: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_doctor.placement import Offload

    monkeypatch.setattr("pytest_vlmgpu.models.loading.torch_ordinals", lambda _fallback=None: {"GPU-a": 0})
    folder = str(tiny_vlms["llava"])
    off = Offload(keys=("model", "lm_head"), weights_bytes=1, copy_bytes=0, host_left_bytes=None, reason="", cost="")
    plan = _plan(folder, device_map={"model": "cpu", "lm_head": "cpu"}, offloaded=off)

    with pytest.raises(LoadFailure, match="VLM714: The plan leaves 0 MiB of "):
        load(folder, plan)
    vlm = load(folder, plan, may_offload=True)

    assert vlm.device_map == {"model": "cpu", "lm_head": "cpu"}
    assert vlm.offloaded_bytes > 0
    assert len(vlm.generate(None, "Hello", max_new_tokens=4)) == 4


def test_where_only_some_gpus_may_be_used_transformers_is_told_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pytest_vlmgpu.models import loading

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda ordinal: (100 + ordinal, 1000))
    ordinals = {f"GPU-{number}": number for number in range(3)}
    gpus: list[Any] = [SimpleNamespace(uuid=f"GPU-{number}", index=number, name="L4") for number in range(3)]

    some = loading._orders(_plan("org/a"), ordinals, "auto", [gpus[2], gpus[0]], may_offload=False)
    every = loading._orders(_plan("org/a"), ordinals, "auto", gpus, may_offload=False)

    assert some.max_memory is not None
    assert some.max_memory.pop("cpu") > 2**20
    assert some.max_memory == {0: 100, 2: 102}
    assert every.max_memory is None
    assert (some.device_map, every.device_map) == ("auto", "auto")
