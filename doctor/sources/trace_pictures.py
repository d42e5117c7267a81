"""What vision towers take for images, where there is no image. Used by the child programs only.

By family, in the sizes that the planner counts: its rules have read the processor's files, and an image processor alone
does not cut an image where the processor around it says so (InternVL). Shapes are those that the processors of
transformers 5.23 give. Of a family that is not known here the checkpoint's image processor is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch

from ..data.image_rules import IMAGE_RULES
from ..trace import Pictures

Inputs = dict[str, Any]
_ENCODERS = ("get_image_features", "extract_feature", "_extract_image_features")
"""Methods that give image features: of transformers, of InternVL-Chat and of Kimi-VL."""
_DEEPSTACK = "deepstack_features"
_ANSWERS = ("pooler_output", "last_hidden_state", _DEEPSTACK)
"""Where they put them, in the order in which a model looks."""
_PIXTRAL = ("pixtral", "mistral_large4_vision")
_QUESTION_TOKENS = 32
"""Of the question that a Q-Former reads beside the image."""
_FLAT_PLACE = 2
"""Elements in front of the pixels of a flattened patch: its row and its column (Pix2Struct)."""


def image_inputs(config: Any, taken: Container[str], folder: str | None, pictures: Pictures, batch: int) -> Inputs:
    """What the vision tower takes for the images of ``batch`` prompts; pixels in the default dtype.

    Args:
        config: Of the model.
        taken: Arguments that its ``forward``, or whatever encodes images, takes.
        folder: The checkpoint, for its image processor; a hub id means the commit that the config came from.
        pictures: Images of one prompt.
        batch: Prompts.

    Raises:
        LookupError: How the family takes images is not known without its processor.
    """
    kind = config.model_type
    if kind in IMAGE_RULES and kind not in _BY_PROCESSOR:
        return Tower(config, taken, pictures, batch).inputs()
    made = _processed(folder, getattr(config, "_commit_hash", None), taken, pictures, batch) if folder else None
    if made is None and kind in _BY_PROCESSOR:
        raise LookupError(
            f"how {kind} takes an image is known to its image processor alone, which is not here or fails here"
        )
    return made or Tower(config, taken, pictures, batch).inputs()


def encoder_of(model: Any) -> Callable[..., Any] | None:
    """The method that gives image features; ``None`` where there is none."""
    bodies = list(model.modules())
    return next((found for name in _ENCODERS for body in bodies if (found := getattr(body, name, None)) is not None), None)


def names_taken(accepted: Iterable[str], encode: Callable[..., Any] | None) -> set[str]:
    """Arguments of a model's ``forward``, and of what encodes its images."""
    return {*accepted, *(inspect.signature(encode).parameters if encode else ())}


def count_features(encode: Callable[..., Any], images: Inputs) -> int:
    """Ask a tower how many features it makes of some images."""
    known = inspect.signature(encode).parameters
    # ``forward`` of Video-LLaVA takes the same under another name.
    named = {name if name in known else name.removesuffix("_images"): value for name, value in images.items()}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
    found = encode(**{name: value for name, value in named.items() if takes_any or name in known})
    parts: list[Any] = []
    _collect(found, parts)
    return sum(part.numel() // part.shape[-1] for part in parts)


def _collect(found: Any, parts: list[Any]) -> None:
    """The tensors of features in what a tower answers, which may be a record of outputs or a list for each image."""
    if isinstance(found, torch.Tensor):
        parts.append(found)
    elif isinstance(found, Mapping):
        # Some records get features in a field that their class does not have: an attribute, and no key.
        answers: dict[str, Any] = {name: getattr(found, name, found.get(name)) for name in _ANSWERS}
        name = next((name for name in _ANSWERS if answers[name] is not None), _ANSWERS[0])
        # Features for several layers, each with its number, fill the same places.
        _collect(answers[name][0] if name == _DEEPSTACK else answers[name], parts)
    elif isinstance(found, (list, tuple)):
        for one in found:
            _collect(one, parts)


def _processed(folder: str, revision: str | None, taken: Container[str], pictures: Pictures, batch: int) -> Inputs | None:
    """Inputs by the image processor that transformers has for a checkpoint; ``None`` when there is none that works here."""
    try:
        from PIL import Image
        from transformers import AutoImageProcessor

        # An explicit False: None would make transformers ask at the terminal whether code of the checkpoint may run.
        processor = AutoImageProcessor.from_pretrained(
            folder, revision=revision, local_files_only=True, trust_remote_code=False
        )
        one = Image.new("RGB", (pictures.width, pictures.height))
        try:
            made = processor(images=[[one] * pictures.images for _ in range(batch)], return_tensors="pt")
        except (ValueError, TypeError):
            made = processor(images=[one] * (pictures.images * batch), return_tensors="pt")
    except (ImportError, OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    dtype = torch.get_default_dtype()
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in made.items()
        if name in taken
    }


class Tower:
    """One call of a tower, by what is known of the family."""

    def __init__(self, config: Any, taken: Container[str], pictures: Pictures, batch: int) -> None:
        self.config = config
        self.taken = taken
        self.pictures = pictures
        self.batch = batch
        self.count = batch * pictures.images
        self.tiles = pictures.sequences // pictures.images
        """Runs of patches of one image."""
        self.rows, self.columns = (edge // pictures.patch for edge in (pictures.run_height, pictures.run_width))
        """Patches along the edges of each run."""
        self.cells = self.rows * self.columns

    def inputs(self) -> Inputs:
        """By name of the argument."""
        return _FAMILIES.get(self.config.model_type, _usual)(self)

    def setting(self, name: str, default: int) -> int:
        """A number of the tower's own config."""
        vision = next(
            (found for part in (self.config, getattr(self.config, "encoder", None)) if (found := _vision(part))),
            self.config,
        )
        found = getattr(vision, name, None)
        return int((found[0] if isinstance(found, (list, tuple)) else found) or default)

    def per_image(self, *numbers: int) -> torch.Tensor:
        """The same whole numbers for each image."""
        return torch.tensor([numbers] * self.count)

    def squares(self, *leading: int) -> torch.Tensor:
        """Pixels of runs of patches, none of them all zeros, which Idefics 2 and 3 take for padding."""
        pixels = torch.empty(*leading, 3, self.pictures.run_height, self.pictures.run_width)
        pixels[..., 0, 0, 0] = 1
        return pixels


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None)


def _usual(tower: Tower) -> Inputs:
    """A stack of patches with its grid (Qwen2-VL), or squares of the tower's size (LLaVA)."""
    if "image_grid_thw" in tower.taken:
        return _stack(tower)
    pictures: Inputs = {"pixel_values": tower.squares(tower.count * tower.tiles)}
    if "image_sizes" in tower.taken and _reads_sizes(tower.config):
        pictures["image_sizes"] = tower.per_image(tower.pictures.run_height, tower.pictures.run_width)
    return pictures


def _reads_sizes(config: Any) -> bool:
    """Towers like Pixtral's, and the image tokenizer of Emu3, which have a use for sizes; LLaVA may have such a tower."""
    return getattr(_vision(config), "model_type", "") in _PIXTRAL or config.model_type == "emu3"


def _stack(tower: Tower) -> Inputs:
    channels = tower.setting("in_channels", 0) or tower.setting("in_chans", 0) or tower.setting("num_channels", 3)
    temporal = tower.setting("temporal_patch_size", 0) or tower.setting("patch_temporal", 1)
    elements = channels * temporal * tower.pictures.patch**2
    grid = tower.per_image(1, tower.rows, tower.columns)
    return {"pixel_values": torch.empty(tower.count * tower.cells, elements), "image_grid_thw": grid}


def _stack_of_squares(tower: Tower) -> Inputs:
    """PaddleOCR-VL and Kimi-K2.5: patches with rows and columns."""
    patch = tower.pictures.patch
    return {**_stack(tower), "pixel_values": torch.empty(tower.count * tower.cells, 3, patch, patch)}


def _stack_of_cells(tower: Tower) -> Inputs:
    """Inkling 2: patches that are merged already, colours last."""
    merge = tower.pictures.merge
    edge = tower.pictures.patch * merge
    return {
        "pixel_values": torch.empty(tower.count * tower.cells // merge**2, edge, edge, 3),
        "image_grid_thw": tower.per_image(1, tower.rows // merge, tower.columns // merge),
    }


def _stack_with_merge(tower: Tower) -> Inputs:
    """VideoLLaMA 3: each image has a merge size of its own."""
    return {**_stack(tower), "image_merge_sizes": torch.ones(tower.count, dtype=torch.long)}


def _stack_with_edges(tower: Tower) -> Inputs:
    """Nemotron: the grid has no time."""
    return {
        "pixel_values": torch.empty(tower.count * tower.cells, 3 * tower.pictures.patch**2),
        "image_grid_hw": tower.per_image(tower.rows, tower.columns),
    }


def _any_resolution(tower: Tower) -> Inputs:
    """LLaVA-NeXT: the whole image and the tiles of the nearest grid, in a dimension of their own."""
    pictures: Inputs = {
        "pixel_values": tower.squares(tower.count, tower.tiles),
        "image_sizes": tower.per_image(tower.pictures.height, tower.pictures.width),
    }
    if "batch_num_images" in tower.taken:
        pictures["batch_num_images"] = torch.full((tower.batch,), tower.pictures.images)
    return pictures


def _by_prompt(tower: Tower) -> torch.Tensor:
    """Squares with a dimension for those of one prompt."""
    return tower.squares(tower.batch, tower.pictures.sequences)


def _with_pixel_mask(tower: Tower) -> Inputs:
    """Aria: which pixels are not padding, of images that stand one behind another."""
    squares = tower.squares(tower.count * tower.tiles)
    return {"pixel_values": squares, "pixel_mask": torch.ones(len(squares), *squares.shape[-2:], dtype=torch.bool)}


def _with_mask(tower: Tower) -> Inputs:
    """Idefics 2 and 3: which pixels are not padding."""
    squares = _by_prompt(tower)
    mask = torch.ones(*squares.shape[:2], *squares.shape[-2:], dtype=torch.long)
    return {"pixel_values": squares, "pixel_attention_mask": mask}


def _with_tile_mask(tower: Tower) -> Inputs:
    """Granite Docling: which tiles are not padding."""
    squares = _by_prompt(tower)
    return {"pixel_values": squares, "pixel_attention_mask": torch.ones(*squares.shape[:2], dtype=torch.bool)}


def _mllama(tower: Tower) -> Inputs:
    images = (tower.batch, tower.pictures.images)
    return {
        "pixel_values": tower.squares(*images, tower.tiles),
        "aspect_ratio_ids": torch.full(images, 6 if tower.tiles == 4 else 1),
        "aspect_ratio_mask": torch.ones(*images, tower.tiles, dtype=torch.long),
    }


def _with_question(tower: Tower) -> Inputs:
    """InstructBLIP: its Q-Former reads the question, too."""
    question = torch.full((tower.count, _QUESTION_TOKENS), 5)
    frames = (tower.tiles,) if "video" in tower.config.model_type else ()
    return {
        "pixel_values": tower.squares(tower.count, *frames),
        "qformer_input_ids": question,
        "qformer_attention_mask": torch.ones_like(question),
    }


def _placed(tower: Tower) -> Inputs:
    """Gemma 4: flat patches with their places, padded to as many as there may be (places of -1)."""
    merge = 1 if "unified" not in tower.config.model_type else tower.pictures.merge
    rows, columns = tower.rows // merge, tower.columns // merge
    padded = max(rows * columns, tower.pictures.patches // merge**2)
    places = torch.full((padded, 2), -1)
    places[: rows * columns] = torch.cartesian_prod(torch.arange(columns), torch.arange(rows))
    return {
        "pixel_values": torch.empty(tower.count, padded, 3 * (tower.pictures.patch * merge) ** 2),
        "image_position_ids": places.expand(tower.count, -1, -1),
    }


def _padded(tower: Tower) -> Inputs:
    """LFM2-VL (SigLIP 2 of any shape): flat patches with their grid."""
    runs = tower.count * tower.tiles
    return {
        "pixel_values": torch.empty(runs, tower.cells, 3 * tower.pictures.patch**2),
        "spatial_shapes": torch.tensor([[tower.rows, tower.columns]] * runs),
        "pixel_attention_mask": torch.ones(runs, tower.cells, dtype=torch.long),
    }


def _flattened(tower: Tower) -> Inputs:
    """Pix2Struct and Kosmos-2.5: flat patches behind their row and column."""
    patches = torch.ones(tower.count, tower.pictures.patches, _FLAT_PLACE + 3 * tower.pictures.patch**2)
    return {"flattened_patches": patches}


def _raw(tower: Tower) -> Inputs:
    """Fuyu: flat patches, which no tower reads."""
    return {"pixel_values": torch.empty(tower.count, tower.cells, 3 * tower.pictures.patch**2)}


def _two_resolutions(tower: Tower) -> Inputs:
    """DeepSeek-VL: a second tower sees the image larger."""
    size = tower.config.high_res_vision_config.image_size
    return {
        "pixel_values": tower.squares(tower.count),
        "high_res_pixel_values": torch.empty(tower.count, 3, size, size),
    }


def _stack_of_edges(tower: Tower) -> Inputs:
    """Kimi-VL: patches with rows and columns; its grid has no time."""
    pictures = _stack_of_squares(tower)
    return {"pixel_values": pictures["pixel_values"], "image_grid_hws": pictures["image_grid_thw"][:, 1:]}


def _named(tower: Tower) -> Inputs:
    """Video-LLaVA: images beside videos."""
    return {"pixel_values_images": tower.squares(tower.count)}


def _squares_by_prompt(tower: Tower) -> Inputs:
    return {"pixel_values": _by_prompt(tower)}


_FAMILIES: Mapping[str, Callable[[Tower], Inputs]] = {
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), _any_resolution),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _with_mask),
    **dict.fromkeys(("instructblip", "instructblipvideo"), _with_question),
    **dict.fromkeys(("gemma4", "gemma4_unified", "diffusion_gemma"), _placed),
    **dict.fromkeys(("kosmos-2.5", "pix2struct"), _flattened),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), _stack_of_squares),
    "aria": _with_pixel_mask,
    "deepseek_vl_hybrid": _two_resolutions,
    "fuyu": _raw,
    "granite_docling": _with_tile_mask,
    **dict.fromkeys(("idefics", "perception_lm"), _squares_by_prompt),
    "inkling2": _stack_of_cells,
    "kimi_vl": _stack_of_edges,
    "lfm2_vl": _padded,
    "mllama": _mllama,
    "nemotron_h_omni": _stack_with_edges,
    "video_llama_3": _stack_with_merge,
    "video_llava": _named,
}
"""Families that take images in another way than most."""
_BY_PROCESSOR = frozenset({
    "deepseek_ocr2", "inkling_mm_model", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "molmo2", "step3p7", "unlimited_ocr",
})  # fmt: skip
"""Families whose towers see an image in pieces of several sizes, or pieces that overlap."""
