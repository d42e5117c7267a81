"""Cut a vision tower into the parts that a ``device_map`` may put on several GPUs. Pure.

By the names of its tensors: one list of repeated blocks, what runs before them and what runs behind. Hooks move the inputs
of a module, not bare parameters, so that a tower whose bare parameters cannot be told to be before or behind stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.families import FamilyRules
from ..model import Unit
from .unit_contents import Named, unit_of

_BEFORE = (
    "embed",
    "patch",
    "pos_",
    "position",
    "rotary",
    "rope",
    "cls",
    "class",
    "pre",
    "conv1",
    "stem",
    "register",
    "mask",
)
"""Parts of the names of what runs before the blocks."""

_BEHIND = ("post", "merg", "head", "neck", "final", "connector", "adapter", "pool", "project", "boi", "eoi", "linear_proj")
"""Parts of the names of what runs behind the blocks; they win, since ``patch_merger`` is behind."""

_FIRST = ("post_conv", "patch_embed", "patch_projection")
"""Beginnings that win over both: GLM-4.1V normalizes the patches, not the features, with ``post_conv_layernorm``."""

_SECOND_LIST_SHARE = 4
"""Two lists of blocks, the smaller with at least this fraction (1 / 4) of the larger, run in an order that names do not
tell. Lists of mergers and of a neck's convolutions are smaller."""


def tower_parts(tower: str, contents: Sequence[Named], rules: FamilyRules) -> tuple[Unit, ...]:
    """Cut a tower.

    Args:
        tower: Key of the vision unit.
        contents: Its tensors.
        rules: Of the family.

    Returns:
        Parts in execution order: without ``layer`` before the blocks, the blocks, without ``layer`` behind them. Nothing
        when the tower cannot be broken, or its names do not tell how.
    """
    blocks = None if rules.is_tower_whole else _main_list(tower, contents)
    if blocks is None:
        return ()
    above = _ancestors(blocks)
    before: dict[str, list[Named]] = {}
    inside: dict[int, list[Named]] = {}
    behind: dict[str, list[Named]] = {}
    for name, tensor in contents:
        number = _number_below(name, blocks)
        if number is not None:
            inside.setdefault(number, []).append((name, tensor))
            continue
        key = _shortest_free(name, above)
        side = _side(key[len(tower) + 1 :], is_bare=key == name)
        if side is None:
            return ()
        (before if side == "before" else behind).setdefault(key, []).append((name, tensor))
    buffers = [key for key in (f"{tower}.{module}" for module in rules.tower_buffers) if _is_free(key, [*before, *behind])]
    return (
        *(unit_of(key, "vision", tensors, rules) for key, tensors in before.items()),
        *(unit_of(key, "vision", [], rules) for key in buffers),
        *(unit_of(f"{blocks}.{number}", "vision", inside[number], rules, layer=number) for number in sorted(inside)),
        *(unit_of(key, "vision", tensors, rules) for key, tensors in behind.items()),
    )


def _main_list(tower: str, contents: Sequence[Named]) -> str | None:
    """The list of blocks, or ``None`` when there is none, or not one alone."""
    sizes: dict[str, int] = {}
    for name, tensor in contents:
        path = name.split(".")
        at = next((index for index, part in enumerate(path) if _is_number(part)), None)
        # A block is a module with modules in it; a numbered linear layer of a merger is none.
        if at is not None and at + 2 < len(path) and name.startswith(f"{tower}."):
            blocks = ".".join(path[:at])
            sizes[blocks] = sizes.get(blocks, 0) + tensor.stored_bytes
    # A list whose name tells its side (Qwen3-VL's mergers) may be as large as it likes.
    lists = [blocks for blocks in sizes if _side(blocks, is_bare=True) is None]
    if not lists:
        return None
    main = max(lists, key=lambda blocks: sizes[blocks])
    others = max((sizes[blocks] for blocks in lists if blocks != main), default=0)
    return None if main == tower or others * _SECOND_LIST_SHARE >= sizes[main] else main


def _is_number(part: str) -> bool:
    """True for the number of a list's item (up to six digits, so that it is one)."""
    return len(part) <= 6 and part.isascii() and part.isdigit()


def _number_below(name: str, blocks: str) -> int | None:
    """Number of the block that a tensor belongs to."""
    if not name.startswith(f"{blocks}."):
        return None
    number = name[len(blocks) + 1 :].partition(".")[0]
    return int(number) if _is_number(number) and number == str(int(number)) else None


def _ancestors(key: str) -> set[str]:
    """The key and all its dotted prefixes."""
    found = {key}
    while key := key.rpartition(".")[0]:
        found.add(key)
    return found


def _shortest_free(name: str, above: set[str]) -> str:
    """The shortest dotted prefix that is no parent of the blocks."""
    path = name.split(".")
    prefixes = (".".join(path[: count + 1]) for count in range(len(path)))
    return next((prefix for prefix in prefixes if prefix not in above), name)


def _side(below: str, *, is_bare: bool) -> str | None:
    """Whether a module runs ``before`` or ``behind`` the blocks; ``None`` for a bare parameter of an unknown name.

    A module of an unknown name counts as behind: hooks move what it is given, so that at worst there is a needless hop.
    """
    name = below.rpartition(".")[2]
    if name.startswith(_FIRST):
        return "before"
    if any(word in name for word in _BEHIND):
        return "behind"
    if any(word in name for word in _BEFORE):
        return "before"
    return None if is_bare else "behind"


def _is_free(key: str, taken: Sequence[str]) -> bool:
    """True unless the key is one of the others, holds one or lies in one."""
    return not any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in taken)
