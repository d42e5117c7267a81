"""What a model needs: bytes of its parts once loaded, and of the work done on them.

Symbols: T prompt tokens, N new tokens, B batch, H hidden, I width of the MLP, V vocabulary, P patches, b bytes an element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from ..data.activations import FULL_LOGITS_ARCHITECTURES, text_coefficient, vision_coefficient
from ..model import ModelProfile, Unit
from ..workload import Workload
from .constraints import Atom
from .image_tokens import ImageLoad

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_CONVERTED = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored dtypes that loading converts; packed and integer tensors stay as they are."""
_STORED_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F4": 4,
}  # fmt: skip
"""Bits of an element by safetensors' words; every other word (F8_E4M3, I8, U8, BOOL …) is one byte."""
_NF4_BITS = 4.5
"""4 bits and one float32 scale for 64 weights. Source: bitsandbytes, quantize_4bit with its default block of 64."""
_PIXEL_ELEMENTS = 3 * 2
"""Channels of a pixel, and the two frames that Qwen2-VL and GLM-4.1V stack even for a still image; others have one."""
_NORM_STATES = 6
"""Hidden states that a norm over the whole prompt holds at once: input, output and two in float32."""

FRAGMENTATION_OF_WORK = 0.5
FRAGMENTATION_OF_KV_CACHE = 0.4
"""Reserved memory that cannot serve a request, as shares of one layer's (or the vision tower's) work and of the KV cache:
keys and values that stay are cut out of blocks that temporaries left, which then are too small for the next layer.

The smallest pair that never claims a prompt that ran out of memory, in 11 readings on H200 cards of 12 and 23.5 GiB free
(predicted 85 to 95 % of the true longest prompt) and in 175 replays of traced allocations of five model families through a
model of torch's caching allocator, which itself meets those readings within 5 % (predicted 74 to 99 %, 87 % on average).
"""


class StageNeed(msgspec.Struct, frozen=True):
    """What one stage needs of its GPU, at its worst moment."""

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    """On top of the KV cache. The vision tower runs before the cache exists, so only what exceeds the cache counts."""
    fragmentation_bytes: int
    moment: str
    """What happens when the activations are largest."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes + self.activations_bytes + self.fragmentation_bytes


class Work(msgspec.Struct, frozen=True):
    """Bytes that the work on one prompt of a given length needs, wherever it runs."""

    kv_layer: int
    layer: int
    """Prefill of one layer; layers run one after another, so a stage pays it once."""
    head: int
    held: int
    """On the first stage through all of the prefill: embeddings, pixels and image features."""
    encode: int
    """The vision tower with its input."""


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a torch dtype, such as 2 for ``bfloat16``; 2 for a dtype that is not a plain float."""
    return _ITEM_BYTES.get(dtype, 2)


def loaded_dtype(profile: ModelProfile, workload: Workload) -> str:
    """Word of torch for the type the weights are loaded in."""
    return workload.dtype or profile.dtype


def unit_bytes(unit: Unit, profile: ModelProfile, workload: Workload) -> int:
    """Bytes of a unit once it is loaded.

    A checkpoint that is already quantized keeps its stored bytes. Otherwise float tensors are converted to the workload's
    dtype (``None``: the checkpoint's main one), and packed or integer tensors stay. bitsandbytes keeps what it quantizes in
    1 byte (int8) or 4.5 bits (nf4, scales included) an element and the rest in 16 bit.
    """
    if profile.quantization:
        return unit.stored_bytes
    size = item_bytes(loaded_dtype(profile, workload))
    if workload.quantization:
        size = min(size, 2)
    converted = sum(count for stored, count in unit.parameters.items() if stored in _CONVERTED)
    kept_bits = sum(
        count * _STORED_BITS.get(stored, 8) for stored, count in unit.parameters.items() if stored not in _CONVERTED
    )
    quantized = min(unit.quantizable_elements, converted) if workload.quantization else 0
    quantized_bits = quantized * (8 if workload.quantization == "int8" else _NF4_BITS)
    return (converted - quantized) * size + math.ceil((quantized_bits + kept_bits) / 8)


class Footprint:
    """Prices any run of atoms for one model and workload, as a function of the text tokens."""

    def __init__(self, profile: ModelProfile, workload: Workload, images: ImageLoad, atoms: Sequence[Atom]) -> None:
        self.profile = profile
        self.workload = workload
        self.images = images
        self.atoms = atoms
        self._item = item_bytes(loaded_dtype(profile, workload))
        if profile.quantization or workload.quantization:
            self._item = min(self._item, 2)
        self._weights = [0]
        self._layers = [0]
        self._heads = [0]
        for atom in atoms:
            self._weights.append(self._weights[-1] + sum(unit_bytes(unit, profile, workload) for unit in atom.units))
            self._layers.append(self._layers[-1] + atom.layers)
            self._heads.append(self._heads[-1] + atom.has_head)

    @property
    def source(self) -> str:
        """Where the figures for activations come from."""
        text = text_coefficient(self.profile.model_type).text
        if not self.profile.vision or not self.images.patches:
            return text
        return f"{text}; {vision_coefficient(self.profile.model_type).text}"

    def work(self, text_tokens: int) -> Work:
        """Bytes of the work on one prompt with ``text_tokens`` tokens of text and the workload's images."""
        text, batch, item = self.profile.text, self.workload.batch, self._item
        tokens = (text_tokens + self.images.tokens) * batch
        coefficient = text_coefficient(self.profile.model_type)
        layer = math.ceil(tokens * item * coefficient.elements(intermediate=text.intermediate, hidden=text.hidden))
        layer += self._quadratic(text_tokens + self.images.tokens)
        layer += self._quantization_temporary(tokens)
        kv_layer = 2 * text.kv_heads * text.head_dim * item * (tokens + self.workload.new_tokens * batch)
        states = tokens * text.hidden * item
        pixels, encode = self._vision(batch)
        features = self.images.tokens * batch * text.hidden * item
        return Work(
            kv_layer=kv_layer,
            # While decoding, DynamicCache grows by torch.cat: the cache of one layer exists twice.
            layer=max(layer, kv_layer),
            head=max(_NORM_STATES * states, 2 * states + self._logits(tokens)),
            held=states + pixels + features,
            encode=encode,
        )

    def _logits(self, tokens: int) -> int:
        """Of the last token in ``generate``; of every token in a plain forward and in classes that always compute all."""
        is_full = self.workload.logits == "forward" or self.profile.architecture.startswith(FULL_LOGITS_ARCHITECTURES)
        return (tokens if is_full else self.workload.batch) * self.profile.text.vocabulary * (self._item + 4)

    def _quadratic(self, prompt_tokens: int) -> int:
        """What grows with the square of the prompt.

        Eager attention has scores in the model's type, their softmax in float32, and a cast. Fused attention has none of
        it, but sliding windows need explicit masks once the prompt is longer: two boolean ones (sliding and full layers)
        and an additive copy of the one in use. Source: masking_utils.py of transformers 5, sdpa of torch; not measured.
        """
        text, pairs = self.profile.text, prompt_tokens**2 * self.workload.batch
        if self.workload.attention == "eager":
            return text.heads * pairs * (2 * self._item + 4)
        if text.sliding_window is not None and prompt_tokens > text.sliding_window:
            return pairs * (2 + self._item)
        return 0

    def _vision(self, batch: int) -> tuple[int, int]:
        """Bytes of the pixels, and of the vision tower at work, pixels included."""
        vision, images, item = self.profile.vision, self.images, self._item
        patches = images.sequences * images.patches * batch
        pixels = patches * _PIXEL_ELEMENTS * images.patch**2 * item
        if vision is None:
            return pixels, pixels
        coefficient = vision_coefficient(self.profile.model_type)
        elements = coefficient.elements(intermediate=vision.intermediate, hidden=vision.hidden, layers=vision.layers)
        work = math.ceil(patches * elements * item)
        if self.workload.attention == "eager":
            work += vision.heads * images.sequences * batch * images.patches**2 * (2 * item + 4)
        return pixels, pixels + work

    def _quantization_temporary(self, tokens: int) -> int:
        """What bitsandbytes needs beside a layer: nf4 unpacks the weight in use, int8 has its product in 32 bit."""
        if self.workload.quantization == "nf4":
            layers = (unit for atom in self.atoms for unit in atom.units if unit.role == "layer")
            return 2 * max(unit.largest_tensor_elements for unit in layers)
        return 4 * tokens * self.profile.text.intermediate if self.workload.quantization == "int8" else 0

    def needs(self, text_tokens: int) -> Callable[[int, int], int]:
        """A function that prices runs of atoms: ``(first, end)`` to total bytes, growing with every atom.

        It says the same as :meth:`detail`; the search asks it tens of thousands of times.
        """
        work = self.work(text_tokens)
        weights, layers, heads = self._weights, self._layers, self._heads
        encode = sum(self._encode(work))

        def need(first: int, end: int) -> int:
            own_layers = layers[end] - layers[first]
            prefill = own_layers * work.kv_layer + self._fragmentation(own_layers, work)
            busy = work.layer if own_layers else 0
            if heads[end] > heads[first]:
                busy = max(busy, work.head)
            prefill += busy
            if not first:
                prefill = max(encode, prefill + work.held)
            return weights[end] - weights[first] + prefill

        return need

    def detail(self, first: int, end: int, text_tokens: int) -> StageNeed:
        """What the atoms from ``first`` up to, not including, ``end`` need, item by item."""
        work = self.work(text_tokens)
        layers = self._layers[end] - self._layers[first]
        kv = layers * work.kv_layer
        moments = {"a layer reads the prompt": work.layer} if layers else {"the prompt is embedded": 0}
        if self._heads[end] > self._heads[first]:
            moments["the head computes logits"] = work.head
        prefill = max(moments.values())
        moment = max(moments, key=lambda name: moments[name])
        fragmentation = self._fragmentation(layers, work)
        encode = encode_fragmentation = 0
        if not first:
            prefill += work.held
            encode, encode_fragmentation = self._encode(work)
        peak = max(kv + prefill, encode)
        return StageNeed(
            weights_bytes=self._weights[end] - self._weights[first],
            kv_cache_bytes=kv,
            activations_bytes=peak - kv,
            fragmentation_bytes=max(kv + prefill + fragmentation, encode + encode_fragmentation) - peak,
            moment="the vision tower runs" if encode > kv + prefill else moment,
        )

    def _encode(self, work: Work) -> tuple[int, int]:
        """Live bytes and fragmentation while the vision tower runs."""
        return work.encode, math.ceil(FRAGMENTATION_OF_WORK * work.encode)

    def _fragmentation(self, layers: int, work: Work) -> int:
        """Reserved bytes that cannot serve a request while a stage with so many layers reads the prompt."""
        if not layers:
            return 0
        return math.ceil(FRAGMENTATION_OF_WORK * work.layer + FRAGMENTATION_OF_KV_CACHE * layers * work.kv_layer)
