"""The one list of all checks, and :func:`diagnose`, which runs them.

A check is a function of :class:`~vlm_doctor.checks._check.Facts` beside its entry in ``CHECKS`` of its family's file; its
docstring is its page. ``docs/contributing.md`` tells how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from ..findings import Diagnosis, Outcome
from ..machine import Machine
from ..placement import Plan
from . import (
    allocator,
    checkpoints,
    companions,
    condition,
    devices,
    driver,
    driver_access,
    environment,
    host,
    kernel,
    libraries,
    limits,
    links,
    memory,
    model,
    modes,
    nvlink,
    settings,
    suitability,
    torch_build,
    transport,
    visibility,
)
from ._check import NO_GPU_CAUSES, Check, Facts, examine, plain

__all__ = ["CHECKS", "RETIRED", "Check", "Examine", "Facts", "diagnose", "examine", "plain"]

Examine = Callable[[Check, Facts], Outcome]
"""Runs one check, whatever happens: :func:`examine`, or something around it that keeps time."""

_FAMILIES = (
    *(
        driver,
        driver_access,
        devices,
        kernel,
        condition,
        modes,
        visibility,
        environment,
        libraries,
        torch_build,
        settings,
        allocator,
        companions,
        suitability,
    ),
    *(checkpoints, links, nvlink, transport, memory, host, limits, model),
)

CHECKS: tuple[Check, ...] = tuple(
    sorted((check for family in _FAMILIES for check in family.CHECKS), key=lambda check: check.code)
)
"""Every check, in the order of the codes."""

RETIRED: dict[str, str] = {}
"""Codes that are no longer given, to the version that dropped them and why. A code never changes its meaning."""

_BY_CODE = {check.code: check for check in CHECKS}


def diagnose(
    machine: Machine, *, plan: Plan | None = None, ignore: Collection[str] = (), by: Examine = examine
) -> Diagnosis:
    """Run every check on a machine.

    Args:
        machine: Live, recorded or made up.
        plan: The plan that the checks of family 6xx judge; without one they are skipped.
        ignore: Codes, or beginnings of codes such as ``VLM5``, whose findings are demoted to info: never hidden.
        by: Runs each check.

    Returns:
        One outcome for each check, in the order of the codes. Nothing is raised: a check that fails is ``crashed``, and a
        symptom whose cause another check found is ``skipped``.
    """
    facts = Facts.of(machine, plan)
    outcomes: dict[str, Outcome] = {}
    for check in CHECKS:
        _settle(check, facts, outcomes, by)
    return Diagnosis(outcomes=tuple(_demoted(outcomes[check.code], tuple(ignore)) for check in CHECKS))


def _settle(check: Check, facts: Facts, outcomes: dict[str, Outcome], by: Examine) -> Outcome:
    """Run a check after those that may explain it."""
    if check.code in outcomes:
        return outcomes[check.code]
    is_blind = check.needs_gpus and facts.has_hardware and not facts.machine.gpus
    hiding = NO_GPU_CAUSES if is_blind else ()
    for code in (*check.explained_by, *hiding):
        cause = _settle(_BY_CODE[code], facts, outcomes, by)
        if any(finding.severity != "info" for finding in cause.findings):
            sees_it_too = any(finding.severity != "info" for finding in by(check, facts).findings)
            outcome = Outcome(
                code=check.code,
                title=check.title,
                state="skipped",
                reason=f"explained by {code}",
                symptom_of=code if sees_it_too else None,
            )
            break
    else:
        causes = [_settle(_BY_CODE[code], facts, outcomes, by) for code in check.told_by]
        outcome = _without_told(by(check, facts), causes)
    outcomes[check.code] = outcome
    return outcome


def _without_told(outcome: Outcome, causes: Sequence[Outcome]) -> Outcome:
    """Leave out findings about a fact that a finding of a cause rests on, too."""
    for cause in causes:
        told = {path for finding in cause.findings if finding.severity != "info" for path in finding.evidence}
        rest = tuple(finding for finding in outcome.findings if next(iter(finding.evidence), None) not in told)
        if len(rest) == len(outcome.findings):
            continue
        outcome = msgspec.structs.replace(
            outcome,
            state="found" if rest else "skipped",
            reason=None if rest else f"explained by {cause.code}",
            symptom_of=cause.code,
            findings=rest,
        )
    return outcome


def _demoted(outcome: Outcome, ignore: tuple[str, ...]) -> Outcome:
    prefix = next((prefix for prefix in ignore if prefix and outcome.code.startswith(prefix.upper())), None)
    if prefix is None:
        return outcome
    findings = tuple(finding.demoted(f"--ignore {prefix.upper()}") for finding in outcome.findings)
    return msgspec.structs.replace(outcome, findings=findings)
