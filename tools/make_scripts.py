"""Write ``doctor/data/allocations.json``: which tensors come and go while a text body reads a prompt, by family.

    python tools/make_scripts.py [MODEL_TYPE ...]

Under transformers 5.17 it writes the towers alone, as those of the releases before 5.18 (``older_towers``).

A small model of the installed transformers whose dimensions all differ runs its real code without arithmetic
(the doctor's own tracer). Every tensor's shape is then read back as a product of dimensions, so that the list holds
for every size of the family. What is kept of a tensor: its elements as a product, the bytes of one, and when it goes.

Needs torch and transformers. ``tests/models/test_allocation_scripts.py`` holds the file against true-size models.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils._pytree import tree_flatten

from vlm_doctor.sources import trace_attention, trace_model, trace_recorder
from vlm_doctor.sources.trace_ghost import CUDA, pretend_cuda

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import traced_models

OUTPUT = Path(__file__).parents[1] / "doctor" / "data" / "allocations.json"
TOKENS = 2023
"""Equal to no dimension below; not a multiple of 8, so that rows of masks are copied to be aligned, as mostly happens."""
LAYERS = 4
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, EXPERT_WIDTH, EXPERTS, ACTIVE = 480, 1504, 12, 4, 32, 3000, 208, 22, 5
WINDOW = 512
CROSS = (3,)
"""Layers of Llama 3.2 Vision that read images alone, which a text prompt skips."""
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = ([4, 6, 6], [2, 3, 3])
BEFORE = -1
TAP, LAYER, ADDED, BEHIND = 100, 200, 300, 400
"""Places in a trace of a tower: behind a block that gives features of its own; a text layer; behind it; behind the last."""


class Shape(NamedTuple):
    """A tensor that was made."""

    number: int
    place: int
    shape: tuple[int, ...]
    item_bytes: int
    size_bytes: int
    kind: str = ""
    """What only some kernels make, see ``allocation.Made``."""
    is_loaded_type: bool = False
    """Its elements are of the type that the weights are loaded in."""


class Recorder(trace_recorder.Recorder):
    """Notes shapes beside sizes, and tensors that go by their number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Shape | int] = []
        self.kind = ""
        self._like: tuple[tuple[int, ...], int, bool] | None = None
        self._operands: list[tuple[int, ...]] = []

    def born(self, tensor: torch.Tensor) -> None:
        """Keep what the tensor looks like for :meth:`_allocate`."""
        self._like = tuple(tensor.shape), tensor.dtype.itemsize, tensor.dtype == torch.bfloat16
        super().born(tensor)
        self._like = None

    def read(self, tensor: torch.Tensor) -> None:
        """Keep the shapes of operands: scratch memory is a multiple of one of them."""
        self._operands = [*self._operands[-3:], tuple(tensor.shape)]

    def temporary(self, *sizes_bytes: int) -> None:
        """Scratch memory of a kernel."""
        before = len(self.events)
        super().temporary(*sizes_bytes)
        self.shapes += [event[0] for event in self.events[before:] if not event[1]]

    def _allocate(self, size_bytes: int) -> int:
        number = super()._allocate(size_bytes)
        shape, item_bytes, is_loaded_type = self._like or self._multiple(size_bytes)
        self.shapes.append(Shape(number, self.place, shape, item_bytes, size_bytes, self.kind, is_loaded_type))
        return number

    def _multiple(self, size_bytes: int) -> tuple[tuple[int, ...], int, bool]:
        shape = max((shape for shape in self._operands if size_bytes % math.prod(shape) == 0), key=math.prod)
        return shape, size_bytes // math.prod(shape), False

    def _end(self, key: int, number: int) -> None:
        super()._end(key, number)
        self.shapes.append(number)


class OnGpu(trace_attention.OnGpu):
    """Marks what only some kernels of attention make beside their output. Heads are taken to be whole vectors."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _attention(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:  # noqa: ARG002
        batch, heads, tokens, _ = query.shape
        shape = batch, tokens, heads, value.shape[-1]
        held = []
        if attn_mask is None:
            held.append(self._marked("flash", (batch, heads, tokens), torch.float32))
        else:
            if attn_mask.dtype == torch.bool:
                held.append(torch.empty(attn_mask.shape, dtype=query.dtype, device=CUDA))
            held.append(self._marked("padding", attn_mask.shape, query.dtype))
        if query.is_contiguous():
            held.append(self._marked("cudnn", shape, query.dtype))
        output = torch.empty(shape, dtype=query.dtype, device=CUDA).transpose(1, 2)
        if attn_mask is not None:
            held.append(self._marked("sums", shape, torch.float32))
        return output

    def _marked(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self._recorder.kind = kind
        tensor = torch.empty(shape, dtype=dtype, device=CUDA)
        self._recorder.kind = ""
        return tensor


def text_config(**fields: Any) -> dict[str, Any]:
    """A text body whose dimensions all differ."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }


_CLIP, _SIGLIP = traced_models._CLIP, traced_models._SIGLIP
_MERGED = {"vision_config": {"out_hidden_size": HIDDEN}}


def _llava(body: str, **fields: Any) -> dict[str, Any]:
    return {"text_config": text_config(model_type=body, **fields), "vision_config": _CLIP}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llava", _llava("llama", head_dim=HEAD_DIM)),
    "mistral": ("llava", _llava("mistral", head_dim=HEAD_DIM, sliding_window=None)),
    "qwen2": ("llava_onevision", {**_llava("qwen2"), "vision_config": _SIGLIP}),
    "qwen3": ("llava", _llava("qwen3", head_dim=HEAD_DIM)),
    "glm4v_text": (
        "glm4v",
        {"text_config": text_config(rope_parameters={**_ROTARY, "mrope_section": [3, 3, 4], "partial_rotary_factor": 0.5})},
    ),
    "qwen2_vl_text": (
        "qwen2_vl",
        {
            "text_config": text_config(rope_parameters={**_ROTARY, "mrope_section": [6, 7, 7]}),
            "vision_config": {"hidden_size": HIDDEN},
        },
    ),
    "qwen2_5_vl_text": (
        "qwen2_5_vl",
        {"text_config": text_config(rope_parameters={**_ROTARY, "mrope_section": [6, 7, 7]}), **_MERGED},
    ),
    "qwen3_vl_text": (
        "qwen3_vl",
        {"text_config": text_config(head_dim=HEAD_DIM, rope_parameters={**_ROTARY, "mrope_section": [4, 6, 6]}), **_MERGED},
    ),
    "qwen3_vl_moe_text": (
        "qwen3_vl_moe",
        {
            "text_config": text_config(
                head_dim=HEAD_DIM,
                rope_parameters={**_ROTARY, "mrope_section": [4, 6, 6]},
                moe_intermediate_size=EXPERT_WIDTH,
                num_experts=EXPERTS,
                num_experts_per_tok=ACTIVE,
            ),
            **_MERGED,
        },
    ),
    "gemma3_text": (
        "gemma3",
        {
            "text_config": text_config(
                model_type="gemma3_text",
                head_dim=HEAD_DIM,
                sliding_window=WINDOW,
                query_pre_attn_scalar=HEAD_DIM,
                layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            ),
            "vision_config": {**_SIGLIP, "image_size": 896},
        },
    ),
    "gemma": (
        "paligemma",
        {
            # One head of keys and values, as all that are published: repeated for every head, it takes no memory.
            "text_config": text_config(model_type="gemma", head_dim=HEAD_DIM, num_key_value_heads=1),
            "vision_config": {**_SIGLIP, "projection_dim": HIDDEN},
            "projection_dim": HIDDEN,
        },
    ),
    "mllama_text_model": (
        "mllama",
        {
            "text_config": text_config(cross_attention_layers=list(CROSS), rope_parameters=_ROTARY),
            "vision_config": {"image_size": 560, "max_num_tiles": 4},
        },
    ),
}
"""Text body, by its ``model_type``, to a model that has it and the fields of its config."""


BLOCKS = 3
VISION_HEADS, VISION_HIDDEN, VISION_WIDTH, MERGE = 13, 468, 1312, 4
_TOWER = {
    "num_attention_heads": VISION_HEADS,
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": VISION_WIDTH,
    "num_hidden_layers": BLOCKS,
}
_QWEN_TOWER = {"depth": BLOCKS, "num_heads": VISION_HEADS, "intermediate_size": VISION_WIDTH}


class Tower(NamedTuple):
    """How a tower is traced."""

    family: str
    fields: dict[str, Any]
    blocks: str
    """Module path of the list of blocks."""
    grid: tuple[int, int] = (12, 14)
    """Patches along height and width, where any size goes."""
    body: str = ""
    """Text body whose layers are other ones where they read image features."""
    vision: str = ""


_STACKED_BLOCKS = 4
_STACKED = {
    "deepstack_visual_indexes": [0, 1, 2],
    "depth": _STACKED_BLOCKS,
    "num_heads": VISION_HEADS,
    "intermediate_size": VISION_WIDTH,
    "hidden_size": VISION_HIDDEN,
    "out_hidden_size": HIDDEN,
}
"""All published models of Qwen3-VL tap three blocks, none of them the last."""


def _squares(name: str, blocks: str, *, body: str = "", vision: str = "", family: str = "") -> Tower:
    model, fields = MODELS[name]
    tower = {**fields["vision_config"], **_TOWER} if not family else {**_TOWER}
    text = dict(fields["text_config"])
    if "head_dim" in text:
        text["head_dim"] = 56  # no edge of squares, nor its half
    return Tower(family or model, {**fields, "text_config": text, "vision_config": tower}, blocks, body=body, vision=vision)


TOWERS: dict[str, Tower] = {
    "glm4v": Tower(
        "glm4v",
        {
            **MODELS["glm4v_text"][1],
            "vision_config": {
                **_QWEN_TOWER,
                "hidden_size": VISION_HIDDEN,
                "out_hidden_size": HIDDEN,
                "intermediate_size": WIDTH,
            },
            # The published models have a merger as wide as the text's MLP.
        },
        "model.visual.blocks",
    ),
    "qwen2_vl": Tower(
        "qwen2_vl",
        {
            **MODELS["qwen2_vl_text"][1],
            "vision_config": {
                "depth": BLOCKS,
                "num_heads": VISION_HEADS,
                "embed_dim": VISION_HIDDEN,
                "hidden_size": HIDDEN,
                "mlp_ratio": 4,
            },
        },
        "model.visual.blocks",
    ),
    # One window of attention: its output is one tensor, as all windows together make.
    "qwen2_5_vl": Tower(
        "qwen2_5_vl",
        {
            **MODELS["qwen2_5_vl_text"][1],
            "vision_config": {
                **_QWEN_TOWER,
                "hidden_size": VISION_HIDDEN,
                "out_hidden_size": HIDDEN,
                "fullatt_block_indexes": [],
            },
        },
        "model.visual.blocks",
        grid=(8, 8),
    ),
    "qwen3_vl": Tower("qwen3_vl", {**MODELS["qwen3_vl_text"][1], "vision_config": _STACKED}, "model.visual.blocks"),
    "qwen3_vl_moe": Tower(
        "qwen3_vl_moe", {**MODELS["qwen3_vl_moe_text"][1], "vision_config": _STACKED}, "model.visual.blocks"
    ),
    "internvl": _squares("qwen2", "model.vision_tower.encoder.layer", family="internvl"),
    "llava": _squares("llama", "model.vision_tower.encoder.layers", vision="clip_vision_model"),
    "gemma3": _squares("gemma3_text", "model.vision_tower.encoder.layers"),
    "paligemma": _squares("gemma", "model.vision_tower.encoder.layers", body="gemma"),
}
"""``model_type`` to its tower."""


def main() -> None:
    """Write the scripts of the families that are named, or of all."""
    warnings.simplefilter("ignore")
    gc.disable()
    pretend_cuda((9, 0))
    wanted = sys.argv[1:] or [*MODELS, *TOWERS]
    known = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"bodies": {}, "towers": {}}
    is_older = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)
    if is_older and not transformers.__version__.startswith("5.17."):
        sys.exit(f"transformers {transformers.__version__}: the older towers are those of 5.17")
    towers = known.setdefault("older_towers" if is_older else "towers", {})
    for body in wanted:
        if body in TOWERS:
            towers[body] = tower_script(TOWERS[body])
            print(body, {name: len(events) for name, events in towers[body].items() if isinstance(events, list)})
            continue
        if is_older:
            continue
        known["bodies"][body] = script(body)
        print(body, {kind: len(parts["prefill"]) for kind, parts in known["bodies"][body]["layers"].items()})
    if not is_older:
        known["source"] = (
            f"tools/make_scripts.py, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        )
    OUTPUT.write_text(_pretty(known))


def _pretty(known: dict[str, Any]) -> str:
    """One line for each list of events."""
    lines = ["{", f' "source": {json.dumps(known["source"])},', ' "bodies": {']
    bodies = []
    for body, parts in sorted(known["bodies"].items()):
        layers = ",\n".join(f"    {json.dumps(kind)}: {_layer(events)}" for kind, events in parts["layers"].items())
        bodies.append(
            f'  {json.dumps(body)}: {{\n   "position_rows": {parts["position_rows"]},\n'
            f'   "before": {json.dumps(parts["before"])},\n   "layers": {{\n{layers}\n   }},\n'
            f'   "behind": {json.dumps(parts["behind"])}\n  }}'
        )
    sections = []
    for section in ("towers", "older_towers"):
        towers = [f"  {json.dumps(name)}: {_layer(parts)}" for name, parts in sorted(known.get(section, {}).items())]
        sections.append(f" {json.dumps(section)}: {{\n" + ",\n".join(towers) + "\n }")
    return "\n".join([*lines, ",\n".join(bodies), " },", ",\n".join(sections), "}"]) + "\n"


def _layer(parts: dict[str, Any]) -> str:
    lists = ",\n".join(f"     {json.dumps(name)}: {json.dumps(events)}" for name, events in parts.items())
    return f"{{\n{lists}\n    }}"


def script(body: str) -> dict[str, Any]:
    """Trace one text body and write its events down."""
    family, fields = MODELS[body]
    config = transformers.AutoConfig.for_model(family, **fields)
    prefill, decode, arrivals = record(config)
    symbols = symbols_of(config.get_text_config())
    types = getattr(config.get_text_config(), "layer_types", None) or ["full"] * LAYERS
    kinds = [kind.removesuffix("_attention") for kind in types]
    layers = {}
    if family == "mllama":
        kinds = kinds[: CROSS[0]]
    for at, kind in reversed(list(enumerate(kinds))):
        if not at:
            continue
        caches = kept_caches(prefill, at)
        layers[kind] = {
            "arrivals": [made(shape, symbols) for shape in arrivals[at]],
            "prefill": events_of(prefill, at, symbols),
            "decode": events_of(decode, at, symbols, caches, is_large_only=True),
        }
    if family == "mllama":
        layers["cross"] = {"arrivals": [], "prefill": [], "decode": []}  # skipped without images
    return {
        "position_rows": position_rows(config),
        "before": events_of(prefill, BEFORE, symbols),
        "layers": layers,
        "behind": events_of(prefill, LAYERS, symbols),
    }


def build(config: Any) -> Any:
    """The model with weights that have no data."""
    architecture = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type]
    fields = json.loads(config.to_json_string(use_diff=False))
    model = trace_model.build(trace_model.class_of_library(architecture), fields, torch.bfloat16, "sdpa")
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            # 5.17 masks the output of the experts always, 5.23 only where they are spread over processes.
            module._is_expert_parallel = True
    return model


def ghosts_of(inputs: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """The caller's tensors, which are replayed apart, since they may be on another GPU."""
    ghosts = {name: value.to(CUDA) for name, value in inputs.items()}
    recorder.ignore(ghosts.values())
    return ghosts


def place_hook(recorder: Recorder, place: int) -> Any:
    """A hook that tells the recorder where it is."""

    def hook(*_: Any) -> None:
        recorder.place = place

    return hook


def arrival_hook(recorder: Recorder, place: int, arrivals: dict[int, list[Shape]]) -> Any:
    """A hook that also notes what a layer is given beside the hidden states."""

    def hook(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        recorder.place = place
        given = {name: value for name, value in options.items() if name not in ("past_key_values", "hidden_states")}
        arrivals.setdefault(
            place, [_shape_of(value) for value in tree_flatten(given)[0] if isinstance(value, torch.Tensor)]
        )

    return hook


def text_body(model: Any) -> Any:
    """The text body, which has ``layers`` and ``norm``."""
    return model.model.language_model


def record(config: Any) -> tuple[list[Shape | int], list[Shape | int], dict[int, list[Shape]]]:
    """All tensors of a text prompt, then of one more token, logits of the last token alone; and what each layer is given
    beside the hidden states, which accelerate's hooks copy to a layer's GPU when it is another one.
    """
    model = build(config)
    inputs = traced_models.text_inputs(config, TOKENS, 1)
    rows = position_rows(config)
    inputs["position_ids"] = torch.arange(TOKENS).expand(rows, 1, -1) if rows > 1 else torch.arange(TOKENS)[None]
    more = {name: value[..., -1:] for name, value in inputs.items()}
    more["attention_mask"] = torch.ones(1, TOKENS + 1, dtype=torch.int64)
    body = text_body(model)
    recorder = Recorder()
    recorder.ignore([*model.parameters(), *model.buffers()])
    recorder.place = BEFORE
    arrivals: dict[int, list[Shape]] = {}

    for number, layer in enumerate(body.layers):
        layer.register_forward_pre_hook(arrival_hook(recorder, number, arrivals), with_kwargs=True)
    body.norm.register_forward_pre_hook(place_hook(recorder, LAYERS))
    with torch.no_grad(), OnGpu(recorder), recorder:
        inputs, more = ghosts_of(inputs, recorder), ghosts_of(more, recorder)
        recorder.listen()
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        prefill = list(recorder.shapes)
        recorder.place = BEFORE
        output = model(**more, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        decode = recorder.shapes[len(prefill) :]
    del output
    return prefill, decode, arrivals


def position_rows(config: Any) -> int:
    """Rows of ``position_ids`` as ``generate`` makes them: text, and time, height and width where there are such."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return 4 if "mrope_section" in rope else 1


def _shape_of(tensor: torch.Tensor) -> Shape:
    item_bytes = tensor.dtype.itemsize
    is_loaded_type = tensor.dtype == torch.bfloat16
    return Shape(0, 0, tuple(tensor.shape), item_bytes, tensor.numel() * item_bytes, is_loaded_type=is_loaded_type)


def tower_script(tower: Tower) -> dict[str, Any]:
    """Trace a vision tower, from the pixels to the embeddings with image features in them."""
    config = transformers.AutoConfig.for_model(tower.family, **tower.fields)
    model = build(config)
    blocks = model.get_submodule(tower.blocks)
    inputs, features, patches = _images(config, tower)
    rows = position_rows(config)
    inputs["position_ids"] = torch.arange(TOKENS).expand(rows, 1, -1) if rows > 1 else torch.arange(TOKENS)[None]
    pictures = {name: inputs.pop(name) for name in list(inputs) if name.startswith(("pixel", "image"))}
    recorder = Recorder()
    recorder.ignore([*model.parameters(), *model.buffers()])
    recorder.place = BEFORE
    count = len(blocks)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(place_hook(recorder, number))
    blocks[-1].register_forward_hook(place_hook(recorder, count))
    mergers = [
        module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("deepstack_merger_list")
    ]
    for number, tap in enumerate(mergers):
        tap.register_forward_pre_hook(place_hook(recorder, TAP + number))
    arrivals: dict[int, list[Shape]] = {}
    for number, layer in enumerate(text_body(model).layers):
        layer.register_forward_pre_hook(arrival_hook(recorder, LAYER + number, arrivals), with_kwargs=True)
        layer.register_forward_hook(place_hook(recorder, ADDED + number))
    text_body(model).norm.register_forward_pre_hook(place_hook(recorder, BEHIND))
    with torch.no_grad(), OnGpu(recorder), recorder:
        inputs = ghosts_of(inputs, recorder)
        recorder.listen()
        pictures = {name: value.to(CUDA) for name, value in pictures.items()}
        # A plain call embeds the prompt first, as generate of transformers 5.17 does; that of 5.23 encodes images before,
        # so that the embedding is not there yet while the tower runs. A script holds for both, so it takes what needs more.
        output = model(**inputs, **pictures, use_cache=True, logits_to_keep=1)
    events = list(recorder.shapes)
    del output, pictures
    pixels = next(event for event in events if isinstance(event, Shape)).size_bytes // 2
    symbols = tower_symbols(config, blocks_width(blocks[0]), pixels, patches, features)
    entry = {
        event.number: ENTRY - at for at, event in enumerate(e for e in events if isinstance(e, Shape) and e.place == BEFORE)
    }
    sizes = [event.size_bytes for event in events if isinstance(event, Shape) and event.place == BEFORE]
    parts: dict[str, Any] = {
        "entry": events_of(events, BEFORE, symbols),
        "block": events_of(events, 1, symbols, entry),
        "exit": events_of(events, count, symbols, entry),
    }
    parts["exit"][:0] = freed_at(events, count - 1, entry)
    given = freed_at(events, 0, entry)
    if given:
        parts["given"] = max(given, key=lambda code: sizes[ENTRY - code])
    taps = len(getattr(config.vision_config, "deepstack_visual_indexes", []))
    if taps:
        parts |= {"taps": taps, "tap": events_of(events, TAP + 1, symbols), "added": events_of(events, ADDED + 1, symbols)}
    if tower.vision:
        parts["vision"] = tower.vision
    if tower.body:
        text = symbols_of(config.get_text_config())
        layer = {
            "arrivals": [made(shape, text) for shape in arrivals[LAYER + 1]],
            "prefill": events_of(events, LAYER + 1, text),
        }
        parts["layers"] = {kind: layer | {"decode": decode} for kind, decode in decodes(tower.body)}
    return parts


def tower_symbols(config: Any, width: int, pixels: int, patches: int, features: int) -> dict[int, tuple[Fraction, str]]:
    """Every length that a dimension can have while images are read, as a multiple of a symbol."""
    text_dim = getattr(config.get_text_config(), "head_dim", None) or HIDDEN // HEADS
    dim = VISION_HIDDEN // VISION_HEADS
    symbols: dict[int, tuple[Fraction, str]] = {}
    for length, factor, symbol in (
        (TOKENS, 1, "tokens"),
        (patches, 1, "patches"),
        (features, 1, "features"),
        (HIDDEN, 1, "hidden"),
        (WIDTH, 1, "width"),
        (VISION_HIDDEN, 1, "vision_hidden"),
        (MERGE * VISION_HIDDEN, MERGE, "vision_hidden"),
        (3 * VISION_HIDDEN, 3, "vision_hidden"),
        (2 * VISION_HIDDEN, 2, "vision_hidden"),
        (TOKENS + 1, 1, "tokens"),
        (width, 1, "vision_width"),
        (2 * width, 2, "vision_width"),
        (VISION_HEADS, 1, "vision_heads"),
        (text_dim, 1, "head_dim"),
        (text_dim // 2, Fraction(1, 2), "head_dim"),
        (text_dim // 4, Fraction(1, 4), "head_dim"),
        (dim, 1, "vision_head_dim"),
        (dim // 2, Fraction(1, 2), "vision_head_dim"),
        (dim // 4, Fraction(1, 4), "vision_head_dim"),
        (pixels, Fraction(pixels, patches), "patches"),
        *edges_of(config, features),
    ):
        symbols.setdefault(length, (Fraction(factor), symbol))
    symbols[ROOT] = (Fraction(math.isqrt(features)), "")
    return symbols


def freed_at(events: list[Shape | int], place: int, codes: dict[int, int]) -> list[int]:
    """Codes of tensors of the entry that go at a place."""
    found: list[int] = []
    now = BEFORE
    for event in events:
        if isinstance(event, Shape):
            now = event.place
        elif now == place and event in codes:
            found.append(codes[event])
    return found


def decodes(body: str) -> list[tuple[str, list[Any]]]:
    """What one more token does to each kind of layer: the same with images and without."""
    return [(kind, parts["decode"]) for kind, parts in script(body)["layers"].items()]


ROOT = -1
"""Key of the number of features along an edge, in tables of symbols."""


def edges_of(config: Any, features: int) -> list[tuple[int, Fraction, str]]:
    """Lengths of an edge of a square of patches or features; two of them are a multiple of the features.

    A tower that takes images of every shape has no such square: the edge of its table of positions stays a number.
    """
    vision = config.vision_config
    has_own_grid = hasattr(vision, "spatial_merge_size")
    if has_own_grid or not isinstance(getattr(vision, "image_size", None), (int, list, tuple)):
        return []
    edge = edge_of(vision)
    ratio = Fraction(edge, math.isqrt(features))
    return [(edge // part, ratio / part, "root") for part in (1, 2, 4) if edge % part == 0]


def edge_of(vision: Any) -> int:
    """Patches along the edge of a square of the tower's own size."""
    size, patch = vision.image_size, vision.patch_size
    return (size if isinstance(size, int) else size[0]) // (patch if isinstance(patch, int) else patch[0])


ENTRY = -32
"""Codes of the tensors of the entry begin here and fall."""


def blocks_width(block: Any) -> int:
    """Width of the MLP of a block."""
    return max(
        module.out_features for name, module in block.named_modules() if hasattr(module, "out_features") and "mlp" in name
    )


def _images(config: Any, tower: Tower) -> tuple[dict[str, Any], int, int]:
    """Inputs, image features in all, and patches in each sequence."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        rows, columns = tower.grid
        patches = rows * columns
        features = patches // vision.spatial_merge_size**2
        ids = torch.cat([torch.full((1, features), config.image_token_id), torch.full((1, TOKENS - features), 5)], 1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["pixel_values"] = torch.empty(patches, width, dtype=torch.bfloat16)
        inputs["image_grid_thw"] = torch.tensor([[1, rows, columns]])
        return inputs, features, patches
    per_edge = edge_of(vision)
    patches = per_edge**2 + (1 if config.model_type in ("llava", "internvl") else 0)
    features = getattr(config, "mm_tokens_per_image", None) or per_edge**2
    if config.model_type == "internvl":
        features = int(features * config.downsample_ratio**2)
    inputs = traced_models.image_inputs(config, features, TOKENS - features, 1, edge=0, sequences=1)
    return inputs, features, patches


def kept_caches(events: list[Shape | int], place: int) -> dict[int, int]:
    """Numbers of the keys and values that a layer leaves, to -2 and -3."""
    gone = {event for event in events if isinstance(event, int)}
    kept = [
        event.number for event in events if isinstance(event, Shape) and event.place == place and event.number not in gone
    ]
    return dict(zip(kept, (-2, -3), strict=False))  # Linear attention keeps neither.


def symbols_of(config: Any) -> dict[int, tuple[Fraction, str]]:
    """Every length that a dimension can have, as a multiple of a symbol. Later entries do not replace earlier ones."""
    dim = getattr(config, "head_dim", None) or HIDDEN // HEADS
    one, half, quarter = Fraction(1), Fraction(1, 2), Fraction(1, 4)
    entries = [
        (TOKENS, one, "tokens"),
        (TOKENS + 1, one, "tokens"),
        (TOKENS * ACTIVE, Fraction(1), "tokens active"),
        (HIDDEN, one, "hidden"),
        (WIDTH, one, "width"),
        (2 * WIDTH, Fraction(2), "width"),
        (HEADS, one, "heads"),
        (KV_HEADS, one, "kv_heads"),
        (HEADS * dim, one, "heads head_dim"),
        (KV_HEADS * dim, one, "kv_heads head_dim"),
        (dim, one, "head_dim"),
        (VOCABULARY, one, "vocabulary"),
        (EXPERT_WIDTH, one, "expert_width"),
        (2 * EXPERT_WIDTH, Fraction(2), "expert_width"),
        (EXPERTS, one, "experts"),
        (ACTIVE, one, "active"),
        (dim // 2, half, "head_dim"),
        (dim // 4, quarter, "head_dim"),
    ]
    symbols: dict[int, tuple[Fraction, str]] = {}
    for length, factor, symbol in entries:
        symbols.setdefault(length, (factor, symbol))
    return symbols


def events_of(
    events: list[Shape | int],
    place: int,
    symbols: dict[int, tuple[Fraction, str]],
    caches: dict[int, int] | None = None,
    *,
    is_large_only: bool = False,
) -> list[Any]:
    """Events of one place.

    Returns:
        ``[elements, symbols, item bytes (0: that of the loaded type)]`` for a tensor that comes, with a fourth entry for
        what only some kernels make; for one that goes its number in this list, -1 for the hidden states that the place was
        given, -2 and -3 for the keys and values so far.
    """
    mine: dict[int, int] = {}
    result: list[Any] = []
    now = BEFORE
    for event in events:
        if isinstance(event, Shape):
            now = event.place
            if now == place:
                entry = made(event, symbols)
                if not is_large_only or "tokens" in entry[1]:
                    mine[event.number] = len(mine)
                    result.append(entry)
        elif now == place:
            number = mine.get(event, (caches or {}).get(event, -1))
            if number != -1 or not is_large_only:
                result.append(number)
    return result


def made(event: Shape, symbols: dict[int, tuple[Fraction, str]]) -> list[Any]:
    """A tensor as a product of symbols."""
    item = event.item_bytes
    shape = event.shape
    if math.prod(shape) * item != event.size_bytes or math.prod(shape) in symbols:
        shape = (event.size_bytes // item,)  # a view was the first that was seen of it
    elements, names = Fraction(1), []
    for length in shape:
        factor, symbol = symbols.get(length, (Fraction(length), ""))
        elements *= factor
        names += symbol.split()
    while names.count("root") > 1:
        names = [name for name in names if name != "root"] + ["root"] * (names.count("root") - 2) + ["features"]
    if "root" in names:
        names.remove("root")
        elements *= symbols[ROOT][0]
    group = HEADS // KV_HEADS
    if "kv_heads" in names and elements % group == 0:
        # Keys and values repeated for every head.
        elements /= group
        names[names.index("kv_heads")] = "heads"
    number = int(elements) if elements.denominator == 1 else float(elements)
    entry: list[Any] = [number, " ".join(sorted(names)), 0 if event.is_loaded_type else item]
    return [*entry, event.kind] if event.kind else entry


if __name__ == "__main__":
    main()
