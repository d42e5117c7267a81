"""Arguments of ``from_pretrained`` that a plan's figures, and its map, rest on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlm_doctor.probes.loading import workload_options

PARTED: dict[str, int | str] = {"model": 0, "lm_head": 1}
STORED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def options(version: str, stored: Any, device_map: Any, quantization: str | None = None) -> dict[str, Any]:
    transformers = SimpleNamespace(
        __version__=version,
        CompressedTensorsConfig=lambda **fields: ("compressed", fields),
        BitsAndBytesConfig=lambda **fields: ("bitsandbytes", fields),
    )
    config = SimpleNamespace() if stored is None else SimpleNamespace(quantization_config=stored)
    kinds: dict[str, Any] = {"attention": "sdpa", "quantization": quantization, "dtype": "bfloat16"}
    return workload_options(transformers, **kinds, config=config, device_map=device_map)


@pytest.mark.parametrize("stored", [STORED, SimpleNamespace(quant_method="compressed-tensors")])
def test_what_would_lose_its_hooks_is_unpacked_while_it_loads(stored: Any) -> None:
    assert options("5.23.0", stored, PARTED) == {"quantization_config": ("compressed", {"dequantize": True})}


@pytest.mark.parametrize(
    ("version", "stored", "device_map"),
    [
        ("4.57.6", STORED, PARTED),
        ("5.23.0", STORED, {"": 0}),
        ("5.23.0", STORED, "auto"),
        ("5.23.0", STORED, None),
        ("5.23.0", {"quant_method": "gptq"}, PARTED),
        ("5.23.0", None, PARTED),
    ],
)
def test_everything_else_loads_as_it_is(version: str, stored: Any, device_map: Any) -> None:
    assert options(version, stored, device_map) == {}


def test_a_workload_that_quantizes_says_so_itself() -> None:
    found = options("5.23.0", None, PARTED, "nf4")["quantization_config"]

    assert found[0] == "bitsandbytes"
    assert found[1]["load_in_4bit"]
