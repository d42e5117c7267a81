"""What the NVML child said, as records."""

from __future__ import annotations

from typing import Any

import msgspec

from ..machine import Driver, Gap, Gpu, Link
from . import links
from .child import Outcome


class NvmlAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of the program in :mod:`.nvml`."""

    driver: dict[str, Any] = {}
    """Fields of :class:`~vlm_doctor.machine.Driver` that NVML knows."""
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[links.Pair, ...] = ()
    gaps: tuple[Gap, ...] = ()


class NvmlView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that NVML told."""

    driver: Driver
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    gaps: tuple[Gap, ...] = ()


def understand(outcome: Outcome) -> NvmlView:
    """Turn the outcome of the NVML child into records; whatever a crash or a hang cut off becomes a gap."""
    try:
        answer = msgspec.convert(outcome.answer, NvmlAnswer)
        driver = msgspec.convert(answer.driver, Driver)
    except msgspec.ValidationError as error:
        return NvmlView(driver=Driver(nvml_state="crashed", nvml_message=f"unreadable answer: {error}"))
    gaps = answer.gaps
    if outcome.state != "ok":
        message = f"{outcome.message}, after {outcome.stage}" if outcome.stage and outcome.answer else outcome.message
        state = "timed_out" if outcome.state == "timed_out" else "crashed"
        driver = msgspec.structs.replace(driver, nvml_state=state, nvml_message=message)
        gaps = (*gaps, *(Gap(path=part, reason=f"NVML child: {message}") for part in ("gpus", "links")))
    return NvmlView(driver=driver, gpus=answer.gpus, links=links.join(answer.gpus, answer.pairs, gaps), gaps=gaps)
