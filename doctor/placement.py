"""What the planner answers: where each unit goes, what that costs on each GPU, and why."""

from __future__ import annotations

from typing import Literal

import msgspec

from .workload import Workload

LedgerKind = Literal[
    "driver", "others", "context", "workspace", "weights", "kv_cache", "activations", "training", "fragmentation",
    "headroom", "left",
]  # fmt: skip


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True):
    """One item of a GPU's memory."""

    kind: LedgerKind
    label: str
    """For people, such as ``weights: vision tower``."""
    size_bytes: int
    source: str
    """Where the figure comes from: a measurement, a formula, a header, the policy."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's part of the chain."""

    gpu: int
    """GPU index (NVML order)."""
    uuid: str
    name: str
    keys: tuple[str, ...]
    """Keys of the ``device_map`` placed here, in execution order."""
    ledger: tuple[LedgerLine, ...]
    """Adds up to ``total_bytes`` exactly; the line ``left`` is what remains and is negative when it does not fit."""
    total_bytes: int
    reserved_bytes: int | None = None
    """Predicted peak of torch's ``max_memory_reserved`` for this workload, in a process that has done nothing before;
    ``None`` in plans of versions that did not tell."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of torch's ``max_memory_allocated``: workspace, weights, KV cache and activations."""
        counted = ("workspace", "weights", "kv_cache", "activations", "training")
        return sum(line.size_bytes for line in self.ledger if line.kind in counted)

    @property
    def weights_bytes(self) -> int:
        """Of weights on the GPU."""
        return sum(line.size_bytes for line in self.ledger if line.kind == "weights")

    @property
    def left_bytes(self) -> int:
        """What remains after headroom; negative when it does not fit."""
        return sum(line.size_bytes for line in self.ledger if line.kind == "left")


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """A border between two stages."""

    before: str
    """Last key of the earlier stage."""
    after: str
    """First key of the later stage."""
    link: str
    """``NV18``, ``PHB`` …; ``?`` when unknown."""
    reason: str


class Lever(msgspec.Struct, frozen=True, kw_only=True):
    """A change that would save memory, computed, not guessed."""

    change: str
    """Imperative, such as ``load in 4 bit (nf4)`` or ``prompt of at most 6144 text tokens``."""
    saves_bytes: int
    """On the GPU that lacks most."""
    fits: bool
    """True when this change alone makes the plan fit."""


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """Why nothing fits."""

    missing_bytes: int
    """By how much the best split found exceeds its tightest GPU; 0 where it is not memory that is missing."""
    message: str
    """One sentence with the numbers."""
    is_permanent: bool
    """True when it would not fit even if every GPU were empty; False when only other processes stand in the way."""
    levers: tuple[Lever, ...] = ()
    """Smallest change first among those that fit, then the rest."""


class AutoShare(msgspec.Struct, frozen=True, kw_only=True):
    """What ``device_map="auto"`` would put on one GPU."""

    gpu: int
    """GPU index (NVML order)."""
    keys: tuple[str, ...]
    """Keys of its map on this GPU, in the order in which the class registers them; empty when it gets nothing."""
    layers: int
    """Text layers; one that is cut counts where it begins."""
    weights_bytes: int
    need_bytes: int
    """Weights, KV cache, activations and fragmentation for the workload, by the formulas."""
    left_bytes: int
    """What remains after headroom; negative when the workload does not fit."""


class CutBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A repeated block whose parts ``auto`` would put on several devices."""

    key: str
    devices: tuple[str, ...]
    """Such as ``GPU 2`` and ``CPU``, in the order of its parts."""
    fails: bool
    """True when the block adds its input to its output, so that the call raises."""


class AutoPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """What ``device_map="auto"`` would do with the same model, on the same GPUs."""

    library: str
    """Whose ``auto``, such as ``transformers 5.23.0``."""
    unknown: str | None = None
    """Why it is not known; all that follows is then empty."""
    shares: tuple[AutoShare, ...] = ()
    """In the order of torch's ordinals."""
    cpu_bytes: int = 0
    """Weights that it would leave in the host's memory."""
    disk_bytes: int = 0
    cut_blocks: tuple[CutBlock, ...] = ()
    parted: tuple[str, ...] = ()
    """Bare parameters on another GPU than the output that they are joined with."""
    fits: bool = False
    """True when the call runs, the workload fits every GPU and nothing is offloaded."""
    longest_prompt_tokens: int | None = None
    """Longest prompt (text and image tokens) that it could take, at least; what it takes is within a few percent."""
    verdict: str
    """One sentence: why it is worse than the plan, or equal."""


class Offload(msgspec.Struct, frozen=True, kw_only=True):
    """The last layers, kept in host memory because the GPUs do not suffice.

    accelerate copies each of their modules to the first GPU of the plan whenever it is called, and computes there: the KV
    cache of these layers, their work, and a copy of the largest module are part of that GPU's ledger.
    """

    keys: tuple[str, ...]
    """Keys of the ``device_map`` with the value ``cpu``, in execution order."""
    weights_bytes: int
    """Host memory that they take."""
    copy_bytes: int
    """On the GPU that executes them: a copy of the largest module."""
    host_left_bytes: int | None
    """Host memory available after loading, less what Python and torch take; ``None`` when it is not known."""
    reason: str
    """Why so much is offloaded, one sentence."""
    cost: str
    """What it costs in speed, one sentence."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The largest workloads that the placement can take: each changes one quantity and keeps the others."""

    prompt_tokens: int
    """Longest prompt, text and image tokens."""
    new_tokens: int | None
    """Most new tokens; bounded by the model's positions. ``None`` for a call that makes none: a training step, or a plain
    forward pass."""
    batch: int
    """Most prompts at once."""
    images: int | None = None
    """Most images in each prompt, of the workload's size; ``None`` for a model that takes none."""
    image_edge: int | None = None
    """Edge in pixels of the largest square image, for as many images as the workload has, where the model takes any size;
    where its processor scales larger images down, at most the size it scales them to."""


class GpuSet(msgspec.Struct, frozen=True, kw_only=True):
    """Cards that would do: as many of one kind, with nobody else on them."""

    spec: str
    """For ``--machine``, such as ``2xL4``."""
    name: str
    """Of the card, as NVML reports it."""
    count: int
    """Fewest that fit the workload."""
    total_bytes: int
    """Memory of all of them."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one model, machine, workload and policy."""

    model: str
    """Hub id or folder."""
    revision: str | None = None
    machine: str
    """``Machine.description``."""
    fits: bool
    workload: Workload
    dtype: str
    """torch's word for the type the weights are loaded in."""
    prompt_tokens: int
    """Text and image tokens of one prompt."""
    image_tokens: int
    """Of all its images together."""
    device_map: dict[str, int | str]
    """Module path to position in ``cuda_visible_devices``, or ``cpu`` for what is offloaded; empty when nothing fits."""
    max_memory: dict[int, int]
    """Position in ``cuda_visible_devices`` to bytes that weights may take there; for accelerate."""
    cuda_visible_devices: str
    """UUIDs (indices on a synthetic machine) of the GPUs used, in the order of the stages."""
    stages: tuple[Stage, ...]
    """When nothing fits: the best split that was found."""
    cuts: tuple[Cut, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why so many GPUs, why these, what constraints acted."""
    longest_prompt_tokens: int | None = None
    """Longest prompt (text and image tokens) that this placement can take."""
    limits: Limits | None = None
    """What this placement can take; ``None`` when nothing fits."""
    offloaded: Offload | None = None
    """What is kept in host memory, where the policy allows that and the GPUs do not suffice."""
    levers: tuple[Lever, ...] = ()
    """Of a training step that fits: what each change would save on the tightest GPU."""
    gpu_sets: tuple[GpuSet, ...] = ()
    """Cards on which the workload would fit, least total memory first: when nothing fits here, or when asked for."""
    shortage: Shortage | None = None
    auto: AutoPlacement | None = None
    """What ``device_map="auto"`` would do on the same GPUs."""
    tier: Literal["formulas", "traced"] = "formulas"
    """How memory was told: by formulas, or by the allocations of the model's real code."""
    notes: tuple[str, ...] = ()
    """What was assumed."""
    is_remote_code: bool = False
    refuses_sdpa: bool = False
    """The class does not load where ``attn_implementation="sdpa"`` is said; without a word it takes what it has."""
    needs_quantization: str | None = None
    """``quant_method`` of the checkpoint, or what the workload quantizes to."""

    @property
    def loses_hooks(self) -> bool:
        """True for a model of compressed-tensors on several devices, which transformers 5 must unpack while it loads."""
        return self.needs_quantization == "compressed-tensors" and len(set(self.device_map.values())) > 1
