"""Borrow a model from its warm host, and put it together as a load would have left it."""

from __future__ import annotations

import importlib
import os
import select
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from ..watching import meter
from . import wire
from .records import Lent, Progress, Refused, Reply

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from vlm_doctor.placement import Plan

    from ..models.loaded import LoadedVlm
    from ..models.source import Source
    from .places import Place
    from .records import Attach

SILENCE_S = 60.0
"""A host that says nothing for so long hangs: while it loads it tells its progress, and all else takes seconds."""


class NotAttached(Exception):  # noqa: N818 - no error: the model is loaded instead
    """There is no model to attach to.

    Args:
        reason: Why: the end of a sentence.
        is_ending: The host that had it ends now.
        is_silent: The host is there, and answers nobody: another one cannot be started.
    """

    def __init__(self, reason: str, *, is_ending: bool = False, is_silent: bool = False) -> None:
        super().__init__(reason)
        self.is_ending = is_ending
        self.is_silent = is_silent


class Loan:
    """A model that was borrowed: given back when it is closed, or when this process ends.

    Args:
        connection: To the host.
        lent: What it sent.
        memory: Descriptor of the shared memory; ``None`` on GPUs.
        log: Of the host.
    """

    def __init__(self, connection: socket.socket, lent: Lent, memory: int | None, log: Path) -> None:
        self._connection = connection
        self.lent = lent
        self.memory = memory
        self.log = log
        self._is_closed = False
        self._counted: dict[int, int] = {}

    @property
    def is_on_gpus(self) -> bool:
        """True where the memory is the host's, and goes with it."""
        return self.memory is None

    @property
    def is_alive(self) -> bool:
        """False once the host has ended, unless the model was given back before."""
        if self._is_closed:
            return True
        # Not select(), which takes no descriptor above 1023.
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return not poll.poll(0)

    def count(self, storages: Iterable[Any]) -> None:
        """Have the memory of a model on GPUs counted among that of this process, where torch's allocator does not."""
        for storage in storages:
            if storage.is_cuda:
                ordinal = storage.device.index
                self._counted[ordinal] = self._counted.get(ordinal, 0) + storage.numel()
        for ordinal, size in self._counted.items():
            meter.ATTACHED[ordinal] = meter.ATTACHED.get(ordinal, 0) + size

    def close(self) -> None:
        """Give the model back; nothing may refer to it any more."""
        for ordinal, size in self._counted.items():
            meter.ATTACHED[ordinal] -= size
        self._counted.clear()
        self._connection.close()
        if self.memory is not None and not self._is_closed:
            os.close(self.memory)
        self._is_closed = True


def borrow(place: Place, request: Attach, told: Callable[[Progress], None], while_waiting: Callable[[], None]) -> Loan:
    """Ask the host of a model for it, and wait while it is still loading.

    Args:
        place: Of the host.
        request: What is wanted.
        told: Called with the progress of a load.
        while_waiting: Called once the host is asked: what has to be done anyway.

    Raises:
        NotAttached: It has none, or does not give it.
    """
    try:
        connection = wire.connect(place.socket, SILENCE_S)
    except wire.WireError as error:
        raise NotAttached(str(error)) from None
    if connection is None:
        raise NotAttached("its warm host was killed" if place.socket.exists() else "there was no warm model")
    descriptors: list[int] = []
    try:
        pid = wire.peer_of(connection).pid
        wire.send(connection, request)
        while_waiting()
        while True:
            reply, descriptors = wire.receive(connection, Reply)
            if not isinstance(reply, Progress):
                break
            told(reply)
        if isinstance(reply, Refused):
            raise NotAttached(reply.reason, is_ending=reply.is_ending)
        on_gpus = isinstance(reply, Lent) and any(block.cuda is not None for block in reply.blocks)
        if not isinstance(reply, Lent) or (not on_gpus and len(descriptors) != 1):
            raise NotAttached("its warm host gave an answer that is none")
        return Loan(connection, reply, None if on_gpus else descriptors[0], place.log)
    except (OSError, wire.WireError, NotAttached) as error:
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, NotAttached):
            raise
        if isinstance(error, TimeoutError):
            why = f"its warm host has said nothing for {SILENCE_S:.0f} s; end it with kill -9 {pid}"
            raise NotAttached(why, is_silent=True) from None
        raise NotAttached(f"its warm host has ended ({error})") from None
    except BaseException:
        connection.close()
        raise


def assembled(
    loan: Loan,
    name: str,
    source: Source,
    plan: Plan | None,
    *,
    ordinals: Mapping[str, int] | None,
    started: float,
) -> LoadedVlm:
    """The borrowed model as :func:`pytest_vlmgpu.models.loading.load` returns one.

    Args:
        loan: Of the host.
        name: Of the model, as the test names it.
        source: Where it was loaded from.
        plan: ``None`` on the CPU.
        ordinals: GPU UUID to CUDA ordinal, used where torch names no UUIDs.
        started: When attaching began (``time.perf_counter``).

    Raises:
        NotAttached: What came is not what the host has.
        LoadFailure: It is not where it was planned, or has no processor.
    """
    import transformers

    from ..models.failures import LoadFailure
    from ..models.loaded import LoadedVlm
    from ..models.loading import check_devices, torch_ordinals
    from ..models.placing import Orders, device_map_for, ordinals_in
    from ..models.processors import load_processor
    from .sharing import filled, mapped, one_line, sample

    lent, orders = loan.lent, Orders()
    try:
        if plan is None:
            assert loan.memory is not None
            storages = mapped(loan.memory, lent.shared_bytes, lent.blocks)
        else:
            from .cuda_sharing import imported

            known = torch_ordinals(ordinals)
            orders = Orders(device_map_for(plan, known))
            storages = imported(lent.blocks, known)
        for storage, block in zip(storages, lent.blocks, strict=True):
            if sample(storage) != block.sample:
                raise NotAttached("its weights did not arrive as the warm host has them")
        model = _constructed(transformers, source)
        filled(model, lent.skeleton, lent.tensors, storages)
        if lent.is_dispatched:
            _dispatch(model, orders.device_map)
        elif getattr(model, "hf_device_map", None) is not None:
            # The host may count the same GPU otherwise.
            model.hf_device_map = orders.device_map
    except (NotAttached, LoadFailure):
        raise
    except Exception as error:  # noqa: BLE001 - of classes that are put together, of CUDA, of accelerate
        raise NotAttached(f"its weights did not arrive ({one_line(error)})") from None
    loan.count(storages)
    model.config._name_or_path = model.name_or_path = source.name
    landed = check_devices(name, model, orders)
    processor = load_processor(transformers, source, model.config, trust_remote_code=False)
    first = next(iter(ordinals_in(landed)), None)
    return LoadedVlm(
        name=name,
        model=model,
        processor=processor,
        plan=plan,
        device_map=landed,
        gpus=() if plan is None else plan.stages,
        input_device=f"cuda:{first}" if first is not None else "cpu",
        load_seconds=time.perf_counter() - started,
    )


def _constructed(transformers: Any, source: Source) -> Any:
    """The model without weights, by its own constructors: they register, set and check things that no state has."""
    import torch

    from vlm_doctor.probes.loading import auto_class

    config = transformers.AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=False)
    kind = auto_class(transformers, config)
    if kind is None:
        raise ValueError("its class is unknown here")
    with torch.device("meta"), _without_first_values():
        return kind.from_config(config)


def _without_first_values() -> AbstractContextManager[Any]:
    """The context of transformers in which a model's parameters are given no first values, which cost time."""
    for place in ("transformers.initialization", "transformers.modeling_utils"):
        with suppress(ImportError):
            context = getattr(importlib.import_module(place), "no_init_weights", None)
            if context is not None:
                return context()  # type: ignore[no-any-return]
    return nullcontext()


def _dispatch(model: Any, device_map: Any) -> None:
    """Put accelerate's hooks on, as a load does, and see that they have moved nothing."""
    from accelerate import dispatch_model

    before = {key: tensor.data_ptr() for key, tensor in model.named_parameters()}
    # A load sends the inputs to the first stage when it has ended (models/first_stage.py). Here they go there from the
    # beginning: otherwise what the model has outside of its parts would move to the lowest number, and back.
    first = next((device for device in device_map.values() if isinstance(device, int)), None)
    skip = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, device_map=device_map, main_device=first, skip_keys=skip)
    moved = [key for key, tensor in model.named_parameters() if before[key] != tensor.data_ptr()]
    if moved:
        raise NotAttached(f"putting hooks on it has moved weights ({moved[0]})")


def import_libraries() -> None:
    """Have ready what unpickling a model needs; a broken torch is told by the load that follows."""
    with suppress(ImportError, OSError):
        import torch  # noqa: F401
        import transformers  # noqa: F401
