"""What transformers' quantizers refuse of a ``device_map``, and what they leave in float32.

Source: ``validate_environment`` of quantizers/quantizer_*.py, transformers 5.23, for weights that are quantized in the
checkpoint; bitsandbytes is the same for weights quantized while they are loaded, and in 4.57.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class OffGpu(NamedTuple):
    """What a method says to parts on the CPU or the disk."""

    beside_gpus: tuple[str, ...]
    """Places that are refused where other parts are on a GPU."""
    alone: tuple[str, ...]
    """Places that are refused for the whole model."""
    error: str
    """What transformers says."""
    way_out: str = ""
    """What makes the map load all the same, as a sentence."""


_BOTH = ("cpu", "disk")

OFF_GPU_REFUSED: Mapping[str, OffGpu] = {
    "bitsandbytes": OffGpu(
        _BOTH,
        ("disk",),
        '"Some modules are dispatched on the CPU or the disk" (ValueError).',
        "BitsAndBytesConfig(llm_int8_enable_fp32_cpu_offload=True) makes such a map load, but leaves what is off the GPUs "
        "unquantized, and cannot be used with a checkpoint that is quantized already.",
    ),
    "torchao": OffGpu(("disk",), (), '"... disk offload with a pre-quantized torchao model" (ValueError).'),
    "hqq": OffGpu(_BOTH, _BOTH, '"... an HQQ model with a device_map that contains a CPU or disk device" (ValueError).'),
    **dict.fromkeys(
        ("quanto", "eetq", "bitnet"),
        OffGpu(_BOTH, ("disk",), '"... a device_map that contains a CPU or disk device" (ValueError).'),
    ),
    "higgs": OffGpu(_BOTH, _BOTH, "transformers refuses CPU and disk for HIGGS (ValueError)."),
    "fp_quant": OffGpu(("disk",), ("disk",), "transformers refuses the disk for fp_quant (ValueError)."),
    "gguf": OffGpu(("disk",), ("disk",), "transformers refuses the disk for GGUF (ValueError)."),
}
"""By ``quant_method``. Methods that are not here take any map (AWQ, GPTQ, compressed-tensors, FP8, MXFP4)."""

ONE_DEVICE: Mapping[str, str] = {
    "sinq": '"SINQ currently supports only a single CUDA device" (quantizer_sinq.py)',
}
"""``quant_method`` to why a model of it cannot be parted."""

KEPT_IN_FLOAT32: Mapping[str, tuple[str, ...]] = {
    "blip-2": ("qformer", "query_tokens"),
    **dict.fromkeys(("instructblip", "instructblipvideo"), ("query_tokens",)),
}
"""Family to modules that are loaded in float32 where float16 is asked for: ``_keep_in_fp32_modules`` of the class. What
other families list are a few biases and routers."""
