"""Where a map really puts a model, and where accelerate's hooks make each module run.

Read in ``dispatch_model`` and ``attach_align_device_hook_on_blocks`` of accelerate 1.15: modules are visited from the
outside in. A module with a key takes all its tensors along and gets a hook that sends its inputs to its device; modules in
it get a hook of the same device, unless they have one already. A key further in moves its tensors again and replaces the
hook of its own module, but not those of the modules below. A key of a bare parameter is never visited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

from .map_devices import OFF_GPU, main_device
from .map_names import outermost, owner, prefixes
from .map_pieces import Anatomy

Device = int | str


class Layout:
    """A model as a map lays it out."""

    def __init__(self, anatomy: Anatomy, device_map: Mapping[str, Device], main: Device | None = None) -> None:
        """Take a map with devices in one spelling; the inputs go to ``main``, or else to the first of its numbers."""
        self.anatomy = anatomy
        self.device_map = device_map
        self.main = main_device(device_map.values()) if main is None else main
        self.dispatches = len(set(device_map.values())) > 1 or "disk" in device_map.values()
        self.module_keys = {key for key in device_map if anatomy.names.is_module(key)}

    @cached_property
    def device_of(self) -> dict[str, Device]:
        """Device of every tensor, and of every unit without tensors, that the map covers."""
        names = (name for tensors in self.anatomy.tensors_of.values() for name in tensors)
        found = {name: self.device_for(name) for name in names}
        return {name: device for name, device in found.items() if device is not None}

    @cached_property
    def missing(self) -> list[str]:
        """Tensors, and units without tensors, that the map does not cover."""
        return [name for names in self.anatomy.tensors_of.values() for name in names if name not in self.device_of]

    def device_for(self, name: str) -> Device | None:
        """Where the map puts a tensor, or a module without any; ``None`` where no key covers it."""
        key = owner(self.module_keys, name) if self.dispatches else None
        if key is None:
            key = owner(self.device_map, name)
        if key is None and name in self.anatomy.units:
            # A module whose tensors are another's, so that the checkpoint does not tell what is in it.
            key = next((inner for inner in self.device_map if inner.startswith(f"{name}.")), None)
        return None if key is None else self.device_map[key]

    def runs(self, device: Device) -> Device | None:
        """Where what lies on a device is computed; ``None`` for text that is no device."""
        if device in OFF_GPU:
            return self.main
        return device if isinstance(device, int) else None

    def runs_on(self, key: str) -> set[Device]:
        """Devices on which the tensors below a key are used."""
        names = self.anatomy.tensors_under(key)
        found = (self.runs(self.device_of[name]) for name in names if name in self.device_of)
        return {device for device in found if device is not None}

    def is_hooked(self, module: str) -> bool:
        """True when something moves the inputs of a module to its device."""
        return self.dispatches and any(prefix in self.module_keys for prefix in prefixes(module))

    def hook_device(self, module: str) -> Device | None:
        """Where its hook sends the inputs of a module; ``None`` without a hook."""
        if not self.is_hooked(module):
            return None
        key = module if module in self.module_keys else outermost(self.module_keys, module)
        return None if key is None else self.runs(self.device_map[key])

    def main_share(self, names: Iterable[str]) -> Device | None:
        """The device that holds most of some tensors; the first of equals in the order of the names."""
        share: Counter[Device] = Counter()
        for name in names:
            if name in self.device_of:
                share[self.device_of[name]] += max(1, self.anatomy.elements.get(name, 0))
        return share.most_common(1)[0][0] if share else None

    @cached_property
    def unit_device(self) -> dict[str, Device]:
        """The device that holds most of each unit."""
        found = {unit: self.main_share(names) for unit, names in self.anatomy.tensors_of.items()}
        return {unit: device for unit, device in found.items() if device is not None}

    def role_device(self, *roles: str) -> Device | None:
        """Where the first unit of a role runs."""
        for unit in self.anatomy.profile.units:
            if unit.role in roles and unit.key in self.unit_device:
                return self.runs(self.unit_device[unit.key])
        return None
