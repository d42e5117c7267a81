"""Markers of a project that stand for ours: the ini setting ``vlm_marker_aliases``, one a line.

::

    gpu                  = vlm_requires
    multi_gpu            = vlm_requires(gpus=2)
    large_gpu(min_gb=24) = vlm_requires(vram_gib=f"{min_gb}GB")
    distributed(num_gpus) = vlm_requires(gpus=num_gpus)

Left of ``=`` is the project's marker with the arguments it takes, right of it one of ours. An argument of theirs stands
where its name is written. The texts are parsed, never run.
"""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ..declare import ALIASES
from ..verdicts import WRONG

if TYPE_CHECKING:
    from collections.abc import Mapping

_ADVICE = "write one such as multi_gpu = vlm_requires(gpus=2)"


class _AliasError(Exception):
    """Why a line is no alias."""


class Alias(NamedTuple):
    """One marker of the project."""

    name: str
    signature: inspect.Signature
    """Of the project's marker."""
    target: str
    """``vlm`` or ``vlm_requires``."""
    args: tuple[ast.expr, ...]
    kwargs: dict[str, ast.expr]

    def expand(self, mark: pytest.Mark) -> pytest.Mark:
        """The marker of ours that a mark of theirs stands for.

        Raises:
            TypeError: The mark's arguments are not those of the alias.
        """
        bound = self.signature.bind(*mark.args, **mark.kwargs)
        bound.apply_defaults()
        args = tuple(_value(node, bound.arguments) for node in self.args)
        kwargs = {name: _value(node, bound.arguments) for name, node in self.kwargs.items()}
        expanded: pytest.Mark = getattr(pytest.mark, self.target).with_args(*args, **kwargs).mark
        return expanded


def read_aliases(config: pytest.Config) -> dict[str, Alias]:
    """Name to alias, of the lines in the ini file.

    Raises:
        pytest.UsageError: A line cannot be understood.
    """
    found: dict[str, Alias] = {}
    for line in config.getini(ALIASES):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        alias = parse(line)
        if alias.name in found:
            raise pytest.UsageError(f"{WRONG}: {ALIASES}: {alias.name!r} is defined twice.")
        found[alias.name] = alias
    return found


def parse(line: str) -> Alias:
    """Read one line.

    Raises:
        pytest.UsageError: It cannot be understood; the message names it.
    """
    try:
        left, right = _split(line)
        name, signature = _their_side(left)
        return Alias(name, signature, *_our_side(right, signature))
    except (_AliasError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        # Others than ours speak of Python.
        why = f"{error}; " if isinstance(error, _AliasError) else ""
        raise pytest.UsageError(f"{WRONG}: {ALIASES}: {line.strip()[:200]!r} is no alias: {why}{_ADVICE}.") from None


def _split(line: str) -> tuple[ast.expr, ast.expr]:
    """Both sides of the ``=`` that is outside of brackets."""
    depth = 0
    for position, letter in enumerate(line):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "=" and depth == 0:
            sides = [line[:position].strip(), line[position + 1 :].strip()]
            left, right = (ast.parse(side, mode="eval").body for side in sides)
            return left, right
    raise _AliasError("it has no =")


def _their_side(node: ast.expr) -> tuple[str, inspect.Signature]:
    name, args, kwargs = _call(node)
    if name in ("vlm", "vlm_requires"):
        raise _AliasError(f"{name} is a marker of the plugin's own")
    parameters = []
    for arg in args:
        if not isinstance(arg, ast.Name):
            raise _AliasError("the arguments of a marker are names, with or without a default")
        parameters.append(inspect.Parameter(arg.id, inspect.Parameter.POSITIONAL_OR_KEYWORD))
    for keyword, default in kwargs.items():
        value = _value(default, {})
        parameters.append(inspect.Parameter(keyword, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return name, inspect.Signature(parameters)


def _our_side(node: ast.expr, signature: inspect.Signature) -> tuple[str, tuple[ast.expr, ...], dict[str, ast.expr]]:
    target, args, kwargs = _call(node)
    if target not in ("vlm", "vlm_requires"):
        raise _AliasError(f"{target} is no marker of the plugin, which has vlm and vlm_requires")
    # Only to find out now whether each value can be made: any will do for the arguments.
    stand_ins = dict.fromkeys(signature.parameters, "")
    for value in (*args, *kwargs.values()):
        _value(value, stand_ins)
    return target, tuple(args), kwargs


def _call(node: ast.expr) -> tuple[str, list[ast.expr], dict[str, ast.expr]]:
    """Name and arguments of ``name`` or ``name(…)``."""
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise _AliasError("a marker is a name, with or without arguments")
    if any(isinstance(arg, ast.Starred) for arg in node.args) or any(keyword.arg is None for keyword in node.keywords):
        raise _AliasError("stars are not understood")
    return node.func.id, node.args, {str(keyword.arg): keyword.value for keyword in node.keywords}


def _value(node: ast.expr, arguments: Mapping[str, Any]) -> Any:
    """What an expression says: an argument's name, a text with names in it (f"{gb}GB"), or a plain value."""
    if isinstance(node, ast.Name):
        if node.id not in arguments:
            raise _AliasError(f"{node.id!r} is no argument of the marker on the left")
        return arguments[node.id]
    if isinstance(node, ast.JoinedStr):
        return "".join(str(_value(part, arguments)) for part in node.values)
    if isinstance(node, ast.FormattedValue) and node.format_spec is None:
        return _value(node.value, arguments)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _AliasError("a value is a number, a text or the name of an argument on the left") from None
