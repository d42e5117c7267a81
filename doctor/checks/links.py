"""4xx: how the GPUs reach each other, and what that means for a split."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..findings import Finding, Fix, Severity
from ..machine import Gpu, Link
from ..topology import WORST_RANK, describe, islands, link_rank
from ._check import Check, Facts, Result, found, names, skipped, unknown

_P2P_TEXTS = {
    "chipset_not_supported": "the chipset does not support it",
    "gpu_not_supported": "these GPUs do not support it",
    "topology_not_supported": "it is not supported across this PCIe topology",
    "disabled_by_regkey": "the driver's settings disable it",
    "not_supported": "it is not supported here",
}
_SHARE_AS_FREE = 0.9
"""Other GPUs count as an alternative when they have at least this share of the visible ones' free memory."""


def what_links_mean(facts: Facts) -> Result:
    """What the links between the visible GPUs mean for a model that is split over them.

    ## What it checks
    NVLink islands and PCIe paths between the visible GPUs.

    ## Why it matters
    Each border between two stages of a split sends the hidden state of every token over a link: NVLink hardly
    notices, a path through two CPU sockets does.

    ## Example
    `info VLM401 2 GPUs joined by NV18 through NVSwitch: any split may cross them freely.`

    ## What to do
    Nothing: the plans of vlm-doctor take it into account. By hand: `nvidia-smi topo -m`.

    ## When it is fine
    Always: it is information.

    ## Sources
    nvmlDeviceGetTopologyCommonAncestor, nvmlDeviceGetNvLinkState and the remote ends of the links.
    """
    visible = facts.visible
    if len(visible) < 2:
        return skipped("fewer than 2 visible GPUs")
    members = {gpu.index for gpu in visible}
    links = [link for link in facts.machine.links if link.a in members and link.b in members]
    if all(link_rank(link) == WORST_RANK for link in links):
        gap = facts.machine.gap("links")
        return unknown(f"how the GPUs are joined is not known{f': {gap.reason}' if gap else ''}")
    worst = facts.machine.links.index(max(links, key=link_rank))
    return (
        found(
            "info",
            describe(facts.machine, sorted(members)),
            evidence=facts.evidence(f"links[{worst}].nvlinks", f"links[{worst}].path"),
            gpus=visible,
        ),
    )


def peer_access_missing(facts: Facts) -> Result:
    """The driver does not grant GPUs access to each other's memory.

    ## What it checks
    Peer read and write access of each pair of visible GPUs, as the driver grants it.

    ## Why it matters
    Copies between such GPUs go through the host's memory: correct, but slower.

    ## Example
    `info VLM404 No peer access between 1 pair of GPUs (0-1): it is not supported here.`

    ## What to do
    Mostly nothing. Between GPUs joined by NVLink it should be there: look at `nvidia-smi topo -p2p r` and the driver.

    ## When it is fine
    GeForce cards from the 40 series on, paths through two CPU sockets, virtual machines and WSL2 have none by design:
    it is only mentioned.

    ## Sources
    nvmlDeviceGetP2PStatus; accelerate issue 2195.
    """
    members = {gpu.index for gpu in facts.visible}
    links = [link for link in facts.machine.links if link.a in members and link.b in members]
    if len(members) < 2:
        return skipped("fewer than 2 visible GPUs")
    if not any(link.p2p_read or link.p2p_write for link in links):
        return unknown("peer access is not known")
    groups: dict[tuple[Severity, str], list[Link]] = {}
    for link in links:
        reason = next((why for why in (link.p2p_read, link.p2p_write) if why in _P2P_TEXTS), None)
        if reason is not None:
            is_odd = bool(link.nvlinks) or reason == "disabled_by_regkey"
            groups.setdefault(("warning" if is_odd else "info", reason), []).append(link)
    return tuple(_no_peer_access(facts, severity, reason, group) for (severity, reason), group in groups.items())


def _no_peer_access(facts: Facts, severity: Severity, reason: str, links: Sequence[Link]) -> Finding:
    pairs = ", ".join(f"{link.a}-{link.b}" for link in links[:4]) + (", ..." if len(links) > 4 else "")
    ends = {index for link in links for index in (link.a, link.b)}
    position = facts.machine.links.index(links[0])
    return found(
        severity,
        f"No peer access between {len(links)} pair{'s' if len(links) > 1 else ''} of GPUs ({pairs}): {_P2P_TEXTS[reason]}.",
        cause="Copies between them go through the host's memory.",
        evidence=facts.evidence(
            f"links[{position}].p2p_read", f"links[{position}].p2p_write", f"links[{position}].nvlinks"
        ),
        fix=Fix(text="Look at what the driver grants, and why not.", commands=("nvidia-smi topo -p2p r",))
        if severity == "warning"
        else None,
        gpus=[gpu for gpu in facts.visible if gpu.index in ends],
    )


def slow_choice(facts: Facts) -> Result:
    """CUDA_VISIBLE_DEVICES picks GPUs that are joined badly, though others are joined better.

    ## What it checks
    The slowest link among the visible GPUs against the best choice of as many GPUs: an NVLink island that is large
    enough, or for two GPUs the best pair.

    ## Why it matters
    The same model on the same number of GPUs runs faster when its stages are neighbors.

    ## Example
    `warning VLM405 GPUs 0, 2 are joined by SYS only, while GPUs 0, 1 share NV4.`

    ## What to do
    Set the value that the finding gives.

    ## When it is fine
    Where the better GPUs are busy (not reported when less memory is free there) or were not given to this job.

    ## Sources
    nvmlDeviceGetTopologyCommonAncestor, NVLink states.
    """
    visible, machine = facts.visible, facts.machine
    if len(visible) < 2:
        return skipped("fewer than 2 visible GPUs")
    if len(visible) == len(facts.working):
        return ()
    worst = _worst(facts, [gpu.index for gpu in visible])
    better = _best_choice(facts, len(visible))
    if worst is None or better is None:
        return unknown("how the GPUs are joined is not known")
    best = _worst(facts, better)
    chosen = [gpu for gpu in machine.gpus if gpu.index in better]
    if best is None or not _is_better(best, worst) or _free(chosen) < _SHARE_AS_FREE * _free(visible):
        return ()
    position = machine.links.index(worst)
    value = ",".join(gpu.uuid for gpu in chosen) if machine.origin != "synthetic" else ",".join(map(str, better))
    return (
        found(
            "warning",
            f"{names(visible)} are joined by {worst.label} only, while {names(chosen)} share {best.label}.",
            cause="CUDA_VISIBLE_DEVICES picks GPUs of different islands.",
            evidence=facts.evidence(
                "environment.CUDA_VISIBLE_DEVICES", f"links[{position}].path", f"links[{position}].nvlinks"
            ),
            fix=Fix(
                text="Choose the GPUs that are joined better.",
                commands=(f"export CUDA_VISIBLE_DEVICES={shlex.quote(value)}",),
            ),
            gpus=visible,
        ),
    )


def _is_better(best: Link, worst: Link) -> bool:
    """NVLink instead of PCIe, or a nearer PCIe path; a few NVLinks more are no reason to move."""
    return link_rank(best) < link_rank(worst) and not worst.nvlinks


def _worst(facts: Facts, gpus: Sequence[int]) -> Link | None:
    """The slowest link among GPUs; ``None`` when one of their links is unknown."""
    members = set(gpus)
    links = [link for link in facts.machine.links if link.a in members and link.b in members]
    if len(links) < len(members) * (len(members) - 1) // 2 or any(link_rank(link) == WORST_RANK for link in links):
        return None
    return max(links, key=link_rank)


def _best_choice(facts: Facts, count: int) -> list[int] | None:
    """As many GPUs inside one NVLink island, else, for two, the best pair; ``None`` when no link is known."""
    working = [gpu.index for gpu in facts.working]
    for island in islands(facts.machine, working):
        if len(island) >= count:
            return list(island[:count])
    known = [link for link in facts.machine.links if link_rank(link) < WORST_RANK and {link.a, link.b} <= set(working)]
    if not known:
        return None
    if count > 2:
        return [gpu.index for gpu in facts.visible]
    best = min(known, key=link_rank)
    return [best.a, best.b]


def _free(gpus: Sequence[Gpu]) -> int:
    return sum(gpu.memory_free_bytes or 0 for gpu in gpus)


CHECKS = (
    Check(
        code="VLM401",
        title="what the links mean for a split",
        run=what_links_mean,
        needs=("gpus",),
        explained_by=("VLM201", "VLM403"),
    ),
    Check(
        code="VLM404",
        title="no peer access between GPUs",
        run=peer_access_missing,
        needs=("gpus",),
        explained_by=("VLM201", "VLM403"),
    ),
    Check(code="VLM405", title="visible GPUs badly joined", run=slow_choice, needs=("gpus",), explained_by=("VLM201",)),
)
