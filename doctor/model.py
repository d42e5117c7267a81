"""A model as data: what a checkpoint's config and headers say, cut into the units that a ``device_map`` can place."""

from __future__ import annotations

from typing import Literal

import msgspec

from .allocation import AllocationScript, TowerScript
from .image_rule import ImageRule

Role = Literal["vision", "projector", "embedding", "layer", "norm", "head", "other"]
"""Part of the model: vision tower, projector (anything between tower and text), token embedding, one repeated text layer,
final norm, output head, or something that fits none of these."""


LayerCache = Literal["full", "sliding", "chunked", "linear", "cross", "none"]
"""What a text layer keeps between tokens: keys and values of all tokens, of the last ``sliding_window``, of the current
``attention_chunk``; a state whose size does not grow (linear attention, Mamba, convolutions); keys and values of the image
tokens (cross-attention); or nothing (it reads what another layer keeps, or has no attention)."""


class LinearWeights(msgspec.Struct, frozen=True):
    """Weights of ``nn.Linear``, counted together: what bitsandbytes replaces, and what it keeps beside them."""

    elements: int = 0
    rows: int = 0
    """Outputs of the layers; in 8 bit each has a scale."""
    tensors: int = 0
    largest: int = 0
    """Elements of the largest."""

    def __add__(self, other: LinearWeights) -> LinearWeights:
        return LinearWeights(
            self.elements + other.elements,
            self.rows + other.rows,
            self.tensors + other.tensors,
            max(self.largest, other.largest),
        )


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest thing that is placed: one key of the ``device_map``."""

    key: str
    """Module path in the *installed* class, such as ``model.language_model.layers.7``; a bare parameter has its own."""
    role: Role
    parameters: dict[str, int]
    """Stored dtype (safetensors' word, such as ``BF16`` or ``F32``) to number of elements; quantized weights count as what
    they stand for, under ``INT4``, ``INT8``, ``FP8``, ``NF4``, ``FP4`` or ``MXFP4``. Empty for a module without weights
    that the map must still name, such as ``model.language_model.rotary_emb``."""
    stored_bytes: int
    """Bytes in the checkpoint; tied tensors are counted once, where they are stored."""
    kept_bytes: int | None = None
    """Bytes on the GPU of what loading converts to no other type: quantized weights with their scales, integers. ``None``
    where only ``stored_bytes`` are known."""
    packed_bytes: int = 0
    """Of packed words that stay beside what is unpacked from them with libraries of the time of transformers 4
    (compressed-tensors; ``planner/installed.py`` counts them then)."""
    largest_tensor_elements: int = 0
    small_elements: int = 0
    """Elements of tensors of at most 1 MiB in a 16-bit type, which torch keeps apart from larger ones."""
    linear: LinearWeights = LinearWeights()
    """What bitsandbytes quantizes as the model is loaded."""
    expert_linear: LinearWeights = LinearWeights()
    """Linear layers of single experts. transformers 5 joins them into one bare parameter, which bitsandbytes leaves alone;
    before, and in a checkpoint's own code, they are layers like others (``planner/installed.py`` counts them then)."""
    layer: int | None = None
    """Number of the text layer; in a part of a tower, of its block."""
    parts: tuple[Unit, ...] = ()
    """What the unit may be broken into where it fits on no GPU as a whole, in execution order: what is before the blocks
    of a vision tower, the blocks, what is behind them (bare parameters such as ``boi`` included: no hook moves them to the
    output they are joined with). Their bytes add up to the unit's. Empty for a unit that no cut may part."""

    @property
    def elements(self) -> int:
        """Elements of all dtypes together."""
        return sum(self.parameters.values())


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest thing that ``device_map="auto"`` places.

    It is a block that ``auto`` does not part, a module without children, or a bare parameter.
    """

    unit: Unit
    """A unit of the profile, or what part of one lies here."""
    owner: str
    """Key of the profile's unit that it is, or is part of."""
    block: str = ""
    """Class of a block that is listed in ``_no_split_modules`` (several joined by ``|``)."""
    is_parameter: bool = False
    buffer_bytes: int = 0
    """Buffers that the class makes itself, such as rotary tables, at the size of its default config."""


class TextShape(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of the text body. Source: ``text_config`` (or the root) of config.json."""

    layers: int
    hidden: int
    intermediate: int
    """Width of the (gated) MLP; for a mixture of experts, of the experts that one token passes, together."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    sliding_window: int | None = None
    attention_chunk: int | None = None
    """Tokens that a ``chunked`` layer sees at most (Llama 4)."""
    max_positions: int | None = None
    body: str = ""
    """``model_type`` of the text body, such as ``qwen2`` in a LLaVA-OneVision."""
    experts: int = 0
    """Of a mixture; 0 where there is none."""
    active_experts: int = 0
    """Experts that one token passes."""
    expert_width: int = 0
    """Width of one expert's MLP."""
    kv_lora_rank: int | None = None
    """Width of the compressed keys and values of multi-head latent attention (DeepSeek, Kimi). ``kv_heads`` and
    ``head_dim`` then describe the expanded cache: 2 x kv_heads x head_dim elements a token."""
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    linear_width: int = 0
    """Width of the values of all heads in layers of linear attention; 0 where it is not known."""
    cached_layers: tuple[LayerCache, ...] = ()
    """What each layer keeps, in order; empty when all are ``full``, or, with a ``sliding_window``, all ``sliding``."""
    full_head_dim: int = 0
    """Of layers that are ``full``, where those beside them have another ``head_dim`` (Gemma 4); 0 where all have one."""
    full_kv_heads: int = 0
    """Likewise."""
    layer_input: int = 0
    """Width of the embedding that each layer has of its own (``hidden_size_per_layer_input`` of Gemma 3n and Gemma 4)."""
    is_never_fused: bool = False
    """The machine's transformers has no fused attention for it: it runs eager where ``sdpa`` is asked for."""

    def heads_of(self, cache: LayerCache) -> tuple[int, int]:
        """KV heads and ``head_dim`` of a layer that keeps so much."""
        has_own = cache == "full" and self.full_head_dim
        return (self.full_kv_heads, self.full_head_dim) if has_own else (self.kv_heads, self.head_dim)


MOST_FRAMES = 2
"""Of a patch, where nobody says how many."""


class VisionShape(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of the vision tower. Source: ``vision_config`` of config.json."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    patch: int
    """Pixels along a patch's edge."""
    kind: str = ""
    """``model_type`` of its config, such as ``pixtral``; empty where the config names none."""
    taken: int = 1
    """Blocks whose states are features (``vision_feature_layer``)."""
    frames: int = MOST_FRAMES
    """Frames of a patch: Qwen2-VL and GLM-4.1V stack two even for a still image, others have one."""
    keeps_states: bool = False
    """The machine's transformers keeps what every block gives until the tower is done, or until the answer."""
    lets_go: bool = False
    """The machine's transformers keeps one copy of the image features, and lets all else of the tower's work go."""


class ModelProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner needs to know about a model, from config.json and safetensors headers alone."""

    name: str
    """Hub id, or the folder as the user wrote it: what ``from_pretrained`` takes."""
    revision: str | None = None
    """Revision of the hub that was asked for (``org/name@revision``)."""
    origin: Literal["checkpoint", "hub", "catalogue"]
    architecture: str
    """Class name, ``config.architectures[0]``."""
    model_type: str
    is_remote_code: bool
    """True when the class lives in the checkpoint (``auto_map``) and needs ``trust_remote_code=True``."""
    dtype: str
    """torch's word for the checkpoint's main dtype, such as ``bfloat16``."""
    units: tuple[Unit, ...]
    """In execution order: vision, projector, embedding, layers, norm, head."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of unit keys that share a tensor and so must share a device."""
    text: TextShape
    vision: VisionShape | None = None
    image: ImageRule | None = None
    quantization: str | None = None
    """``quantization_config.quant_method`` of a checkpoint that is already quantized, such as ``awq``."""
    computes_in: Literal["int8", "float32"] | None = None
    """What the linear layers of such a checkpoint compute in where it is not the type of the hidden states: those of
    bitsandbytes in 8 bit, and in 4 bit where config.json says ``float32`` or nothing."""
    refuses_sdpa: bool = False
    """The class does not load where ``attn_implementation="sdpa"`` is said: what it can do it chooses by itself."""
    one_gpu: str | None = None
    """Why the machine's libraries cannot run it on several GPUs; ``None`` where they can, or where no machine is known."""
    tensors: dict[str, tuple[str, int]] = {}
    """Parameter name in the class to stored dtype and elements, so that a key inside a unit can be judged; empty where only
    the units are known."""
    runs_inner_generate: bool = False
    """True when the class calls ``self.language_model.generate`` (InternVL-Chat and others), so that the logits must end
    on the device of the inputs."""
    text_multiples: tuple[float, float] | None = None
    """From the user's own rules: elements a token while a text layer runs, in multiples of the MLP's width and of the
    hidden size; outdoes ``data/activations.py``."""
    vision_multiples: tuple[float, float] | None = None
    """The same for a patch in the tower."""
    body_script: AllocationScript | None = None
    """Which tensors come and go in the text body, where that is known."""
    tower_script: TowerScript | None = None
    """The same in the vision tower, of the transformers that will run it."""
    older_tower_script: TowerScript | None = None
    """That of transformers before 5.18, which holds less of what the tower gives."""
    broken_calls: tuple[str, ...] | None = None
    """What the checkpoint's own code relies on and some releases of transformers lack (names of ``data/removed_calls.py``);
    ``None`` where its code was not at hand."""
    moved_joins: tuple[str, ...] | None = None
    """What that code moves itself before joining it (``moves`` in ``data/joins.py``); ``None`` where it was not at hand."""
    files: tuple[str, ...] = ()
    """Checkpoint files the headers were read from."""
    registered: dict[str, tuple[Registered, ...]] = {}
    """By major version of transformers the model in the order in which its class registers it; a version is missing where
    that order is not known."""
    notes: tuple[str, ...] = ()
    """What was assumed, for the user to read."""

    @property
    def elements(self) -> int:
        """Parameters of the model."""
        return sum(unit.elements for unit in self.units)

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights in the checkpoint."""
        return sum(unit.stored_bytes for unit in self.units)
