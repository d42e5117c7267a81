"""The text of checkpoints' own code, searched and never run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from vlm_doctor.sources.checkpoint_folder import read_folder
from vlm_doctor.sources.own_code import broken_calls, gone, moved_joins, tells_head

PHI = """
from transformers.cache_utils import Cache, DynamicCache
class Phi3VModel(Phi3VPreTrainedModel):
    def __init__(self, config):
        self.register_buffer("inv_freq", None, persistent=False)
        self.post_init()
    def forward(self, past_key_values):
        past_key_values = DynamicCache.from_legacy_cache(past_key_values)
        length = past_key_values.get_usable_length(3)
        return past_key_values.seen_tokens, past_key_values.get_max_length()
"""
CASES = {
    "from transformers.utils.import_utils import is_torch_fx_available\n": ("is_torch_fx_available",),
    "from transformers.models.llama.modeling_llama import (\n    LlamaAttention,\n    LlamaFlashAttention2\n)\n": (
        "LlamaFlashAttention2",
    ),
    PHI: ("from_legacy_cache", "get_max_length", "get_usable_length", "seen_tokens"),
    "class InternVLChatModel(PreTrainedModel):\n    def __init__(self, config):\n        super().__init__(config)\n": (
        "post_init",
    ),
    "class Mine(Qwen2VLForConditionalGeneration):\n    pass\n": (),
    'self.register_buffer("inv_freq", inv_freq, persistent=False)\n': ("register_buffer",),
    'self.register_buffer("inv_freq", inv_freq)\n': (),
    'self.register_buffer("a", b, persistent=False)\ndef _init_weights(self, module):\n    init.copy_(module.a, b)\n': (),
    "class Resampler(nn.Module):\n    x = 1\n\n    def _init_weights(self, m):\n        pass\n": ("_initialize_weights",),
    "class Tower(PreTrainedModel):\n    def _init_weights(self, m):\n        self.post_init()\n": (),
    "super()._extract_past_from_model_output(outputs)\n": (),
    "self._extract_past_from_model_output(outputs)\n": ("_extract_past_from_model_output",),
}


@pytest.mark.parametrize(("code", "found"), CASES.items(), ids=range(len(CASES)))
def test_what_code_relies_on(code: str, found: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "modeling_x.py").write_text(code)
    assert broken_calls(tmp_path) == found


def test_code_beside_the_model_counts_and_no_code_is_none(tmp_path: Path) -> None:
    assert broken_calls(tmp_path) is None
    assert broken_calls(tmp_path / "nowhere") is None
    (tmp_path / "resampler.py").write_text('self.register_buffer("pos_embed", x, persistent=False)\n')
    assert broken_calls(tmp_path) is None
    (tmp_path / "modeling_x.py").write_text("x = 1\n")
    assert broken_calls(tmp_path) == ("register_buffer",)


def test_a_package_that_is_not_there_has_lost_nothing(tmp_path: Path) -> None:
    assert gone(tmp_path) == frozenset()
    (tmp_path / "cache_utils.py").write_text("def get_max_length(self): ...\n")
    assert gone(tmp_path) == {"from_legacy_cache", "get_usable_length", "seen_tokens"}
    (tmp_path / "modeling_utils.py").write_text("keys = self.all_tied_weights_keys\n")
    assert "post_init" in gone(tmp_path)


def test_code_made_to_hold_up_the_verdict_does_not(tmp_path: Path) -> None:
    # An unbounded search tries each of 58,000 beginnings to the end of the file: minutes.
    hostile = "class a(\n" * 58_000
    for name in ("modeling_a.py", "modeling_b.py", "modeling_c.py", "other.py"):
        (tmp_path / name).write_text(hostile)
    (tmp_path / "modeling_0.py").write_text("super().x\nself.get_usable_length(\nx.get_usable_length(1)\n")
    started = time.process_time()
    assert broken_calls(tmp_path) == ("get_usable_length",)
    assert time.process_time() - started < 20


def test_of_much_code_that_of_models_is_read_first(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.py").write_text("#" * 600_000)
    (tmp_path / "modeling_z.py").write_text("x.get_usable_length(1)\n")
    assert broken_calls(tmp_path) == ("get_usable_length",)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.cat((inputs_embeds[i, :boi], images_features[i].to(inputs_embeds.device)))", ("transformer.vision",)),
        ("torch.cat((inputs_embeds[i, :boi], images_features[i], inputs_embeds[i, eoi + 1 :]))", ()),
        ("images_features = images_features.to(inputs_embeds.device)", ("transformer.vision",)),
        ("boi = self.boi.expand(x.shape[0], -1, -1).to(x.device)", ("transformer.vision.boi",)),
        ("boi = self.boi.expand(x.size(0), -1, -1).to(x.device)", ("transformer.vision.boi",)),
        ("eoi = self.eoi.to(x.device).expand(x.shape[0], -1, -1)", ("transformer.vision.eoi",)),
        ("boi = self.boi.expand(x.shape[0], -1, -1)", ()),
    ],
)
def test_what_newer_code_moves_before_it_is_joined_is_seen(tmp_path: Path, code: str, found: tuple[str, ...]) -> None:
    (tmp_path / "modeling_chatglm.py").write_text(code)

    assert moved_joins(tmp_path) == found
    assert moved_joins(tmp_path / "nowhere") == ()


def test_a_checkpoint_knows_what_the_code_beside_it_moves(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_chatglm.ChatGLM"}}))
    unknown = read_folder(tmp_path).moved_joins
    (tmp_path / "modeling_chatglm.py").write_text("images_features[i].to(inputs_embeds.device)")

    assert unknown is None
    assert read_folder(tmp_path).moved_joins == ("transformer.vision",)


@pytest.mark.parametrize(
    ("code", "is_told"),
    [
        ("    def get_output_embeddings(self):\n        return self.transformer.output_layer\n", True),
        ("    @property\n    def lm_head(self):\n        return self.language_model.lm_head\n", True),
        ("    def get_input_embeddings(self):\n        return self.embedding\n", False),
        ("", False),
    ],
)
def test_whether_the_head_is_named_to_transformers(code: str, is_told: bool, tmp_path: Path) -> None:
    (tmp_path / "modeling_x.py").write_text(f"class X(PreTrainedModel):\n{code}")
    assert tells_head(tmp_path) == is_told
