"""CUDA_VISIBLE_DEVICES read aloud: what it selects, which entry cuts it short, and where GPUs get lost.

The rules are those of CUDA and of torch's own parser (``torch.cuda._parse_visible_devices``, torch 2.13), which stop
silently at the first entry they do not accept. Source: CUDA programming guide, environment variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from .machine import Gpu, Machine

VARIABLE = "CUDA_VISIBLE_DEVICES"

MAX_VALUE_CHARS = 4096
"""What is kept and repaired of a value: 64 full UUIDs have 2,623 characters."""
_MAX_QUOTED_CHARS = 48
"""What is quoted in a message: one UUID with its quotes."""
_NOTHING = ("-1", "NoDevFiles")
"""Entries that are written to hide every GPU; the second is Slurm's, for a job that was given none."""
_INTEGER = re.compile(r"\+?([0-9]{1,9})(?![0-9])", re.ASCII)
"""What C's strtoul takes from the start of an entry; ten digits are out of range on any machine."""
_OLD_MIG = re.compile(r"MIG-(GPU-[^/]{1,64})/[0-9]{1,4}/[0-9]{1,4}", re.ASCII)


class Visibility(msgspec.Struct, frozen=True, kw_only=True):
    """What CUDA_VISIBLE_DEVICES does on one machine."""

    value: str | None
    """As set, at most :data:`MAX_VALUE_CHARS` characters; ``None`` when unset."""
    gpus: tuple[int, ...]
    """GPU indices in CUDA order: the position is the CUDA ordinal."""
    is_order_certain: bool
    """False when CUDA may number the GPUs otherwise (mixed models without CUDA_DEVICE_ORDER=PCI_BUS_ID, MIG, lost GPUs)."""
    cut_by: str | None = None
    """First entry that CUDA does not accept, quoted: it and all after it are dropped."""
    problem: str | None = None
    """One sentence; ``None`` when the value does what it says."""
    corrected: str | None = None
    """A value ready to paste; ``None`` when nothing is wrong or there is no GPU to name."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How many GPUs each step sees, and which were lost on the way. ``None`` is unknown."""

    pci: int | None
    """On the PCI bus."""
    driver: int | None
    """As NVML lists them."""
    visible: int | None
    """After CUDA_VISIBLE_DEVICES."""
    torch: int | None
    lost_by_driver: tuple[str, ...] = ()
    """PCI addresses that the driver does not list. In a container these are normal: GPUs that were not given to it."""
    hidden: tuple[int, ...] = ()
    """GPU indices that CUDA_VISIBLE_DEVICES hides."""
    lost_by_torch: tuple[int, ...] = ()
    """Visible GPU indices that torch does not count, where its UUIDs tell."""


class _Stop(msgspec.Struct, frozen=True):
    """Why reading ended early."""

    entry: str
    why: str
    hides_all: bool = False


def visible_gpus(machine: Machine) -> Visibility:
    """Say which GPUs CUDA shows a process on this machine, and in which order.

    The work is bounded: a list is read up to the first entry CUDA refuses, which comes after at most one entry more than
    there are GPUs.
    """
    order, is_certain = _cuda_order(machine)
    value = machine.environment.get(VARIABLE)
    if value is None:
        return _with_torch_order(Visibility(value=None, gpus=tuple(order), is_order_certain=is_certain), machine)
    gpus, stop, remarks = _read(value, order, {gpu.index: gpu for gpu in machine.gpus})
    if stop is not None and stop.hides_all:
        gpus = []
    problem = _problem(value, gpus, stop, remarks) if machine.gpus else None
    is_named = value.startswith(("GPU-", "MIG-"))
    seen = Visibility(
        value=value[:MAX_VALUE_CHARS],
        gpus=tuple(gpus),
        is_order_certain=is_certain or is_named or not gpus,
        cut_by=quote(stop.entry) if stop is not None else None,
        problem=problem,
        corrected=_corrected(value, order, machine.gpus) if problem else None,
    )
    return _with_torch_order(seen, machine)


def counts(machine: Machine) -> Counts:
    """Count the GPUs on the PCI bus, in the driver, after CUDA_VISIBLE_DEVICES, and in torch.

    Virtual machines and WSL may show no PCI device at all: the first count is then unknown, not zero.
    """
    listed = {gpu.bus_id for gpu in machine.gpus}
    on_bus = [device.bus_id for device in machine.pci_devices]
    is_bus_known = bool(on_bus) or not (machine.gpus or machine.gap("pci_devices") or machine.origin == "synthetic")
    is_driver_known = bool(machine.gpus) or machine.driver.nvml_state in ("ok", "no_library")
    is_absent = not machine.gpus and machine.driver.kernel_module_version is None and machine.driver.nvml_state == "error"
    driver = len(machine.gpus) if is_driver_known or is_absent else None
    visible = visible_gpus(machine).gpus
    uuids = [_torch_uuid(device.uuid) for device in machine.torch.devices]
    is_named = bool(uuids) and None not in uuids and None not in listed
    return Counts(
        pci=len(on_bus) if is_bus_known else None,
        driver=driver,
        visible=None if driver is None else len(visible),
        torch=machine.torch.device_count,
        lost_by_driver=tuple(bus for bus in on_bus if bus not in listed)
        if driver is not None and None not in listed
        else (),
        hidden=tuple(gpu.index for gpu in machine.gpus if gpu.index not in visible and gpu.error is None),
        lost_by_torch=tuple(g.index for g in machine.gpus if g.index in visible and g.uuid.lower() not in uuids)
        if is_named
        else (),
    )


def quote(text: str) -> str:
    """Quote a value for a message: ASCII, escaped and short, whatever it contains."""
    if len(text) > _MAX_QUOTED_CHARS:
        return f"{text[: _MAX_QUOTED_CHARS // 2]!a}... ({len(text):,} characters)"
    return ascii(text)


def _cuda_order(machine: Machine) -> tuple[list[int], bool]:
    """GPU indices as CUDA numbers them before CUDA_VISIBLE_DEVICES, and whether that is certain.

    CUDA's default is FASTEST_FIRST: it guesses the fastest GPU and leaves the order of the rest unspecified, so only GPUs
    of one model, or PCI_BUS_ID, give a certain order. A GPU that fails may be missing from CUDA's list or not.
    """
    working = [gpu for gpu in machine.gpus if gpu.error is None]
    by_bus = sorted(working, key=lambda gpu: (gpu.bus_id or "", gpu.index))
    if any(gpu.bus_id is None for gpu in working):
        by_bus = sorted(working, key=lambda gpu: gpu.index)
    is_by_bus = machine.environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    has_one_model = len({(gpu.name, gpu.compute_capability) for gpu in working}) <= 1
    is_certain = (
        (is_by_bus or has_one_model) and not any(gpu.mig_enabled for gpu in working) and len(working) == len(machine.gpus)
    )
    if not (is_by_bus or has_one_model):
        fastest = max(by_bus, key=lambda gpu: (gpu.compute_capability or (0, 0), gpu.memory_total_bytes or 0, -gpu.index))
        by_bus = [fastest, *(gpu for gpu in by_bus if gpu is not fastest)]
    return [gpu.index for gpu in by_bus], is_certain


def _read(value: str, order: list[int], gpus: Mapping[int, Gpu]) -> tuple[list[int], _Stop | None, list[str]]:
    """Read entries until one is refused; returns GPU indices, what ended it, and remarks on entries read loosely."""
    chosen: list[int] = []
    remarks: list[str] = []
    # One entry more than there are GPUs is always refused: it repeats one or names none.
    entries = value.split(",", len(order) + 1)
    for position, entry in enumerate(entries):
        index = _resolve(value, entry, order, gpus)
        if isinstance(index, str):
            # A list may end in a comma or in -1: both are idioms, and nothing is lost.
            is_idle_end = bool(chosen) and position == len(entries) - 1 and entry.strip() in ("", "-1")
            return chosen, None if is_idle_end else _Stop(entry, index), remarks
        if index in chosen:
            return chosen, _Stop(entry, "is there twice", hides_all=True), remarks
        chosen.append(index)
        if value.startswith("MIG-"):
            if _OLD_MIG.fullmatch(entry):
                remarks.append(f"{quote(entry)} is the old form of drivers before 470: name the slice by its own MIG UUID")
            if position + 1 < len(entries):
                remarks.append("one process sees one MIG slice only: the first")
            break
        if not value.startswith("GPU-") and not re.fullmatch(r"\s*\+?[0-9]+\s*", entry, re.ASCII):
            remarks.append(f"{quote(entry)} is read as {order.index(index)}")
    return chosen, None, remarks


def _resolve(value: str, entry: str, order: list[int], gpus: Mapping[int, Gpu]) -> int | str:
    """GPU index of one entry, or why CUDA refuses it. The first entry decides whether names or numbers are expected."""
    if value.startswith("GPU-"):
        return (
            _by_uuid(entry, [gpus[index] for index in order])
            if entry.startswith("GPU-")
            else "is not a GPU UUID like the first"
        )
    if value.startswith("MIG-"):
        return _by_mig(entry, [gpus[index] for index in order])
    entry = entry.strip()
    match = _INTEGER.match(entry)
    if match is None:
        if entry.startswith(("GPU-", "MIG-")):
            return "is a UUID behind a number or a space, where CUDA expects a number"
        hint = " (a word of NVIDIA_VISIBLE_DEVICES)" if entry.lower() in ("all", "none", "void") else ""
        return f"is not a GPU index or UUID{hint}"
    ordinal = int(match[1])
    if ordinal >= len(order):
        last = f"the last index is {len(order) - 1}" if order else "there is none"
        return f"names a GPU that does not exist: {last}"
    return order[ordinal]


def _by_uuid(entry: str, gpus: list[Gpu]) -> int | str:
    found = [gpu.index for gpu in gpus if gpu.uuid.startswith(entry)]
    if len(found) == 1:
        return found[0]
    return f"is the beginning of {len(found)} GPU UUIDs" if found else "matches no GPU of this machine"


def _by_mig(entry: str, gpus: list[Gpu]) -> int | str:
    old = _OLD_MIG.fullmatch(entry)
    if old is not None:
        return _by_uuid(old[1], gpus)
    found = [gpu.index for gpu in gpus if any(slice_.uuid.startswith(entry) for slice_ in gpu.mig_devices)]
    return found[0] if found else "matches no MIG slice of this machine"


def _problem(value: str, gpus: list[int], stop: _Stop | None, remarks: list[str]) -> str | None:
    shown = f"{VARIABLE}={quote(value)}"
    if not value.strip() or (stop is not None and not gpus and stop.entry.strip() in _NOTHING):
        return f"{shown} hides every GPU."
    if stop is not None:
        names = ", ".join(map(str, gpus))
        effect = f"only GPU{'s' if len(gpus) > 1 else ''} {names} can be seen" if gpus else "every GPU is hidden"
        entry = "" if stop.entry == value else f": {quote(stop.entry)}"
        return f"{shown}{entry} {stop.why}, so {effect}."
    return f"{shown}: {'; '.join(remarks)}." if remarks else None


def _corrected(value: str, order: list[int], gpus: tuple[Gpu, ...]) -> str | None:
    """Keep what the value plainly names, in its order and each once; all GPUs when it names none."""
    kept: list[str] = []
    for word in re.split(r"[\s,;\"'\[\](){}]+", value[:MAX_VALUE_CHARS]):
        word_kept = _repaired(word, len(order), gpus)
        if word_kept is not None and word_kept not in kept:
            kept.append(word_kept)
    if kept and kept[0].startswith("MIG-"):
        return kept[0]
    uuids = [word for word in kept if word.startswith("GPU-")]
    if uuids and len(uuids) < len(kept):
        # Names and numbers do not mix: write all of them as names.
        by_index = {gpu.index: gpu.uuid for gpu in gpus}
        kept = list(
            dict.fromkeys(
                by_index[order[int(word)]] if word.isdigit() else word for word in kept if not word.startswith("MIG-")
            )
        )
    return ",".join(kept or [str(ordinal) for ordinal in range(len(order))]) or None


def _repaired(word: str, count: int, gpus: tuple[Gpu, ...]) -> str | None:
    number = re.match(r"(?:cuda:|gpu)?\+?([0-9]{1,9})(?![0-9])", word, re.ASCII | re.IGNORECASE)
    if number is not None:
        return str(int(number[1])) if int(number[1]) < count else None
    old_mig = _OLD_MIG.fullmatch(word)
    if old_mig is not None:
        slices = [slice_.uuid for gpu in gpus if gpu.uuid == old_mig[1] for slice_ in gpu.mig_devices]
        return slices[0] if len(slices) == 1 else None
    names = [gpu.uuid for gpu in gpus if gpu.error is None] + [slice_.uuid for gpu in gpus for slice_ in gpu.mig_devices]
    found = [name for name in names if len(word) > 4 and name.lower().startswith(word.lower())]
    return found[0] if len(found) == 1 else None


def _with_torch_order(seen: Visibility, machine: Machine) -> Visibility:
    """Where torch names each of the visible GPUs by UUID, its order is the truth."""
    by_uuid = {gpu.uuid.lower(): gpu.index for gpu in machine.gpus}
    devices = sorted(machine.torch.devices, key=lambda device: device.ordinal)
    found = [by_uuid.get(_torch_uuid(device.uuid) or "") for device in devices]
    order = tuple(index for index in found if index is not None)
    if not order or len(order) != len(found) or len(order) != len(seen.gpus) or len(set(order)) != len(order):
        return seen
    return msgspec.structs.replace(seen, gpus=order, is_order_certain=True)


def _torch_uuid(uuid: str | None) -> str | None:
    """Normalize a UUID of torch: it prints them without the ``GPU-`` that NVML puts before it."""
    if uuid is None:
        return None
    lower = uuid.lower()
    return lower if lower.startswith(("gpu-", "mig-")) else f"gpu-{lower}"
