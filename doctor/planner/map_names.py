"""Names in a ``device_map``: which tensors a key takes, as each loader sees it, and what an unknown key may have meant.

Three readers of one map, and they differ:

- accelerate's ``dispatch_model`` (both versions) walks the modules by whole components and has the last word on where the
  tensors of a module end up; a key that names a bare parameter means nothing to it.
- transformers 5 loads by ``expand_device_map``: a regular expression of all keys, unescaped and without a border behind
  it, most components first. ``layers.1`` therefore takes ``layers.10`` as well, unless that has a key of its own.
- transformers 4.57 loads by ``re.search`` with the keys escaped, last in the alphabet first
  (``_load_state_dict_into_meta_model``), again without a border: the same trap, although its ``expand_device_map``, which
  only warms the allocator up, knows better.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ..data.families import RENAMES
from ..likeness import nearest

ROOT = ""
"""The key of the whole model."""


def prefixes(name: str) -> Iterator[str]:
    """The name, and every module that holds it, innermost first; the root last."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ROOT


def owner(keys: Collection[str], name: str) -> str | None:
    """The innermost key that covers a name by whole components; ``None`` when no key does."""
    return next((prefix for prefix in prefixes(name) if prefix in keys), None)


def outermost(keys: Collection[str], name: str) -> str | None:
    """The outermost key that covers a name by whole components."""
    found = None
    for prefix in prefixes(name):
        if prefix in keys:
            found = prefix
    return found


def loaded_by(keys: Collection[str], name: str, *, is_old: bool, lengths: Iterable[int] | None = None) -> str | None:
    """The key by which transformers loads a tensor, before accelerate moves what does not belong there.

    Args:
        keys: Of the map.
        name: Of the tensor.
        is_old: True for 4.57, False for 5.x.
        lengths: Of the keys, rising; ``None`` finds them.

    Returns:
        ``None`` when the loader finds no key: 5.x then takes the CPU, 4.57 refuses.
    """
    ends = sorted(set(map(len, keys))) if lengths is None else lengths
    candidates = [name[:end] for end in ends if end <= len(name) and name[:end] in keys]
    if is_old:
        # Of keys that begin the name, the longest is the last in the alphabet.
        return candidates[-1] if candidates else None
    return max(candidates, key=lambda key: (key.count("."), len(key)), default=None)


def trapped(keys: Collection[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Keys that take tensors of other modules while loading, as ``layers.1`` takes ``layers.10``, with those tensors."""
    found: dict[str, list[str]] = {}
    lengths = sorted(set(map(len, keys)))
    for name in names:
        key = loaded_by(keys, name, is_old=False, lengths=lengths)
        if key is not None and key != owner(keys, name):
            found.setdefault(key, []).append(name)
    return found


def renamed(key: str, model_type: str) -> str:
    """A key of an older transformers in its present form; the key itself where the family kept its names."""
    for old, new in RENAMES.get(model_type, ()):
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


class Names:
    """All names of a model: modules, and tensors in them."""

    def __init__(self, tensors: Iterable[str], modules: Iterable[str]) -> None:
        """Take the names of tensors and of modules that hold none."""
        self.tensors = dict.fromkeys(tensors)
        self._children: dict[str, dict[str, None]] = {}
        for name in (*self.tensors, *modules):
            path = name
            while path and path not in (above := self._children.setdefault(path.rpartition(".")[0], {})):
                above[path] = None
                path = path.rpartition(".")[0]
        self._modules = {name for name in self._children if name} | set(modules)

    def is_known(self, key: str) -> bool:
        """True for a module or a tensor."""
        return key in self._modules or key in self.tensors or key == ROOT

    def is_module(self, key: str) -> bool:
        """True for a module; a bare parameter is none."""
        return key in self._modules or key == ROOT

    def children(self, module: str) -> list[str]:
        """Names directly below a module, in the order of the checkpoint."""
        return list(self._children.get(module, ()))

    def proposal(self, key: str, model_type: str) -> tuple[str, str]:
        """What an unknown key may have meant.

        Returns:
            The name meant, or nothing; and why, for the message.
        """
        new = renamed(key, model_type)
        if new != key and self.is_known(new):
            return new, "that is its name in the class of transformers 4.52 and later"
        return self._nearest(key) or self._by_end(key)

    def _nearest(self, key: str) -> tuple[str, str] | None:
        """Follow the components; where one is not there, take the nearest that is."""
        path = ROOT
        guessed = False
        for part in key.split("."):
            below = {name.rpartition(".")[2]: name for name in self.children(path)}
            if part in below:
                path = below[part]
                continue
            if part.isdigit() and any(other.isdigit() for other in below):
                last = max(int(other) for other in below if other.isdigit())
                return "", f"{path} has the numbers 0 to {last}"
            near = nearest(part, below, most=1, cutoff=0.75)
            if not near or guessed:
                return None
            path, guessed = below[near[0]], True
        return (path, "the nearest name") if guessed else None

    def _by_end(self, key: str) -> tuple[str, str]:
        """The only module whose path ends in the key, such as the one that a wrapper class holds."""
        ends = [name for name in self._modules if name.endswith(f".{key}")]
        return (ends[0], "the only module that ends so") if len(ends) == 1 else ("", "")
