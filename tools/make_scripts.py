"""Write ``doctor/data/allocations.json``: which tensors come and go while a text body reads a prompt, by family.

    python tools/make_scripts.py [MODEL_TYPE ...]

A small model of the installed transformers whose dimensions all differ runs its real code without arithmetic
(``benchmarks/trace_memory.py``). Every tensor's shape is then read back as a product of dimensions, so that the list holds
for every size of the family. What is kept of a tensor: its elements as a product, the bytes of one, and when it goes.

Needs torch and transformers. ``tests/models/test_allocation_scripts.py`` holds the file against true-size models.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import trace_memory
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


class Shape(NamedTuple):
    """A tensor that was made."""

    number: int
    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    size_bytes: int
    kind: str = ""
    """What only some kernels make, see ``allocation.Made``."""


class AsOnGpu(trace_memory.AsOnGpu):
    """Marks what a kernel of attention makes beside its output."""

    kind = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.softmax and kwargs.get("dtype") is not None and args[0].dtype == torch.bfloat16:
            # Converted first: only float16 has a kernel that reads one type and writes another.
            converted = torch.empty(args[0].shape, dtype=kwargs["dtype"])
            return torch.empty_like(converted)
        if func is torch.sort:
            result = func(*args, **kwargs)
            # Seen in memory histories of an H100: the numbers once more, and twice as much for CUB.
            held = [torch.empty(count, dtype=torch.int64) for count in (args[0].numel(), 2 * args[0].numel())]
            del held
            return result
        return super().__torch_function__(func, types, args, kwargs)

    def _attention(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:  # noqa: ARG002
        held = []
        batch, heads, tokens, _ = query.shape
        if attn_mask is None:
            held.append(self._marked("flash", (batch, heads, tokens), torch.float32))
        else:
            if attn_mask.dtype == torch.bool:
                held.append(torch.empty(attn_mask.shape, dtype=query.dtype))
            held.append(self._marked("padding", attn_mask.shape, query.dtype))
        if query.is_contiguous():
            held.append(self._marked("cudnn", (batch, tokens, heads, value.shape[-1]), query.dtype))
        return torch.empty(batch, tokens, heads, value.shape[-1], dtype=query.dtype).transpose(1, 2)

    @staticmethod
    def _marked(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        AsOnGpu.kind = kind
        tensor = torch.empty(shape, dtype=dtype)
        AsOnGpu.kind = ""
        return tensor


class Recorder(trace_memory.Recorder):
    """Notes shapes, and storages that go by their number alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.events: list[Shape | int] = []
        self._count = 0

    def note(self, tensor: torch.Tensor) -> None:
        """Keep that a tensor came, and when it goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known[key] = number = self._count
        self._count += 1
        shape = tuple(tensor.shape)
        self.events.append(Shape(number, self.place, shape, tensor.dtype, storage.nbytes(), AsOnGpu.kind))
        weakref.finalize(storage, self._end, key, number)

    def _end(self, key: int, number: int) -> None:
        self._known.pop(key, None)
        self.events.append(number)


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
            "text_config": text_config(model_type="gemma", head_dim=HEAD_DIM),
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
    sequences: int = 1
    """Squares of the tower's own size, where only that goes."""


def _squares(name: str, blocks: str, *, sequences: int = 3, **changes: Any) -> Tower:
    family, fields = MODELS[name]
    vision = {**fields["vision_config"], **_TOWER, **changes}
    return Tower(family, {**fields, "vision_config": vision}, blocks, sequences=sequences)


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
    "llava": _squares("llama", "model.vision_tower.encoder.layers", sequences=1),
    "gemma3": _squares("gemma3_text", "model.vision_tower.encoder.layers", sequences=1),
    "paligemma": _squares("gemma", "model.vision_tower.encoder.layers", sequences=1),
}
"""``model_type`` to its tower."""


def main() -> None:
    """Write the scripts of the families that are named, or of all."""
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:] or [*MODELS, *TOWERS]
    known = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"bodies": {}, "towers": {}}
    known.setdefault("towers", {})
    for body in wanted:
        if body in TOWERS:
            known["towers"][body] = tower_script(TOWERS[body])
            print(body, {name: len(events) for name, events in known["towers"][body].items()})
            continue
        known["bodies"][body] = script(body)
        print(body, {kind: len(parts["prefill"]) for kind, parts in known["bodies"][body]["layers"].items()})
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
    towers = [f"  {json.dumps(name)}: {_layer(parts)}" for name, parts in sorted(known["towers"].items())]
    return "\n".join([*lines, ",\n".join(bodies), " },", ' "towers": {', ",\n".join(towers), " }", "}"]) + "\n"


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
    if family == "mllama":
        kinds = kinds[: CROSS[0]]
    layers = {}
    for at, kind in reversed(list(enumerate(kinds))):
        if not at:
            continue
        caches = kept_caches(prefill, at)
        layers[kind] = {
            "arrivals": [made(shape, symbols) for shape in arrivals[at]],
            "prefill": events_of(prefill, at, symbols),
            "decode": events_of(decode, at, symbols, caches, is_large_only=True),
        }
    return {
        "position_rows": position_rows(config),
        "before": events_of(prefill, BEFORE, symbols),
        "layers": layers,
        "behind": events_of(prefill, LAYERS, symbols),
    }


def record(config: Any) -> tuple[list[Shape | int], list[Shape | int], dict[int, list[Shape]]]:
    """All tensors of a text prompt, then of one more token, logits of the last token alone; and what each layer is given
    beside the hidden states, which accelerate's hooks copy to a layer's GPU when it is another one.
    """
    model = trace_memory.build(config, "sdpa")
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            # 5.17 masks the output of the experts always, 5.23 only where they are spread over processes.
            module._is_expert_parallel = True
    inputs = traced_models.text_inputs(config, TOKENS, 1)
    rows = position_rows(config)
    inputs["position_ids"] = torch.arange(TOKENS).expand(rows, 1, -1) if rows > 1 else torch.arange(TOKENS)[None]
    path = next(path for path in ("model.language_model", "model.text_model") if path in trace_memory._names(model))
    layers = model.get_submodule(path).layers
    recorder = Recorder(model)
    arrivals: dict[int, list[Shape]] = {}

    def arrive(number: int) -> Any:
        def hook(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
            recorder.place = number
            given = {name: value for name, value in options.items() if name not in ("past_key_values", "hidden_states")}
            arrivals.setdefault(
                number, [_shape_of(value) for value in tree_flatten(given)[0] if isinstance(value, torch.Tensor)]
            )

        return hook

    def leave(*_: Any) -> None:
        recorder.place = LAYERS

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(arrive(number), with_kwargs=True)
    layers[-1].register_forward_hook(leave)
    with torch.no_grad(), recorder, AsOnGpu():
        # The caller's tensors are replayed apart, since they may be on another GPU.
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        prefill = list(recorder.events)
        recorder.place = BEFORE
        more = {name: value[..., -1:] for name, value in inputs.items()}
        more["attention_mask"] = torch.ones(1, TOKENS + 1, dtype=torch.int64)
        output = model(**more, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        decode = [*prefill, *recorder.events[len(prefill) :]]
    del output
    return prefill, decode[len(prefill) :], arrivals


def position_rows(config: Any) -> int:
    """Rows of ``position_ids`` as ``generate`` makes them: text, and time, height and width where there are such."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return 4 if "mrope_section" in rope else 1


def _shape_of(tensor: torch.Tensor) -> Shape:
    return Shape(0, 0, tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.dtype.itemsize)


def tower_script(tower: Tower) -> dict[str, Any]:
    """Trace a vision tower, from the pixels to the embeddings with image features in them."""
    config = transformers.AutoConfig.for_model(tower.family, **tower.fields)
    model = trace_memory.build(config, "sdpa")
    blocks = model.get_submodule(tower.blocks)
    layers = model.get_submodule("model.language_model").layers
    inputs, features, patches = _images(config, tower)
    recorder = Recorder(model)

    def arrive(place: int) -> Any:
        def hook(*_: Any) -> None:
            recorder.place = place

        return hook

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(arrive(number))
    blocks[-1].register_forward_hook(arrive(BLOCKS))
    layers[0].register_forward_pre_hook(arrive(BLOCKS + 1))
    with torch.no_grad(), recorder, AsOnGpu():
        recorder.note(inputs["pixel_values"])
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    events = list(recorder.events)
    del output
    text_dim = getattr(config.get_text_config(), "head_dim", None) or HIDDEN // HEADS
    dim = VISION_HIDDEN // VISION_HEADS
    width = blocks_width(blocks[0])
    pixels = math.prod(inputs["pixel_values"].shape)
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
        (width, 1, "vision_width"),
        (2 * width, 2, "vision_width"),
        (VISION_HEADS, 1, "vision_heads"),
        (text_dim, 1, "head_dim"),
        (text_dim // 2, Fraction(1, 2), "head_dim"),
        (dim, 1, "vision_head_dim"),
        (dim // 2, Fraction(1, 2), "vision_head_dim"),
        (dim // 4, Fraction(1, 4), "vision_head_dim"),
        (pixels, Fraction(pixels, patches), "patches"),
    ):
        symbols.setdefault(length, (Fraction(factor), symbol))
    entry = {
        event.number: ENTRY - at for at, event in enumerate(e for e in events if isinstance(e, Shape) and e.place == BEFORE)
    }
    return {
        "entry": events_of(events, BEFORE, symbols),
        "block": events_of(events, 1, symbols, entry),
        "exit": events_of(events, BLOCKS, symbols, entry),
    }


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
    per_edge = vision.image_size // vision.patch_size
    patches = per_edge**2 + (1 if config.model_type == "llava" else 0)
    features = (getattr(config, "mm_tokens_per_image", None) or per_edge**2) * tower.sequences
    inputs = traced_models.image_inputs(
        config, features, TOKENS - features, 1, edge=vision.image_size, sequences=tower.sequences
    )
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
    item = event.dtype.itemsize
    shape = event.shape
    if math.prod(shape) * item != event.size_bytes or math.prod(shape) in symbols:
        shape = (event.size_bytes // item,)  # a view was the first that was seen of it
    elements, names = Fraction(1), []
    for length in shape:
        factor, symbol = symbols.get(length, (Fraction(length), ""))
        elements *= factor
        names += symbol.split()
    group = HEADS // KV_HEADS
    if "kv_heads" in names and elements % group == 0:
        # Keys and values repeated for every head.
        elements /= group
        names[names.index("kv_heads")] = "heads"
    number = int(elements) if elements.denominator == 1 else float(elements)
    entry: list[Any] = [number, " ".join(sorted(names)), 0 if event.dtype == torch.bfloat16 else item]
    return [*entry, event.kind] if event.kind else entry


if __name__ == "__main__":
    main()
