"""The only part that touches the world: devices, processes, files, environment, clock. Gives a :class:`Machine`.

Drivers and torch are asked in child processes, at once, while this process reads files. One source that fails leaves a
gap, never an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collection import Collection, collect
    from .named_machine import load_machine

__all__ = ["Collection", "collect", "load_machine"]


def __getattr__(name: str) -> Any:
    # Late, so that importing one source (model files, say) does not import all.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "load_machine":
        from .named_machine import load_machine

        return load_machine
    from . import collection

    return getattr(collection, name)
