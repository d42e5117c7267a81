"""Write doctor/data/registration.json from the installed transformers.

Usage: python tools/make_registration.py            (once with transformers 5, once with 4.57; each writes its own part)

``device_map="auto"`` walks a model in the order in which its class registers modules, and never parts the classes in
``_no_split_modules``. Neither can be read from a checkpoint: safetensors sorts names when it saves. So the order is kept
here, for every class behind ``AutoModelForImageTextToText`` and for the text bodies and towers that composite models take.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

TARGET = Path(__file__).resolve().parent.parent / "doctor" / "data" / "registration.json"

BODIES = (
    "cohere", "cohere2", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "granite",
    "llama", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
    "stablelm", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
"""Text bodies that a composite model may name, beside those of the default configs."""

TOWERS = (
    "clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "pixtral", "dinov2", "internvl_vision",
    "idefics2_vision", "idefics3_vision", "smolvlm_vision", "aimv2_vision_model", "mllama_vision_model",
)  # fmt: skip
"""Vision towers that a composite model may name, beside those of their default configs."""
ENTRY = tuple[str, str]
"""Pattern of a module's or parameter's name, numbers as ``*``, and what it is: see ``doctor/sources/registration.py``."""


def pattern_of(name: str) -> str:
    """A name with its numbers as ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def no_split_classes(model: Any) -> set[str]:
    """Classes that ``device_map="auto"`` never parts."""
    if hasattr(model, "_get_no_split_modules"):
        return set(model._get_no_split_modules("auto"))
    return set(model._no_split_modules)


def walk(model: Any, no_split: set[str]) -> Iterator[tuple[str, str]]:
    """What ``auto`` may place on its own, in the order of registration: names, each with what it is.

    Blocks come as ``=Class``, bare parameters as ``-``, modules with buffers alone as ``~``, other modules without children
    as ``.``; buffers add ``+bytes``, at the size they have by default.
    """

    def buffers(module: Any) -> str:
        size_bytes = sum(buffer.numel() * counted_bytes(buffer) for buffer in module.buffers())
        return f" +{size_bytes}" if size_bytes else ""

    def visit(prefix: str, module: Any) -> Iterator[tuple[str, str]]:
        children = list(module.named_children())
        name = module.__class__.__name__
        if prefix and (name in no_split or not children):
            if next(module.parameters(), None) is not None:
                yield prefix, (f"={name}" if name in no_split else ".") + buffers(module)
            elif buffers(module) and pattern_of(prefix) == prefix:
                yield prefix, "~" + buffers(module)
            return
        for own, _ in module.named_parameters(recurse=False):
            yield f"{prefix}.{own}" if prefix else own, "-"
        for child, submodule in children:
            yield from visit(f"{prefix}.{child}" if prefix else child, submodule)

    yield from visit("", model)


def counted_bytes(buffer: Any) -> int:
    """Bytes of an element as the libraries count them: accelerate takes every float for one of the loaded type, 16 bit."""
    is_narrowed = transformers.__version__.startswith("4.") and buffer.is_floating_point()
    return min(2, buffer.element_size()) if is_narrowed else int(buffer.element_size())


def patterns(model: Any) -> list[ENTRY] | None:
    """The walk with numbers as ``*``; ``None`` when blocks of one list are not alike."""
    entries: dict[str, str] = {}
    for name, kind in walk(model, no_split_classes(model)):
        pattern = pattern_of(name)
        known = entries.get(pattern)
        if known is None:
            entries[pattern] = kind
        elif known != kind:
            if not (known.startswith("=") and kind.startswith("=")):
                return None
            (classes, _, size), (other, _, _) = known.partition(" "), kind.partition(" ")
            names = "=" + "|".join(sorted({*classes[1:].split("|"), other[1:]}))
            entries[pattern] = f"{names} {size}".rstrip()
    if any(f"{pattern}.".startswith(f"{other}.") for pattern in entries for other in entries if other != pattern):
        return None
    return list(entries.items())


def slots(model: Any) -> dict[str, str]:
    """Submodules that come from another family, by module path: ``part=model_type``, with ``/lm`` for one with a head."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or not isinstance(module, PreTrainedModel) or any(path.startswith(f"{known}.") for known in found):
            continue
        if module.__class__.__module__ == model.__class__.__module__:
            continue
        for part, config in vars(model.config).items():
            if config is module.config or (
                part.endswith("_config") and getattr(config, "model_type", "") == module.config.model_type
            ):
                kind = "/lm" if module.__class__.__name__.endswith("ForCausalLM") else ""
                found[path] = f"{part}={module.config.model_type}{kind}"
                break
    return found


def with_slots(model: Any, entries: list[ENTRY], bodies: dict[str, list[ENTRY]]) -> list[ENTRY]:
    """Replace what another family registers by a reference to it, where that says the same."""
    for path, slot in slots(model).items():
        body = bodies.get(slot.partition("=")[2])
        if body is None:
            continue
        inside = [(pattern, kind) for pattern, kind in entries if pattern.startswith(f"{path}.")]
        if inside != [(f"{path}.{pattern}", kind) for pattern, kind in body]:
            continue
        at = entries.index(inside[0])
        entries = [*entries[:at], (path, f"@{slot}"), *entries[at + len(inside) :]]
    return entries


def build(factory: Any, config: Any) -> Any:
    """An instance on the meta device, or ``None`` where the class cannot be built."""
    try:
        with torch.device("meta"):
            return factory(config)
    except Exception as error:  # noqa: BLE001 - whatever a class raises, it is left out
        print(f"left out: {getattr(config, 'model_type', config)}: {str(error)[:100]!r}", file=sys.stderr)
        return None


def config_of(model_type: str) -> Any:
    """The default config of a family, or ``None`` where there is none."""
    try:
        config = AutoConfig.for_model(model_type)
    except Exception as error:  # noqa: BLE001
        print(f"left out: {model_type}: {str(error)[:100]!r}", file=sys.stderr)
        return None
    return config


def collect() -> dict[str, dict[str, list[str]]]:
    """The part of the installed version."""
    models: dict[str, Any] = {}
    for model_type, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        first = name[0] if isinstance(name, (list, tuple)) else name
        config = config_of(model_type)
        model = None if config is None else build(getattr(transformers, first), config)
        if model is not None:
            models[model_type] = model
    wanted = {slot.partition("=")[2] for model in models.values() for slot in slots(model).values()}
    wanted |= {*BODIES, *TOWERS, *(f"{word}/lm" for word in ("llama", "mistral", "qwen2", "qwen3"))}
    bodies: dict[str, list[ENTRY]] = {}
    for word in sorted(wanted):
        model_type, _, head = word.partition("/")
        config = config_of(model_type)
        if config is None:
            continue
        factory = (AutoModelForCausalLM if head else AutoModel).from_config
        model = build(factory, config)
        try:
            entries = patterns(model) if model is not None else None
        except ValueError as error:
            print(f"left out: {word}: {str(error)[:100]!r}", file=sys.stderr)
            continue
        if entries:
            bodies[word] = entries
    families: dict[str, list[ENTRY]] = {}
    for model_type, model in models.items():
        try:
            entries = patterns(model)
        except ValueError as error:
            print(f"left out: {model_type}: {str(error)[:100]!r}", file=sys.stderr)
            continue
        if entries is None:
            print(f"left out: {model_type}: blocks that are not alike", file=sys.stderr)
        else:
            families[model_type] = with_slots(model, entries, bodies)
    return {"families": written(families), "bodies": written(bodies)}


def written(entries: dict[str, list[ENTRY]]) -> dict[str, list[str]]:
    """Entries as lines."""
    return {
        key: [f"{pattern} {kind}".removesuffix(" .") for pattern, kind in value] for key, value in sorted(entries.items())
    }


if __name__ == "__main__":
    known = json.loads(TARGET.read_text("utf-8")) if TARGET.exists() else {}
    known[transformers.__version__.partition(".")[0]] = collect()
    TARGET.write_text(json.dumps(known, indent=0) + "\n", "utf-8")
