"""Keys of what the plugin keeps in ``config.stash`` and ``item.stash``, and tells workers; there are no other places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .collection.aliases import Alias
    from .collection.reading import Examinations, Examined
    from .concern import Ours
    from .gating.gate import Gate
    from .options import Settings
    from .requirements import GatedTest, VlmSpec, WatchedTest
    from .verdicts import Verdict
    from .watching.watch import Failure, Watch
    from .workers.controller import Controller

SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()
"""Of the config; there when a setting was given."""
ALIASES: pytest.StashKey[dict[str, Alias]] = pytest.StashKey()
"""Of the config; there when the project gives any."""
GATE: pytest.StashKey[Gate] = pytest.StashKey()
"""Of the config; there from the first gated test that is collected."""
CONTROLLER: pytest.StashKey[Controller] = pytest.StashKey()
"""Of the config of pytest-xdist's controller."""
OURS: pytest.StashKey[Ours] = pytest.StashKey()
"""Of the config: which markers concern us."""
ASKED: pytest.StashKey[list[Examined]] = pytest.StashKey()
"""Of the config: what tests ask for, each once a module; there when a test was collected that may be gated or watched."""
READ_MARKS: pytest.StashKey[int] = pytest.StashKey()
"""Of a module or class with tests that were examined: markers of ours that it and what it is in had then."""
EXAMINED: pytest.StashKey[Examinations] = pytest.StashKey()
"""Of the config, until the collection is finished: what was found of each item that was examined."""
RULES: pytest.StashKey[dict[VlmSpec, set[str]]] = pytest.StashKey()
"""Of the config, once the collection is finished: where the fixtures are by which tests place and load each model."""
REQUESTS: pytest.StashKey[Sequence[Examined | None]] = pytest.StashKey()
"""Of the config, once the collection is finished: what each test asks for, in the order in which tests run."""
GATED_TEST: pytest.StashKey[GatedTest] = pytest.StashKey()
"""Of an item that asks for a model or GPUs."""
WATCHED_TEST: pytest.StashKey[WatchedTest] = pytest.StashKey()
"""Of an item that is measured and guarded: it uses a shared model or a fixture or marker about memory."""
WATCH: pytest.StashKey[Watch] = pytest.StashKey()
"""Of the config; there when a watched test was collected."""
FAILURE: pytest.StashKey[Failure] = pytest.StashKey()
"""Of a watched item: what its setup or call raised."""
POSITION: pytest.StashKey[int] = pytest.StashKey()
"""Of such an item: its place in the order in which tests run."""
VERDICT: pytest.StashKey[Verdict] = pytest.StashKey()
"""Of such an item, once it was decided about."""

WORKER_INPUT = "vlmgpu"
"""Key of what a worker of pytest-xdist is told (``config.workerinput``)."""


def gate_of(config: pytest.Config) -> Gate:
    """The state of this run, made when first asked for: a run without gated tests never imports what it needs.

    Raises:
        pytest.UsageError: ``--vlm-machine`` cannot be read.
    """
    if GATE not in config.stash:
        from .gating.gate import Gate
        from .options import Settings, recorded_machine

        settings = config.stash.get(SETTINGS, None) or Settings()
        config.stash[GATE] = Gate(settings, config, recorded_machine(settings))
    return config.stash[GATE]
