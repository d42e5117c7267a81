"""What accelerate and transformers do for ``device_map="auto"``, step by step, on a tree of sizes instead of modules.

Three routes. transformers 4 calls accelerate (``get_balanced_memory``, ``infer_auto_device_map``); transformers 5 has its
own copies in ``integrations/accelerate.py``, with other ties, and from 5.18 on another margin. Read in accelerate 1.15,
transformers 4.57.6, 5.0, 5.8, 5.17, 5.18, 5.20 and 5.23; ``tests/models/test_auto_exact.py`` holds the replay against the
installed ones. Before 5.17 a class whose blocks differ in size counts by its first one; here by its largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from .auto_tree import Node, block_sizes, largest_layer, leaf_module_sizes, without_parameters

Mode = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Device = int | Literal["cpu", "disk"]
Route = Literal["4", "5", "5.18"]
"""The version of transformers since which it is so."""
MARGIN = 1.25
"""On top of an equal share: so many of the largest blocks (or leaves). Source: both ``get_balanced_memory``."""
SINGLE_GPU_SHARE = 0.9
"""Of one GPU's memory that is used when the user set no ``max_memory``. Source: both ``get_balanced_memory``."""
CPU_SHARE = 0.9
"""Of the host's memory that transformers 5 uses. Source: its ``get_max_memory``."""


class AutoError(Exception):
    """The libraries raise here instead of answering."""


class Placed(msgspec.Struct, frozen=True):
    """Where ``auto`` puts everything."""

    devices: dict[str, Device]
    """Every leaf, block and bare parameter, by name, in order of registration."""
    device_map: dict[str, Device]
    """The same with modules whose parts are all on one device as one key, as ``clean_device_map`` leaves it."""


def replay(
    root: Node,
    memory: dict[Device, float],
    ties: Sequence[Sequence[str]],
    *,
    route: Route,
    mode: Mode = "auto",
    cached_bytes: int = 0,
) -> Placed:
    """Place a model as ``from_pretrained(device_map=mode)`` does.

    Args:
        root: The model.
        memory: Free bytes of each device, as the driver tells them; GPUs by ordinal in rising order, then ``cpu``.
        ties: Groups of names of parameters that are one tensor.
        route: Whose code.
        mode: ``auto`` is ``balanced``.
        cached_bytes: On each GPU, what torch holds of it without using it: transformers counts that as free, 5 before it
            shares the model out, 4 afterwards.

    Raises:
        AutoError: The libraries would raise.
    """
    memory = dict(memory)
    if route != "4":
        memory = _with_cached(memory, cached_bytes)
        if "cpu" in memory:
            memory["cpu"] *= CPU_SHARE
    if mode != "sequential":
        memory = balanced_memory(root, memory, route=route, is_low_zero=mode == "balanced_low_0")
    if route == "4":
        memory = _with_cached(memory, cached_bytes)
    chosen = _Walk(root, memory, ties, route).run()
    devices: dict[str, Device] = {}
    for node in root.nodes():
        device = chosen.get(node.name)
        if device is not None:
            devices.update((leaf.name, device) for leaf in node.leaves())
    return Placed(devices, _cleaned(root, devices))


def _with_cached(memory: dict[Device, float], cached_bytes: int) -> dict[Device, float]:
    return {device: size + cached_bytes if isinstance(device, int) else size for device, size in memory.items()}


def balanced_memory(root: Node, memory: dict[Device, float], *, route: Route, is_low_zero: bool) -> dict[Device, float]:
    """Lower what each GPU but the last may take to an equal share with a margin (``get_balanced_memory``)."""
    memory = dict(memory)
    gpus = [device for device in memory if isinstance(device, int) and memory[device] > 0]
    if not gpus:
        return memory
    if len(gpus) == 1:
        is_low_zero = False
        first = next(device for device in memory if isinstance(device, int))
        memory[first] *= SINGLE_GPU_SHARE
    per_gpu = root.size_bytes // (len(gpus) - 1 if is_low_zero else len(gpus)) + _margin(root, route)
    for gpu in sorted(gpus)[:-1]:
        memory[gpu] = min(memory[0] if is_low_zero and gpu == 0 else per_gpu, memory[gpu])
    if is_low_zero:
        others = sum(memory[gpu] for gpu in range(1, len(gpus)))
        memory[0] = min(max(0, root.size_bytes - others), memory[0])
    return memory


def _margin(root: Node, route: Route) -> int:
    """The largest of: 5.18 any block or leaf; 5 any block, or the mean leaf; 4 the first of each class, or that mean."""
    blocks = block_sizes(root)
    leaves = leaf_module_sizes(root)
    largest_block = max((max(sizes) for sizes in blocks.values()), default=0)
    if route == "5.18":
        return int(MARGIN * max(largest_block, max(leaves, default=0)))
    # A name that stands for several classes hides which of them each block is: the largest stands for all.
    first = max((max(sizes) if "|" in name else sizes[0] for name, sizes in blocks.items()), default=0)
    # The mean counts the leaves inside of blocks as well, so that where there are blocks it is below theirs.
    mean = 0 if blocks else int(sum(leaves) / max(len(leaves), 1))
    return int(MARGIN * max(first if route == "4" else largest_block, mean))


class _Walk:
    """One run of ``infer_auto_device_map``."""

    def __init__(self, root: Node, memory: dict[Device, float], ties: Sequence[Sequence[str]], route: Route) -> None:
        self._memory = memory
        self._devices: list[Device] = [*memory, "disk"]
        gpus = [device for device in memory if isinstance(device, int)]
        self._main: set[Device] = {gpus[0], "cpu"} if gpus else {"cpu"}
        self._ties = [sorted(group) for group in ties]
        self._route = route
        self._waiting = list(root.children)
        self._used: dict[Device, float] = dict.fromkeys(self._devices, 0)
        self._current = 0
        self._largest, self._largest_names = largest_layer(self._waiting)
        self._chosen: dict[str, Device] = {}

    def run(self) -> dict[str, Device]:
        """Name of every node that was placed as a whole, to its device."""
        while self._waiting:
            self._treat(self._waiting.pop(0))
        return self._chosen

    def _treat(self, node: Node) -> None:
        """Place a node, split it, or turn to the next device."""
        inside = f"{node.name}."
        self._largest_names = {name for name in self._largest_names if name != node.name and not name.startswith(inside)}
        if not self._largest_names:
            self._find_largest()
        device = self._devices[self._current]
        reserved = self._largest if device in self._main else 0
        room = None if device == "disk" else self._memory[device] - reserved
        tied, size = self._with_ties(node)
        used = self._used[device]
        if room is None or used + size <= room:
            self._place(node, tied, device, size)
            return
        if tied and used + node.size_bytes <= room:
            if self._split_tied(node, tied):
                return
            # accelerate does not part a module that fits on its own; transformers 5 does.
            may_split = self._route != "4" or used + node.size_bytes >= room
        else:
            may_split = True
        if may_split and node.item is None:
            self._waiting[:0] = node.children
            self._find_largest()
            return
        self._used[device] = used + reserved
        self._current += 1
        self._waiting.insert(0, node)

    def _find_largest(self) -> None:
        self._largest, self._largest_names = largest_layer(without_parameters(self._waiting))

    def _place(self, node: Node, tied: list[Node], device: Device, size: float) -> None:
        self._used[device] += size
        self._chosen[node.name] = device
        for other in tied:
            self._waiting = [waiting for waiting in self._waiting if waiting is not other]
            self._chosen[other.name] = device

    def _with_ties(self, node: Node) -> tuple[list[Node], float]:
        """Modules still waiting that hold tensors of this one, and the size of all together.

        A tensor counts where it is registered first, so that its other names add nothing.
        """
        size = node.size_bytes
        found: list[Node] = []
        for name in self._tied_parameters(node):
            module = next((waiting for waiting in self._waiting if name.startswith(f"{waiting.name}.")), None)
            if module is None:
                raise AutoError(f"looks for the module of {name}, which it has placed already (IndexError)")
            if module not in found:
                found.append(module)
                size += module.size_bytes
        return found, size

    def _tied_parameters(self, node: Node) -> list[str]:
        """Parameters outside a node that are tied to one inside."""
        inside = f"{node.name}."
        outside: list[str] = []
        for group in self._ties:
            others = [name for name in group if inside not in f"{name}."]
            if 0 < len(others) < len(group):
                outside += others
        return outside

    def _split_tied(self, node: Node, tied: list[Node]) -> bool:
        """Split the first tied module that can be split, and look at the node again."""
        module = next((module for module in tied if module.item is None), None)
        if module is None:
            return False
        at = self._waiting.index(module)
        self._waiting = [node, *self._waiting[:at], *module.children, *self._waiting[at + 1 :]]
        self._find_largest()
        return True


def _cleaned(root: Node, devices: dict[str, Device]) -> dict[str, Device]:
    """One key for every module whose parts are all on one device."""
    found: dict[str, Device] = {}

    def visit(node: Node) -> None:
        on = {devices[leaf.name] for leaf in node.leaves()}
        if len(on) == 1:
            found[node.name] = on.pop()
            return
        for child in node.children:
            visit(child)

    visit(root)
    return found
