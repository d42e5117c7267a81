"""A checkpoint's processor: loading it, and writing the prompt it expects."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from .failures import LoadFailure

if TYPE_CHECKING:
    from .source import Source


def load_processor(transformers: Any, source: Source, config: Any, *, trust_remote_code: bool) -> Any:
    """The processor of a checkpoint; without torchvision the same processor, for images only.

    Args:
        transformers: The imported module: ``loading.py`` is the only door to it.
        source: Of the model.
        config: Of the loaded model.
        trust_remote_code: Allow Python code of the checkpoint to run.

    Raises:
        LoadFailure: VLM713, when a family of transformers' own has no image processor in the checkpoint.
    """
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=trust_remote_code
        )
    except ImportError:
        # Without torchvision there is no video processor, and every family that knows videos is refused as a whole.
        if importlib.util.find_spec("torchvision") is not None or type(config) not in transformers.PROCESSOR_MAPPING:
            raise
        processor = _for_images_only(transformers, source, config)
    if type(config) in transformers.PROCESSOR_MAPPING and not hasattr(processor, "image_processor"):
        raise LoadFailure(
            "VLM713",
            f"{source.name} has a tokenizer but no image processor: add preprocessor_config.json of the published one.",
        )
    return processor


def _for_images_only(transformers: Any, source: Source, config: Any) -> Any:
    """The family's own processor with nothing in the place of its video processor."""
    family: Any = transformers.PROCESSOR_MAPPING[type(config)]

    class WithoutVideo(family):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutVideo.__name__ = family.__name__
    settings, _ = family.get_processor_dict(source.name, revision=source.revision)
    classes = (transformers.AutoImageProcessor, transformers.AutoTokenizer)
    parts = [*(part.from_pretrained(source.name, revision=source.revision) for part in classes), None]
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
