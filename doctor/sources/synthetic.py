"""Machines made up from a short text, to plan for hardware that is not here.

::

    machine = cards [":" option]...
    cards   = card ("+" card)...                     2xL4+A10          24GiB,12GiB
    card    = [count "x"] (catalogue name | size)    a bare size is free memory, exactly as written
    option  = "nvswitch"                             every GPU to every other, through switches
            | "nvlink"                               every GPU to every other, directly
            | "nvlink=" a "-" b ("," a "-" b)...     bridges between these pairs of GPU indices
            | "p2p" ["=" pairs | "=off"]             which pairs reach each other's memory over PCIe: all, these, none
            | "pcie=" PIX | PXB | PHB | NODE | SYS   how all pairs are joined over PCIe (PHB)
            | "free=" size ("," size)...             free memory now: of all GPUs, or of each
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import get_args

import msgspec

from ..data.gpus import ALIASES, GPUS, GpuModel, find_gpu
from ..errors import MachineError, UsageError
from ..likeness import nearest
from ..machine import Driver, Fabric, Gpu, Link, LinkPath, Machine, NvLink, TorchView
from ..units import format_gib, parse_bytes
from .links import Pair, join

MAX_GPUS = 64
_MAX_SPEC_CHARS = 2000
_COUNTED = re.compile(r"(?:(?P<count>[0-9]+)\s*[xX×]\s*)?(?P<what>.+)")
_SIZE = re.compile(r"[0-9.]+\s*[kKmMgGtT]?i?[bB]")
_NO_UNIT = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,5})?\s*(?:[gG][iI]?)?")
_SWITCH_ADDRESS = "ffff:ff:ff.0"
"""What NVML shows at the far end of a port that leads to NVSwitch (measured on H200)."""
_BRIDGED_PORTS = 4
"""NVLinks of a bridge between two cards that are given by size only: those of an RTX 3090 or A6000."""


def parse_machine(spec: str) -> Machine:
    """Make the machine that ``spec`` describes.

    Raises:
        MachineError: The text cannot be understood, or describes what cannot exist; one sentence says which part.
    """
    if len(spec) > _MAX_SPEC_CHARS:
        raise MachineError(f"A machine spec has at most {_MAX_SPEC_CHARS:,} characters, this one {len(spec):,}.")
    description = spec = spec.strip()
    if not spec.isprintable():
        spec = ascii(spec)
    cards, *options = (part.strip() for part in description.split(":"))
    models = _models(spec, cards)
    gpus = [_gpu(index, model) for index, model in enumerate(models)]
    path: LinkPath = "PHB"
    peers: Sequence[tuple[int, int]] | None = None
    seen: set[str] = set()
    for option in options:
        name, _, value = (part.strip() for part in option.partition("="))
        name = name.lower()
        topic = "nvlink" if name == "nvswitch" else name
        if topic in seen:
            raise MachineError(f"{spec}: {topic} is said twice.")
        seen.add(topic)
        if name == "nvswitch" and not value:
            gpus = _switched(spec, gpus, models)
        elif name == "nvlink":
            gpus = _bridged(spec, gpus, models, _pairs(spec, value, len(gpus)))
        elif name == "p2p":
            peers = () if value.lower() == "off" else _pairs(spec, value, len(gpus))
        elif name == "pcie":
            path = _path(spec, value)
        elif name == "free":
            gpus = _with_free(spec, gpus, value)
        else:
            raise MachineError(f"{spec}: {option!r} is not an option; there are nvswitch, nvlink, p2p, pcie and free.")
    pairs = [Pair(a=a, b=b, path=path) for a, b in combinations(range(len(gpus)), 2)]
    links = tuple(msgspec.structs.replace(link, **_peer_access(link, models, peers)) for link in join(gpus, pairs))
    return Machine(
        origin="synthetic",
        description=description,
        gpus=tuple(gpus),
        links=links,
        driver=Driver(nvml_state="ok"),
        torch=TorchView(state="not_asked", message="this machine is made up"),
    )


def _models(spec: str, cards: str) -> list[GpuModel]:
    models: list[GpuModel] = []
    if cards.lower() == "live":
        raise MachineError(f"{spec}: this machine is called live, in small letters and alone.")
    for card in re.split(r"[+,]", cards):
        match = _COUNTED.fullmatch(card.strip())
        if match is None:
            raise MachineError(
                f"{spec!r} is not a machine: write live, a snapshot file, or GPUs, such as 2xL4 or 24GiB,12GiB."
            )
        count = int(match["count"] or 1)
        if not 1 <= count <= MAX_GPUS - len(models):
            raise MachineError(f"{spec}: a made-up machine has 1 to {MAX_GPUS} GPUs.")
        models += [_model(spec, match["what"].strip())] * count
    return models


def _model(spec: str, what: str) -> GpuModel:
    model = find_gpu(what)
    if model is not None:
        return model
    if _SIZE.fullmatch(what):
        size = _size(spec, what, least=1)
        return GpuModel(f"GPU with {format_gib(size)}", size, 0, (0, 0), _BRIDGED_PORTS)
    names = [*GPUS, *ALIASES]
    by_lower = {name.lower(): name for name in names}
    if _NO_UNIT.fullmatch(what):
        raise MachineError(f"{spec}: {what!r} has no unit; write {what.rstrip('gGiI')}GiB.")
    if "@" in what or "=" in what:
        raise MachineError(f"{spec}: {what[:60]!r} is not a GPU; options stand behind a colon, such as 2xL4:free=12GiB.")
    near = [by_lower[key] for key in nearest(what.lower(), by_lower, most=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}, and sizes such as 24GiB."
    raise MachineError(f"{spec}: {what!r} is not a GPU of the catalogue; {hint}")


def _gpu(index: int, model: GpuModel) -> Gpu:
    is_known = model.compute_capability != (0, 0)
    return Gpu(
        index=index,
        uuid=f"GPU-{index:08x}-0000-0000-0000-{index:012x}",
        name=model.name,
        bus_id=f"0000:{index + 1:02x}:00.0",
        memory_total_bytes=model.memory_total_bytes,
        memory_free_bytes=model.memory_total_bytes - model.memory_reserved_bytes,
        memory_used_bytes=0,
        memory_reserved_bytes=model.memory_reserved_bytes,
        compute_capability=model.compute_capability if is_known else None,
        compute_mode="default",
        mig_enabled=False,
        mig_pending=False,
        has_unified_memory=False,
    )


def _pairs(spec: str, value: str, count: int) -> list[tuple[int, int]]:
    """``0-1,2-3`` as pairs in rising order; nothing means all."""
    if not value:
        return list(combinations(range(count), 2))
    found = set()
    for text in value.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*-\s*([0-9]{1,4})\s*", text)
        a, b = sorted((int(match[1]), int(match[2]))) if match else (0, 0)
        if match is None or a == b or b >= count:
            raise MachineError(f"{spec}: {text.strip()!r} is not a pair of two of the GPUs 0 to {count - 1}, such as 0-1.")
        found.add((a, b))
    return sorted(found)


def _bridged(spec: str, gpus: Sequence[Gpu], models: Sequence[GpuModel], pairs: Sequence[tuple[int, int]]) -> list[Gpu]:
    """Share the ports of each card among its neighbours; a pair has as many links as its poorer end can spare."""
    neighbours = Counter(index for pair in pairs for index in pair)
    ports: list[list[NvLink]] = [[] for _ in gpus]
    for a, b in pairs:
        links = min(models[index].nvlinks // neighbours[index] for index in (a, b))
        if not links:
            poorer = min((a, b), key=lambda index: models[index].nvlinks // neighbours[index])
            raise MachineError(
                f"{spec}: {gpus[poorer].label} has {models[poorer].nvlinks or 'no'} NVLink ports, too few for "
                f"{neighbours[poorer]} {'neighbour' if neighbours[poorer] == 1 else 'neighbours'}."
            )
        for near, far in ((a, b), (b, a)):
            first = len(ports[near])
            ports[near] += [_port(first + offset, "gpu", gpus[far].bus_id) for offset in range(links)]
    return [msgspec.structs.replace(gpu, nvlinks=tuple(found)) for gpu, found in zip(gpus, ports, strict=True)]


def _switched(spec: str, gpus: Sequence[Gpu], models: Sequence[GpuModel]) -> list[Gpu]:
    """Every port leads to a switch. Only H100 and newer tell a fabric state."""
    for gpu, model in zip(gpus, models, strict=True):
        if model.nvlinks <= _BRIDGED_PORTS:
            raise MachineError(f"{spec}: {gpu.label} does not exist with NVSwitch.")
    return [
        msgspec.structs.replace(
            gpu,
            nvlinks=tuple(_port(link, "switch", _SWITCH_ADDRESS) for link in range(model.nvlinks)),
            fabric=Fabric(state="completed", status=0, health_mask=0, clique_id=0)
            if model.compute_capability >= (9, 0)
            else Fabric(state="not_supported"),
        )
        for gpu, model in zip(gpus, models, strict=True)
    ]


def _port(link: int, remote: str, address: str | None) -> NvLink:
    return NvLink(link=link, is_active=True, remote="switch" if remote == "switch" else "gpu", remote_bus_id=address)


def _peer_access(link: Link, models: Sequence[GpuModel], peers: Sequence[tuple[int, int]] | None) -> dict[str, str | None]:
    """Drivers grant peer access over NVLink; over PCIe it depends on card, driver and board.

    Args:
        link: Between two GPUs.
        models: Of all GPUs.
        peers: Pairs that were said to have it over PCIe; ``None`` where nothing was said: then only cards that never have
            it are known.
    """
    state: str | None = None
    if link.nvlinks or (peers is not None and (link.a, link.b) in peers):
        state = "ok"
    elif peers is not None:
        state = "topology_not_supported"
    elif models[link.a].lacks_pcie_peers or models[link.b].lacks_pcie_peers:
        state = "gpu_not_supported"
    return {"p2p_read": state, "p2p_write": state}


def _path(spec: str, value: str) -> LinkPath:
    paths: tuple[LinkPath, ...] = get_args(LinkPath)
    for path in paths:
        if path == value.upper():
            return path
    raise MachineError(f"{spec}: {value!r} is not a PCIe path; there are {', '.join(paths)}.")


def _with_free(spec: str, gpus: Sequence[Gpu], value: str) -> list[Gpu]:
    sizes = [_size(spec, text.strip()) for text in value.split(",")]
    if len(sizes) == 1:
        sizes *= len(gpus)
    if len(sizes) != len(gpus):
        raise MachineError(f"{spec}: free has {len(sizes)} sizes for {len(gpus)} GPUs; write one for all or one for each.")
    changed = []
    for gpu, size in zip(gpus, sizes, strict=True):
        most = gpu.memory_free_bytes or 0
        if size > most:
            raise MachineError(f"{spec}: {gpu.label} cannot have {format_gib(size)} free, only {format_gib(most)}.")
        changed.append(msgspec.structs.replace(gpu, memory_free_bytes=size, memory_used_bytes=most - size))
    return changed


def _size(spec: str, text: str, *, least: int = 0) -> int:
    try:
        size = parse_bytes(text, where=spec)
    except UsageError as error:
        raise MachineError(str(error)) from None
    if not least <= size < 2**50:
        raise MachineError(f"{spec}: {text} is not a size that a GPU can have.")
    return size
