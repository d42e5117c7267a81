"""Quantized weights that a machine's cards or packages cannot use as stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ..machine import Machine
from ..model import ModelProfile, Unit
from .release import is_before_5, release_of


class _Demand(NamedTuple):
    """What a method's kernels demand."""

    capability: tuple[int, int]
    packages: tuple[str, ...] = ()
    is_refused_before_5: bool = False


_DEMANDS: Mapping[str, _Demand] = {
    "fp8": _Demand((8, 9), is_refused_before_5=True),
    "mxfp4": _Demand((7, 5), ("triton", "kernels")),
}
"""By ``quant_method``. Source: ``validate_environment`` of quantizer_finegrained_fp8.py and quantizer_mxfp4.py,
transformers 5.23 (unpacks both to bfloat16) and 4.57.6 (raises for FP8)."""

_QUANTIZED = frozenset({"FP8", "MXFP4"})


def unpacked(profile: ModelProfile, machine: Machine) -> ModelProfile:
    """The profile with weights unpacked where transformers cannot use them as stored."""
    demand = _DEMANDS.get(profile.quantization or "")
    if demand is None or not any(_QUANTIZED & unit.parameters.keys() for unit in profile.units):
        return profile
    lacking = _lacking(demand, machine)
    if not lacking:
        return profile
    what = f"{profile.quantization} weights need {lacking}"
    if demand.is_refused_before_5 and is_before_5(release_of(machine)):
        note = f"{what}: transformers 4 refuses to load this checkpoint, 5 unpacks it to bfloat16, as counted here."
    else:
        note = f"{what}: transformers unpacks them to bfloat16, as counted here."
    units = tuple(_unpacked(unit) for unit in profile.units)
    return msgspec.structs.replace(profile, units=units, notes=(*profile.notes, note))


def _lacking(demand: _Demand, machine: Machine) -> str:
    """What the machine lacks, in words; nothing when it lacks nothing that is known."""
    known = [gpu.compute_capability for gpu in machine.gpus if gpu.compute_capability is not None]
    if known and min(known) < demand.capability:
        (wanted, least), (major, minor) = demand.capability, min(known)
        return f"GPUs of compute capability {wanted}.{least}, and one here has {major}.{minor}"
    libraries = machine.libraries
    if libraries is None or not libraries.packages:
        return ""
    absent = [name for name in demand.packages if libraries.version(name) is None]
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(demand.packages)}, and {' and '.join(absent)} {verb} not installed" if absent else ""


def _unpacked(unit: Unit) -> Unit:
    parameters = dict(unit.parameters)
    dense = sum(parameters.pop(word, 0) for word in _QUANTIZED)
    if dense:
        parameters["BF16"] = parameters.get("BF16", 0) + dense
    parts = tuple(_unpacked(part) for part in unit.parts)
    # Scales go with the weights; what else is kept (integers) is a few bytes.
    return msgspec.structs.replace(unit, parameters=parameters, kept_bytes=0 if dense else unit.kept_bytes, parts=parts)
