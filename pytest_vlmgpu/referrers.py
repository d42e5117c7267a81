"""Who still refers to a model that was unloaded, in words: so that what keeps memory can be found and let go."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_DEPTH = 6
"""Steps from a weight to a name: parameter, dictionary of parameters, module, list of a test, module variable, and one."""
_BREADTH = 2000
"""Objects that are looked at in all: naming a holder must not take longer than loading did."""
_SHOWN = 3


class Watch:
    """Remembers the parts of a model without keeping them alive.

    Args:
        model: A ``torch.nn.Module``, or anything else: then only itself is watched.
    """

    def __init__(self, model: Any) -> None:
        self._parts: list[weakref.ref[Any]] = []
        parameters = getattr(model, "parameters", None)
        for part in (model, *(parameters() if callable(parameters) else ())):
            with suppress(TypeError):  # not everything can be watched
                self._parts.append(weakref.ref(part))

    def holders(self) -> list[str]:
        """Names of what keeps parts alive, most telling first; empty when all are gone."""
        alive = [part for ref in self._parts if (part := ref()) is not None]
        return holders_of(alive) if alive else []


def holders_of(objects: list[Any]) -> list[str]:
    """Follow references backwards until something with a name is met.

    Args:
        objects: Of which one holder each is looked for. The caller's own list does not count.
    """
    ignored = {id(objects), id(sys._getframe()), id(sys._getframe(1))}
    seen = {id(part) for part in objects}
    names: dict[str, None] = {}
    edge = list(objects[:_SHOWN])
    for _ in range(_DEPTH):
        found: list[Any] = []
        ignored.update((id(edge), id(found)))
        for target in edge:
            for referrer in gc.get_referrers(target):
                if id(referrer) in ignored or id(referrer) in seen or len(seen) > _BREADTH:
                    continue
                seen.add(id(referrer))
                name = _name(referrer, target)
                if name is None:
                    found.append(referrer)
                elif name:
                    names[name] = None
        if names or not found:
            break
        edge = found
    return list(names)[:_SHOWN] or [f"an object of {kind}" for kind in _kinds(edge)]


def _name(referrer: Any, target: Any) -> str | None:
    """What a referrer is called; empty for one of this file's own, ``None`` for one that has no name itself."""
    if isinstance(referrer, types.GeneratorType):  # a fixture that yields, say: its frame refers to the value
        referrer = referrer.gi_frame
    if isinstance(referrer, types.FrameType):
        code = referrer.f_code
        if code.co_filename == __file__:
            return ""
        variable = next((name for name, value in referrer.f_locals.items() if value is target), "a value")
        return f"{variable} in {code.co_name} ({code.co_filename.rpartition('/')[2]}:{referrer.f_lineno})"
    if isinstance(referrer, dict) and "__name__" in referrer and "__builtins__" in referrer:
        variable = next((name for name, value in referrer.items() if value is target), "a variable")
        return f"{referrer['__name__']}.{variable}"
    if isinstance(referrer, types.ModuleType):
        return f"module {referrer.__name__}"
    if isinstance(referrer, type):
        return f"class {referrer.__module__}.{referrer.__qualname__}"
    return None


def _kinds(objects: Iterable[Any]) -> list[str]:
    kinds = (f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in objects)
    return list(dict.fromkeys(kinds))[:_SHOWN]
