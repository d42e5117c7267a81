"""The traced tier, put together: what the planner asks, run by the sources; and why not, when it cannot be."""

from __future__ import annotations

import msgspec

from .errors import ModelError
from .machine import Machine
from .model import ModelProfile
from .trace import Traces
from .workload import Workload


class Tracing(msgspec.Struct, frozen=True, kw_only=True):
    """Traces of a model for a plan, or why there are none."""

    traces: Traces | None = None
    reason: str | None = None
    """A phrase; ``None`` when there are traces."""


def trace_model(
    name: str,
    profile: ModelProfile,
    machine: Machine,
    workload: Workload,
    *,
    allow_network: bool = True,
    trust_remote_code: bool = False,
    deadline_s: float | None = None,
) -> Tracing:
    """Trace a model's real code for a plan: in a child process, without GPU, weights and arithmetic.

    Code that a checkpoint brings runs there with all rights of its user, and only where it is trusted.

    Args:
        name: A folder, a catalogue name or a hub id, as ``load_profile`` takes it.
        profile: The same model, read.
        machine: Where it is to run; the kernels of its GPUs matter.
        workload: What it is to do.
        allow_network: May ask the hub for the config.
        trust_remote_code: Allow Python code of the checkpoint to run.
        deadline_s: Seconds after which to give up; ``None`` is the usual ones.

    Raises:
        UsageError: The workload makes no sense.
    """
    from .planner.own_code import why_broken
    from .planner.traced_footprint import obstacle, trace_request
    from .planner.validate import validate_workload
    from .sources.trace import DEADLINE_S, RunError, find_config, trace

    validate_workload(workload, profile)
    reason = obstacle(profile, workload, trust_remote_code=trust_remote_code)
    if reason is not None:
        return Tracing(reason=reason)
    try:
        config, folder = find_config(name, allow_network=allow_network)
        request = trace_request(profile, workload, machine)
        return Tracing(traces=trace(request, config, folder=folder, deadline_s=deadline_s or DEADLINE_S))
    except RunError as error:
        known = why_broken(profile, error.transformers)
        return Tracing(reason=str(error) if known is None else f"{known} ({error})")
    except ModelError as error:
        return Tracing(reason=str(error))
