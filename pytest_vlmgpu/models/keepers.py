"""Who still refers to a tensor that should be gone: names for people, found by the garbage collector's own records."""

from __future__ import annotations

import gc
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_STEPS = 40
"""How far the chain of references is followed: each module around a tensor is three links (two dictionaries and itself)."""
MAX_OBJECTS = 400
"""Objects looked at for one answer, so that a widely shared one costs no minutes."""


def holder_of(tensor: Any) -> str:
    """The nearest holder with a name, such as ``variable KEPT of module test_ocr``; empty when none is found."""
    seen = {id(tensor)}
    level: list[Any] = [tensor]
    # The frames of this search refer to everything it looks at.
    for _ in range(MAX_STEPS):
        found: list[Any] = []
        frame = sys._getframe()
        ours = {id(seen), id(level), id(found), id(frame)}
        for thing in gc.get_referrers(*level) if level else ():
            if id(thing) in seen or id(thing) in ours or thing is level or _is_of_search(thing):
                continue
            name = _name(thing, seen)
            if name:
                return name
            seen.add(id(thing))
            found.append(thing)
            if len(seen) > MAX_OBJECTS:
                return ""
        level = found
    return ""


def holders(tensors: Sequence[Any]) -> str:
    """Different holders of several tensors, at most three, joined."""
    names: dict[str, None] = {}
    for tensor in tensors[:3]:
        name = holder_of(tensor)
        if name:
            names[name] = None
    return "; ".join(names)


def _is_of_search(thing: Any) -> bool:
    if isinstance(thing, types.FrameType):
        return thing.f_globals.get("__name__") == __name__
    return False


def _name(thing: Any, held: set[int]) -> str:
    """What people call an object that leads to one of ``held`` (ids); empty for a link of the chain without a name."""
    if isinstance(thing, types.FrameType):
        return _frame(thing, held)
    if isinstance(thing, types.CellType):
        return _closure(thing)
    if isinstance(thing, dict):
        return _module_variable(thing, held)
    if isinstance(thing, types.ModuleType):
        return _module_variable(vars(thing), held)
    if type(thing).__name__ == "FixtureDef":
        return f"the value of fixture {getattr(thing, 'argname', '?')}"
    if isinstance(thing, type):
        name = next((key for key, value in vars(thing).items() if _is_among(value, held)), "")
        return f"attribute {name or '?'} of class {thing.__module__}.{thing.__qualname__}"
    return ""


def _frame(frame: types.FrameType, held: set[int]) -> str:
    names = [name for name, value in frame.f_locals.items() if _is_among(value, held)]
    variable = f"variable {names[0]}" if names else "a value"
    where = f"{frame.f_code.co_name} ({_place(frame)})"
    is_kept = any(isinstance(thing, types.TracebackType) for thing in gc.get_referrers(frame))
    return f"{variable} of {where}{', kept by a traceback' if is_kept else ''}"


def _place(frame: types.FrameType) -> str:
    parts = frame.f_code.co_filename.replace("\\", "/").rsplit("/", 2)
    return f"{'/'.join(parts[-2:])}:{frame.f_lineno}"


def _closure(cell: types.CellType) -> str:
    for thing in gc.get_referrers(cell):
        for function in gc.get_referrers(thing) if isinstance(thing, tuple) else ():
            cells = function.__closure__ if isinstance(function, types.FunctionType) else None
            if cells is not None and cells is thing:
                variable = function.__code__.co_freevars[next(i for i, one in enumerate(cells) if one is cell)]
                return f"closure variable {variable} of function {function.__module__}.{function.__qualname__}"
    return ""


def _module_variable(namespace: dict[Any, Any], held: set[int]) -> str:
    module = namespace.get("__name__") if "__spec__" in namespace else None
    if not isinstance(module, str):
        return ""
    name = next((key for key, value in namespace.items() if _is_among(value, held)), "?")
    return f"variable {name} of module {module}"


def _is_among(value: Any, held: set[int]) -> bool:
    return id(value) in held
