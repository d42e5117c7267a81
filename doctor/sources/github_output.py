"""Hands results to later steps of a GitHub Actions job."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

from ..errors import UsageError

VARIABLE = "GITHUB_OUTPUT"


def write_outputs(outputs: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Append outputs to the file that ``GITHUB_OUTPUT`` names.

    Each value stands between lines that nobody can guess, so that one of several lines cannot become another output.
    Source: docs.github.com, "Workflow commands", multiline strings.

    Raises:
        UsageError: The variable is not set, or the file cannot be written.
    """
    name = environment.get(VARIABLE)
    if not name:
        raise UsageError(f"--github-output: {VARIABLE} is not set; GitHub Actions sets it in the steps of a job.")
    mark = f"vlm-doctor-{secrets.token_hex(16)}"
    text = "".join(f"{key}<<{mark}\n{value}\n{mark}\n" for key, value in outputs.items())
    try:
        # Not blocking: a pipe that nobody reads would be waited for.
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--github-output: {name} cannot be written: {reason}.") from error
