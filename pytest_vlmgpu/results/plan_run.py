"""``--vlm-plan``: decide about each gated test as its setup would, and say what would run where, with how many loads.

Of a test's fixtures only the gate is set up, and what the gate asks: machine, planner, workload and policy, which a
conftest may override. Nothing else of the project runs, no model is loaded and torch is not imported.
"""

from __future__ import annotations

from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from _pytest.runner import runtestprotocol  # as pytest-xdist and pytest-rerunfailures do: there is no public name

from ..state import GATED_TEST, VERDICT, gate_of
from ..wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

    from ..gating.gate import Gate
    from ..verdicts import Verdict


class Planned(NamedTuple):
    """What would become of one test."""

    nodeid: str
    verdict: Verdict | None
    """``None`` where something else than the gate decides: a skip marker, a hook of the project."""
    model: str
    """Label of the model that it would load; empty for none."""
    plan: Plan | None
    need_bytes: int | None
    reason: str
    """Why it would not run."""
    is_automatic: bool = False
    """True where transformers is to place the model, and the plan only says that it fits."""


def decide(session: pytest.Session) -> Iterator[tuple[pytest.TestReport, Planned]]:
    """Decide about the gated tests of a session in the order in which they would run."""
    gate = gate_of(session.config)
    gated: list[Any] = [item for item in session.items if GATED_TEST in item.stash]
    for item, following in zip_longest(gated, gated[1:]):
        item.fixturenames = ["_vlm_gate"]
        if VERDICT in item.stash:  # of another runner
            del item.stash[VERDICT]
        setup, *_ = runtestprotocol(item, log=False, nextitem=following)
        yield setup, _planned(item, gate, setup)


def lines(planned: Sequence[Planned], others: int, machine: Machine | None = None) -> list[str]:
    """The plan as text: models in the order of their loads, then tests without one, then what would not run.

    Args:
        planned: What would become of each test.
        others: Tests that are no concern of the plugin.
        machine: For which it was planned; how long loads take is known of this one alone.
    """
    from ..models import load_times

    timed = load_times.known(machine) if machine is not None else []
    running = [test for test in planned if _runs(test)]
    loads = [(label, list(tests)) for label, tests in groupby((t for t in running if t.model), key=lambda test: test.model)]
    plain = [test for test in running if not test.model]
    refused = [test for test in planned if not _runs(test)]
    skipped = [test for test in refused if test.verdict is None or test.verdict.action == "skip"]
    head = f"{plural(len(running), 'gated test')} would run, {len(skipped)} would skip, "
    head += f"{plural(len(refused) - len(skipped), 'error')}; {plural(len(loads), 'load')}"
    text = [head]
    for number, (label, tests) in enumerate(loads, start=1):
        plan = tests[0].plan
        takes = load_times.expected(label, plan, timed) if plan is not None else ""
        text.append(f"{number}. load {label} on {_where(tests[0])}{f': {takes}' if takes else ''}")
        text += [f"     {test.nodeid}" for test in tests]
    text += [f"without a load: {test.nodeid} on {_where(test)}" for test in plain]
    for test in refused:
        word = test.verdict.action if test.verdict is not None else "skip"
        text.append(f"{word}: {test.nodeid}: {test.reason}")
    if others:
        text.append(f"{plural(others, 'other test')} not concerned")
    is_here = machine is not None and machine.origin == "live"
    if is_here and not timed and any(tests[0].plan is not None for _, tests in loads):
        text.append("how long loads take is not known yet: none has ended on these GPUs")
    return text


def worker_lines(session: pytest.Session) -> list[str]:
    """Who would run what with pytest-xdist, where that is for the plugin to choose; nothing with one worker."""
    from ..workers.controller import takes_over

    config, gate = session.config, gate_of(session.config)
    workers, machine = len(config.getoption("tx", None) or ()), gate.machine_used
    if workers < 2 or machine is None or not gate.uses_gpus or not takes_over(config):
        return []
    from ..collection.groups import group_tests
    from ..workers import forecast

    needs = group_tests(session.items).needs
    return forecast.lines(needs, machine, gate.settings.gpus, workers, lambda spec, *_: gate.fitting.plans.get(spec))


def _planned(item: pytest.Item, gate: Gate, setup: pytest.TestReport) -> Planned:
    from .recorder import reason_of

    test, verdict = item.stash[GATED_TEST], item.stash.get(VERDICT, None)
    runs = verdict is not None and verdict.action == "run"
    return Planned(
        nodeid=item.nodeid,
        verdict=verdict,
        model=test.specs[0].label if test.loads and test.specs else "",
        plan=gate.plan_of(test) if runs else None,
        need_bytes=gate.need_bytes(test),
        reason="" if runs else reason_of(setup) or "",
        is_automatic=any(spec.is_placed_by_transformers for spec in test.specs),
    )


def _runs(test: Planned) -> bool:
    return test.verdict is not None and test.verdict.action == "run"


def _where(test: Planned) -> str:
    """``GPU 0 (15.0 GiB peak predicted), GPU 1 (…)``."""
    from vlm_doctor.units import format_gib

    if test.plan is not None and test.is_automatic:
        auto = test.plan.auto
        if auto is None or auto.unknown or not auto.shares:
            return "GPUs that transformers chooses"
        shares = [f"GPU {share.gpu} ({format_gib(share.need_bytes)})" for share in auto.shares if share.keys]
        off_bytes = auto.cpu_bytes + auto.disk_bytes
        host = [f"host memory or disk ({format_gib(off_bytes)} OFF THE GPUS)"] if off_bytes else []
        return f"{', '.join(shares + host)}, as {auto.library} would place it"
    if test.plan is not None:
        stages = [f"GPU {stage.gpu} ({format_gib(stage.peak_bytes)} peak predicted)" for stage in test.plan.stages]
        off = test.plan.offloaded
        return ", ".join(stages + ([f"host memory ({format_gib(off.weights_bytes)} OFF THE GPUS)"] if off else []))
    gpus = test.verdict.gpus if test.verdict is not None else ()
    needs = f" ({format_gib(test.need_bytes)} asked for)" if test.need_bytes else ""
    return f"GPU {', '.join(map(str, gpus))}{needs}" if gpus else "the CPU"
