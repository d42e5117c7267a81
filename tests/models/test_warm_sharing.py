"""A model that was taken apart and put together again is the model that was loaded, and nobody can change what is kept."""

from __future__ import annotations

import inspect
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.models

from pytest_vlmgpu.models.loading import load  # noqa: E402
from pytest_vlmgpu.models.source import find_source  # noqa: E402
from pytest_vlmgpu.testing import TINY_FAMILIES, tiny_image  # noqa: E402
from pytest_vlmgpu.warm import cuda_sharing  # noqa: E402
from pytest_vlmgpu.warm.attaching import _constructed  # noqa: E402
from pytest_vlmgpu.warm.facts import NotKept  # noqa: E402
from pytest_vlmgpu.warm.records import Block, CudaBlock  # noqa: E402
from pytest_vlmgpu.warm.sharing import Taken, filled, into_shared_memory, mapped, sample  # noqa: E402
from pytest_vlmgpu.watching import fingerprint  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Kept:
    """A model in shared memory."""

    def __init__(self, folder: Path) -> None:
        self.source = find_source(str(folder))
        self.taken = Taken(load(str(folder), None).model)
        self.records = self.taken.records()
        self.memory, self.blocks = into_shared_memory(self.taken, "test")
        self.size = os.fstat(self.memory).st_size

    def attach(self) -> Any:
        storages = mapped(self.memory, self.size, self.blocks)
        assert [sample(storage) for storage in storages] == [block.sample for block in self.blocks]
        model = _constructed(transformers, self.source)
        filled(model, self.taken.skeleton, self.records, storages)
        return model


@pytest.fixture
def keep(tiny_vlms: Mapping[str, Path]) -> Iterator[Callable[[str], Kept]]:
    made: list[Kept] = []

    def make(family: str) -> Kept:
        made.append(Kept(tiny_vlms[family]))
        return made[-1]

    yield make
    for kept in made:
        os.close(kept.memory)


def put_together(model: Any, folder: Path) -> Any:
    """A model that was taken apart, on its way through shared memory."""
    taken = Taken(model)
    records = taken.records()
    memory, blocks = into_shared_memory(taken, "test")
    storages = mapped(memory, os.fstat(memory).st_size, blocks)
    other = _constructed(transformers, find_source(str(folder)))
    filled(other, taken.skeleton, records, storages)
    os.close(memory)
    return other


def without_addresses(looks: fingerprint.Fingerprint | None) -> fingerprint.Fingerprint:
    assert looks is not None
    looks.tensors = {name: state._replace(address=0) for name, state in looks.tensors.items()}
    return looks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_an_attached_model_is_the_loaded_one(
    family: str, tiny_vlms: Mapping[str, Path], keep: Callable[[str], Kept]
) -> None:
    loaded = load(str(tiny_vlms[family]), None)

    model = keep(family).attach()

    theirs, ours = (without_addresses(fingerprint.take(each)) for each in (loaded.model, model))
    assert fingerprint.changes(theirs, ours).texts == ()
    assert {name: value.tolist() for name, value in loaded.model.named_buffers()} == {
        name: value.tolist() for name, value in model.named_buffers()
    }
    for path, module in loaded.model.named_modules():
        assert set(vars(module)) == set(vars(model.get_submodule(path))), path
    answers = []
    for each in (loaded.model, model):
        loaded.model = each
        answers.append(loaded.generate(tiny_image(), "What is this?", max_new_tokens=6))
    assert answers[0] == answers[1]


def test_hooks_come_off_modules_of_every_kind(tiny_vlms: Mapping[str, Path]) -> None:
    """Lists of layers have a forward of another name, under which nobody finds it again."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = load(str(tiny_vlms["llava"]), None).model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    assert lists
    for module in (model, *lists):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    other = put_together(model, tiny_vlms["llava"])

    assert not any("forward" in vars(module) for module in (*model.modules(), *other.modules()))
    with torch.no_grad():
        assert other(input_ids=ids).logits.tolist() == expected.tolist()


def test_tied_weights_stay_one_parameter(tiny_vlms: Mapping[str, Path]) -> None:
    model = load(str(tiny_vlms["llava"]), None).model
    model.get_output_embeddings().weight = model.get_input_embeddings().weight

    other = put_together(model, tiny_vlms["llava"])

    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert len(list(other.parameters())) == len(list(model.parameters()))


def test_what_a_run_writes_is_its_own(keep: Callable[[str], Kept]) -> None:
    kept = keep("llava")
    one, other = kept.attach(), kept.attach()
    before = fingerprint.take(other)
    assert before is not None

    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    sum(parameter.float().sum() for parameter in one.parameters()).backward()
    optimizer.step()
    with torch.no_grad():
        next(one.parameters()).zero_()

    after = fingerprint.take(other)
    assert after is not None
    assert fingerprint.changes(before, after).texts == ()
    assert without_addresses(fingerprint.take(kept.attach())).samples == before.samples


def test_the_memory_is_sealed(keep: Callable[[str], Kept]) -> None:
    kept = keep("llava")

    with pytest.raises(PermissionError):
        mmap.mmap(kept.memory, kept.size)
    with pytest.raises(PermissionError):
        os.pwrite(kept.memory, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(kept.memory, 0)


def test_views_of_one_memory_stay_views_of_one(tiny_vlms: Mapping[str, Path]) -> None:
    model = load(str(tiny_vlms["llava"]), None).model
    whole = torch.arange(64, dtype=torch.float32)
    model.register_buffer("odd", whole[3:40:2])
    model.register_buffer("even", whole[4:40:2])
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    model.register_buffer("nothing", torch.empty(0, 3))

    other = put_together(model, tiny_vlms["llava"])

    assert other.odd.tolist() == [float(value) for value in range(3, 40, 2)]
    assert other.even.tolist() == [float(value) for value in range(4, 40, 2)]
    assert other.odd.untyped_storage().data_ptr() == other.even.untyped_storage().data_ptr()
    assert other.turned.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert other.nothing.shape == (0, 3)


def test_on_gpus_what_nothing_has_moved_there_keeps_its_values(tiny_vlms: Mapping[str, Path]) -> None:
    model = load(str(tiny_vlms["llava"]), None).model
    model.frequencies = torch.arange(4.0)
    model.large = torch.zeros(2**18 + 1)

    taken = Taken(model, is_on_gpus=True)

    records = taken.records()
    assert len(records) == len(list(model.parameters())) + len(list(model.buffers())) + 1
    memory, blocks = into_shared_memory(taken, "test")
    storages = mapped(memory, os.fstat(memory).st_size, blocks)
    other = _constructed(transformers, find_source(str(tiny_vlms["llava"])))
    filled(other, taken.skeleton, records, storages)
    os.close(memory)
    assert other.frequencies.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert other.large.shape == (2**18 + 1,)


def spoil_with_code(model: Any) -> None:
    class Mine(torch.nn.Module):  # type: ignore[name-defined, misc]
        pass

    model.mine = Mine()


def spoil_with_closure(model: Any) -> None:
    model.note = lambda: model


def spoil_with_type(model: Any) -> None:
    class Special(torch.Tensor):  # type: ignore[name-defined, misc]
        pass

    model.special = torch.zeros(3).as_subclass(Special)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_with_code, "it runs code from elsewhere"),
        (spoil_with_closure, "it cannot be pickled"),
        (spoil_with_type, "it has tensors of a type of their own"),
        (lambda model: model.__dict__.update(hidden=[torch.nn.Linear(1, 1)]), "it has modules outside of its tree"),
        (lambda model: setattr(model.config, "quantization_config", {"bits": 4}), "it is quantized"),
        (lambda model: setattr(model, "loss", next(model.parameters()).sum()), "part of a computation of gradients"),
        (lambda model: setattr(model, "off", torch.empty(3, device="meta")), "not in memory"),
    ],
)
def test_what_cannot_be_kept_whole_is_not_kept(
    spoil: Callable[[Any], None], reason: str, tiny_vlms: Mapping[str, Path]
) -> None:
    model = load(str(tiny_vlms["llava"]), None).model
    spoil(model)

    with pytest.raises(NotKept, match=reason) as caught:
        Taken(model)

    assert caught.value.is_for_good


def test_a_model_that_is_constructed_otherwise_is_refused(
    tiny_vlms: Mapping[str, Path], keep: Callable[[str], Kept]
) -> None:
    kept = keep("llava")
    model = _constructed(transformers, kept.source)
    model.added = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="constructed of other modules here"):
        filled(model, kept.taken.skeleton, kept.records, mapped(kept.memory, kept.size, kept.blocks))


def test_torch_takes_the_arguments_that_are_told_for_gpus() -> None:
    """What :func:`pytest_vlmgpu.warm.cuda_sharing.exported` counts on, in the order of torch's own function."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    assert list(inspect.signature(rebuild_cuda_tensor).parameters) == [
        *("tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype", "storage_device"),
        *("storage_handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad"),
        *("ref_counter_handle", "ref_counter_offset", "event_handle", "event_sync_required"),
    ]


def test_a_block_without_bytes_needs_no_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda ordinal: None)
    nothing = torch.empty(0, dtype=torch.uint8)

    (block,) = cuda_sharing.exported([nothing], {nothing.device.index: "GPU-1"})

    assert block == Block(0, cuda=CudaBlock("GPU-1"))


def test_files_of_counters_go_with_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sharing, "_COUNTERS", tmp_path)
    own, other = f"torch_{os.getpid()}_1_0", f"torch_{os.getpid()}0_1_0"
    for name in (own, other):
        (tmp_path / name).touch()

    cuda_sharing.remove_counters([f"/{own}".encode(), f"/{other}".encode(), b"/../x", b""])

    assert [path.name for path in tmp_path.iterdir()] == [other]


@pytest.mark.parametrize("size", [0, 5, 8, 4096, 2**19 + 24, 2**19 * 3, 2**26 + 2**19 + 5])
def test_a_checksum_sees_every_byte_and_its_place(size: int) -> None:
    storage = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    before = cuda_sharing.checksum(storage)
    assert cuda_sharing.checksum(storage.clone()) == before

    for position in {0, size // 3, size - 1} if size else ():
        changed = storage.clone()
        changed[position] ^= 1
        assert cuda_sharing.checksum(changed) != before
    if size > 8:
        assert cuda_sharing.checksum(storage.roll(8)) != before
        assert cuda_sharing.checksum(storage.flip(0)) != before
