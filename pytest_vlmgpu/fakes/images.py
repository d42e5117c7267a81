"""Value of the fixture ``vlm_images``: pictures and frames made on the spot, without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..testing import tiny_image

if TYPE_CHECKING:
    from PIL.Image import Image


class TestImages:
    """Pictures by number: the same number and size give the same pixels in every run."""

    __test__ = False
    """Not a class of tests, whatever its name says to pytest."""

    def __getitem__(self, number: int) -> Image:
        """The picture of that number, 64 x 48 pixels."""
        if number < 0:
            raise IndexError(f"pictures are numbered from 0 on; got {number}.")
        return tiny_image(seed=number)

    def picture(self, width: int = 64, height: int = 48, *, seed: int = 0) -> Image:
        """A picture of colored rectangles of any size, in pixels."""
        return tiny_image(width, height, seed=seed)

    def frames(self, count: int = 8, *, width: int = 64, height: int = 48, seed: int = 0) -> list[Image]:
        """Frames of a short video: one picture that moves 4 pixels to the right each time, wrapped around."""
        from PIL import ImageChops

        first = tiny_image(width, height, seed=seed)
        return [ImageChops.offset(first, 4 * number, 0) for number in range(count)]
