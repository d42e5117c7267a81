"""A loaded model as something that another process can have: its skeleton pickled, its tensors apart.

On the CPU the tensors are in memory that the kernel has sealed: whoever attaches maps it privately, so that what a test
writes is its own and no other run can ever meet it. For GPUs see :mod:`cuda_sharing`.
"""

from __future__ import annotations

import fcntl
import io
import mmap
import os
import pickle
from typing import TYPE_CHECKING, Any

from .facts import NotKept
from .records import Block, TensorRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALIGNMENT = 64
"""Bytes; of a cache line, and as torch aligns its own memory."""
_SPARE_BYTES = 2**30
"""Host memory that a kept model leaves to everybody else."""
_SAMPLES, _SAMPLE_BYTES = 4, 8
_SMALL_BYTES = 2**20
"""Of a tensor that is pickled; frequencies of a rotary embedding have 256 bytes."""
_OWN_CODE = ("torch", "transformers", "accelerate")
"""Packages whose modules a host may keep: what else a model is made of, only its own project knows."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_REPLACED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")
"""Methods that accelerate replaces on a model with hooks (``dispatch_model``)."""


class Taken:
    """A model taken apart: its tensors in groups that share memory.

    Args:
        model: Loses its hooks.
        is_on_gpus: A small tensor on the CPU that is neither parameter nor buffer, which nothing has moved to a GPU, stays
            in the skeleton with its values.

    Raises:
        NotKept: Only its own project could put it together again.
    """

    def __init__(self, model: Any, *, is_on_gpus: bool = False) -> None:
        self._registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._keeps_small = is_on_gpus
        self.is_dispatched = _strip_hooks(model)
        _refuse_what_only_its_project_knows(model)
        self._tensors: list[Any] = []
        self._index: dict[int, int] = {}
        self.skeleton = self._pickled(model)
        self.groups: list[list[int]] = _groups(self._tensors)
        """Positions of tensors that share one storage."""
        self.spans = [_span([self._tensors[position] for position in group]) for group in self.groups]
        """Of each group, the bytes of the storage in which its tensors are."""

    def storage(self, group: int) -> Any:
        """The bytes of a group as a tensor of ``uint8``, on its device."""
        import torch

        first, end = self.spans[group]
        tensor = self._tensors[self.groups[group][0]].detach()
        view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return view.set_(tensor.untyped_storage(), first, (end - first,), (1,))

    def records(self) -> tuple[TensorRecord, ...]:
        """All tensors, in the order of their positions in the skeleton."""
        found: dict[int, TensorRecord] = {}
        for block, group in enumerate(self.groups):
            for position in group:
                found[position] = _record(self._tensors[position], block, self.spans[block][0])
        return tuple(found[position] for position in range(len(self._tensors)))

    def let_go(self, group: int) -> None:
        """Free the tensors of a group on the CPU: their bytes are elsewhere now."""
        import torch

        for position in self.groups[group]:
            tensor = self._tensors[position]
            tensor.data = torch.empty(0, dtype=tensor.dtype)

    def _pickled(self, model: Any) -> bytes:
        import torch

        taken, index = self._tensors, self._index
        modules = dict(model.named_modules())
        numbers = {id(module): -1 - number for number, module in enumerate(modules.values())}

        def is_in_skeleton(tensor: Any) -> bool:
            if not self._keeps_small or id(tensor) in self._registered:
                return False
            if tensor.device.type != "cpu" or tensor.nbytes > _SMALL_BYTES:
                return False
            _check_tensor(tensor)
            return True

        class Pickler(pickle.Pickler):
            def persistent_id(self, thing: Any) -> int | None:
                if isinstance(thing, torch.nn.Module):
                    if id(thing) not in numbers:
                        raise NotKept("it has modules outside of its tree", is_for_good=True)
                    return numbers[id(thing)]
                if not isinstance(thing, torch.Tensor) or is_in_skeleton(thing):
                    return None
                if id(thing) not in index:
                    index[id(thing)] = len(taken)
                    taken.append(thing)
                return index[id(thing)]

        buffer = io.BytesIO()
        try:
            # Not the module objects: whoever attaches constructs them, since constructors do more than set attributes.
            state = [(path, type(module), vars(module)) for path, module in modules.items()]
            Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(state)
        except NotKept:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign class raises while it is pickled
            raise NotKept(f"it cannot be pickled ({one_line(error)})", is_for_good=True) from None
        for tensor in taken:
            _check_tensor(tensor)
        return buffer.getvalue()


def into_shared_memory(taken: Taken, name: str) -> tuple[int, tuple[Block, ...]]:
    """Put a model's tensors into memory that nobody can change any more; they are gone from the model then.

    Returns:
        Descriptor of the memory, and where in it each group is.

    Raises:
        NotKept: There is too little host memory for it.
    """
    import psutil
    import torch

    offsets, size = [], 0
    for first, end in taken.spans:
        offsets.append(size)
        size += -(-(end - first) // _ALIGNMENT) * _ALIGNMENT
    free = psutil.virtual_memory().available
    if free < size + _SPARE_BYTES:
        raise NotKept(f"a copy of {size / 2**30:.1f} GiB would leave less than 1 GiB of host memory")
    memory = os.memfd_create(f"vlmgpu {name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, max(size, 1))
        blocks = []
        with mmap.mmap(memory, max(size, 1)) as view:
            whole = torch.frombuffer(view, dtype=torch.uint8)
            for group, ((first, end), offset) in enumerate(zip(taken.spans, offsets, strict=True)):
                there = whole[offset : offset + end - first]
                there.copy_(taken.storage(group))
                taken.let_go(group)
                blocks.append(Block(end - first, offset, sample=sample(there)))
            del whole, there  # the mapping cannot be closed before
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(memory)
        raise
    return memory, tuple(blocks)


def mapped(memory: int, size_bytes: int, blocks: Sequence[Block]) -> list[Any]:
    """Each block as a tensor of ``uint8``, mapped privately: a write makes a copy of its page.

    Raises:
        OSError, ValueError: It cannot be mapped.
    """
    import torch

    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    view = mmap.mmap(memory, size_bytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return [
        torch.frombuffer(view, dtype=torch.uint8, offset=block.offset, count=block.size_bytes)
        if block.size_bytes
        else torch.empty(0, dtype=torch.uint8)
        for block in blocks
    ]


def filled(model: Any, skeleton: bytes, records: Sequence[TensorRecord], storages: Sequence[Any]) -> None:
    """Make a model that was constructed without weights the one that was taken apart: its state, module by module.

    Args:
        model: Of the same class and config.
        skeleton: Of the model that was taken apart.
        records: Its tensors.
        storages: Where they are now, one a block.

    Raises:
        ValueError: It was made of other modules.
        Exception: Whatever a class raises that cannot be unpickled here.
    """
    made: dict[int, Any] = {}
    modules = dict(model.named_modules())
    numbered = list(modules.values())

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Any:
            if number < 0:
                return numbered[-1 - number]
            if number not in made:
                made[number] = _tensor(records[number], storages[records[number].block])
            return made[number]

    state = Unpickler(io.BytesIO(skeleton)).load()
    there = [(path, kind) for path, kind, _ in state]
    here = [(path, type(module)) for path, module in modules.items()]
    if there != here:
        odd = next((path for path, _ in {*there} ^ {*here}), "")
        raise ValueError(f"it is constructed of other modules here ({odd or 'in another order'})")
    for module, (_, _, attributes) in zip(numbered, state, strict=True):
        vars(module).clear()
        vars(module).update(attributes)


def sample(storage: Any) -> bytes:
    """A few bytes of a block, spread over it."""
    size = storage.numel()
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return bytes(storage.cpu().tolist())
    step = (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
    parts = [storage[start : start + _SAMPLE_BYTES] for start in range(0, step * _SAMPLES, step)]
    import torch

    return bytes(torch.cat(parts).cpu().tolist())


def _record(tensor: Any, block: int, first: int) -> TensorRecord:
    import torch

    return TensorRecord(
        block=block,
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset=tensor.storage_offset() - first // tensor.element_size(),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        is_parameter=isinstance(tensor, torch.nn.Parameter),
        requires_grad=tensor.requires_grad,
        attributes=dict(vars(tensor)),
    )


def _tensor(record: TensorRecord, storage: Any) -> Any:
    import torch

    plain = torch.empty(0, dtype=getattr(torch, record.dtype), device=storage.device)
    offset = storage.storage_offset() // plain.element_size() + record.offset
    plain.set_(storage.untyped_storage(), offset, record.shape, record.stride)
    tensor = torch.nn.Parameter(plain, record.requires_grad) if record.is_parameter else plain
    vars(tensor).update(record.attributes)
    return tensor


def _check_tensor(tensor: Any) -> None:
    import torch

    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter):
        raise NotKept(f"it has tensors of a type of their own ({kind.__module__}.{kind.__qualname__})", is_for_good=True)
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        raise NotKept("some of its weights are not in memory, sparse or quantized", is_for_good=True)
    if tensor.grad_fn is not None or tensor.grad is not None or (tensor.requires_grad and kind is torch.Tensor):
        raise NotKept("it has tensors that are part of a computation of gradients", is_for_good=True)
    plain = (bool, int, float, str, type(None))
    strange = [name for name, value in vars(tensor).items() if not isinstance(value, plain)]
    if strange:
        raise NotKept(f"its tensors have attributes of their own ({strange[0]})", is_for_good=True)


def _refuse_what_only_its_project_knows(model: Any) -> None:
    config = model.config
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise NotKept("it is quantized", is_for_good=True)
    if "/" in str(getattr(config, "_attn_implementation", "")):
        raise NotKept("its attention is a kernel from a hub, which each process has to fetch itself", is_for_good=True)
    for module in model.modules():
        package = type(module).__module__.partition(".")[0]
        if package not in _OWN_CODE:
            raise NotKept(f"it runs code from elsewhere ({package})", is_for_good=True)


def _strip_hooks(model: Any) -> bool:
    """Take accelerate's hooks off, which cannot be pickled; returns whether there were any."""
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return False
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        # What is left is a method of the class, which under the name that a list's has there cannot be found again.
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    for name in _REPLACED:
        vars(model).pop(name, None)
    return True


def _groups(tensors: Sequence[Any]) -> list[list[int]]:
    """Positions of tensors by the storage in which they are."""
    groups: dict[object, list[int]] = {}
    for position, tensor in enumerate(tensors):
        # An empty storage has no address of its own.
        key = tensor.untyped_storage().data_ptr() or f"empty {position}"
        groups.setdefault((str(tensor.device), key), []).append(position)
    return list(groups.values())


def _span(tensors: Sequence[Any]) -> tuple[int, int]:
    """First byte, and the one after the last, of these tensors in their storage; the first is where any type may begin."""
    starts, ends = [], []
    for tensor in tensors:
        size = tensor.element_size()
        last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
        starts.append(tensor.storage_offset() * size)
        ends.append(starts[-1] + (last + 1) * size if tensor.numel() else starts[-1])
    first = min(starts) // _ALIGNMENT * _ALIGNMENT
    return first, max(ends)


def one_line(error: Exception) -> str:
    """Its type and the beginning of what it says."""
    return next(iter(f"{type(error).__name__}: {error}".splitlines()), "")[:200]
