"""What counts as a change of a model, what can be undone, and what is no change at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vlmgpu.watching.fingerprint import SAMPLES, changes, restore, take

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.models


class Config(SimpleNamespace):
    """Nested as those of transformers are."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def small() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8, dtype=torch.float64))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    model.register_buffer("kept", torch.zeros(3))
    model.config = Config(use_cache=True, layers=[1, 2], text=Config(hidden=8), dtype=torch.float32)
    return model.eval()


def tokenizer() -> Any:
    class Words(SimpleNamespace):
        def __len__(self) -> int:
            return int(self.size)

    return SimpleNamespace(
        tokenizer=Words(padding_side="left", size=9), image_processor=SimpleNamespace(do_resize=True, mean=[0.5, 0.5])
    )


def _grad(model: Any, _: Any) -> None:
    model[0](torch.ones(1, 8)).sum().backward()


def _zero(model: Any, _: Any) -> None:
    with torch.no_grad():
        model[0].bias.zero_()


def _data(model: Any, _: Any) -> None:
    model[2].weight.data.mul_(2)


def _step(model: Any, _: Any) -> None:
    _grad(model, _)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _replace(model: Any, _: Any) -> None:
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())


CHANGES: list[tuple[Callable[[Any, Any], Any], str, bool]] = [
    (lambda model, _: model.train(), "training mode of 4 modules (the model itself, 0, …)", True),
    (lambda model, _: model[1].train(), "training mode of 1 module (1)", True),
    (lambda model, _: model.requires_grad_(False), "requires_grad=False: 6 tensors (0.weight, 0.bias, …)", True),
    (_grad, "gradients left on: 2 tensors (0.weight, 0.bias)", True),
    (lambda model, _: model[0].register_forward_hook(lambda *_: None), "hooks of 1 module (0)", True),
    (lambda model, _: setattr(model.config, "use_cache", False), "config.use_cache = False, was True", True),
    (lambda model, _: setattr(model.config.text, "hidden", 9), "config.text.hidden = 9, was 8", True),
    (lambda model, _: setattr(model.config, "added", 1), "config.added = 1, was not set", True),
    (lambda model, _: model.config.layers.append(3), "config.layers = [1, 2, 3], was [1, 2]", False),
    (lambda _, words: setattr(words.tokenizer, "padding_side", "right"), "tokenizer.padding_side = 'right', was", True),
    (lambda _, words: setattr(words.image_processor, "do_resize", False), "image_processor.do_resize = False", True),
    (lambda _, words: setattr(words.tokenizer, "size", 10), "vocabulary = 10, was 9", False),
    (_zero, "values: 1 tensor (0.bias)", False),
    (_data, "values: 1 tensor (2.weight)", False),
    (_step, "values: ", False),
    (lambda model, _: model.kept.add_(1), "values: 1 tensor (kept)", False),
    (_replace, "replaced by another tensor: 1 tensor (0.weight)", False),
    (lambda model, _: model[0].half(), "dtype torch.float16 (was torch.float32): 2 tensors (0.weight, 0.bias)", False),
    (lambda model, _: model.append(torch.nn.Linear(2, 2)), "modules added or removed (3)", False),
    (lambda model, _: model[0].register_parameter("bias", None), "tensors added or removed: 1 tensor (0.bias)", False),
]


@pytest.mark.parametrize(("change", "text", "is_restorable"), CHANGES, ids=[text for _, text, _ in CHANGES])
def test_each_change_is_told_and_undone_where_that_is_possible(
    change: Callable[[Any, Any], Any], text: str, is_restorable: bool
) -> None:
    model, words = small(), tokenizer()
    before = take(model, words)
    assert before is not None

    change(model, words)
    after = take(model, words)
    assert after is not None
    found = changes(before, after)

    assert text in "; ".join(found.texts)
    assert found.is_restorable == is_restorable
    if is_restorable:
        restore(model, words, before)
        again = take(model, words)
        assert again is not None
        assert changes(before, again).texts == ()


def _nothing(model: Any) -> None:
    with torch.inference_mode():
        model[0](torch.ones(2, 8))


def _undone(model: Any) -> None:
    state = copy.deepcopy(model.state_dict())
    _zero(model, None)
    model.load_state_dict(state)
    model.train().eval()
    model[0].register_forward_hook(lambda *_: None).remove()


@pytest.mark.parametrize(
    "use", [_nothing, _undone, lambda model: model.scratch.add_(1), lambda model: setattr(model, "rope_deltas", 3)]
)
def test_use_is_no_change(use: Callable[[Any], Any]) -> None:
    model = small()
    before = take(model)
    use(model)
    after = take(model)

    assert before is not None
    assert after is not None
    assert changes(before, after).texts == ()


def test_nan_equals_nan() -> None:
    model = small()
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    before, after = take(model), take(model)

    assert before == after


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]),
    is_transposed=st.booleans(),
)
def test_whatever_replaces_all_values_of_a_tensor_is_found(
    rows: int, columns: int, dtype: Any, is_transposed: bool
) -> None:
    data = torch.zeros(rows, columns, dtype=dtype)
    model = torch.nn.Module()
    model.register_buffer("kept", data.t() if is_transposed else data)
    before = take(model)
    model.kept.fill_(1)
    after = take(model)

    assert before is not None
    assert after is not None
    assert len(before.samples["kept"]) == min(SAMPLES, rows * columns) * data.element_size()
    assert changes(before, after).texts == ("values: 1 tensor (kept)",)


def test_it_keeps_no_tensor_alive() -> None:
    import gc
    import weakref

    model = small()
    reference = weakref.ref(model[0].weight)
    found = take(model)
    del model
    gc.collect()

    assert reference() is None
    assert found is not None


@pytest.mark.parametrize("thing", [None, "model", SimpleNamespace(parameters=list)])
def test_what_is_no_module_is_not_looked_at(thing: object) -> None:
    assert take(thing) is None


def test_tensors_that_cannot_be_sampled_are_compared_by_the_rest() -> None:
    model = torch.nn.Module()
    model.register_buffer("meta", torch.zeros(3, device="meta"))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("spread", torch.zeros(1).expand(5))
    found = take(model)

    assert found is not None
    assert set(found.tensors) == {"meta", "empty", "spread"}
    assert set(found.samples) <= {"spread"}
