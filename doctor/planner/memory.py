"""What a model needs: bytes of its parts once loaded, and of the work done on them.

Symbols: T prompt tokens, N new tokens, B batch, H hidden, I width of the MLP, V vocabulary, P patches, b bytes an element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy

import msgspec

from ..data.activations import (
    ATTENTION_STATES,
    CROSS_ATTENTION,
    FULL_LOGITS_ARCHITECTURES,
    text_coefficient,
    vision_coefficient,
)
from ..model import ModelProfile, Unit
from ..units import MIB
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
_TENSORS_OF_MODULE = 1.5
"""Bytes of the largest module in multiples of its largest tensor: ``gate_up_proj`` and ``down_proj`` of joined experts.
Source: modeling_qwen3_vl_moe.py, modeling_glm4v_moe.py and modeling_gpt_oss.py of transformers 5.23."""
_NORM_STATES = 6
"""Hidden states that a norm over the whole prompt holds at once: input, output and two in float32."""

FRAGMENTATION_BYTES = 64 * MIB
FRAGMENTATION_OF_KV_CACHE = 0.25
FRAGMENTATION_OF_ENCODING = 0.5
"""Reserved memory that cannot serve a request: a constant, a share of the KV cache and a share of one layer's work
(``lost_first`` and ``lost_later`` of the text coefficient), or else a share of the vision tower's work. Keys and values
that stay are cut out of blocks that temporaries left, which then are too small for the next layer's largest temporary;
requests below 10 MiB share segments of 20 MiB (torch, CUDACachingAllocator).

The figures that predict most among those that never claim a prompt that ran out of memory, in 14 readings on H200 cards of
12 and 23.5 GiB free (predicted 87 to 99 % of the true longest prompt) and in 175 replays of traced allocations of five
model families through a model of torch's caching allocator (74 to 100 %, 89 % on average); the replays themselves meet the
last three readings within 5 %. A much closer formula cannot be had: what is lost jumps between 0.15 and 0.55 of a layer's
work from one cut to the next.
"""


class StageNeed(msgspec.Struct, frozen=True):
    """What one stage needs of its GPU, at its worst moment."""

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    """On top of the KV cache, the copy of an offloaded module included. The vision tower runs before the cache exists, so
    only what exceeds the cache counts."""
    fragmentation_bytes: int
    moment: str
    """What happens when the activations are largest."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes + self.activations_bytes + self.fragmentation_bytes


class Holding(msgspec.Struct, frozen=True):
    """What a device holds of a model, as far as its memory goes; of any map, not of contiguous stages alone."""

    weights_bytes: int
    layers: int
    has_tower: bool
    """Any part of the vision tower: its work, and the pixels, are here."""
    has_embedding: bool
    """The prompt is embedded here and joined with the image features."""
    has_head: bool


class Work(msgspec.Struct, frozen=True):
    """Bytes that the work on one prompt of a given length needs, wherever it runs."""

    kv_layer: int
    layer: int
    """Prefill of one layer; layers run one after another, so a stage pays it once."""
    head: int
    held: int
    """Where the prompt is embedded, all through prefill: embeddings, pixels, the tower's output and image features."""
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


def copied_bytes(unit: Unit, profile: ModelProfile, workload: Workload) -> int:
    """Most bytes of weights that are on the executing GPU at once while an offloaded unit runs.

    accelerate copies each module that has tensors of its own when it is called, and lets the copy go when it returns
    (``attach_align_device_hook``, ``AlignDevicesHook.pre_forward`` and ``post_forward`` of accelerate 1.15): a linear layer
    has its weight, the joined experts of a mixture have two, the larger of twice the other's size.
    """
    size = item_bytes(loaded_dtype(profile, workload))
    of_module = math.ceil(_TENSORS_OF_MODULE * size * unit.largest_tensor_elements)
    whole = unit_bytes(unit, profile, workload)
    return min(whole, of_module) if of_module else whole


class Footprint:
    """Prices any run of atoms for one model and workload, as a function of the text tokens."""

    def __init__(
        self,
        profile: ModelProfile,
        workload: Workload,
        images: ImageLoad,
        atoms: Sequence[Atom],
        offloaded: Sequence[Atom] = (),
        *,
        is_bare: bool = False,
    ) -> None:
        """Sum up the parts.

        Args:
            profile: The model.
            workload: What it is to do.
            images: Its images, counted.
            atoms: Those placed on GPUs, in the order of execution.
            offloaded: Those behind them whose weights stay in host memory. The first stage executes them, so it has their
                KV cache and their work, and room for a copy of the module in use.
            is_bare: Leave out what the allocator wastes, for a bound that no split can beat.
        """
        self.profile = profile
        self.workload = workload
        self.images = images
        self.atoms = atoms
        self.offloaded = offloaded
        self.is_bare = is_bare
        guests = [unit for atom in offloaded for unit in atom.units]
        self.copy_bytes = max((copied_bytes(unit, profile, workload) for unit in guests), default=0)
        """Of weights of an offloaded module, on the first stage while it is in use."""
        self._guest_layers = sum(atom.layers for atom in offloaded)
        self._has_guest_head = any(atom.has_head for atom in offloaded)
        self.item_bytes = item_bytes(loaded_dtype(profile, workload))
        """Of one element of a hidden state."""
        if profile.quantization or workload.quantization:
            self.item_bytes = min(self.item_bytes, 2)
        self._weights = [0]
        self._layers = [0]
        self._heads = [0]
        self._towers = [0]
        for atom in atoms:
            self._weights.append(self._weights[-1] + sum(unit_bytes(unit, profile, workload) for unit in atom.units))
            self._layers.append(self._layers[-1] + atom.layers)
            self._heads.append(self._heads[-1] + atom.has_head)
            self._towers.append(self._towers[-1] + atom.has_tower)
        self._embedding = next((number for number, atom in enumerate(atoms) if atom.has_embedding), -1)
        """Number of the atom where the prompt is embedded; negative where none is."""

    def changed(self, workload: Workload, images: ImageLoad) -> Footprint:
        """The same parts for another workload; their weights are summed up again only where they change."""
        same = ("dtype", "quantization", "training")
        if any(getattr(workload, field) != getattr(self.workload, field) for field in same):
            return type(self)(self.profile, workload, images, self.atoms, self.offloaded, is_bare=self.is_bare)
        result = copy(self)
        result.workload, result.images = workload, images
        return result

    def weights_of(self, first: int, end: int) -> int:
        """Bytes of the weights of a run of atoms."""
        return self._weights[end] - self._weights[first]

    @property
    def least_bytes(self) -> int:
        """Weights and KV cache of everything that GPUs hold or execute: what no split can avoid."""
        layers = self._layers[-1] + self._guest_layers
        return self._weights[-1] + self.copy_bytes + layers * self.work(self.workload.text_tokens).kv_layer

    @property
    def source(self) -> str:
        """Where the figures for activations come from."""
        text = text_coefficient(self.profile.model_type).text
        if not self.profile.vision or not self.images.patches:
            return text
        return f"{text}; {vision_coefficient(self.profile.model_type).text}"

    def work(self, text_tokens: int) -> Work:
        """Bytes of the work on one prompt with ``text_tokens`` tokens of text and the workload's images."""
        text, batch, item = self.profile.text, self.workload.batch, self.item_bytes
        tokens = (text_tokens + self.images.tokens) * batch
        coefficient = text_coefficient(self.profile.model_type)
        states = tokens * text.hidden * item
        masks, attention = self._pairs(text_tokens + self.images.tokens)
        layer = math.ceil(tokens * item * coefficient.elements(intermediate=text.intermediate, hidden=text.hidden))
        if attention:
            layer = max(layer, math.ceil(ATTENTION_STATES * states) + attention)
        layer += masks + self._quantization_temporary(tokens)
        cross_share = CROSS_ATTENTION.get(self.profile.model_type, 0)
        cached = tokens + self.workload.new_tokens * batch + math.ceil(cross_share * self.images.features * batch)
        kv_layer = 2 * text.kv_heads * text.head_dim * item * cached
        pixels, encode, kept = self._vision(batch)
        return Work(
            kv_layer=kv_layer,
            # While decoding, DynamicCache grows by torch.cat: the keys of one layer, then its values, exist twice.
            layer=max(layer, kv_layer // 2),
            head=max(_NORM_STATES * states, 2 * states + self._logits(tokens)),
            held=states + pixels + kept,
            encode=encode,
        )

    def _logits(self, tokens: int) -> int:
        """Of the last token in ``generate``, of every token in a plain forward and in classes that always compute all.

        ``generate`` and those classes copy them to float32.
        """
        if self.profile.architecture.startswith(FULL_LOGITS_ARCHITECTURES):
            return tokens * self.profile.text.vocabulary * (self.item_bytes + 4)
        if self.workload.logits == "forward":
            return tokens * self.profile.text.vocabulary * self.item_bytes
        return self.workload.batch * self.profile.text.vocabulary * (self.item_bytes + 4)

    def _pairs(self, prompt_tokens: int) -> tuple[int, int]:
        """Bytes for pairs of tokens: of masks that all layers share, and of attention at work.

        Eager attention has an additive mask, and for each head scores in the model's type, their softmax in float32, and a
        cast. Fused attention has none of it, except where a sliding window needs an explicit mask: once the prompt is
        longer, or images attend both ways (Gemma 3, with a second mask for the full layers). It is boolean, and the kernel
        makes an additive copy and another with aligned rows. Source: masking_utils.py of transformers 5;
        convert_boolean_attn_mask and preprocess_mask of torch; counted by ``benchmarks/trace_memory.py``.
        """
        text, pairs, item = self.profile.text, prompt_tokens**2 * self.workload.batch, self.item_bytes
        is_windowed = text.sliding_window is not None
        if self.workload.attention == "eager":
            return pairs * item * (2 if is_windowed else 1), text.heads * pairs * (2 * item + 4)
        if text.sliding_window is not None and (prompt_tokens > text.sliding_window or self.images.tokens):
            return pairs * (2 if self.images.tokens else 1), pairs * 2 * item
        return 0, 0

    def _vision(self, batch: int) -> tuple[int, int, int]:
        """Bytes of the pixels, of the vision tower at work with them, and of what stays of its work until the answer."""
        vision, images, item = self.profile.vision, self.images, self.item_bytes
        patches = images.sequences * images.patches * batch
        pixels = patches * _PIXEL_ELEMENTS * images.patch**2 * item
        if vision is None:
            return pixels, pixels, 0
        coefficient = vision_coefficient(self.profile.model_type)
        elements = coefficient.elements(intermediate=vision.intermediate, hidden=vision.hidden, layers=vision.layers)
        work = math.ceil(patches * elements * item)
        if self.workload.attention == "eager":
            work += vision.heads * images.sequences * batch * images.patches**2 * (2 * item + 4)
        features = images.features * batch * self.profile.text.hidden * item
        return pixels, pixels + work, coefficient.kept_features * features + patches * vision.hidden * item

    def _quantization_temporary(self, tokens: int) -> int:
        """What bitsandbytes needs beside a layer: nf4 unpacks the weight in use, int8 has its product in 32 bit."""
        if self.workload.quantization == "nf4":
            layers = (unit for atom in self.atoms for unit in atom.units if unit.role == "layer")
            return 2 * max(unit.largest_tensor_elements for unit in layers)
        return 4 * tokens * self.profile.text.intermediate if self.workload.quantization == "int8" else 0

    def needs(self, text_tokens: int) -> Callable[[int, int], int]:
        """A function that prices runs of atoms: ``(first, end)`` to total bytes, growing with every atom.

        The search asks it tens of thousands of times; :meth:`detail` says the same, item by item.
        """
        work = self.work(text_tokens)
        weights, layers, heads = self._weights, self._layers, self._heads
        encode, kv_layer, lost_first, lost_later = self._padded(work)
        embedding, towers = self._embedding, self._towers
        guest_layers, guest_heads, copy_bytes = self._guest_layers, int(self._has_guest_head), self.copy_bytes
        lost_with_guests = max(lost_first, lost_later)

        def need(first: int, end: int) -> int:
            run_layers, run_heads, held_weights = layers[end] - layers[first], heads[end] - heads[first], weights[end]
            embeds = first <= embedding < end
            lost = lost_first if embeds else lost_later
            if first:
                held_weights -= weights[first]
            elif guest_layers or guest_heads:
                run_layers, run_heads, lost = run_layers + guest_layers, run_heads + guest_heads, lost_with_guests
                held_weights += copy_bytes
            prefill = run_layers * kv_layer
            busy = 0
            if run_layers:
                busy = work.layer
                prefill += lost
            if run_heads:
                busy = max(busy, work.head)
            prefill += busy
            if embeds:
                prefill += work.held
            total = held_weights + (max(encode, prefill) if towers[end] > towers[first] else prefill)
            # A stage must not become cheaper by the anchor, where less is lost on the first GPU.
            return max(total, need(embedding + 1, end)) if embeds and end > embedding + 1 else total

        return need

    def _padded(self, work: Work) -> tuple[int, int, int, int]:
        """With what the allocator wastes: work of the tower, KV cache of a layer, what a first and a later stage lose."""
        if self.is_bare:
            return work.encode, work.kv_layer, 0, 0
        if self.workload.allocator == "expandable":
            return work.encode, work.kv_layer, FRAGMENTATION_BYTES, FRAGMENTATION_BYTES
        coefficient = text_coefficient(self.profile.model_type)
        lost_first, lost_later = (
            FRAGMENTATION_BYTES + math.ceil(share * work.layer)
            for share in (coefficient.lost_first, coefficient.lost_later)
        )
        encode = math.ceil((1 + FRAGMENTATION_OF_ENCODING) * work.encode)
        return encode, math.ceil((1 + FRAGMENTATION_OF_KV_CACHE) * work.kv_layer), lost_first, lost_later

    def detail(self, first: int, end: int, text_tokens: int) -> StageNeed:
        """What the atoms from ``first`` up to, not including, ``end`` need, item by item."""
        executes_guests = not first
        holding = Holding(
            weights_bytes=self._weights[end] - self._weights[first],
            layers=self._layers[end] - self._layers[first] + executes_guests * self._guest_layers,
            has_tower=self._towers[end] > self._towers[first],
            has_embedding=first <= self._embedding < end,
            has_head=self._heads[end] > self._heads[first] or (executes_guests and self._has_guest_head),
        )
        peak = self.need_of(holding, text_tokens)
        if executes_guests:
            peak = msgspec.structs.replace(peak, activations_bytes=peak.activations_bytes + self.copy_bytes)
        total = self.needs(text_tokens)(first, end)
        return msgspec.structs.replace(peak, fragmentation_bytes=total - peak.total_bytes)

    def need_of(self, holding: Holding, text_tokens: int) -> StageNeed:
        """What a device needs for its part of a model, item by item, without fragmentation."""
        work = self.work(text_tokens)
        kv = holding.layers * work.kv_layer
        moments = {"a layer reads the prompt": work.layer} if holding.layers else {"the prompt is embedded": 0}
        if holding.has_head:
            moments["the head computes logits"] = work.head
        moment = max(moments, key=lambda name: moments[name])
        prefill = moments[moment] + (work.held if holding.has_embedding else 0)
        encode = work.encode if holding.has_tower else 0
        peak = max(kv + prefill, encode)
        return StageNeed(
            weights_bytes=holding.weights_bytes,
            kv_cache_bytes=kv,
            activations_bytes=peak - kv,
            fragmentation_bytes=0,
            moment="the vision tower runs" if encode > kv + prefill else moment,
        )
