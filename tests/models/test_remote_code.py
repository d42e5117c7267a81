"""Families whose class comes with the checkpoint: stand-ins for their code, from the files alone to two devices."""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor import ModelProfile, Plan, Policy, Workload, load_machine, load_profile, plan
from vlm_doctor.data.removed_calls import BREAKS
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.own_code import broken_calls, gone

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import tiny_remote  # noqa: E402
from architecture_trial import Row  # noqa: E402
from remote_trial import RemoteTrial  # noqa: E402

pytestmark = [pytest.mark.usefixtures("copied_code"), pytest.mark.models, pytest.mark.filterwarnings("ignore")]

WORK = Workload(images=1, text_tokens=16, new_tokens=4)
TOGETHER: dict[str, tuple[str, ...]] = {
    "cogvlm": ("model.vision", "model.embed_tokens"),
    "cogvlm2": ("model.vision", "model.embed_tokens"),
    "cogagent": ("model.vision", "model.cross_vision", "model.embed_tokens"),
    "chatglm": ("transformer.vision", "transformer.embedding.word_embeddings", "transformer.rotary_pos_emb"),
    "internvl_chat": ("vision_model", "mlp1", "language_model.model.embed_tokens", "language_model.model.rotary_emb",
                      "language_model.model.norm", "language_model.lm_head", "language_model.model.layers.5"),
    "minicpmv": ("vpm", "resampler", "llm.model.embed_tokens", "llm.lm_head", "llm.model.norm", "llm.model.layers.5"),
    "deepseek_vl_v2": ("vision", "projector", "image_newline", "view_seperator", "language.model.embed_tokens",
                       "language.model.norm", "language.lm_head", "language.model.layers.5"),
    "kimi_vl": ("vision_tower", "multi_modal_projector", "language_model.model.embed_tokens"),
    "molmo": ("model.vision_backbone", "model.transformer.wte"),
    "phi3_v": ("model.vision_embed_tokens", "model.embed_tokens"),
}  # fmt: skip
"""What must share a device, by the code and the guides of each family."""
_ROTARY = ("language_model.model.rotary_emb", "llm.model.rotary_emb")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {family: tiny_remote.write(family, tmp_path_factory.mktemp(family)) for family in tiny_remote.FAMILIES}


@pytest.fixture(params=list(tiny_remote.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("name", "family", "more"),
    [
        ("THUDM/glm-4v-9b", "chatglm", {}),
        ("THUDM/cogvlm2-llama3-chat-19B", "cogvlm2", {"num_multi_query_heads": 8}),
        ("THUDM/cogvlm-chat-hf", "cogvlm", {}),
        ("OpenGVLab/InternVL3-8B", "internvl_chat", {}),
    ],
)
def test_a_stand_in_at_true_size_stores_what_is_published(
    name: str, family: str, more: dict[str, Any], tmp_path: Path
) -> None:
    entry = catalogue()[name]
    tiny_remote.write_config(family, tmp_path)
    classes = {key: json.loads((tmp_path / "config.json").read_text())[key] for key in ("architectures", "auto_map")}
    (tmp_path / "config.json").write_text(json.dumps({**entry.config, **more, **classes}))
    config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.device("meta"):
        model = getattr(transformers, tiny_remote.FAMILIES[family].auto).from_config(config, trust_remote_code=True)

    stored = {name: tensor.shape for name, tensor in entry.checkpoint().tensors.items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == stored


def planned(profile: ModelProfile, machine: str = "24GiB,24GiB", **policy: Any) -> Plan:
    return plan(profile, load_machine(machine), WORK, Policy(**{"min_gpus": 2, "max_gpus": 2, **policy}))


def test_the_files_alone_tell_every_part(family: str, folders: Mapping[str, Path]) -> None:
    folder = folders[family]
    profile = load_profile(str(folder))
    shards = list(folder.glob("*.safetensors"))
    data = 0
    for shard in shards:
        with shard.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data += max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")

    assert len(shards) > 3
    assert profile.is_remote_code
    assert profile.stored_bytes == data
    roles = [unit.role for unit in profile.units]
    assert roles.count("layer") == profile.text.layers == tiny_remote.LAYERS
    assert {"vision", "embedding", "norm", "head"} <= set(roles)
    assert roles.count("head") == roles.count("embedding") == roles.count("norm") == 1
    assert {unit.key for unit in profile.units if unit.role == "other"} <= {"transformer.rotary_pos_emb", *_ROTARY}
    assert profile.vision is not None
    assert profile.image is not None
    assert profile.notes == ()
    # What is no part of a tower of its own is a part of its own.
    own = {
        "internvl_chat": "mlp1",
        "minicpmv": "resampler",
        "kimi_vl": "multi_modal_projector",
        "deepseek_vl_v2": "projector",
    }
    assert family not in own or own[family] in [unit.key for unit in profile.units if unit.role == "projector"]


def test_a_plan_names_modules_and_keeps_together_what_the_code_joins(family: str, folders: Mapping[str, Path]) -> None:
    profile = load_profile(str(folders[family]))
    made = planned(profile)
    model = tiny_remote.load(folders[family], family)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = {name for name, _ in model.named_modules(remove_duplicate=False)} | names

    assert made.fits
    assert set(made.device_map.values()) == {0, 1}
    assert [key for key in made.device_map if key not in known] == []
    keys = tuple(made.device_map)
    assert [name for name in names if not any(name == key or name.startswith(f"{key}.") for key in keys)] == []
    # Blocks are whole: no key lies in one.
    layers = [unit.key for unit in profile.units if unit.role == "layer"]
    assert [key for key in keys for layer in layers if key.startswith(f"{layer}.")] == []
    assert len({made.device_map[name] for name in TOGETHER[family]}) == 1
    found = check_map(made.device_map, profile, load_machine("24GiB,24GiB"), WORK).findings
    assert [finding.message for finding in found if finding.severity != "info"] == []


def test_the_order_of_registration_is_known(family: str, folders: Mapping[str, Path]) -> None:
    """As accelerate walks: bare parameters of a module before its children; blocks that the class declares as a whole."""
    if family == "phi3_v":
        pytest.skip("it registers one embedding twice, which is not modelled")
    model = tiny_remote.load(folders[family], family)
    declared = set(model._no_split_modules)
    for child in model.children():
        declared |= set(getattr(child, "_no_split_modules", None) or ())
    walked: list[str] = []

    def visit(module: Any, name: str) -> None:
        if type(module).__name__ in declared or not list(module.children()):
            walked.extend([name] if list(module.parameters()) else [])
            return
        walked.extend(f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False))
        for own, child in module.named_children():
            visit(child, f"{name}.{own}".lstrip("."))

    visit(model, "")
    items = load_profile(str(folders[family])).registered["5"]
    blocks = {item.block for item in items if item.block}

    assert [item.unit.key for item in items if any(name.startswith(item.unit.key) for name in walked)] == walked
    assert blocks <= declared


def test_on_two_devices_it_answers_as_on_one(family: str, tmp_path: Path) -> None:
    row = Row(tmp_path / "row.json", family)
    RemoteTrial(family, argparse.Namespace(devices="fake", cuts=False, turned=True), row).run()

    assert row["alone"] == {"text": "", "image": ""}
    assert (row["plan"]["crashes"], row["plan"]["equal"]) == (False, True)
    assert row["plan"]["check"]["errors"] == {}
    entries = {name: row[name] for name in ("accelerate", "auto", "quarters")}
    # With the devices exchanged accelerate sends the inputs to the other: masks that the code makes of them stay there.
    entries |= {f"{name}, turned": row[name].get("turned", {}) for name in ("plan", "accelerate", "auto")}
    for name, entry in entries.items():
        if entry.get("crashes"):
            assert entry["named"], (name, entry["runs"], entry["check"])
        elif "runs" in entry:
            assert entry["check"]["errors"] == {}, name


def test_no_cut_of_a_tower_parts_what_is_joined(family: str, folders: Mapping[str, Path]) -> None:
    """Where not even the anchor fits, the tower is cut, or the plan says that it does not fit; the map stays clean."""
    profile = load_profile(str(folders[family]))
    for free in ("600MiB,24GiB", "24GiB,600MiB"):
        made = planned(profile, free)
        if made.fits:
            found = check_map(made.device_map, profile, load_machine("24GiB,24GiB"), WORK).findings
            assert [finding.message for finding in found if finding.severity == "error"] == []


def tokens(folder: Path, height: int, width: int) -> int:
    return image_load(load_profile(str(folder)), Workload(images=1, image_height=height, image_width=width)).tokens


SIZES = ((336, 336), (448, 448), (640, 480), (1080, 1920), (2240, 2240), (300, 2400))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_image_never_takes_more_tokens_than_are_counted(height: int, width: int, folders: Mapping[str, Path]) -> None:
    """The arithmetic of each family's own processor, for every grid that it may choose."""
    grids = [(i, j) for i in range(1, 17) for j in range(1, 17)]
    phi = max((i * j + 1) * 144 + 1 + (i + 1) * 12 for i, j in grids if i * j <= 16)
    minicpm = max((i * j + 1) * (64 + 2) + i for i, j in grids if i * j <= 9) + 5
    deepseek = max(14 * 15 + 1 + 14 * i * (14 * j + 1) for i, j in grids if i * j <= 9)
    molmo = max(12 * (12 * j + 1) * i + 12 * 13 for i, j in grids if i * j <= 12) + 4
    rows, columns = -(-height // 28), -(-width // 28)
    kimi = min(rows * columns, 4096) + 4

    assert phi <= tokens(folders["phi3_v"], height, width)
    assert minicpm <= tokens(folders["minicpmv"], height, width)
    assert deepseek == tokens(folders["deepseek_vl_v2"], height, width) == 2101
    assert molmo <= tokens(folders["molmo"], height, width)
    assert kimi <= tokens(folders["kimi_vl"], height, width)


def test_latent_attention_of_own_code_is_cached_expanded(folders: Mapping[str, Path]) -> None:
    """transformers 5 caches it compressed, in its own classes alone: a tenth of what this code keeps."""
    profile = load_profile(str(folders["kimi_vl"]))
    long = Workload(images=0, text_tokens=400, new_tokens=4)
    made = plan(profile, load_machine("24GiB"), long)
    (cache,) = (line for line in made.stages[0].ledger if line.kind == "kv_cache")
    model = tiny_remote.load(folders["kimi_vl"], "kimi_vl")
    with torch.no_grad():
        kept = model(input_ids=torch.ones(1, 404, dtype=torch.long)).past_key_values
    real = sum(part.nbytes for layer in kept.layers for part in (layer.keys, layer.values))

    assert cache.size_bytes >= real


# -- what the code relies on


def changed(folder: Path, target: Path, file: str, old: str, new: str) -> Path:
    shutil.copytree(folder, target)
    text = (target / file).read_text()
    assert old in text
    (target / file).write_text(text.replace(old, new))
    return target


def installed() -> frozenset[str]:
    return gone(Path(str(transformers.__file__)).parent)


def test_code_that_does_not_call_post_init(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["molmo"], tmp_path / "old", "modeling_molmo.py", "self.post_init()", "pass")
    code = (folder / "modeling_molmo.py").read_text().replace("(CausalBase):", "(MolmoPreTrainedModel):")
    (folder / "modeling_molmo.py").write_text(code.replace("LAYERS = (", "MolmoPreTrainedModel = CausalBase\nLAYERS = ("))

    assert broken_calls(folder) == ("post_init",)
    if "post_init" in installed():
        with pytest.raises(AttributeError, match="all_tied_weights_keys"):
            tiny_remote.load(folder, "molmo")
    else:
        tiny_remote.load(folder, "molmo")


def test_buffers_that_no_file_stores(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = changed(
        folders["minicpmv"], tmp_path / "old", "modeling_minicpmv.py", "module.pos_embed.copy_(module.positions())", "pass"
    )
    (folder / "parts.py").write_text((folder / "parts.py").read_text().replace("module.inv_freq.copy_(", "print("))

    assert broken_calls(folder) == ("register_buffer",)
    expected = tiny_remote.load(folders["minicpmv"], "minicpmv").resampler.pos_embed
    found = tiny_remote.load(folder, "minicpmv").resampler.pos_embed
    assert torch.equal(found, expected) == ("register_buffer" not in installed())


def test_a_plain_module_with_init_weights(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = changed(
        folders["minicpmv"],
        tmp_path / "old",
        "modeling_minicpmv.py",
        "    def positions(self):",
        "    def _init_weights(self, module):\n        module.copy_()\n\n    def positions(self):",
    )

    assert broken_calls(folder) == ("_initialize_weights",)
    if "_initialize_weights" in installed():
        with pytest.raises(AttributeError, match="_initialize_weights"):
            tiny_remote.load(folder, "minicpmv")
    else:
        tiny_remote.load(folder, "minicpmv")


def test_the_stand_ins_rely_on_nothing_that_is_gone(family: str, folders: Mapping[str, Path]) -> None:
    profile = load_profile(str(folders[family]))
    assert profile.broken_calls == ()
    assert not any("own code" in note for note in planned(profile).notes)


def test_the_installed_transformers_is_known(folders: Mapping[str, Path]) -> None:
    """Each entry of the table against the files of this version."""
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    wanted = {
        name for name, found in BREAKS.items() if found.since <= release and (found.until is None or release < found.until)
    }
    assert installed() == wanted


def test_bitsandbytes_replaces_what_is_counted(family: str, folders: Mapping[str, Path]) -> None:
    """By the installed transformers' own rule: no byte is counted as quantized that stays as it is; of GLM-4V the head."""
    rules = pytest.importorskip("transformers.quantizers.quantizers_utils", reason="before 5 the rule is another")
    if not hasattr(rules, "should_convert_module"):
        pytest.skip("before 5 the rule is another")
    from transformers.quantizers.base import HfQuantizer

    profile = load_profile(str(folders[family]))
    config = transformers.AutoConfig.from_pretrained(folders[family], trust_remote_code=True)
    with torch.device("meta"):
        model = getattr(transformers, tiny_remote.FAMILIES[family].auto).from_config(config, trust_remote_code=True)
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replaced = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and rules.should_convert_module(name, skipped)
    }
    for unit in profile.units:
        inside = sum(size for name, size in replaced.items() if name == unit.key or name.startswith(f"{unit.key}."))
        assert unit.linear.elements + unit.expert_linear.elements <= inside, unit.key
        if family == "chatglm":
            assert unit.linear.elements == inside, unit.key
