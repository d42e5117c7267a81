"""Judge a ``device_map`` before anything loads: does it load, run and fit; and if not, what is the smallest repair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from ..device_map import DeviceUse, MapCheck
from ..errors import MapError
from ..findings import SEVERITIES, Finding
from ..machine import Machine
from ..model import ModelProfile
from ..placement import Plan
from ..workload import Policy, Workload
from .installed import as_loaded
from .map_blocks import about_blocks
from .map_devices import normal
from .map_joins import about_joins
from .map_keys import about_keys
from .map_layout import Device, Layout
from .map_machine import about_devices, about_links
from .map_memory import about_memory, device_uses
from .map_pieces import Anatomy
from .map_question import Question, finding
from .map_repair import amended, changes_between, in_numbers_of, keys_of, moved_pieces, rebalanced
from .planning import plan
from .validate import validate_policy, validate_workload

MAX_KEYS = 20_000
"""A map with one key a tensor of the largest published mixture of experts stays below it."""
_WORTH_A_MAP = frozenset({"VLM610", "VLM612", "VLM613", "VLM614", "VLM615", "VLM618"})
"""Codes whose warnings are answered with a corrected map as well."""
_DEFAULT_WORKLOAD = Workload()
_DEFAULT_POLICY = Policy()


class Judged(msgspec.Struct, frozen=True):
    """A map, looked at once."""

    layout: Layout
    findings: tuple[Finding, ...]
    uses: tuple[DeviceUse, ...]

    @property
    def has_errors(self) -> bool:
        """True when it would not load, run or fit."""
        return any(found.severity == "error" for found in self.findings)

    @property
    def wants_repair(self) -> bool:
        """True when a corrected map is worth printing."""
        return self.has_errors or any(f.code in _WORTH_A_MAP and f.severity == "warning" for f in self.findings)


def check_map(
    device_map: Mapping[str, int | str],
    profile: ModelProfile,
    machine: Machine,
    workload: Workload = _DEFAULT_WORKLOAD,
    policy: Policy = _DEFAULT_POLICY,
) -> MapCheck:
    """Judge a ``device_map`` for a model on a machine.

    Args:
        device_map: Module path to a number, ``"cuda:N"``, ``"cpu"`` or ``"disk"``, as ``from_pretrained`` takes it.
        profile: The model, from its config and headers.
        machine: Live, recorded or synthetic.
        workload: One call of the model, at its largest.
        policy: Its headroom counts; ``gpus`` are the GPUs that the numbers of the map stand for, in this order. ``None``
            takes those that CUDA shows a process of this machine.

    Returns:
        Findings, worst first; what is on each device; and where something is wrong a corrected map. A map without errors
        loads, runs and fits.

    Raises:
        MapError: The map is empty, or has too many keys.
        UsageError: Workload or policy make no sense, alone or for this model and machine.
        ModelFileError: The profile has no layers, or ties units that it does not have.
    """
    return check_placed(device_map, profile, machine, workload, policy)


def check_placed(
    device_map: Mapping[str, int | str],
    profile: ModelProfile,
    machine: Machine,
    workload: Workload,
    policy: Policy,
    *,
    main: Device | None = None,
) -> MapCheck:
    """:func:`check_map` of a model that may be loaded: ``main`` is then where its outermost hook takes what it is given."""
    if not 0 < len(device_map) <= MAX_KEYS:
        raise MapError(f"The map has {len(device_map):,} keys; give one with 1 to {MAX_KEYS:,}.")
    profile = as_loaded(profile, machine)
    validate_workload(workload, profile)
    validate_policy(policy, machine)
    question = Question.of(profile, machine, workload, policy)
    anatomy = Anatomy(profile, workload)
    judged = judge(question, anatomy, device_map, main)
    # A corrected map is for the process that the map was for.
    best = plan(profile, machine, workload, msgspec.structs.replace(policy, keeps_numbers=True))
    corrected, changes = _correct(question, judged, best) if judged.wants_repair else (None, ())
    extra = () if judged.has_errors else tuple(_fewer_gpus(question, judged, best))
    return MapCheck(
        model=profile.name,
        machine=machine.description,
        workload=workload,
        device_map=normal(device_map),
        gpus=question.gpus,
        findings=_worst_first((*judged.findings, *extra)),
        devices=judged.uses,
        corrected=corrected,
        changes=changes,
        best=best,
        notes=profile.notes,
    )


def judge(question: Question, anatomy: Anatomy, device_map: Mapping[str, int | str], main: Device | None = None) -> Judged:
    """All findings about one map; ``main`` as for :class:`Layout`."""
    layout = Layout(anatomy, normal(device_map), main)
    uses = device_uses(question, layout)
    found = (
        *about_keys(question, layout),
        *about_devices(question, layout, device_map),
        *about_blocks(question, layout),
        *about_joins(question, layout),
        *about_memory(question, uses),
        *about_links(question, layout, uses),
    )
    return Judged(layout, found, uses)


def _worst_first(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda found: (SEVERITIES.index(found.severity), found.code)))


def _correct(question: Question, judged: Judged, best: Plan) -> tuple[dict[str, Device] | None, tuple[str, ...]]:
    """The map with the smallest change that is free of errors, or the planner's own; and what is different."""
    anatomy = judged.layout.anatomy
    renamed, renames = amended(question, judged.layout)
    layout = Layout(anatomy, renamed)
    place = moved_pieces(question, layout)
    corrected = keys_of(anatomy, place)
    again = judge(question, anatomy, corrected)
    if again.has_errors:
        spread = rebalanced(question, again.layout, place)
        if spread is not None:
            place, corrected = spread, keys_of(anatomy, spread)
            again = judge(question, anatomy, corrected)
    if not again.has_errors:
        changes = (*renames, *changes_between(layout, place))
        return corrected, changes or ("Every device stays: units have one key each, and devices are numbers.",)
    planned = in_numbers_of(question, best)
    if planned is None:
        return None, ("No map would do for this workload on these GPUs; 'vlm-doctor plan' says what is missing.",)
    return planned, ("No small change repairs the map: this is the planner's own.",)


def _fewer_gpus(question: Question, judged: Judged, best: Plan) -> Iterator[Finding]:
    """VLM625: a model on fewer GPUs answers faster, since stages run one after the other."""
    used = [use.gpu for use in judged.uses if use.gpu is not None]
    if best.fits and len(best.stages) < len(used):
        count = "one GPU is" if len(best.stages) == 1 else f"{len(best.stages)} GPUs are"
        yield finding(
            question,
            "VLM625",
            "info",
            f"The map spreads the model over {len(used)} GPUs, and {count} enough for this workload.",
            cause="GPUs of one model work one after the other: more of them never answer one prompt faster.",
            fix="Take the planner's map, unless the others' room is wanted for longer prompts.",
        )
