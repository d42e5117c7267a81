"""From a checkpoint (config and headers) to a ``ModelProfile``. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import msgspec

from ..data.activations import vision_coefficient
from ..data.config_defaults import ARCHITECTURES, PARTS
from ..data.families import FLAT_TOWERS, PACKAGED, REMOTE_TYPES, FamilyChanges, FamilyRules, rules_of
from ..data.image_rules import UNKNOWN
from ..data.linear_weights import UNTOLD_HEADS
from ..errors import ModelFileError
from ..image_rule import ImageRule
from ..model import ModelProfile, TextShape, Unit, VisionShape
from .allocation_scripts import body_script, tower_script
from .checkpoint import TORCH_DTYPES, Checkpoint, StoredTensor
from .image_files import ImageFiles
from .image_rule import image_rule
from .model_shapes import text_fields, text_shape, vision_fields, vision_shape
from .model_units import Cut, cut_into_units
from .module_names import by_module_name, with_flat_tower
from .quantized_tensors import (
    COMPRESSED,
    COUNTED,
    computes_in,
    join_quantized,
    quantization_method,
    quantization_section,
)
from .registration import registered
from .shapes_from_tensors import FLOATS
from .weightless_units import complete_units

MAX_UNITS = 2_000
"""The deepest published models have about 130 text layers (Llama 3.1 405B: 126); it bounds the time of a plan."""
_RIGHT_CONFIG = "use the config.json that belongs to this checkpoint"


def build_profile(
    checkpoint: Checkpoint,
    *,
    name: str,
    origin: Literal["checkpoint", "hub", "catalogue"],
    families: Mapping[str, FamilyChanges] | None = None,
    are_towers_flat: bool = False,
    stored_names: Collection[str] = (),
) -> ModelProfile:
    """Describe a model from its config and headers.

    Args:
        checkpoint: What was read, or a catalogue entry expanded.
        name: What the user calls it.
        origin: Where it was read from.
        families: The user's own rules, by ``model_type`` or name of the class; what they give outdoes what is built in.
        are_towers_flat: The installed transformers has no ``vision_model`` inside CLIP and SigLIP towers (5.x), which
            matters only where a tower is broken into parts.
        stored_names: Families whose class has the names of the checkpoint in the installed transformers.

    Raises:
        ModelFileError: The config lacks a key that a plan needs, or contradicts the tensors.
    """
    config = checkpoint.config
    if not checkpoint.tensors:
        raise ModelFileError(f"{name}: its files hold no tensors; download the checkpoint again.")
    model_type, architecture = class_of(config)
    is_own = bool(config.get("auto_map")) or architecture in PACKAGED
    is_remote_code = is_own and ARCHITECTURES.get(model_type) != architecture
    rules = _rules(config, model_type, architecture, is_remote_code=is_remote_code, families=families or {})
    if is_remote_code and model_type in UNTOLD_HEADS and not checkpoint.tells_head:
        rules = rules._replace(quantized=(*rules.quantized, UNTOLD_HEADS[model_type]))
    is_flat = are_towers_flat and not is_remote_code and _tower_type(config) in FLAT_TOWERS
    fields = text_fields(config)
    ties = _ties(config, fields.raw("tie_word_embeddings"))
    section = quantization_section(config)
    named = by_module_name(
        _each_once(checkpoint, ties_embeddings=ties), () if model_type in stored_names else rules.renames
    )
    if section is not None:
        named = join_quantized(named, section)
    tensors = with_flat_tower(named) if is_flat else named
    cut = cut_into_units(tensors, rules)
    if len(cut.units) > MAX_UNITS:
        raise ModelFileError(
            f"{name}: its tensors are named like {len(cut.units):,} parts of a model (at most {MAX_UNITS:,}); "
            "name the folder of a checkpoint that transformers can load."
        )
    text = text_shape(fields, tensors, cut.first("layer"))
    notes = [*checkpoint.notes, *_about_quantization(section), *_check_against(text, cut, tensors)]
    units, tied = complete_units(
        cut,
        body_type=fields.model_type,
        ties_embeddings=ties,
        rotary=rules.rotary,
    )
    vision, image = _vision(checkpoint, tensors, cut.first("vision"), rules, notes)
    has_script = not is_remote_code and not rules.vision_multiples and vision is not None
    return ModelProfile(
        name=name,
        origin=origin,
        architecture=architecture,
        model_type=model_type,
        is_remote_code=is_remote_code,
        dtype=_dtype(config, units),
        units=units,
        tensors={name: (tensor.dtype, tensor.elements) for name, tensor in tensors.items()},
        tied=tied,
        text=text,
        vision=vision,
        image=image,
        quantization=quantization_method(section),
        computes_in=computes_in(section),
        runs_inner_generate=rules.runs_inner_generate,
        text_multiples=rules.text_multiples,
        vision_multiples=rules.vision_multiples,
        body_script=None if is_remote_code or rules.text_multiples else body_script(text.body),
        # Scripts count in the tower's dimensions.
        tower_script=tower_script(model_type, _vision_type(config)) if has_script else None,
        older_tower_script=tower_script(model_type, _vision_type(config), is_older=True) if has_script else None,
        files=checkpoint.files,
        broken_calls=checkpoint.broken_calls,
        moved_joins=checkpoint.moved_joins,
        registered=registered(named, units, config, model_type=model_type, is_remote_code=is_remote_code),
        notes=tuple(notes),
    )


def _vision_type(config: Mapping[str, Any]) -> str | None:
    """``model_type`` of the vision tower, where the config names it."""
    vision = config.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, dict) else None
    return kind if isinstance(kind, str) else None


def _each_once(checkpoint: Checkpoint, *, ties_embeddings: bool | None) -> Mapping[str, StoredTensor]:
    """The tensors, those with two names once. A config that forbids ties makes transformers load both."""
    if not checkpoint.shared or ties_embeddings is False:
        return checkpoint.tensors
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in checkpoint.shared}


def class_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return ``model_type`` and the name of the class.

    Raises:
        ModelFileError: One of them is not there, or is no text.
    """
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    model_type = config.get("model_type") or REMOTE_TYPES.get(architecture, "")
    if not isinstance(model_type, str) or not (model_type or (architecture and config.get("auto_map"))):
        raise ModelFileError(f"config.json has no model_type; {_RIGHT_CONFIG}.")
    architecture = architecture or ARCHITECTURES.get(model_type, "")
    if not architecture:
        raise ModelFileError(f"config.json has no architectures; {_RIGHT_CONFIG}.")
    return model_type, architecture


def _rules(
    config: Mapping[str, Any],
    model_type: str,
    architecture: str,
    *,
    is_remote_code: bool,
    families: Mapping[str, FamilyChanges],
) -> FamilyRules:
    """The user's rules for the model, otherwise the built-in ones; what the config forbids is added."""
    rules = rules_of(model_type, architecture)
    if is_remote_code:
        rules = rules._replace(renames=())
    for name in (model_type, architecture):
        rules = rules._replace(**families.get(name, {}))
    if _taken(config) > 1:
        # The outputs of several blocks are joined (``torch.cat`` in modeling_llava.py), so that all must be on one GPU.
        rules = rules._replace(is_tower_whole=True)
    return rules


def _tower_type(config: Mapping[str, Any]) -> str:
    """``model_type`` of the vision tower."""
    section = config.get("vision_config")
    named = section.get("model_type") if isinstance(section, dict) else None
    if isinstance(named, str) and named:
        return named
    family = config.get("model_type")
    return PARTS.get(family, {}).get("vision_config", "") if isinstance(family, str) else ""


def _check_against(text: TextShape, cut: Cut, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Hold the config against the tensors; return what is worth a note.

    Raises:
        ModelFileError: Layers are missing, or the embedding has another width.
    """
    table = tensors.get(f"{cut.first('embedding')}.weight")
    if table is not None and len(table.shape) == 2 and table.dtype in FLOATS and table.shape[1] != text.hidden:
        raise ModelFileError(
            f"config.json says hidden_size {text.hidden} and the embedding is {table.shape[1]} wide; {_RIGHT_CONFIG}."
        )
    stored = {unit.layer for unit in cut.units if unit.layer is not None}
    missing = next((layer for layer in range(text.layers) if layer not in stored), None)
    if missing is not None:
        raise ModelFileError(
            f"config.json promises {text.layers} text layers and the checkpoint lacks number {missing}; "
            f"complete the download, or {_RIGHT_CONFIG}."
        )
    if len(stored) == text.layers:
        return []
    return [f"The checkpoint stores {len(stored)} text layers, config.json names {text.layers}: all are counted."]


def _taken(config: Mapping[str, Any]) -> int:
    """Blocks of the tower whose states are features."""
    layers = config.get("vision_feature_layer", config.get("vision_feature_layers"))
    return max(1, len(layers)) if isinstance(layers, list) else 1


def _ties(config: Mapping[str, Any], of_body: Any) -> bool | None:
    """``tie_word_embeddings``: the root decides when it says something, as in transformers."""
    flag = config.get("tie_word_embeddings")
    flag = of_body if flag is None else flag
    return flag if isinstance(flag, bool) else None


def _vision(
    checkpoint: Checkpoint,
    tensors: Mapping[str, StoredTensor],
    tower: str,
    rules: FamilyRules,
    notes: list[str],
) -> tuple[VisionShape | None, ImageRule | None]:
    """Dimensions of the tower and its processor's rule; what is unknown becomes a note."""
    fields = vision_fields(checkpoint.config)
    shape = vision_shape(fields, tensors, tower) if tower and fields else None
    if shape is not None:
        shape = msgspec.structs.replace(shape, taken=_taken(checkpoint.config))
    if not tower:
        notes.append("No vision tower was recognized in the names of the tensors.")
    elif shape is None and not vision_coefficient(str(checkpoint.config.get("model_type"))).pixel_elements:
        notes.append("config.json does not give the dimensions of the vision tower: its working memory is not counted.")
    if shape is None and rules.image is None:
        return None, None
    files = ImageFiles(checkpoint.config, fields, checkpoint.processor or {}, checkpoint.prompts)
    tower_patch = shape.patch if shape else None
    rule = image_rule(rules.image or UNKNOWN, files, tower_patch, has_conv=f"{tower}.conv.weight" in tensors)
    says_frames = fields is not None and fields.get("frames") is not None
    if shape is not None and rules.image is not None and rules.image.kind != "merge" and not says_frames:
        # Families that stack frames have another rule, Qwen2-VL's; of an unknown one nothing can be told.
        shape = msgspec.structs.replace(shape, frames=1)
    family = checkpoint.config.get("model_type") or "this family"
    if rule is None and shape is not None:
        notes.append(f"How {family} turns images into tokens is unknown: image tokens are not counted.")
    elif rule is not None and rules.image is None:
        notes.append(
            f"How {family} turns images into tokens is assumed: each is resized to {rule.size} x {rule.size} pixels."
        )
    return shape, rule


def _dtype(config: Mapping[str, Any], units: Iterable[Unit]) -> str:
    """Main type in torch's words: what the config says, otherwise the one that most stored elements have."""
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        if isinstance(named, str) and named.removeprefix("torch.") in TORCH_DTYPES.values():
            return named.removeprefix("torch.")
    stored: Counter[str] = Counter()
    for unit in units:
        stored.update({dtype: count for dtype, count in unit.parameters.items() if dtype in FLOATS})
    return TORCH_DTYPES[stored.most_common(1)[0][0]] if stored else "bfloat16"


def _about_quantization(section: Mapping[str, Any] | None) -> list[str]:
    """What a plan assumes of weights that are quantized already."""
    method = quantization_method(section)
    if method is not None and method not in COUNTED:
        return [f"How {method[:40]!a} quantizes is not known: its weights are counted as the files hold them."]
    if method != COMPRESSED:
        return []
    return [
        "The first forward pass unpacks the weights and keeps them in 16 bit (compressed-tensors), so that they take more "
        "than their files."
    ]
