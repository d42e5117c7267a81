"""A test with a vision-language model: ``pytest examples --vlm-gpus=auto`` runs it.

The model is placed by vlm-doctor's planner, loaded once a session, and shared with every other test that names it.
Where no GPU can hold it, the test is skipped with a code that ``vlm-doctor explain`` explains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_vlmgpu.models.loading import LoadedVlm


@pytest.mark.vlm("zai-org/GLM-4.1V-9B-Thinking")
def test_names_the_color(vlm: LoadedVlm) -> None:
    from PIL import Image

    image = Image.new("RGB", (448, 448), "red")

    answer = vlm.generate(image, "Which color is this picture? Think briefly.", max_new_tokens=256)

    assert "red" in answer.lower()
