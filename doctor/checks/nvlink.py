"""4xx: NVLink and NVSwitch, are they up?"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.xids import NVLINK_XIDS
from ..findings import Finding, Fix, Severity
from ..health import failure_of_fabric, ills_of_fabric
from ..machine import Gpu
from ._check import Check, Facts, Result, alike, found, labels, names, skipped, unknown
from .kernel import said_by_kernel


def nvlink_inactive(facts: Facts) -> Result:
    """A GPU has fewer active NVLinks than others of its model.

    ## What it checks
    Active NVLinks of each GPU against the most that a GPU of the same model has here.

    ## Why it matters
    A loose bridge or a broken link costs bandwidth, and collectives may fail or hang.

    ## Example
    `warning VLM402 GPU 3 (NVIDIA GeForce RTX 3090) has 2 of 4 NVLinks active.`

    ## What to do
    Look at `nvidia-smi nvlink --status -i 3` and its error counters (`-e`). Bridge: reseat it. NVSwitch: reset the
    GPUs, then have the board looked at.

    ## When it is fine
    A card without a bridge has no active link, and links that no GPU of the model uses are off by design: neither is
    reported.

    ## Sources
    nvmlDeviceGetNvLinkState; NVIDIA Health Validation, nvlink_active.
    """
    working = [gpu for gpu in facts.working if gpu.nvlinks]
    if not working:
        return skipped("no NVLink")
    has_switch = any(port.remote == "switch" for gpu in working for port in gpu.nvlinks)
    most = {gpu.name: max(_active(other) for other in working if other.name == gpu.name) for gpu in working}
    short = [gpu for gpu in working if _active(gpu) < most[gpu.name] and (_active(gpu) or has_switch)]
    groups = alike(short, lambda gpu: (gpu.name, _active(gpu)))
    return tuple(_inactive(facts, gpus, most[gpus[0].name]) for gpus in groups)


def _active(gpu: Gpu) -> int:
    return sum(port.is_active for port in gpu.nvlinks)


def _inactive(facts: Facts, gpus: Sequence[Gpu], most: int) -> Finding:
    """One finding for the GPUs at both ends of a bridge."""
    verb, which = ("has", f" -i {gpus[0].index}") if len(gpus) == 1 else ("have", "")
    cause, log = said_by_kernel(facts, {gpu.bus_id for gpu in gpus}, NVLINK_XIDS) or (
        "A bridge is loose, or a link is broken.",
        {},
    )
    return found(
        "warning",
        f"{labels(gpus)} {verb} {_active(gpus[0])} of {most} NVLinks active.",
        cause=cause,
        evidence=facts.evidence(
            *(_inactive_path(facts, gpu) for gpu in gpus),
            *(facts.path(gpu, "nvlink_errors") for gpu in gpus if gpu.nvlink_errors),
        )
        | log,
        fix=Fix(
            text="Look at the links and their errors; reseat the bridge or reset the GPUs.",
            commands=(f"nvidia-smi nvlink --status{which}", f"nvidia-smi nvlink -e{which}"),
            who="administrator",
        ),
        gpus=gpus,
    )


def _inactive_path(facts: Facts, gpu: Gpu) -> str:
    """Field path of the first link that is down."""
    first = next((at for at, port in enumerate(gpu.nvlinks) if not port.is_active), 0)
    return facts.path(gpu, f"nvlinks[{first}].is_active")


def fabric_not_up(facts: Facts) -> Result:
    """The NVSwitch fabric is not up, though the links are.

    ## What it checks
    The fabric state that each GPU of an NVSwitch machine reports: completed, without error, healthy.

    ## Why it matters
    Links train in hardware, but only the fabric manager makes them usable: without it CUDA fails with error 802,
    "system not yet initialized", while nvidia-smi looks fine.

    ## Example
    `error VLM403 The NVSwitch fabric of GPUs 0, 1, 2, 3, 4, 5, 6, 7 is not up: not started.`

    ## What to do
    Start the fabric manager in exactly the driver's version. In a virtual machine it runs on the host.

    ## When it is fine
    For a minute after boot it says "in progress". Machines without NVSwitch have no fabric: the check is skipped.

    ## Sources
    nvmlDeviceGetGpuFabricInfoV; pytorch issue 35710.
    """
    told = [gpu for gpu in facts.working if gpu.fabric is not None and gpu.fabric.state != "not_supported"]
    if not told:
        return skipped("no NVSwitch fabric")
    groups: dict[tuple[Severity, str], list[Gpu]] = {}
    for gpu in told:
        trouble = _fabric_trouble(gpu)
        if trouble is not None:
            groups.setdefault(trouble, []).append(gpu)
    doubtful = [gpu for gpu in told if gpu.fabric is not None and gpu.fabric.state == "unknown"]
    if doubtful and not groups:
        return unknown(f"the fabric state of {names(doubtful)} is not known")
    return tuple(_fabric_finding(facts, severity, text, gpus) for (severity, text), gpus in groups.items())


def _fabric_trouble(gpu: Gpu) -> tuple[Severity, str] | None:
    failure = failure_of_fabric(gpu)
    if failure is not None:
        return "error", failure
    ills = ills_of_fabric(gpu)
    return ("warning", f"is not healthy: {', '.join(ills)}") if ills else None


def _fabric_finding(facts: Facts, severity: Severity, text: str, gpus: Sequence[Gpu]) -> Finding:
    return found(
        severity,
        f"The NVSwitch fabric of {names(gpus)} {text}.",
        cause="The fabric manager is not running, or not in the version of the driver." if severity == "error" else None,
        evidence=facts.evidence(
            *(facts.path(gpus[0], f"fabric.{name}") for name in ("state", "status", "health_mask")),
            # Their links that are down are part of the same trouble: VLM402 then has nothing to add.
            *(_inactive_path(facts, gpu) for gpu in gpus if not all(port.is_active for port in gpu.nvlinks)),
        ),
        fix=Fix(
            text="Start the fabric manager in the driver's version; in a virtual machine it runs on the host.",
            commands=(
                "systemctl status --no-pager nvidia-fabricmanager",
                "sudo systemctl enable --now nvidia-fabricmanager",
            ),
            who="administrator",
        ),
        gpus=gpus,
    )


CHECKS = (
    Check(code="VLM402", title="NVLinks inactive", run=nvlink_inactive, needs=("gpus",), told_by=("VLM403",)),
    Check(code="VLM403", title="NVSwitch fabric not up", run=fabric_not_up, needs=("gpus",)),
)
