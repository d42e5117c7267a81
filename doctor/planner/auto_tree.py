"""The module tree that ``device_map="auto"`` walks, with sizes, rebuilt from a profile's order of registration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..model import Registered


class Node:
    """A module, or a bare parameter."""

    __slots__ = ("block", "children", "is_parameter", "item", "largest_leaf_bytes", "name", "own_bytes", "size_bytes")

    def __init__(self, name: str, item: Registered | None = None) -> None:
        self.name = name
        self.item = item
        """What is placed here as a whole; ``None`` where a node can be split into its children."""
        self.block = item.block if item else ""
        self.is_parameter = item.is_parameter if item else False
        self.children: list[Node] = []
        """Bare parameters first, then modules, in the order of registration."""
        self.size_bytes: float = 0
        self.own_bytes: float = 0
        """Of the bare parameters right below it."""
        self.largest_leaf_bytes: float = 0
        """Largest module below that is a leaf or a block; bare parameters inside do not count."""

    def leaves(self) -> Iterator[Node]:
        """Everything that is placed as a whole, in order."""
        if self.item is not None:
            yield self
        for child in self.children:
            yield from child.leaves()

    def nodes(self) -> Iterator[Node]:
        """The node and all below it, in order."""
        yield self
        for child in self.children:
            yield from child.nodes()


def tree(registered: Iterable[Registered], size_of: Callable[[Registered], float]) -> Node:
    """Build the tree.

    Args:
        registered: In the order of registration, so that what belongs to one module stands together.
        size_of: Bytes of an item, as accelerate counts them.

    Returns:
        The root; its name is empty.
    """
    root = Node("")
    for item in registered:
        node, parts = root, item.unit.key.split(".")
        for count in range(1, len(parts)):
            name = ".".join(parts[:count])
            if not node.children or node.children[-1].name != name:
                node.children.append(Node(name))
            node = node.children[-1]
        leaf = Node(item.unit.key, item)
        leaf.size_bytes = size_of(item)
        node.children.append(leaf)
    _sum(root)
    return root


def _sum(node: Node) -> None:
    if node.item is not None:
        node.largest_leaf_bytes = node.size_bytes
        return
    for child in node.children:
        _sum(child)
    node.size_bytes = sum(child.size_bytes for child in node.children)
    node.own_bytes = sum(child.size_bytes for child in node.children if child.is_parameter)
    node.largest_leaf_bytes = max(
        (child.largest_leaf_bytes for child in node.children if not child.is_parameter), default=0
    )


def largest_layer(nodes: Sequence[Node]) -> tuple[float, set[str]]:
    """Size of the largest leaf or block among and below these nodes, and the names of all of that size.

    Source: accelerate, ``get_max_layer_size``; transformers 5 calls the same function.
    """
    size_bytes = max((node.largest_leaf_bytes for node in nodes), default=0)
    names: set[str] = set()

    def collect(node: Node) -> None:
        if node.largest_leaf_bytes != size_bytes:
            return
        if node.item is not None:
            names.add(node.name)
        for child in node.children:
            if not child.is_parameter:
                collect(child)

    for node in nodes:
        collect(node)
    return size_bytes, names


def without_parameters(nodes: Iterable[Node]) -> list[Node]:
    """The modules among them."""
    return [node for node in nodes if not node.is_parameter]


def block_sizes(root: Node) -> dict[str, list[float]]:
    """Sizes of the blocks of each class, in order."""
    sizes: dict[str, list[float]] = {}
    for node in root.leaves():
        if node.block:
            sizes.setdefault(node.block, []).append(node.size_bytes)
    return sizes


def leaf_module_sizes(root: Node) -> list[float]:
    """Sizes of the modules that hold parameters themselves, blocks as a whole."""
    modules = [node for node in root.nodes() if node.name and not node.is_parameter]
    return [node.size_bytes if node.item else node.own_bytes for node in modules if node.item or node.own_bytes]
