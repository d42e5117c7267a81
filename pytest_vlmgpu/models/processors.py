"""A checkpoint's processor, by the doctor's own rule; one that takes no images is refused where the family has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_doctor.probes import loading
from vlm_doctor.probes.loading import prompt_text

from .failures import LoadFailure

if TYPE_CHECKING:
    from .source import Source

__all__ = ["load_processor", "prompt_text"]


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
    processor = loading.load_processor(
        transformers, source.name, source.revision, config, trust_remote_code=trust_remote_code
    )
    if type(config) in transformers.PROCESSOR_MAPPING and not hasattr(processor, "image_processor"):
        raise LoadFailure(
            "VLM713",
            f"{source.name} has a tokenizer but no image processor: add preprocessor_config.json of the published one.",
        )
    return processor
