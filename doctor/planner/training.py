"""What one optimizer step needs beside the weights: adapters, gradients, optimizer states, and what backward keeps.

Counted on real steps of transformers 5.23 and torch 2.13 (``benchmarks/count_training.py``), and held against recorded ones
at true size and measured ones (tests/doctor/planner/test_training_recorded.py); the comments tell the tensors apart.
Symbols: T tokens of all prompts, H hidden, I width of the MLP, Q and K widths of queries and keys, V vocabulary, b bytes an
element, r rank of the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from ..model import ModelProfile, Unit
from ..units import MIB
from ..workload import Training, Workload
from .image_tokens import ImageLoad
from .layer_work import LayerKind, coefficient_of, is_eager
from .prompt_work import JOINED_GATE_AND_UP
from .release import Release, is_before_5
from .weights import computed_item_bytes, unit_bytes

_ADAPTER_BYTES = 4
"""peft keeps adapters in float32 beside 16-bit weights (``autocast_adapter_dtype``), their gradients and states too."""
_LOSS_BYTES = 12
"""A token and entry of the vocabulary: log-probabilities, their gradient and that of the logits, all float32. Counted;
source: ForCausalLMLoss of transformers (``logits.float()``)."""
_STATE_BYTES = {"adamw_8bit": 2 + 2 * 4 / 256, "adafactor": 0.05, "sgd": 0.0}
"""Of an element of a trained weight. bitsandbytes keeps two bytes with a float32 scale for 256 of each; Adafactor keeps
rows and columns in float32. ``adamw`` keeps two tensors of the weight's own type (torch.optim.AdamW)."""
_ADAFACTOR_STEP_BYTES = 12
"""Of an element of the largest tensor: gradient, update and weight in float32. Source: Adafactor.step of transformers."""
_NORMS = {"gemma2": 4, "gemma3_text": 4, "gemma4_text": 4, "glm4": 4, "glm4v_text": 4}
"""Norms of a layer, by text body; 2 in all others."""
_HEAD_NORMS = frozenset({"gemma3_text", "gemma4_text", "qwen3", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_moe", "olmo2"})
"""Text bodies that norm queries and keys."""
_WORKSPACE_BYTES = 32 * MIB
"""Source: ``data/contexts.py``; the smaller one of older cards makes no difference."""
_TOWER_KEEPS = {"full": (15, 4), "lora": (10, 3)}
"""Elements that a block of a vision tower keeps for each patch, in multiples of its hidden size and of its MLP's width,
where it is trained and where it is only passed. Counted (saved tensors of autograd, transformers 5.23): Qwen2.5-VL 15 and
4, 10 and 3; CLIP 8 and 3, 6 and 2; GLM-4.1V 15 and 4; Qwen3-VL 11 and 2."""
_WIDE_AS_TEXT = frozenset({"glm4v", "glm4v_moe", "glm46v"})
"""Families whose tower has an MLP as wide as the text's hidden states. Source: Glm4vVisionMLP (``out_hidden_size``)."""
_SEPARATE_TOWERS = frozenset({*_WIDE_AS_TEXT, "qwen3_vl", "qwen3_vl_moe"})
"""Families whose tower no gradient passes where adapters are trained: ``enable_input_require_grads`` of transformers 5 asks
every submodel for its input embedding, which these towers do not name. Seen: their output requires no gradient, that of
Qwen2.5-VL's and of CLIP does. Before 5 it asked the text body alone."""


class Waste(NamedTuple):
    """Shares that torch's allocator wastes in a training step, on top of what lives.

    Fitted to 57 stages of recorded steps of Qwen2.5-VL 7B, GLM-4.1V 9B and LLaVA-1.5 (512 to 16,384 tokens, one to three
    stages, all methods), replayed (``benchmarks/record_training.py``): no stage runs out of memory in what is said to
    suffice. The same replays meet peaks of allocated and reserved memory of steps on two H200s within 1 and 3 %.
    """

    encoding: float = 0
    """Of a tower that is only read."""
    largest: float = 0
    """Of the largest tensor of the loss: optimizer states that the first step leaves in its segment keep the next one from
    it. They do not always; whether they do changes with every cut and length, so it counts."""
    beside: float = 0
    """Of a layer's backward, when the loss is computed."""
    logits: float = 0
    """Of their copy where the model begins."""
    layer: float = 0
    """Of a layer that goes backward."""
    saved: float = 0
    """Of what is kept for backward."""
    step: float = 0
    """Of the optimizer's temporaries: a tensor's block may be up to 1 MiB larger than the tensor."""
    pinned: float = 0
    """Of what was kept and worked with, when the optimizer steps: gradients are cut out of it while it goes."""
    cached: float = 0
    """Of the largest tensor of the loss, in what comes after it: kept as long as there is enough, given back otherwise."""


WASTE = {
    "lora": Waste(encoding=0.5, largest=1, beside=0.13, logits=1, layer=0.35, saved=0.03, cached=1),
    "full": Waste(
        encoding=0.5, largest=1.75, beside=0.13, logits=1, layer=0.35, saved=0.03, step=0.05, pinned=0.45, cached=1.75
    ),
}
"""By method."""
SLACK_BYTES = 256 * MIB
"""Left free for what recorded steps do not tell. With 64 MiB, LLaVA-1.5 13B without checkpoints on 2 x 23.5 GiB was
promised 1,421 tokens and ran out of memory, 40 MiB short at least, on an H200; two others, with checkpoints, ran what they
were promised, and not a tenth more."""


class Trained(NamedTuple):
    """Bytes that training adds to a unit, whatever the prompt is."""

    adapters: int = 0
    gradients: int = 0
    states: int = 0
    step: int = 0
    """Temporaries of the optimizer: torch's AdamW takes the roots of all second moments at once (``foreach``)."""

    def __add__(self, other: object) -> Trained:
        """Bytes of both."""
        assert isinstance(other, Trained)
        return Trained(*(mine + its for mine, its in zip(self, other, strict=True)))

    def __sub__(self, other: Trained) -> Trained:
        """Bytes of this without the other."""
        return Trained(*(mine - its for mine, its in zip(self, other, strict=True)))


class StepWork(NamedTuple):
    """Bytes that depend on the prompt."""

    saved: dict[LayerKind, int]
    """From forward to backward, of each layer."""
    layer: dict[LayerKind, int]
    """Of one layer while it goes backward; computed again where there are checkpoints."""
    flowing: int
    """Gradients of activations on their way through the MLP."""
    loss: int
    largest: int
    """Of the loss, its largest tensor: the logits in float32."""
    logits: int
    """Their copy where the model begins: accelerate's outermost hook brings what the model returns back to its input."""
    tower_saved: int
    tower_backward: int


def trained(unit: Unit, kind: LayerKind | None, profile: ModelProfile, workload: Workload) -> Trained:
    """What training adds to one unit.

    Args:
        unit: Any.
        kind: Of a text layer; ``None`` for all else.
        profile: The model.
        workload: ``full`` trains every floating-point weight that the prompts pass, ``lora`` adapters in the text layers;
            nothing without ``training``.
    """
    training = workload.training
    if training is None or not _has_gradients(unit, workload):
        return Trained()
    if training.method == "lora":
        elements = training.lora_rank * _adapted_edges(kind, profile) if kind is not None else 0
        size = _ADAPTER_BYTES
    else:
        size = computed_item_bytes(profile, workload)
        elements = unit_bytes(unit, profile, workload) // size
    gradients = elements * size
    states = 2 * gradients if training.optimizer == "adamw" else math.ceil(elements * _STATE_BYTES[training.optimizer])
    step = gradients if training.optimizer == "adamw" else 0
    return Trained(gradients if training.method == "lora" else 0, gradients, states, step)


def _has_gradients(unit: Unit, workload: Workload) -> bool:
    """Whether backward reaches a unit: prompts without images do not pass the tower, and optimizers leave out weights
    without a gradient, so that there are no states either. Measured: Qwen2.5-VL 7B, all weights, text alone.
    """
    return workload.images > 0 or unit.role not in ("vision", "projector")


def largest_step_bytes(units: Iterable[Unit], workload: Workload) -> int:
    """Temporaries of an optimizer that takes one tensor after another."""
    training = workload.training
    if training is None or training.method == "lora" or training.optimizer != "adafactor":
        return 0
    passed = (unit.largest_tensor_elements for unit in units if _has_gradients(unit, workload))
    return _ADAFACTOR_STEP_BYTES * max(passed, default=0)


def _adapted_edges(kind: LayerKind, profile: ModelProfile) -> int:
    """Inputs and outputs of all linear layers of a text layer; joined experts are no linear layers."""
    text = profile.text
    kv_heads, head_dim = text.heads_of(kind.cache)
    hidden, queries, keys = text.hidden, text.heads * head_dim, kv_heads * head_dim
    if text.kv_lora_rank is not None:
        rotated, rest, value = text.qk_rope_head_dim or 0, text.qk_nope_head_dim or 0, text.v_head_dim or text.head_dim
        queries, values = text.heads * (rest + rotated), text.heads * value
        edges = 3 * hidden + queries + 2 * text.kv_lora_rank + rotated + text.heads * (rest + value) + values
    else:
        edges = 2 * (hidden + queries) + 2 * (hidden + keys)
    return edges if kind.has_experts else edges + 3 * (hidden + text.intermediate)


def step_work(
    kinds: set[LayerKind],
    profile: ModelProfile,
    workload: Workload,
    images: ImageLoad,
    text_tokens: int,
    *,
    release: Release = None,
) -> StepWork:
    """Bytes of one forward and backward pass, with a release of transformers."""
    training, item = workload.training, computed_item_bytes(profile, workload)
    assert training is not None
    tokens = (text_tokens + images.tokens) * workload.batch
    is_lora, is_checkpointed = training.method == "lora", training.gradient_checkpointing
    text = profile.text
    saved, layer = {}, {}
    for kind in kinds:
        kept = math.ceil(tokens * _saved_bytes(kind, profile, item, training))
        if is_eager(text, workload):
            # Scores before softmax, after it in float32, and cast.
            kept += text.heads * (text_tokens + images.tokens) ** 2 * workload.batch * (item + 4)
        saved[kind], layer[kind] = tokens * text.hidden * item if is_checkpointed else kept, kept
    flowing = tokens * _flowing_bytes(profile, item, training)
    is_passed = not is_lora or not (is_before_5(release) or profile.model_type in _SEPARATE_TOWERS)
    tower_saved, tower_backward = _tower(profile, workload, images, training) if is_passed else (0, 0)
    final_norm = tokens * text.hidden * (4 if is_lora else 4 + 2 * item)
    loss = tokens * text.vocabulary * _LOSS_BYTES + final_norm
    logits = tokens * text.vocabulary * item
    largest = tokens * text.vocabulary * 4
    return StepWork(saved, layer, flowing, loss, largest, logits, tower_saved, tower_backward)


def _flowing_bytes(profile: ModelProfile, item: int, training: Training) -> int:
    """Bytes a token of gradients on their way through the MLP.

    With adapters, gradients are in float32 behind the small matrices: that of the down projection's input, and that of gate
    and up where they are one weight; where they are two, those of hidden states are more.
    """
    text = profile.text
    if training.method == "full":
        return 2 * text.intermediate * item
    is_joined = coefficient_of(profile).intermediate_multiple == JOINED_GATE_AND_UP
    return 4 * text.intermediate + (4 * text.intermediate if is_joined else 12 * text.hidden)


def _saved_bytes(kind: LayerKind, profile: ModelProfile, item: int, training: Training) -> float:
    """Bytes a token that a layer keeps for backward, with fused attention."""
    text, body = profile.text, profile.text.body
    hidden, width = text.hidden, text.intermediate
    kv_heads, head_dim = text.heads_of(kind.cache)
    queries, keys = text.heads * head_dim, kv_heads * head_dim
    if text.kv_lora_rank is not None:
        queries = keys = text.heads * ((text.qk_nope_head_dim or 0) + (text.qk_rope_head_dim or 0))
    normed = _NORMS.get(body, 2) * hidden + (queries + keys if body in _HEAD_NORMS else 0)
    # Rotated queries and keys, values, the output of attention, its row statistics.
    attention = item * (2 * queries + 2 * keys) + 4 * text.heads
    passed = text.active_experts * (text.expert_width or math.ceil(width / max(1, text.active_experts)))
    if training.method == "full":
        # A norm keeps its input in float32, the normed one, and the product with its weight. The MLP keeps gate, up, the
        # activation and the product.
        mlp = (4 * passed + 3 * text.active_experts * hidden if kind.has_experts else 4 * width) * item
        return normed * (4 + 2 * item) + attention + mlp
    # Frozen weights need no input; every adapted layer keeps its own input in float32, and what passed its small matrix.
    adapted = 4 * hidden + queries
    if kind.has_experts:
        mlp = (3 * passed + 3 * text.active_experts * hidden) * item
    else:
        mlp, adapted = 3 * width * item, adapted + hidden + width
    return 4 * normed + attention + mlp + 4 * adapted + 4 * 7 * training.lora_rank


def _tower(profile: ModelProfile, workload: Workload, images: ImageLoad, training: Training) -> tuple[int, int]:
    """Bytes that all blocks of the vision tower keep, and that one needs on its way backward."""
    vision, item = profile.vision, computed_item_bytes(profile, workload)
    if vision is None:
        return 0, 0
    patches = images.sequences * images.patches * workload.batch
    width = profile.text.hidden if profile.model_type in _WIDE_AS_TEXT else vision.intermediate
    of_hidden, of_width = _TOWER_KEEPS[training.method]
    block = patches * (of_hidden * vision.hidden + of_width * width) * item
    flowing = 2 * patches * width * item
    if training.gradient_checkpointing:
        return patches * vision.hidden * item * vision.layers, block + flowing
    return block * vision.layers, flowing


class Peak(NamedTuple):
    """The worst moment of a step. Bytes beside the weights."""

    kept: int
    """Adapters, states and gradients that are there then."""
    work: int
    """All else that lives then."""
    lost: int
    """What the allocator needs on top."""
    reserved: int
    """What it takes in all where there is enough."""
    moment: str


def peak(
    *,
    fixed: Trained,
    saved: int,
    again: int,
    last: int,
    loss: int,
    largest: int,
    logits: int,
    held: int,
    encode: int,
    tower: int,
    waste: Waste,
) -> Peak:
    """The worst moment of a step.

    Args:
        fixed: Of its units together.
        saved: Of its layers, and of the tower where it is trained.
        again: What its neediest layer needs on top of that when it goes backward, the last one first.
        last: Of the layer that goes backward last, when all gradients are there.
        loss: Where the head is; else 0.
        largest: Tensor of the loss; else 0.
        logits: Copied to where the prompt is embedded; else 0.
        held: Of the prompt where it is embedded.
        encode: Of a tower that is only read, while it runs.
        tower: Of one block of a tower that is trained, on its way backward.
        waste: Shares of what the allocator wastes. What counts in the end is the worst moment with its waste, which may be
            another one: otherwise a stage could become cheaper by an atom that makes another moment the worst.
    """
    ending = max(last, tower)
    kept = waste.saved * saved
    moments = {
        "the vision tower runs": (encode, waste.encoding * encode),
        "the loss is computed": (saved + held + loss, waste.largest * largest + waste.beside * again + kept),
        "the logits come back": (saved + held + logits, waste.logits * logits + kept),
        "a layer goes backward": (saved + held + again, waste.layer * again + kept),
        "the last gradients are computed": (
            held + fixed.gradients + ending,
            waste.layer * ending + waste.pinned * (saved + again),
        ),
        "the optimizer steps": (fixed.gradients + fixed.step, waste.step * fixed.step + waste.pinned * (saved + again)),
    }
    totals = {name: size + math.ceil(lost) for name, (size, lost) in moments.items()}
    moment = max(moments, key=lambda name: moments[name][0])
    size, most = moments[moment][0], max(totals.values())
    # Backward runs in a thread of its own, which has a cuBLAS workspace of its own.
    always = fixed.adapters + fixed.states + _WORKSPACE_BYTES
    later = max(totals["a layer goes backward"], totals["the optimizer steps"]) + math.ceil(waste.cached * largest)
    gradients = fixed.gradients if moment in ("the last gradients are computed", "the optimizer steps") else 0
    return Peak(
        kept=fixed.adapters + fixed.states + gradients,
        work=size - gradients + _WORKSPACE_BYTES,
        lost=most - size,
        reserved=always + max(most, later),
        moment=moment,
    )
