from __future__ import annotations

import pytest

from vlm_doctor.machine import Checkpoint

from .asking import Ask, Said, commands

CASES = {
    ("_extract_past_from_model_output",): (
        "calls _extract_past_from_model_output, and transformers 5.23.0 lacks it.",
        "transformers<4.49",
    ),
    ("post_init",): (
        "does not call post_init, and transformers 5.23.0 asks for more.",
        "transformers<5.0",
    ),
    ("from_legacy_cache", "get_usable_length"): (
        "calls get_usable_length of the cache and calls from_legacy_cache, and transformers 5.23.0 has moved on.",
        "transformers<4.54",
    ),
    ("of_a_newer_doctor",): ("calls of_a_newer_doctor, and transformers 5.23.0 lacks it.", None),
}
"""Names of a report to the end of the sentence and to the release to install, where one is known."""


@pytest.mark.parametrize(("calls", "told"), CASES.items())
def test_code_that_the_installed_transformers_cannot_run(
    calls: tuple[str, ...], told: tuple[str, str | None], ask: Ask, said: Said
) -> None:
    outcome = ask("VLM321", "cogvlm-in-the-cache", checkpoints=(Checkpoint(repo="org/model", lost_calls=calls),))

    ((severity, message),) = said(outcome)
    version = message.partition("transformers ")[2].split(" ")[0]
    assert severity == "warning"
    assert message == f"The code of org/model {told[0]}".replace("5.23.0", version)
    environment = "python -m venv older-transformers"
    install = f"older-transformers/bin/python -m pip install '{told[1]}' accelerate torch torchvision pillow"
    assert commands(outcome) == ((environment, install) if told[1] else ())
