"""What a run and a warm host tell each other, as msgpack frames, and what a host leaves in its folder. No I/O."""

from __future__ import annotations

import msgspec

Plain = bool | int | float | str | None


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a host is to load and keep."""

    digest: str
    """Of :attr:`facts`."""
    facts: dict[str, str]
    """All that decides what a load gives, by the words that say what changed."""
    label: str
    """The model, for people."""
    name: str
    """For ``find_source``: an absolute folder, or a hub id."""
    dtype: str | None
    plan: bytes | None
    """JSON of the plan; ``None`` on the CPU."""
    ordinals: dict[str, int] = {}
    """GPU UUID to CUDA ordinal, used where torch names no UUIDs."""
    gpus: tuple[str, ...] = ()
    """UUIDs of the GPUs that the host leases whenever no run does; empty on the CPU."""
    lease_dir: str
    ttl_s: float
    runs: tuple[int, ...] = ()
    """Processes that may hold these leases now: the run, and the controller of its workers."""


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a host leaves in its folder: who it is, for runs that look for it, alive or not."""

    pid: int
    label: str
    name: str
    digest: str
    facts: dict[str, str]
    gpus: tuple[str, ...] = ()
    started_at: float
    """Seconds since the epoch."""


class Attach(msgspec.Struct, frozen=True, tag=True):
    """Lend me the model. The connection is the loan: when it closes, the model was given back."""

    digest: str
    pid_namespace: str
    ttl_s: float
    runs: tuple[int, ...] = ()


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Say who you are."""


class TakeLeases(msgspec.Struct, frozen=True, tag=True):
    """Let go of your leases, as long as this connection is open: I take them."""

    runs: tuple[int, ...] = ()


class End(msgspec.Struct, frozen=True, tag=True):
    """End, unless another run has your model."""


Request = Attach | Ask | TakeLeases | End


class Progress(msgspec.Struct, frozen=True, tag=True):
    """The model is still being loaded."""

    seconds: float
    loaded: dict[str, int] = {}
    """GPU UUID to bytes of tensors; empty on the CPU."""
    host_bytes: int = 0
    """Of the process, all in all."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """No, and why: the end of a sentence that begins with "not attached:"."""

    reason: str
    is_for_good: bool = False
    """The same model is refused the next time, too."""
    is_ending: bool = False
    """The host ends now."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is so, or will be in a moment."""


class Status(msgspec.Struct, frozen=True, tag=True):
    """Who a host is."""

    pid: int
    label: str
    digest: str
    is_loaded: bool
    age_s: float
    """Since the model was loaded."""
    idle_s: float
    """Since no run has had it; 0 while one has."""
    users: tuple[int, ...]
    """Pids of runs that have the model."""
    weights: dict[str, int]
    """GPU UUID to bytes of weights and buffers there."""


class CudaBlock(msgspec.Struct, frozen=True):
    """What ``torch.multiprocessing`` tells another process about memory of a GPU."""

    uuid: str
    handle: bytes = b""
    """Empty for a block without bytes."""
    storage_bytes: int = 0
    storage_offset: int = 0
    counter: bytes = b""
    counter_offset: int = 0
    event: bytes = b""


class Block(msgspec.Struct, frozen=True):
    """A run of bytes in which tensors live, some of them together."""

    size_bytes: int
    offset: int = 0
    """In the shared memory, on the CPU."""
    cuda: CudaBlock | None = None
    sample: bytes = b""
    """A few of its bytes, to be found again by whoever attaches."""


class TensorRecord(msgspec.Struct, frozen=True):
    """A parameter, buffer or plain tensor of a model, without its values."""

    block: int
    dtype: str
    offset: int
    """In elements, from the beginning of the block."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_parameter: bool
    requires_grad: bool
    attributes: dict[str, Plain] = {}


class Lent(msgspec.Struct, frozen=True, tag=True):
    """A model; on the CPU the descriptor of its memory comes with the frame."""

    skeleton: bytes
    """The model pickled, with positions in :attr:`tensors` in place of its tensors."""
    tensors: tuple[TensorRecord, ...]
    blocks: tuple[Block, ...]
    shared_bytes: int
    """Size of the shared memory."""
    is_dispatched: bool
    """Hooks move what modules hand over between devices."""
    load_seconds: float
    age_s: float


Reply = Progress | Refused | Done | Status | Lent
