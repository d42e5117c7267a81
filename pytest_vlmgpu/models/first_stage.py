"""Where accelerate sends the inputs of a model that is on several GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def send_inputs_to_first(model: Any, device_map: Mapping[str, int | str] | str) -> None:
    """Have accelerate bring the inputs to the first GPU of a plan's map, where it has chosen another.

    ``dispatch_model`` takes the lowest number of a map for the device of the inputs, and computes there what is offloaded;
    the first stage may be on another GPU. Many a class makes masks of its inputs and uses them beside its embedding.

    Args:
        model: Loaded by the map.
        device_map: Module path to CUDA ordinal or ``cpu``, in execution order; anything else is left alone.
    """
    outermost = getattr(model, "_hf_hook", None)
    places = device_map.values() if isinstance(device_map, Mapping) else ()
    first = next((device for device in places if isinstance(device, int)), None)
    if outermost is None or first is None or first == outermost.execution_device:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and getattr(hook, "offload", False):
            hook.execution_device = first
    skip = getattr(model, "_skip_keys_device_placement", None)
    add_hook_to_module(model, AlignDevicesHook(first, io_same_device=True, skip_keys=skip))
