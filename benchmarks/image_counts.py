"""What the image processors of the installed transformers make of images of many sizes: tokens, and what the tower sees.

    python benchmarks/image_counts.py [FILE.json]

Processors are built from their class's defaults or from the settings of a published checkpoint (``PUBLISHED``), with a
tokenizer that only knows that a special token is one token, and run on plain images. Families whose processor needs
torchvision are left out where it is missing. The file, ``tests/doctor/model/image_counts.json`` unless another is named,
lets the doctor's rules be held against the counts without transformers; ``tests/models/test_image_rules.py`` runs the
processors that are installed.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parents[1] / "tests" / "doctor" / "model" / "image_counts.json"
SIZES = (
    *((8, 8), (30, 500), (97, 31), (224, 224), (336, 672), (364, 364), (500, 333), (512, 384), (600, 100), (768, 768)),
    *((1000, 1000), (1024, 300), (1080, 1920), (300, 2400), (2160, 3840)),
)
"""Height and width in pixels."""

PAIR = (500, 333)
"""Of two images in one prompt."""

_WORD = re.compile(r"<[^<>]*>|\|[A-Z]+\||\n+|\[[A-Z_]+\]|[A-Z]+(?:_[A-Z]+)*(?:_\d+)?|\d|\S")
"""What a tokenizer of any family makes one token of, in what processors write for an image."""


class Case(NamedTuple):
    """A processor to be built."""

    processor: str
    images: str
    """Class of the image processor."""
    config: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    """Of the image processor, beside the class's defaults."""
    prompts: Mapping[str, Any] = {}
    """Of the processor around it."""
    outside: int = 0
    """Tokens that the chat template puts around an image."""
    spare: int = 0
    """Tokens that the doctor may count too much: the digits of a size."""


_QWEN = Case("Qwen2VLProcessor", "Qwen2VLImageProcessor", outside=2)
_QWEN3 = Case(
    "Qwen3VLProcessor",
    "Qwen2VLImageProcessor",
    settings={"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    outside=2,
)
_GLM = Case("Glm4vProcessor", "Glm4vImageProcessor", outside=2)
_GLM46 = Case("Glm46VProcessor", "Glm46VImageProcessor", outside=2)
_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
_CLIP = {"vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}}
_SIGLIP = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
_PIXTRAL_24B = {"size": {"longest_edge": 1540}, "patch_size": {"height": 14, "width": 14}}
_MINICPM = {"vision_config": {"image_size": 980, "patch_size": 14}}
_448 = {"size": {"height": 448, "width": 448}}

CASES: dict[str, list[Case]] = {
    "aria": [Case("AriaProcessor", "AriaImageProcessor", {"vision_config": {"image_size": 980, "patch_size": 14}})],
    "aya_vision": [
        Case(
            "AyaVisionProcessor",
            "GotOcr2ImageProcessor",
            {"vision_config": {"image_size": 364, "patch_size": 14}, "downsample_factor": 2},
            {"size": {"height": 364, "width": 364}, "crop_to_patches": True},
            {"patch_size": 14, "img_size": 364, "downsample_factor": 2},
        )
    ],
    "chameleon": [Case("ChameleonProcessor", "ChameleonImageProcessor")],
    "cohere2_vision": [Case("Cohere2VisionProcessor", "Cohere2VisionImageProcessor")],
    "cohere_compass": [Case("CohereCompassProcessor", "CohereCompassImageProcessor", outside=2)],
    "cosmos3_edge": [Case("Cosmos3EdgeProcessor", "Cosmos3EdgeImageProcessor", outside=2)],
    "cosmos3_omni": [_QWEN3],
    "deepseek_ocr2": [Case("DeepseekOcr2Processor", "DeepseekOcr2ImageProcessor", prompts={"patch_size": 16})],
    "deepseek_vl": [Case("DeepseekVLProcessor", "DeepseekVLImageProcessor", {"vision_config": _SIGLIP})],
    "deepseek_vl_hybrid": [
        Case(
            "DeepseekVLHybridProcessor",
            "DeepseekVLHybridImageProcessor",
            {"vision_config": _SIGLIP | {"patch_size": 16}},
        )
    ],
    "diffusion_gemma": [Case("Gemma4Processor", "Gemma4ImageProcessor")],
    "dots3_note": [Case("Dots3NoteProcessor", "Qwen2VLImageProcessor", outside=2)],
    "emu3": [Case("Emu3Processor", "Emu3ImageProcessor", spare=4)],
    "ernie4_5_vl_moe": [Case("Ernie4_5_VLMoeProcessor", "Ernie4_5_VLMoeImageProcessor", outside=2)],
    "exaone4_5": [Case("Exaone4_5_Processor", "Qwen2VLImageProcessor", outside=2)],
    "fast_vlm": [
        Case(
            "LlavaProcessor",
            "LlavaImageProcessor",
            {"image_seq_length": 256},
            {"size": {"shortest_edge": 1024}, "crop_size": {"height": 1024, "width": 1024}},
            {"patch_size": 64, "vision_feature_select_strategy": "full"},
        )
    ],
    "florence2": [
        Case(
            "Florence2Processor",
            "CLIPImageProcessor",
            settings={"size": {"height": 768, "width": 768}, "do_center_crop": False, "image_seq_length": 577},
        )
    ],
    "fuyu": [Case("FuyuProcessor", "FuyuImageProcessor")],
    "gemma3": [
        Case(
            "Gemma3Processor",
            "Gemma3ImageProcessor",
            {"vision_config": {"image_size": 896, "patch_size": 14}, "mm_tokens_per_image": 256},
            {"size": {"height": 896, "width": 896}},
        )
    ],
    "gemma3n": [
        Case("Gemma3nProcessor", "SiglipImageProcessor", settings={"size": {"height": 768, "width": 768}}),
    ],
    "gemma4": [
        Case("Gemma4Processor", "Gemma4ImageProcessor"),
        Case("Gemma4Processor", "Gemma4ImageProcessor", settings={"max_soft_tokens": 1120}),
    ],
    "gemma4_unified": [Case("Gemma4UnifiedProcessor", "Gemma4UnifiedImageProcessor")],
    "glm46v": [_GLM46],
    "glm4v": [_GLM, _GLM._replace(settings={"size": {"shortest_edge": 12544, "longest_edge": 9633792}})],
    "glm4v_moe": [_GLM],
    "glm5_next": [Case("Glm5NextProcessor", "Glm5NextImageProcessor", outside=2)],
    "glm_ocr": [_GLM46],
    "glmga": [Case("Glm46VProcessor", "GlmgaImageProcessor", outside=2)],
    "got_ocr2": [
        Case(
            "GotOcr2Processor",
            "GotOcr2ImageProcessor",
            settings={"size": {"height": 1024, "width": 1024}},
            outside=2,
        )
    ],
    "granite4_vision": [
        Case(
            "Granite4VisionProcessor",
            "LlavaNextImageProcessor",
            {"vision_config": _SIGLIP | {"patch_size": 16}},
            {
                "size": {"height": 384, "width": 384},
                "crop_size": {"height": 384, "width": 384},
                "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
            },
            {"patch_size": 16, "downsample_rate": "4/8", "vision_feature_select_strategy": "full"},
        )
    ],
    "granite_docling": [Case("GraniteDoclingProcessor", "GraniteDoclingImageProcessor")],
    "hunyuan_vl": [Case("HunYuanVLProcessor", "HunYuanVLImageProcessor", outside=2)],
    "hyperclovax_vision_v2": [Case("HyperCLOVAXVisionV2Processor", "Qwen2VLImageProcessor", outside=2)],
    "idefics3": [
        Case("Idefics3Processor", "Idefics3ImageProcessor", {"vision_config": {"image_size": 364, "patch_size": 14}}),
        Case(
            "Idefics3Processor",
            "Idefics3ImageProcessor",
            {"vision_config": {"image_size": 364, "patch_size": 14}},
            {"size": {"longest_edge": 3 * 364}, "do_image_splitting": False},
        ),
    ],
    "inkling2": [Case("Inkling2Processor", "Inkling2ImageProcessor")],
    "inkling_mm_model": [Case("InklingProcessor", "InklingImageProcessor", outside=1)],
    "internvl": [
        Case(
            "InternVLProcessor",
            "GotOcr2ImageProcessor",
            {"vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}, "downsample_ratio": 0.5},
            _448,
        )
    ],
    "janus": [Case("JanusProcessor", "JanusImageProcessor")],
    "kimi_k25": [Case("Kimi_K25Processor", "Kimi_K25ImageProcessor", outside=4)],
    "lfm2_vl": [Case("Lfm2VlProcessor", "Lfm2VlImageProcessor")],
    "lfm3_vl": [Case("Lfm3VlProcessor", "Qwen2VLImageProcessor", settings={"patch_size": 16}, outside=2)],
    "lighton_ocr": [
        Case("LightOnOcrProcessor", "PixtralImageProcessor", settings=_PIXTRAL_24B, prompts={"patch_size": 14})
    ],
    "llama4": [Case("Llama4Processor", "Llama4ImageProcessor", {"vision_config": {"image_size": 336, "patch_size": 14}})],
    "llava": [
        Case("LlavaProcessor", "CLIPImageProcessor", _CLIP, _336, _LLAVA),
        Case(
            "LlavaProcessor",
            "SiglipImageProcessor",
            {"vision_config": _SIGLIP},
            {"size": {"height": 384, "width": 384}},
            {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
        ),
        Case(
            "PixtralProcessor",
            "PixtralImageProcessor",
            {"vision_config": {"model_type": "pixtral", "image_size": 1024, "patch_size": 16}},
            prompts={"patch_size": 16},
        ),
    ],
    "llava_next": [Case("LlavaNextProcessor", "LlavaNextImageProcessor", _CLIP, _336, _LLAVA)],
    "llava_next_video": [Case("LlavaNextVideoProcessor", "LlavaNextImageProcessor", _CLIP, _336, _LLAVA)],
    "llava_onevision": [
        Case(
            "LlavaOnevisionProcessor",
            "LlavaOnevisionImageProcessor",
            {"vision_config": _SIGLIP},
            prompts={"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
        )
    ],
    "minicpm_ocr": [Case("MiniCPMOcrProcessor", "MiniCPMOcrImageProcessor", _MINICPM, outside=3)],
    "minicpmv4_6": [
        Case("MiniCPMV4_6Processor", "MiniCPMV4_6ImageProcessor", _MINICPM, outside=3),
        Case("MiniCPMV4_6Processor", "MiniCPMV4_6ImageProcessor", _MINICPM, {"downsample_mode": "4x"}, outside=3),
        Case("MiniCPMV4_6Processor", "MiniCPMV4_6ImageProcessor", _MINICPM, {"slice_mode": False}, outside=3),
    ],
    "minicpmv4_7": [Case("MiniCPMV4_7Processor", "MiniCPMV4_6ImageProcessor", _MINICPM, outside=3)],
    "minimax_m3_vl": [Case("MiniMaxM3VLProcessor", "MiniMaxM3VLImageProcessor")],
    "mistral3": [
        Case(
            "PixtralProcessor",
            "PixtralImageProcessor",
            {"spatial_merge_size": 2},
            _PIXTRAL_24B,
            {"patch_size": 14, "spatial_merge_size": 2},
        )
    ],
    "mistral_large4": [
        Case(
            "PixtralProcessor",
            "PixtralImageProcessor",
            {"spatial_merge_size": 2},
            _PIXTRAL_24B,
            {"patch_size": 14, "spatial_merge_size": 2},
        )
    ],
    "mllama": [
        Case(
            "MllamaProcessor",
            "MllamaImageProcessor",
            {"vision_config": {"image_size": 560, "patch_size": 14, "max_num_tiles": 4}},
            {"size": {"height": 560, "width": 560}},
        )
    ],
    "molmo2": [
        Case("Molmo2Processor", "Molmo2ImageProcessor"),
        Case("Molmo2Processor", "Molmo2ImageProcessor", settings={"max_crops": 24}),
    ],
    "muse_glimmer": [Case("MuseGlimmerProcessor", "MuseGlimmerImageProcessor")],
    "muse_spark": [Case("MuseSparkProcessor", "MuseGlimmerImageProcessor")],
    "nemotron_h_omni": [
        Case("NemotronH_Omni_Reasoning_V3Processor", "NemotronH_Omni_Reasoning_V3ImageProcessor"),
        Case(
            "NemotronH_Omni_Reasoning_V3Processor",
            "NemotronH_Omni_Reasoning_V3ImageProcessor",
            settings={"max_model_len": 1028},
        ),
    ],
    "ovis2": [
        Case("Ovis2Processor", "Ovis2ImageProcessor", {"vision_config": {"image_size": 448, "patch_size": 14}}, _448),
        Case(
            "Ovis2Processor",
            "Ovis2ImageProcessor",
            {"vision_config": {"image_size": 448, "patch_size": 14}},
            _448 | {"crop_to_patches": True},
        ),
    ],
    "paddleocr_vl": [Case("PaddleOCRVLProcessor", "PaddleOCRVLImageProcessor", outside=2)],
    "paligemma": [
        Case(
            "PaliGemmaProcessor",
            "SiglipImageProcessor",
            {"vision_config": {"image_size": 448, "patch_size": 14}},
            _448 | {"image_seq_length": 1024},
        )
    ],
    "perception_lm": [
        Case("PerceptionLMProcessor", "PerceptionLMImageProcessor", prompts={"patch_size": 14, "pooling_ratio": 2})
    ],
    "qianfan_ocr": [
        Case(
            "QianfanOCRProcessor",
            "GotOcr2ImageProcessor",
            {"vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}, "downsample_ratio": 0.5},
            _448,
        )
    ],
    "qwen2_5_omni_thinker": [Case("Qwen2_5OmniProcessor", "Qwen2VLImageProcessor", outside=2)],
    "qwen2_5_vl": [
        Case("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", outside=2),
    ],
    "qwen2_vl": [_QWEN, _QWEN._replace(settings={"min_pixels": 3136, "max_pixels": 12845056})],
    "qwen3_5": [_QWEN3],
    "qwen3_5_moe": [_QWEN3],
    "qwen3_omni_moe_thinker": [
        Case("Qwen3OmniMoeProcessor", "Qwen2VLImageProcessor", settings={"patch_size": 16}, outside=2)
    ],
    "qwen3_vl": [_QWEN3],
    "qwen3_vl_moe": [_QWEN3],
    "qwen4_exp": [_QWEN3],
    "shieldgemma2": [
        Case(
            "ShieldGemma2Processor",
            "Gemma3ImageProcessor",
            {"vision_config": {"image_size": 896, "patch_size": 14}, "mm_tokens_per_image": 256},
            {"size": {"height": 896, "width": 896}},
        )
    ],
    "smolvlm": [
        Case(
            "SmolVLMProcessor",
            "SmolVLMImageProcessor",
            {"vision_config": {"image_size": 512, "patch_size": 16}, "scale_factor": 4},
            {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
            {"image_seq_len": 64},
        ),
        Case(
            "SmolVLMProcessor",
            "SmolVLMImageProcessor",
            {"vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 3},
            {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
            {"image_seq_len": 81},
        ),
    ],
    "step3p7": [Case("Step3p7Processor", "Step3p7ImageProcessor")],
    "t5gemma2": [
        Case("Gemma3Processor", "Gemma3ImageProcessor", settings={"size": {"height": 896, "width": 896}}),
    ],
    "unlimited_ocr": [Case("UnlimitedOcrProcessor", "UnlimitedOcrImageProcessor", prompts={"patch_size": 16})],
    "video_llama_3": [Case("VideoLlama3Processor", "VideoLlama3ImageProcessor")],
    "video_llava": [
        Case(
            "VideoLlavaProcessor",
            "VideoLlavaImageProcessor",
            {"vision_config": {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14}},
        )
    ],
    "vipllava": [Case("LlavaProcessor", "CLIPImageProcessor", _CLIP, _336, _LLAVA)],
}
"""By ``model_type``; the first is the usual one."""


class Tokenizer:
    """Names for the special tokens that processors ask for; each is one token, and so is each word in front of them."""

    def __init__(self) -> None:
        self.init_kwargs: dict[str, Any] = {}
        self.special_tokens_map: dict[str, Any] = {}
        self.all_special_tokens: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """A special token, or its number."""
        if name.endswith("_token_id"):
            return 7
        if name.endswith("_token"):
            return f"<{name}>"
        raise AttributeError(name)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """As many numbers as there are tokens."""
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_: Any) -> list[int]:
        """The same, bare."""
        return [7] * len(words(text))

    def tokenize(self, text: str) -> list[str]:
        """The tokens."""
        return words(text)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """A number for each token."""
        return 7 if isinstance(tokens, str) else [7] * len(tokens)

    def get_vocab(self) -> dict[str, int]:
        """What Fuyu looks up."""
        return {"|SPEAKER|": 1, "|NEWLINE|": 2}

    def add_tokens(self, *_: Any, **__: Any) -> None:
        """Nothing to be done."""

    def add_special_tokens(self, *_: Any, **__: Any) -> None:
        """Nothing to be done."""


def words(text: str) -> list[str]:
    """The tokens of what a processor writes for an image."""
    return _WORD.findall(text)


def image_processor(case: Case) -> Any:
    """The image processor, with torchvision or in pure Python.

    Raises:
        LookupError: The installed version has none, or torchvision is missing.
    """
    import transformers

    for name in (case.images, f"{case.images}Pil", f"{case.images}Fast"):
        try:
            made = getattr(transformers, name)(**case.settings)
        except (AttributeError, ImportError, RuntimeError):
            continue
        if type(made).__name__ not in _BROKEN:
            return made
    raise LookupError(f"{case.images} needs torchvision, or is not in this version of transformers")


_BROKEN = ("FuyuImageProcessorPil",)
"""Handed a tensor, it calls numpy's ``transpose`` on it (transformers 5.23)."""


def processor(case: Case, images: Any) -> Any:
    """The processor around an image processor, without a real tokenizer.

    Raises:
        LookupError: The installed version has none.
    """
    import transformers
    from transformers.processing_utils import ProcessorMixin

    def init(self: Any, *parts: Any, **named: Any) -> None:
        given = [*parts, *named.values()]
        self.image_processor = next(part for part in given if part is images)
        self.tokenizer = next(part for part in given if isinstance(part, Tokenizer))
        # One that does videos as well asks the other for its settings.
        self.video_processor = self.image_processor

    kept, ProcessorMixin.__init__ = ProcessorMixin.__init__, init
    try:
        kind = getattr(transformers, case.processor)
        module = importlib.import_module(kind.__module__)
        if hasattr(module, "num2words"):
            module.num2words = module.num2words or object()
        accepted = inspect.signature(kind.__init__).parameters
        parts = {name: None for name in accepted if name.endswith(("_processor", "_extractor"))}
        parts |= {"image_processor": images, "tokenizer": Tokenizer()}
        if "video_processor" in parts:
            parts["video_processor"] = images
        return kind(**{name: part for name, part in parts.items() if name in accepted}, **case.prompts)
    except (AttributeError, ImportError) as error:
        raise LookupError(f"{case.processor}: {error}") from error
    finally:
        ProcessorMixin.__init__ = kept


def run(around: Any, patch: int, height: int, width: int, count: int = 1) -> tuple[int | None, int, int]:
    """Tokens, runs of patches and patches in the largest run of the last of ``count`` images of one prompt.

    Processors of transformers 4.57 write the whole prompt at once: of them only what the tower sees is told.

    Args:
        around: The processor.
        patch: Pixels along a patch's edge in the tower.
        height: Pixels.
        width: Pixels.
        count: Images of this size in the prompt.

    Raises:
        ValueError: The processor refuses the size.
    """
    from PIL import Image

    pictures = [Image.new("RGB", (width, height), (90, 120, 150)) for _ in range(count)]
    settings = {**defaults(around), "return_tensors": "pt"}
    if not hasattr(around, "_process_images"):
        sequences, patches = seen(around.image_processor(pictures, **settings), patch)
        return None, sequences // count, patches
    if "use_image_special_tokens" in inspect.signature(around._process_images).parameters:
        settings["use_image_special_tokens"] = True
    is_nested = type(around).__name__ in _NESTED
    inputs, texts = around._process_images([pictures] if is_nested else pictures, **settings)
    # Some give one text for all images of a prompt that they were handed together.
    text = texts[-1] if len(texts) == count else around.replace_image_token(inputs, count - 1)
    for name in dir(type(around)):
        if name.endswith("_TOKEN"):
            text = text.replace(getattr(type(around), name), f"<{name}>")
    sequences, patches = seen(inputs, patch)
    return len(words(text)), sequences // count, patches


def defaults(around: Any) -> dict[str, Any]:
    """What a processor asks of its image processor, whatever the file of that says."""
    found = getattr(type(around), "images_kwargs", None)
    if found is None:
        kinds = vars(importlib.import_module(type(around).__module__)).values()
        asked = (getattr(kind, "_defaults", {}).get("images_kwargs", {}) for kind in kinds if isinstance(kind, type))
        found = next((settings for settings in asked if settings), {})
    asked = {key: value for key, value in found.items() if key not in _OF_PROCESSORS}
    if type(around).__name__ == "PixtralProcessor" and not hasattr(around, "_process_images"):
        asked["patch_size"] = around.patch_size * around.spatial_merge_size
    return asked


_OF_PROCESSORS = ("num_image_tokens", "multi_page", "ratio", "image_area")
"""Of what processors of 4.57 ask, what their image processors do not take."""


_NESTED = {"Idefics3Processor", "SmolVLMProcessor", "LlavaOnevisionProcessor", "MllamaProcessor"}


def seen(inputs: Any, patch: int) -> tuple[int, int]:
    """Runs of patches that the tower is given, and patches in the largest."""
    for name in ("image_grid_thw", "image_grid_hw"):
        if name in inputs:
            # Inkling 2 hands over squares of several patches.
            each = (inputs["pixel_values"].shape[1] // patch) ** 2 if inputs["pixel_values"].shape[-1] == 3 else 1
            return len(inputs[name]), int(inputs[name][-1].prod()) * each
    if "target_sizes" in inputs:
        return len(inputs["target_sizes"]), int(inputs["target_sizes"].prod(-1).max())
    if "num_patches" in inputs and "pixel_values" in inputs and inputs["pixel_values"].ndim == 5:
        return len(inputs["num_patches"]), int(inputs["num_patches"][-1])
    if "image_patches" in inputs:
        return 1, len(inputs["image_patches"])
    if "high_res_pixel_values" in inputs:
        # Two towers: their patches together.
        return len(inputs["pixel_values"]), sum(_runs(inputs[name], patch)[1] for name in _PIXELS if name in inputs)
    runs = [_runs(inputs[name], patch) for name in _PIXELS if name in inputs]
    return sum(number for number, _ in runs), max(patches for _, patches in runs)


_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_local", "high_res_pixel_values")


def _runs(pixels: Any, patch: int) -> tuple[int, int]:
    if isinstance(pixels, list):
        runs = [_runs(part, patch) for part in pixels]
        return sum(number for number, _ in runs), max(patches for _, patches in runs)
    shape = pixels.shape
    if len(shape) == 3 and shape[-1] % (3 * patch**2) == 0 and shape[-1] != shape[-2]:
        # Flat patches; Gemma 4's unified model flattens several into one.
        return shape[0], shape[1] * shape[2] // (3 * patch**2)
    if len(shape) in (3, 4) and shape[-3] == 3:
        return shape[0] if len(shape) == 4 else 1, (shape[-2] // patch) * (shape[-1] // patch)
    if len(shape) > 4:
        number = 1
        for length in shape[:-3]:
            number *= length
        return number, (shape[-2] // patch) * (shape[-1] // patch)
    return shape[0], shape[1]


def rule_of_files(config: dict[str, Any], images: dict[str, Any], prompts: dict[str, Any]) -> Any:
    """The doctor's rule for a checkpoint whose files say this."""
    from vlm_doctor.data.image_rules import IMAGE_RULES
    from vlm_doctor.sources.image_files import ImageFiles
    from vlm_doctor.sources.image_rule import image_rule
    from vlm_doctor.sources.model_shapes import vision_fields

    vision = vision_fields(config)
    is_plain = vision is not None and not isinstance(vision.raw("depths"), list)
    files = ImageFiles(config, vision, images, prompts)
    return image_rule(IMAGE_RULES[config["model_type"]], files, vision.get("patch") if vision and is_plain else None)


def files_of(case: Case, images: Any, family: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """config.json, preprocessor_config.json and processor_config.json, as far as images go."""
    settings = json.loads(images.to_json_string())
    return (
        {"model_type": family, **case.config},
        {key: settings[key] for key in settings if key not in _USELESS},
        case.prompts,
    )


_USELESS = {"image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb",
            "image_processor_type", "data_format", "device", "disable_grouping", "input_data_format", "return_tensors",
            "background_color", "high_res_image_mean", "high_res_image_std", "high_res_resample"}  # fmt: skip


def counts(around: Any, patch: int) -> list[list[int | None]]:
    """Height, width, tokens, runs and patches of every size that the processor takes."""
    return [[height, width, *found] for height, width in SIZES if (found := taken(around, patch, height, width))]


def taken(around: Any, patch: int, height: int, width: int) -> tuple[int | None, int, int] | None:
    """As :func:`run`; ``None`` for a size that the processor refuses."""
    try:
        return run(around, patch, height, width)
    except ValueError as error:
        if _REFUSED.search(str(error)):
            return None
        raise


def planned(around: Any, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Tokens by size as the processor tells servers, which ask without pixels; nothing of one that does not."""
    if not hasattr(around, "_get_num_multimodal_tokens"):
        return {}
    found = {}
    for size in sizes:
        try:
            found[size] = int(around._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"][0])
        except (TypeError, AttributeError):
            return {}  # LLaVA's asks for a crop where the image processor makes none.
        except ValueError as error:
            if not _REFUSED.search(str(error)):
                raise
    return found


_REFUSED = re.compile("aspect ratio must be smaller|0 x 0 image|divisible by")


def record() -> dict[str, Any]:
    """Every case that can be built here."""
    import transformers

    entries: dict[str, Any] = {}
    for family, cases in CASES.items():
        for case in cases:
            try:
                images = image_processor(case)
                around = processor(case, images)
            except LookupError as error:
                print(family, error)
                continue
            config, settings, prompts = files_of(case, images, family)
            patch = rule_of_files(config, settings, prompts).patch
            entry = {
                "config": config,
                "images": settings,
                "prompts": prompts,
                "outside": case.outside,
                "spare": case.spare,
                "counts": counts(around, patch),
                "pair": None if family == "fuyu" else [PAIR, run(around, patch, *PAIR, count=2)],  # Fuyu takes one image
            }
            entries.setdefault(family, []).append(entry)
            print(family, flush=True)
    return {"transformers": transformers.__version__, "families": entries}


def main() -> int:
    warnings.filterwarnings("ignore")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    found = record()
    path.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{sum(len(cases) for cases in found['families'].values())} processors in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
