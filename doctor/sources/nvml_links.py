"""The part of the NVML program that asks about NVLink, the NVSwitch fabric, PCIe distance and peer access."""

from __future__ import annotations

import ctypes
from itertools import combinations
from typing import Any

_REMOTE_TYPES = {0: "gpu", 1: "ibmnpu", 2: "switch"}
"""NVML_NVLINK_DEVICE_TYPE_*."""
_FABRIC_STATES = {0: "not_supported", 1: "not_started", 2: "in_progress", 3: "completed"}
"""NVML_GPU_FABRIC_STATE_*."""
_ANCESTORS = {0: "INTERNAL", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""NVML_TOPOLOGY_*, in the words of ``nvidia-smi topo -m``."""
_P2P_STATES = (
    "ok",
    "chipset_not_supported",
    "gpu_not_supported",
    "topology_not_supported",
    "disabled_by_regkey",
    "not_supported",
    "unknown",
)
"""NVML_P2P_STATUS_*."""
_NOT_SUPPORTED = 3
_NO_SUCH_PORT = (2, _NOT_SUPPORTED)
"""NVML_ERROR_INVALID_ARGUMENT and NVML_ERROR_NOT_SUPPORTED: the card has no port of that number."""
_HIDDEN = (None, "ffff:ff:ff.0", "0000:00:00.0")
"""Addresses that name no device."""
_Asked = tuple[dict[str, Any], Any]
"""Fields of a GPU so far, and its handle."""
_PEER_FIELDS = ("p2p_read", "p2p_write")
_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2
"""NVML_P2P_CAPS_INDEX_* (in nvidia-ml-py, READ is a tuple by a slip of the comma: the numbers are safer)."""


def bus_id(address: Any) -> str:
    """``00000000:3B:00.0`` as NVML writes it to ``0000:3b:00.0`` as the kernel does (NVML's domain has 8 digits)."""
    text = address.busId
    text = (text.decode("ascii", "replace") if isinstance(text, bytes) else str(text)).lower()
    domain, colon, rest = text.partition(":")
    return f"{domain[-4:]}{colon}{rest}"


def ask_ports(reader: Any, gpu: dict[str, Any], handle: Any) -> None:
    """Fill ``fabric`` and ``nvlinks`` of one GPU."""
    path = f"gpus[{gpu['index']}]"
    gpu["fabric"] = fabric = _fabric(reader, f"{path}.fabric", handle)
    ports: list[dict[str, Any]] = []
    gpu["nvlinks"] = ports
    ends = _FarEnds(reader, handle, is_in_fabric=fabric is not None and fabric["state"] == "completed")
    for link in range(_port_count(reader, f"{path}.nvlinks", handle)):
        where = f"{path}.nvlinks[{link}]"
        is_active = reader.ask(where, "nvmlDeviceGetNvLinkState", handle, link)
        if is_active is None:
            if reader.code(where) in _NO_SUCH_PORT:
                reader.forget(where)
            continue
        port: dict[str, Any] = {"link": link, "is_active": bool(is_active)}
        if is_active:
            port.update(ends.of(where, link))
        ports.append(port)


class _FarEnds:
    """What is at the other end of the active ports of a GPU. What one port tells of all of them is asked once.

    Args:
        reader: The reader of :mod:`.nvml`.
        handle: Of the GPU.
        is_in_fabric: True in an NVSwitch fabric that is up, whose GPUs have all their ports at its switches.
    """

    def __init__(self, reader: Any, handle: Any, *, is_in_fabric: bool) -> None:
        self._reader = reader
        self._handle = handle
        self._is_in_fabric = is_in_fabric
        self._version: int | None = None
        self._switch: str | None = None
        """Address of the last switch."""
        self._has_switch = False

    def of(self, where: str, link: int) -> dict[str, Any]:
        """Fields ``version``, ``remote`` and ``remote_bus_id`` of a port."""
        if self._version is None:  # all ports of a GPU are of one kind
            self._version = self._ask(f"{where}.version", "nvmlDeviceGetNvLinkVersion", link)
        if self._has_switch and self._is_in_fabric:
            remote = "switch"
        else:
            kind = self._ask(f"{where}.remote", "nvmlDeviceGetNvLinkRemoteDeviceType", link)
            remote = _REMOTE_TYPES.get(kind, "unknown")
        if remote == "switch" and self._switch in _HIDDEN[1:]:  # where one switch is hidden, all are
            return {"version": self._version, "remote": remote, "remote_bus_id": self._switch}
        address = self._ask(f"{where}.remote_bus_id", "nvmlDeviceGetNvLinkRemotePciInfo", link)
        found = bus_id(address) if address is not None else None
        if remote == "switch":
            self._has_switch, self._switch = True, found
        return {"version": self._version, "remote": remote, "remote_bus_id": found}

    def _ask(self, where: str, function: str, link: int) -> Any:
        return self._reader.ask(where, function, self._handle, link)


def _port_count(reader: Any, where: str, handle: Any) -> int:
    """NVLink ports of this card, as the driver counts them; where it does not tell, as many as NVML can name."""
    most = getattr(reader.nvml, "NVML_NVLINK_MAX_LINKS", 36)
    field = getattr(reader.nvml, "NVML_FI_DEV_NVLINK_LINK_COUNT", 91)
    values = reader.ask(where, "nvmlDeviceGetFieldValues", handle, [field])
    reader.forget(where)  # without it, every port that NVML can name is asked
    if values is None or values[0].nvmlReturn != 0:
        return int(most)
    return min(int(values[0].value.uiVal), int(most))


def _fabric(reader: Any, where: str, handle: Any) -> dict[str, Any] | None:
    """State of the NVSwitch fabric.

    The call wants a *pointer* to a versioned structure. Given the structure itself, as its Python name suggests, it
    takes the process down (measured on H200, driver 580.159).
    """
    structure = getattr(reader.nvml, "c_nvmlGpuFabricInfo_v2_t", None)
    if structure is None:
        reader.gap(where, "nvidia-ml-py: c_nvmlGpuFabricInfo_v2_t is missing")
        return None
    info = structure()
    if reader.ask(where, "nvmlDeviceGetGpuFabricInfoV", handle, ctypes.byref(info)) is None:
        if reader.code(where) != _NOT_SUPPORTED:
            return None
        reader.forget(where)
        return {"state": "not_supported"}
    return {
        "state": _FABRIC_STATES.get(info.state, "unknown"),
        "status": info.status,
        "health_mask": info.healthMask,
        "clique_id": info.cliqueId,
    }


def ask_pairs(reader: Any, gpus: list[_Asked], lost: type[Exception]) -> list[dict[str, Any]]:
    """PCIe distance and peer access of every two GPUs that answer.

    A question about peer access takes 2 ms (measured on H200), and eight GPUs make 28 pairs. Behind an NVSwitch fabric each
    GPU is asked about its access to the first one; only where these answers differ are the other pairs asked, too.

    Args:
        reader: The reader of :mod:`.nvml`.
        gpus: Fields and handle of each.
        lost: What the reader raises when a GPU is lost while it is asked.

    Returns:
        A record a pair: ``a``, ``b``, ``path``, ``p2p_read``, ``p2p_write``, and ``p2p_nvlink`` where it was asked.
    """
    groups: dict[Any, list[int]] = {}
    for gpu, _ in gpus:
        if (group := _switched_group(gpu)) is not None:
            groups.setdefault(group, []).append(gpu["index"])
    heads = {index: members[0] for members in groups.values() for index in members}
    first = [two for two in combinations(gpus, 2) if _is_asked_first(two, heads)]
    told = dict(zip(map(_name_of, first), reader.each(lambda own, two: _ask_pair(own, two, lost), first), strict=True))
    peers = {head: _common(told, members) for head, members in ((members[0], members) for members in groups.values())}
    rest = [two for two in combinations(gpus, 2) if _name_of(two) not in told]

    def ask(own: Any, two: tuple[_Asked, _Asked]) -> dict[str, Any]:
        return _ask_pair(own, two, lost, known=peers[heads[two[0][0]["index"]]])

    told.update(zip(map(_name_of, rest), reader.each(ask, rest), strict=True))
    return [told[_name_of(two)] for two in combinations(gpus, 2)]


def _switched_group(gpu: dict[str, Any]) -> Any:
    """What GPUs have in common that reach each other in one way: through a fabric that is up; ``None`` outside of one."""
    fabric, ports = gpu.get("fabric"), [port for port in gpu.get("nvlinks", ()) if port["is_active"]]
    if not ports or fabric is None or fabric["state"] != "completed" or fabric.get("status"):
        return None
    if any(port["remote"] != "switch" for port in ports):
        return None
    return fabric.get("clique_id"), len(ports), gpu["name"], gpu.get("mig_enabled")


def _name_of(two: tuple[_Asked, _Asked]) -> tuple[int, int]:
    return two[0][0]["index"], two[1][0]["index"]


def _is_asked_first(two: tuple[_Asked, _Asked], heads: dict[int, int]) -> bool:
    """All pairs but those of a group without its first GPU."""
    near, far = _name_of(two)
    return near not in heads or heads.get(far) != heads[near] or heads[near] == near


def _common(told: dict[tuple[int, int], dict[str, Any]], members: list[int]) -> dict[str, Any] | None:
    """Peer access of a group, where every GPU has the same with the first one; ``None`` where it differs or is refused.

    The driver tells it from what each GPU can do and how both are joined: each was asked, and all are joined alike.
    """
    answers = [{field: told[members[0], far].get(field) for field in _PEER_FIELDS} for far in members[1:]]
    alike = bool(answers) and all(answer == answers[0] for answer in answers)
    return answers[0] if alike and set(answers[0].values()) == {"ok"} else None


def _ask_pair(
    reader: Any, two: tuple[_Asked, _Asked], lost: type[Exception], *, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Path and peer access of two GPUs; the latter is not asked where it is ``known``."""
    (near, first), (far, second) = two
    pair: dict[str, Any] = {"a": near["index"], "b": far["index"]}
    where = f"links[{near['index']}-{far['index']}]"
    capabilities = [("p2p_read", _P2P_READ), ("p2p_write", _P2P_WRITE)] if known is None else []
    if _has_hidden_port(near) and _has_hidden_port(far):
        capabilities.append(("p2p_nvlink", _P2P_NVLINK))
    try:
        ancestor = reader.ask(f"{where}.path", "nvmlDeviceGetTopologyCommonAncestor", first, second)
        pair["path"] = _ANCESTORS.get(ancestor)
        for field, capability in capabilities:
            status = reader.ask(f"{where}.{field}", "nvmlDeviceGetP2PStatus", first, second, capability)
            pair[field] = _P2P_STATES[status] if status in range(len(_P2P_STATES)) else None
    except lost as error:
        reader.gap(where, f"NVML: {error}")
    return {**pair, **(known or {})}


def _has_hidden_port(gpu: dict[str, Any]) -> bool:
    """Whether an active port that does not lead to a switch shows no address, as a virtual machine may hide it."""
    ports = [port for port in gpu.get("nvlinks", ()) if port["is_active"] and port["remote"] != "switch"]
    return any(port["remote_bus_id"] in _HIDDEN for port in ports)
