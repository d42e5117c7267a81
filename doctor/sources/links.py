"""How GPUs are joined: pairs of them from the NVLink ports that each GPU shows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from ..machine import Gap, Gpu, Link, LinkPath

_UNREAD_PORT = re.compile(r"gpus\[(\d+)\]\.nvlinks(\[\d+\](\.remote(_bus_id)?)?)?")
"""Gaps that leave open how many links a GPU has to another."""


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """What NVML says about two GPUs, ``a < b``."""

    a: int
    b: int
    path: LinkPath | None = None
    p2p_read: str | None = None
    p2p_write: str | None = None
    p2p_nvlink: str | None = None
    """Whether the driver says that NVLink joins them."""


def join(gpus: Sequence[Gpu], pairs: Sequence[Pair], gaps: Sequence[Gap] = ()) -> tuple[Link, ...]:
    """Make the links of a machine from its GPUs' ports and NVML's word on each pair."""
    by_index = {gpu.index: gpu for gpu in gpus}
    unread = {int(match[1]) for gap in gaps if (match := _UNREAD_PORT.fullmatch(gap.path))}
    links = []
    for pair in pairs:
        a, b = by_index.get(pair.a), by_index.get(pair.b)
        if a is None or b is None or pair.a >= pair.b:
            continue
        nvlinks = None if unread & {pair.a, pair.b} else count_nvlinks(a, b, pair.p2p_nvlink)
        links.append(
            Link(a=pair.a, b=pair.b, nvlinks=nvlinks, path=pair.path, p2p_read=pair.p2p_read, p2p_write=pair.p2p_write)
        )
    return tuple(links)


def count_nvlinks(a: Gpu, b: Gpu, p2p_nvlink: str | None = None) -> int | None:
    """Active NVLinks that join two GPUs; ``None`` when they are joined but the ports do not tell by how many.

    * Bridged pairs: the ports of one whose far end is the other's PCI address.
    * Through NVSwitch every port ends at a switch, whose address says nothing (``ffff:ff:ff.0`` on virtual machines,
      measured on H200), and every GPU of the fabric reaches every other with all its ports: the count is the smaller
      number of active switch ports. This holds when the fabric is up, and on machines older than H100 that have no
      fabric state at all; with a fabric that is not up, links that trained still carry nothing, so the count is 0.

    Args:
        a: A GPU.
        b: Another GPU.
        p2p_nvlink: NVML's word on peer access over NVLink; it is asked for where both have ports with hidden addresses.
    """
    direct = max(_direct(a, b), _direct(b, a))
    if direct:
        return direct
    switched = min(_switched(a), _switched(b))
    if switched:
        return switched if _is_fabric_up(a, b) else 0
    return None if p2p_nvlink == "ok" else 0


def _direct(near: Gpu, far: Gpu) -> int:
    if far.bus_id is None:
        return 0
    return sum(port.is_active and port.remote != "switch" and port.remote_bus_id == far.bus_id for port in near.nvlinks)


def _switched(gpu: Gpu) -> int:
    return sum(port.is_active and port.remote == "switch" for port in gpu.nvlinks)


def _is_fabric_up(a: Gpu, b: Gpu) -> bool:
    states = {gpu.fabric.state for gpu in (a, b) if gpu.fabric is not None}
    if not states <= {"completed", "not_supported", "unknown"}:
        return False
    joined = [gpu.fabric for gpu in (a, b) if gpu.fabric is not None and gpu.fabric.state == "completed"]
    return all(not fabric.status for fabric in joined) and len({fabric.clique_id for fabric in joined}) <= 1
