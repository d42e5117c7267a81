"""A loaded model: what the fixture ``vlm`` gives, and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_doctor.errors import UsageError
from vlm_doctor.units import GIB

from .placing import ordinals_in
from .processors import prompt_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from vlm_doctor.placement import Plan, Stage

    from ..requirements import VlmSpec
    from ..warm.run import Warm


@dataclass
class LoadedVlm:
    """A model with its processor, ready to be asked."""

    name: str
    model: Any
    """``None`` after :func:`unload`."""
    processor: Any
    plan: Plan | None
    """``None`` when the model was loaded for the CPU, or placed by transformers."""
    device_map: dict[str, int | str]
    """Module path to CUDA ordinal of this process, or ``cpu`` for what is offloaded; ``""`` is the whole model. Empty for a
    run on the CPU."""
    gpus: tuple[Stage, ...]
    """One a GPU, in the order of the stages, with the plan's ledger where it was placed by one. Empty on the CPU."""
    input_device: str
    """Where inputs belong: the first stage's device, such as ``cuda:0``."""
    load_seconds: float
    offloaded_bytes: int = 0
    """Weights that are in host memory or on disk, although GPUs were to be used (``--vlm-allow-offload``)."""
    spec: VlmSpec | None = None
    """As the test named it."""
    warm: Warm | None = None
    """What came of ``--vlm-warm``; ``None`` without it."""
    held_by: str = ""
    """Who kept some of the model after :func:`unload`, such as ``variable KEPT of module test_ocr``; else empty."""

    def __repr__(self) -> str:
        devices = dict.fromkeys(self.device_map.values())
        where = ", ".join(f"cuda:{device}" if isinstance(device, int) else device for device in devices) or "cpu"
        return f"<LoadedVlm {self.name} on {where}>" if self.model is not None else f"<LoadedVlm {self.name}, unloaded>"

    @property
    def vram_gib(self) -> float:
        """GPU memory of its weights and buffers, over all its GPUs, in GiB; 0 on the CPU and after it was unloaded."""
        if self.model is None or not self.device_map:
            return 0.0
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return float(sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cuda") / GIB)

    @property
    def ordinals(self) -> list[int]:
        """CUDA ordinals of its GPUs, in the order of the stages; empty on the CPU."""
        return ordinals_in(self.device_map)

    def generate(
        self,
        images: Image | Sequence[Image] | None,
        text: str,
        *,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> str:
        """Ask the model once, as its chat template wants to be asked.

        Args:
            images: None, one or several PIL images, put before the text.
            text: The user's words.
            max_new_tokens: At most this many tokens are made.
            do_sample: False takes the likeliest token each time, so that the answer is the same each time.
            seed: For sampling. The random state of torch is left as it was.
            options: Passed on to ``model.generate``.

        Returns:
            The new text alone, without prompt and special tokens.

        Raises:
            UsageError: The model was unloaded, or its processor takes no images.
        """
        import torch

        if self.model is None:
            raise UsageError(f"{self.name} was unloaded: ask before the fixture is torn down.")
        inputs = self._inputs(images, text)
        if not do_sample:
            # A checkpoint's own sampling settings would only be warned about.
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        ordinals = sorted(self.ordinals)
        with torch.random.fork_rng(devices=ordinals), torch.inference_mode():
            for generator in (torch.default_generator, *(torch.cuda.default_generators[ordinal] for ordinal in ordinals)):
                generator.manual_seed(seed)
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=do_sample, **options)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(new_tokens, skip_special_tokens=True))

    def peak_bytes(self) -> dict[int, int]:
        """CUDA ordinal to the most memory that torch had allocated since the peak was last reset; empty on the CPU."""
        import torch

        return {ordinal: torch.cuda.max_memory_allocated(ordinal) for ordinal in sorted(self.ordinals)}

    def _inputs(self, images: Image | Sequence[Image] | None, text: str) -> dict[str, Any]:
        pictures = _as_list(images)
        if pictures and not hasattr(self.processor, "image_processor"):
            raise UsageError(f"{self.name} has no image processor: use vlm.model and vlm.processor as its model card says.")
        arguments = {"images": pictures} if pictures else {}
        batch = self.processor(text=prompt_text(self.processor, len(pictures), text), return_tensors="pt", **arguments)
        return {key: self._on_input_device(value) for key, value in batch.items()}

    def _on_input_device(self, value: Any) -> Any:
        if isinstance(value, list):
            # Some processors keep images of different sizes apart.
            return [self._on_input_device(item) for item in value]
        if not hasattr(value, "is_floating_point"):
            return value
        if value.is_floating_point():
            return value.to(self.input_device, self.model.dtype)
        return value.to(self.input_device)


def _as_list(images: Image | Sequence[Image] | None) -> list[Image]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
