"""``--vlm-fleet``: the kinds of runner that a project has, and which tests can run on which.

The file names them; each is a machine as ``--vlm-machine`` takes it, recorded or made up, or ``none`` for one without GPU.
"""

from __future__ import annotations

import importlib
import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ..verdicts import BUSY, NOWHERE, WRONG
from ..wording import first, plural
from .evidence import Broken
from .given_file import read_given

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vlm_doctor.machine import Machine

    from .plan_run import Planned

NONE = "none"
"""A runner without any GPU, as in ``--vlm-gpus``."""
_TABLE = "runners"
_MAX_BYTES = 2**20


class Runner(NamedTuple):
    """One kind of runner."""

    name: str
    machine: Machine


class Fate(NamedTuple):
    """What would become of one test on all of them."""

    nodeid: str
    runners: tuple[str, ...]
    """That can run it."""
    busy: tuple[str, ...]
    """Those of them where others held the memory when they were recorded."""
    refusals: tuple[tuple[str, str], ...]
    """Runner and why it cannot."""
    is_judged: bool
    """False where something else than the gate decides: a skip marker, say."""

    @property
    def is_nowhere(self) -> bool:
        """True when the gate refuses it on every runner."""
        return self.is_judged and not self.runners


def read_fleet(path: Path) -> tuple[Runner, ...]:
    """Read the runners, in the order of the file.

    Raises:
        pytest.UsageError: The file cannot be read, or names something that is no machine.
    """
    from vlm_doctor.errors import VlmDoctorError

    runners = []
    for name, spec in _table(path).items():
        if not name.strip() or not name.isprintable():
            raise _wrong(path, f"{name!a} is no name of a runner")
        if not isinstance(spec, str) or spec == "live":
            raise _wrong(path, f'{name} = {spec!a} is no machine; write a spec such as "2xL4", a recorded file, or "none"')
        try:
            runners.append(Runner(name, _machine(spec, path.parent)))
        except VlmDoctorError as error:
            raise _wrong(path, f"{name}: {str(error).rstrip('.')}") from error
    return tuple(runners)


def _table(path: Path) -> dict[str, Any]:
    try:
        data = read_given(path, _MAX_BYTES + 1)
    except OSError as error:
        raise _wrong(path, f"it cannot be read: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise _wrong(path, "it has more than 1 MiB; that is no list of runners")
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = data.decode("utf-8")
        if kind == "JSON":
            whole = json.loads(text)
        else:
            # Before Python 3.11 the reader is tomli, which pytest brings.
            whole = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"it is not {kind}: {str(error).rstrip('.')}") from error
    table = whole.get(_TABLE) if isinstance(whole, dict) else None
    if not isinstance(table, dict) or not table:
        example = '{"runners": {"l4": "2xL4"}}' if kind == "JSON" else '[runners] and lines such as l4 = "2xL4"'
        raise _wrong(path, f"it names no runners; write {example}")
    return table


def _machine(spec: str, folder: Path) -> Machine:
    from vlm_doctor.machine import Driver, Machine
    from vlm_doctor.sources import load_machine

    from ..gating.slices import unfold

    if spec == NONE:
        return Machine(origin="synthetic", description="no GPU", driver=Driver(nvml_state="no_library"), gpus=())
    is_file = "/" in spec or spec.endswith(".json")
    return unfold(load_machine(str(folder / spec) if is_file else spec))


def _wrong(path: Path, what: str) -> pytest.UsageError:
    return pytest.UsageError(f"{WRONG}: --vlm-fleet: {path}: {what}.")


def fates(plans: Mapping[str, Sequence[Planned]]) -> list[Fate]:
    """Put the plans of all runners together, test by test.

    Args:
        plans: Name of a runner to what would become of each test there; the same tests in the same order.
    """
    return [_fate(dict(zip(plans, tests, strict=True))) for tests in zip(*plans.values(), strict=True)]


def _fate(tests: Mapping[str, Planned]) -> Fate:
    able, busy, refusals, is_judged = [], [], [], False
    nodeid = ""
    for runner, test in tests.items():
        nodeid, verdict = test.nodeid, test.verdict
        is_judged = is_judged or verdict is not None
        is_busy = verdict is not None and verdict.code == BUSY
        if verdict is not None and (verdict.action == "run" or is_busy):
            able.append(runner)
            busy += [runner] if is_busy else []
        else:
            refusals.append((runner, test.reason))
    return Fate(nodeid, tuple(able), tuple(busy), tuple(refusals), is_judged)


def lines(fleet: Sequence[Runner], found: Sequence[Fate], others: int) -> list[str]:
    """The plan as text: the runners, then tests by where they can run, then those that can run nowhere, and why."""
    text = []
    for runner in fleet:
        count = sum(runner.name in fate.runners for fate in found)
        text.append(f"{runner.name} ({runner.machine.description}): {count} of {plural(len(found), 'gated test')} can run")
    able = sorted((fate for fate in found if fate.runners), key=lambda fate: _order(fleet, fate))
    for names, tests in groupby(able, key=lambda fate: fate.runners):
        text.append(f"on {', '.join(names)}{' alone' if len(names) == 1 < len(fleet) else ''}:")
        text += [f"     {fate.nodeid}{_once_free(fate)}" for fate in tests]
    text += [f"nowhere: {fate.nodeid}: {_reasons(fate)}" for fate in found if fate.is_nowhere]
    text += [f"decided elsewhere: {fate.nodeid}: {_reasons(fate)}" for fate in found if not fate.is_judged]
    if others:
        text.append(f"{plural(others, 'other test')} not concerned")
    return text


def unrunnable(found: Sequence[Fate], name: str) -> list[Broken]:
    """The run fails when a test can run on no runner: it would rot in silence."""
    nowhere = [fate.nodeid for fate in found if fate.is_nowhere]
    if not nowhere:
        return []
    count = plural(len(nowhere), "gated test")
    return [Broken(code=NOWHERE, message=f"{count} can run on no runner of {name}: {', '.join(first(nowhere))}.")]


def told(fate: Fate) -> dict[str, Any]:
    """What the report says of a test."""
    why = _reasons(fate) if fate.refusals and not fate.runners else None
    return {"runners": fate.runners, "code": NOWHERE if fate.is_nowhere else None, "reason": why}


def _order(fleet: Sequence[Runner], fate: Fate) -> tuple[int, list[int]]:
    """Tests that run on most runners first."""
    return -len(fate.runners), [number for number, runner in enumerate(fleet) if runner.name in fate.runners]


def _once_free(fate: Fate) -> str:
    return f" (on {', '.join(fate.busy)} once others free its memory)" if fate.busy else ""


def _reasons(fate: Fate) -> str:
    """``l4: VLM702: …; h100: …``, equal reasons once."""
    by_reason: dict[str, list[str]] = {}
    for runner, reason in fate.refusals:
        by_reason.setdefault(reason.rstrip("."), []).append(runner)
    if len(by_reason) == 1:
        return f"{next(iter(by_reason))}."
    return "; ".join(f"{', '.join(runners)}: {reason}" for reason, runners in by_reason.items()) + "."


def on_each(session: pytest.Session, fleet: Sequence[Runner]) -> Iterator[tuple[Runner, list[Planned]]]:
    """Decide about every gated test of a session for each runner.

    Raises:
        pytest.UsageError: A conftest decides by a machine of its own.
    """
    from ..state import GATE, gate_of
    from .plan_run import decide

    own = gate_of(session.config)
    try:
        for runner in fleet:
            session.config.stash[GATE] = gate = own.on(runner.machine)
            planned = [test for _, test in decide(session)]
            if gate.machine_used is not None and gate.machine_used is not runner.machine:
                raise pytest.UsageError(
                    f"{WRONG}: --vlm-fleet: a conftest overrides the fixture vlm_machine, which hides the runners: "
                    "implement the hook pytest_vlmgpu_inventory instead."
                )
            yield runner, planned
    finally:
        session.config.stash[GATE] = own
