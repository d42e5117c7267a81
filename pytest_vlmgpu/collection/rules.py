"""Tests of one model that see different fixtures of the ladder, by the conftest of a folder, say: each sort loads it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..state import ASKED, RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from ..requirements import VlmSpec
    from .ordering import Requests
    from .reading import Examined

_DECIDING = ("vlm_workload", "vlm_policy", "vlm_planner", "vlm_loader")
"""Fixtures that decide how a model is placed and loaded."""


def told_apart(session: pytest.Session, items: Sequence[Any], requests: Requests) -> list[Examined | None]:
    """What each test asks for; a model for which tests see different fixtures is another one for each sort of them."""
    seen: dict[int, str] = {}
    """Identity of a collector to the places of the fixtures that its tests see."""
    rules_of: dict[VlmSpec, set[str]] = {}
    for item, examined in zip(items, requests, strict=True):
        if examined is None or examined.gated is None or not examined.gated.specs:
            continue
        key = id(item.parent)
        if key not in seen:
            seen[key] = _places(session, item)
        for spec in examined.gated.specs:
            rules_of.setdefault(spec, set()).add(seen[key])
    session.config.stash[RULES] = rules_of
    apart = {spec for spec, rules in rules_of.items() if len(rules) > 1}
    if not apart:
        return list(requests)
    known: dict[tuple[int, str], Examined] = {}
    told: list[Examined | None] = []
    for item, examined in zip(items, requests, strict=True):
        if examined is None or examined.gated is None or apart.isdisjoint(examined.gated.specs):
            told.append(examined)
            continue
        rules = seen[id(item.parent)]
        if (id(examined), rules) not in known:
            known[id(examined), rules] = _by(examined, apart, rules)
        told.append(known[id(examined), rules])
    session.config.stash[ASKED] = [*session.config.stash[ASKED], *known.values()]
    return told


def _places(session: Any, item: Any) -> str:
    """Where the fixtures are that a test sees; empty where they are the plugin's or those of the outermost conftest."""
    places = []
    for name in _DECIDING:
        definitions = session._fixturemanager.getfixturedefs(name, item)
        places.append(definitions[-1].baseid if definitions else "")
    return ", ".join(dict.fromkeys(place for place in places if place not in ("", ".")))


def as_seen_by(item: Any, spec: VlmSpec) -> VlmSpec:
    """A model that a test chooses at run time: told apart from the one of other tests by which fixtures this one sees."""
    rules, known = _places(item.session, item), item.config.stash.get(RULES, {}).get(spec)
    return spec if known is None or known == {rules} else replace(spec, rules=rules)


def _by(examined: Examined, apart: set[VlmSpec], rules: str) -> Examined:
    """The same with its models told apart from those of the same name."""
    assert examined.gated is not None

    def told(spec: VlmSpec) -> VlmSpec:
        return replace(spec, rules=rules) if spec in apart else spec

    specs = tuple(told(spec) for spec in examined.gated.specs)
    model = None if examined.model is None else told(examined.model)
    given = type(examined.callspec)(**vars(examined.callspec))
    given.params = {"vlm": specs[0] if len(specs) == 1 else specs}
    return examined._replace(gated=replace(examined.gated, specs=specs), model=model, callspec=given)
