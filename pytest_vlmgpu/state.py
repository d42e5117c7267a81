"""Keys of what the plugin keeps in ``config.stash`` and ``item.stash``; there are no other places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .controller import Controller
    from .gate import Gate
    from .options import Settings
    from .requirements import GatedTest
    from .verdicts import Verdict

SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()
"""Of the config; there when a setting was given."""
GATE: pytest.StashKey[Gate] = pytest.StashKey()
"""Of the config; there from the first gated test that is collected."""
CONTROLLER: pytest.StashKey[Controller] = pytest.StashKey()
"""Of the config of pytest-xdist's controller."""
GATED_TEST: pytest.StashKey[GatedTest] = pytest.StashKey()
"""Of an item that asks for a model or GPUs."""
POSITION: pytest.StashKey[int] = pytest.StashKey()
"""Of such an item: its place in the order in which tests run."""
VERDICT: pytest.StashKey[Verdict] = pytest.StashKey()
"""Of such an item, once it was decided about."""


def gate_of(config: pytest.Config) -> Gate:
    """The state of this run, made when first asked for: a run without gated tests never imports what it needs.

    Raises:
        pytest.UsageError: ``--vlm-machine`` cannot be read.
    """
    if GATE not in config.stash:
        from .gate import Gate
        from .options import Settings, recorded_machine

        settings = config.stash.get(SETTINGS, None) or Settings()
        config.stash[GATE] = Gate(settings, config, recorded_machine(settings))
    return config.stash[GATE]
