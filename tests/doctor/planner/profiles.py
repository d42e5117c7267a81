"""Profiles and machines made by hand, with the true dimensions of published models, so that the planner is tested alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from vlm_doctor.image_rule import ImageRule
from vlm_doctor.machine import Gpu, Libraries, Link, Machine, Package
from vlm_doctor.model import LinearWeights, ModelProfile, Role, TextShape, Unit, VisionShape
from vlm_doctor.units import GIB, MIB

DRIVER_BYTES = 200 * MIB
BODY = "model.language_model"


def unit(key: str, role: Role, elements: int, *, layer: int | None = None, linear: int = 0, dtype: str = "BF16") -> Unit:
    size = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1}[dtype]
    return Unit(
        key=key,
        role=role,
        parameters={dtype: elements} if elements else {},
        stored_bytes=elements * size,
        largest_tensor_elements=elements // 3,
        linear=LinearWeights(linear, linear // 4096, 7, linear // 3) if linear else LinearWeights(),
        layer=layer,
    )


def model(
    name: str,
    text: TextShape,
    *,
    vision_elements: int,
    layer_elements: int,
    fields: dict[str, Any],
    **own_fields: Any,
) -> ModelProfile:
    """A model of the usual parts; ``fields`` outdo its own."""
    table = text.vocabulary * text.hidden
    layers = [
        unit(f"{BODY}.layers.{number}", "layer", layer_elements, layer=number, linear=layer_elements - 4 * text.hidden)
        for number in range(text.layers)
    ]
    profile = ModelProfile(
        name=name,
        origin="catalogue",
        architecture="SomeForConditionalGeneration",
        model_type="",
        is_remote_code=False,
        dtype="bfloat16",
        units=(
            unit("model.visual", "vision", vision_elements, linear=vision_elements // 2),
            unit(f"{BODY}.embed_tokens", "embedding", table),
            unit(f"{BODY}.rotary_emb", "other", 0),
            *layers,
            unit(f"{BODY}.norm", "norm", text.hidden),
            unit("lm_head", "head", table),
        ),
        text=text,
    )
    return msgspec.structs.replace(profile, **{**own_fields, **fields})


def glm41v_9b(**fields: Any) -> ModelProfile:
    """The GLM-4.1V-9B class as measured: Glm4vConfig of transformers 5.17, 19.17 GiB in bfloat16. Its image processor's
    bounds are left out, as the measurement did."""
    return model(
        "zai-org/GLM-4.1V-9B-Thinking",
        TextShape(layers=40, hidden=4096, intermediate=13696, heads=32, kv_heads=2, head_dim=128, vocabulary=151552),
        model_type="glm4v",
        vision=VisionShape(layers=24, hidden=1536, intermediate=13696, heads=12, patch=14),
        image=ImageRule(kind="merge", size=1008, patch=14, merge=2),
        vision_elements=892_498_432,
        layer_elements=203_969_024,
        fields=fields,
    )


def llava_13b(**fields: Any) -> ModelProfile:
    """The LLaVA-1.5-13B class as measured: 24.87 GiB in bfloat16."""
    return model(
        "llava-hf/llava-1.5-13b-hf",
        TextShape(layers=40, hidden=5120, intermediate=13824, heads=40, kv_heads=40, head_dim=128, vocabulary=32064),
        model_type="llava",
        vision=VisionShape(layers=24, hidden=1024, intermediate=4096, heads=16, patch=14),
        image=ImageRule(kind="fixed", size=336, patch=14, extra_patches=1),
        vision_elements=303_507_456 + 31_467_520,
        layer_elements=317_204_480,
        fields=fields,
    )


def qwen25_vl_72b(**fields: Any) -> ModelProfile:
    """Qwen2.5-VL-72B: 136.74 GiB in bfloat16."""
    return model(
        "Qwen/Qwen2.5-VL-72B-Instruct",
        TextShape(layers=80, hidden=8192, intermediate=29568, heads=64, kv_heads=8, head_dim=128, vocabulary=152064),
        model_type="qwen2_5_vl",
        vision=VisionShape(layers=32, hidden=1280, intermediate=3456, heads=16, patch=14),
        image=ImageRule(kind="merge", size=1008, patch=14, merge=2),
        vision_elements=701_000_000,
        layer_elements=877_684_736,
        fields=fields,
    )


def gpu(index: int, free_bytes: int | None, total_bytes: int | None, **fields: Any) -> Gpu:
    known = Gpu(
        index=index,
        uuid=f"GPU-{index:08x}-0000-0000-0000-000000000000",
        name="NVIDIA Test",
        memory_total_bytes=total_bytes,
        memory_free_bytes=free_bytes,
        memory_reserved_bytes=DRIVER_BYTES,
    )
    return msgspec.structs.replace(known, **fields)


def machine(
    free_gib: Sequence[float], *, total_gib: float | None = None, links: Sequence[Link] = (), **fields: Any
) -> Machine:
    """Free memory of each GPU; without a total, nobody else is on it."""
    gpus = []
    for index, free in enumerate(free_gib):
        free_bytes = round(free * GIB)
        total_bytes = free_bytes + DRIVER_BYTES if total_gib is None else round(total_gib * GIB)
        gpus.append(gpu(index, free_bytes, total_bytes))
    made = Machine(origin="synthetic", description="test machine", gpus=tuple(gpus), links=tuple(links))
    return msgspec.structs.replace(made, **fields)


def with_transformers(where: Machine, version: str) -> Machine:
    """The machine, with a release of transformers."""
    packages = (Package(name="transformers", version=version),)
    return msgspec.structs.replace(where, libraries=Libraries(python="3.11", executable="python", packages=packages))
