"""What the files of a checkpoint say of its images, read by whoever needs a number. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .model_shapes import Fields

MAX_NUMBER = 2**31
_EDGES = ("height", "longest_edge", "shortest_edge", "max_height")


class ImageFiles(NamedTuple):
    """Of one checkpoint; what is missing is empty."""

    config: Mapping[str, Any]
    """config.json"""
    vision: Fields | None = None
    """``vision_config``"""
    images: Mapping[str, Any] = {}
    """preprocessor_config.json, or the part of processor_config.json about images."""
    prompts: Mapping[str, Any] = {}
    """The rest of processor_config.json."""

    def tower(self, key: str) -> Any:
        """A value of ``vision_config``."""
        return None if self.vision is None else self.vision.raw(key)

    def counted(self, keys: Iterable[str]) -> int | None:
        """The first number under one of these names: what counts tokens goes before what cuts images, and the model."""
        return first_number(place.get(key) for place in (self.prompts, self.images, self.config) for key in keys)

    def cut(self, keys: Iterable[str]) -> int | None:
        """The first number under one of these names of what cuts images."""
        return first_number(self.images.get(key) for key in keys)

    def edge(self, *names: str) -> int | None:
        """The first of these edges of ``size``."""
        size = self.images.get("size")
        return first_number(size.get(name) for name in names) if isinstance(size, dict) else None

    def word(self, key: str) -> Any:
        """Whatever stands under this name, by the same order as :meth:`counted`."""
        found = (place.get(key) for place in (self.prompts, self.images, self.config))
        return next((value for value in found if value is not None), None)


def processor_settings(
    images: Mapping[str, Any] | None, processor: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """What a checkpoint says of its image processor, and of the processor around it.

    Args:
        images: preprocessor_config.json, if there is one.
        processor: processor_config.json, which transformers 5 writes in its place, with a part for each modality.
    """
    outer = processor or {}
    found = images if images is not None else processor
    for settings in (images or {}, outer):
        nested = settings.get("image_processor")
        if isinstance(nested, dict):
            found = nested if images is None or settings is images else images
            break
    return found, {key: value for key, value in outer.items() if not isinstance(value, dict)}


def first_number(values: Iterable[Any]) -> int | None:
    """The first positive integer of them."""
    return next((number for value in values if (number := number_of(value)) is not None), None)


def number_of(value: Any) -> int | None:
    """A positive integer: the value itself, the first of a list, or the edge that a mapping names."""
    if isinstance(value, dict):
        value = next((edge for key in _EDGES if (edge := value.get(key))), None)
    if isinstance(value, list) and value:
        value = value[0]
    return value if type(value) is int and 0 < value < MAX_NUMBER else None


__all__ = ["MAX_NUMBER", "ImageFiles", "first_number", "number_of", "processor_settings"]
