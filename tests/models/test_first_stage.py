"""Inputs go to the first stage of a plan, whichever number its GPU has in the process: on GPUs that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")]

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from accelerate import dispatch_model  # noqa: E402

from pytest_vlmgpu.models.first_stage import send_inputs_to_first  # noqa: E402
from pytest_vlmgpu.warm.attaching import _dispatch  # noqa: E402
from pytest_vlmgpu.warm.sharing import _strip_hooks  # noqa: E402

from .fake_devices import FakeDevices, place_of  # noqa: E402


class Masking(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Uses a mask of its inputs beside its embedding, as Gemma 3n, GIT and others do; and has a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.newline = torch.nn.Parameter(torch.ones(4))
        self.embed = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8)

    def forward(self, ids: Any) -> Any:
        return self.head(torch.where((ids > 2)[..., None], self.embed(ids), self.newline))


def placed(device_map: Mapping[str, int | str]) -> Any:
    model = Masking()
    for name, module in (("embed", model.embed), ("head", model.head)):
        module.to(torch.device("cuda", int(device_map[name])))
    dispatch_model(model, dict(device_map), force_hooks=True)
    return model


def answer(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([[1, 5]]))


def test_a_first_stage_of_another_number_than_the_lowest_gets_the_inputs() -> None:
    device_map = {"newline": 1, "embed": 1, "head": 0}
    with FakeDevices():
        model = placed(device_map)
        with pytest.raises(RuntimeError, match="same device"):
            answer(model)

        send_inputs_to_first(model, device_map)

        assert answer(model).shape == (1, 2, 8)
        assert [str(place_of(tensor)) for tensor in (model.newline, model.embed.weight, model.head.weight)] == [
            "cuda:1", "cuda:1", "cuda:0"
        ]  # fmt: skip


@pytest.mark.parametrize("device_map", [{"newline": 0, "embed": 0, "head": 1}, "auto", {}, {"": "cpu"}])
def test_where_accelerate_is_right_or_no_map_is_given_nothing_changes(device_map: Any) -> None:
    with FakeDevices():
        model = placed({"newline": 0, "embed": 0, "head": 1})
        hook = model._hf_hook

        send_inputs_to_first(model, device_map)

        assert model._hf_hook is hook


def test_a_model_without_hooks_is_left_alone() -> None:
    model = Masking()

    send_inputs_to_first(model, {"": 0})

    assert not hasattr(model, "_hf_hook")


def test_a_warm_model_is_attached_with_the_same_hooks() -> None:
    device_map: dict[str, int | str] = {"newline": 1, "embed": 1, "head": 0}
    with FakeDevices():
        model = placed(device_map)
        send_inputs_to_first(model, device_map)
        _strip_hooks(model)

        _dispatch(model, device_map)

        assert model._hf_hook.execution_device == 1
        assert answer(model).shape == (1, 2, 8)


def test_what_is_offloaded_is_computed_on_the_first_stage() -> None:
    device_map: dict[str, int | str] = {"newline": 1, "embed": 1, "head": "cpu"}
    with FakeDevices():
        model = Masking()
        model.embed.to(torch.device("cuda", 1))
        dispatch_model(model, {**device_map, "other": 0}, main_device=0, force_hooks=True)

        send_inputs_to_first(model, device_map)

        assert model.head._hf_hook.execution_device == 1
