"""Which classes of the installed transformers have fused attention, and which refuse its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.data.activations import NEVER_FUSED
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.planner.release import read_release
from vlm_doctor.sources.model_files import load_profile

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from formulas_and_traces import machine_here, write_checkpoint  # noqa: E402 - of the benchmarks, which import torch
from tiny_architectures import families, tiny_config  # noqa: E402


def attention_of(config: Any, **asked: str) -> dict[str, str]:
    """Attention of each model and model within, by ``model_type`` of its config; the outermost as ``""``."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, **asked)
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    return {part.config.model_type: part.config._attn_implementation for part in parts[::-1]} | {
        "": model.config._attn_implementation
    }


@pytest.mark.parametrize("family", families())
def test_attention_is_as_the_installed_class_has_it(family: str, tmp_path: Path) -> None:
    try:
        write_checkpoint(tmp_path, tiny_config(family))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        by_default = attention_of(config)
    except Exception as error:  # noqa: BLE001 - some cannot be made without packages or a vocabulary that are not here
        pytest.skip(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
    is_refused = False
    try:
        attention_of(transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="sdpa")
    except ValueError as error:
        is_refused = "scaled_dot_product_attention" in str(error)

    loaded = as_loaded(load_profile(str(tmp_path), allow_network=False), machine_here())

    assert loaded.refuses_sdpa == is_refused
    if loaded.text.body in by_default:
        assert loaded.text.is_never_fused == (by_default[loaded.text.body] == "eager")


ENCODERS = {
    "bert-generation", "big_bird", "bigbird_pegasus", "ctrl", "data2vec-text", "electra", "ernie", "mega", "megatron-bert",
    "mvp", "open-llama", "prophetnet", "qdqbert", "recurrent_gemma", "reformer", "rembert", "roberta-prelayernorm",
    "roc_bert", "roformer", "speech_to_text_2", "transfo-xl", "trocr", "xlm", "xlm-prophetnet", "xlnet", "xmod", "zamba",
}  # fmt: skip
"""Of before there were vision-language models; nobody has them for a text body."""
WITHOUT_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}


def test_bodies_that_are_never_fused_are_known() -> None:
    """Any text body may be that of a LLaVA or an InternVL, such as gpt_oss in InternVL3.5."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    release = read_release(transformers.__version__)
    assert release is not None
    names = {kind: name if isinstance(name, str) else name[0] for kind, name in CLASSES.items()}
    found = {kind for kind, name in names.items() if not getattr(transformers, name)._supports_sdpa}
    told = {kind for kind, (since, before) in NEVER_FUSED.items() if kind in names and since <= release < before}
    assert found - ENCODERS - WITHOUT_ATTENTION - {"got_ocr2"} == told
