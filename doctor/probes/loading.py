"""How a checkpoint is loaded with transformers: the class that can generate, options, processor, the words of a prompt.

The one way of ``vlm-doctor try`` and of the pytest plugin, so that what was tried is what the tests get. The modules of
transformers and torch are given, not imported: whoever calls has imported them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ..data.auto_classes import AUTO_CLASSES

_ATTENTION = {"eager": "eager", "flash": "flash_attention_2"}
"""transformers' word for each; ``sdpa`` is its own choice wherever a class can."""


def published_class(config: Any) -> str | None:
    """Name of the auto class under which a checkpoint's own Python code is published; ``None`` without such code."""
    published = getattr(config, "auto_map", None) or {}
    return next((name for name in AUTO_CLASSES if name in published), None)


def auto_class(transformers: Any, config: Any) -> Any | None:
    """The auto class that loads a checkpoint: transformers' own before the checkpoint's.

    Returns:
        ``None`` when this transformers does not know the family and the checkpoint brings no code.
    """
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    name = published_class(config)
    return None if name is None else getattr(transformers, name)


def workload_options(
    transformers: Any,
    *,
    attention: str,
    quantization: str | None,
    dtype: Any,
    config: Any = None,
    device_map: Mapping[str, int | str] | str | None = None,
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` on which a plan's figures rest beyond the map and the dtype.

    Args:
        transformers: The module.
        attention: As in ``Workload``.
        quantization: ``int8``, ``nf4`` or ``None``.
        dtype: That the model is loaded in: torch's own, its name, or ``auto``. Layers in 4 bit compute in it; by default
            they would in float32, and unpack each weight in float32 too.
        config: Of the checkpoint.
        device_map: The plan's, with which a model of compressed-tensors on several devices is unpacked while it is loaded:
            at its first pass it would lose accelerate's hooks.
    """
    options: dict[str, Any] = {}
    if attention in _ATTENTION:
        options["attn_implementation"] = _ATTENTION[attention]
    if quantization is not None:
        is_int8 = quantization == "int8"
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=is_int8,
            load_in_4bit=not is_int8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=None if dtype == "auto" else dtype,
        )
    elif _loses_hooks(transformers, config, device_map):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return options


def _loses_hooks(transformers: Any, config: Any, device_map: Mapping[str, int | str] | str | None) -> bool:
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    is_parted = isinstance(device_map, Mapping) and len(set(device_map.values())) > 1
    return method == "compressed-tensors" and is_parted and not transformers.__version__.startswith("4.")


def load_processor(transformers: Any, name: str, revision: str | None, config: Any, *, trust_remote_code: bool) -> Any:
    """The processor of a checkpoint; without torchvision the same processor, for images only.

    Args:
        transformers: The module.
        name: Folder or hub id.
        revision: Of the hub id.
        config: Of the loaded model.
        trust_remote_code: Allow Python code of the checkpoint to run.

    Raises:
        ImportError: It needs a package that is missing.
    """
    try:
        return transformers.AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ImportError:
        # Without torchvision there is no video processor, and every family that knows videos is refused as a whole.
        if importlib.util.find_spec("torchvision") is not None or type(config) not in transformers.PROCESSOR_MAPPING:
            raise
    return _for_images_only(transformers, name, revision, config, trust_remote_code=trust_remote_code)


def _for_images_only(transformers: Any, name: str, revision: str | None, config: Any, *, trust_remote_code: bool) -> Any:
    """The family's own processor with nothing in the place of its video processor."""
    family: Any = transformers.PROCESSOR_MAPPING[type(config)]

    class WithoutVideo(family):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutVideo.__name__ = family.__name__
    settings, _ = family.get_processor_dict(name, revision=revision)
    classes = (transformers.AutoImageProcessor, transformers.AutoTokenizer)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    parts = [*(part.from_pretrained(name, **where) for part in classes), None]
    return WithoutVideo.from_args_and_dict(parts, settings)


def prompt_text(processor: Any, images: int, text: str) -> str:
    """The user's words as the processor expects them: chat template applied, one placeholder an image before the text."""
    owners = [processor, getattr(processor, "tokenizer", None)]
    owner = next((owner for owner in owners if getattr(owner, "chat_template", None)), None)
    if owner is None:
        return f"{getattr(processor, 'image_token', '<image>') * images}{text}"
    content: Any = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    if not hasattr(processor, "image_processor"):
        content = text
    messages = [{"role": "user", "content": content}]
    return str(owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
