"""GPU catalogue: what a card reports, for made-up machines.

Total is what NVML and ``nvidia-smi`` say, not the data sheet: an "80 GB" H100 has 81,559 MiB, and ECC takes a sixteenth
of a GDDR card (a 24 GB L4 has 23,034). Reserved is the driver's own share: total less what CUDA calls total. It grows by
some tens of MiB from driver to driver; the figures are those of recent ones (550 to 595).

Sources: H200 measured (driver 580.159); totals of H100, A100, A10, L40S, L4 and T4 from modal-labs/modal-client #2797;
the others from ``nvidia-smi`` listings in public threads. CUDA's totals are those that torch prints in out-of-memory
texts and device properties. NVLink ports are those of NVIDIA's data sheets. GeForce cards from the 40 series on are granted
no peer access over PCIe: accelerate's ``check_cuda_p2p_ib_support``, huggingface/accelerate #2195.
"""

from __future__ import annotations

from typing import NamedTuple

from ..units import MIB


class GpuModel(NamedTuple):
    """One card."""

    name: str
    """As NVML reports it."""
    memory_total_bytes: int
    memory_reserved_bytes: int
    """The driver's own share on an idle card."""
    compute_capability: tuple[int, int]
    nvlinks: int
    """NVLink ports; 0 where the card has none."""
    lacks_pcie_peers: bool = False
    """The driver grants it no access to the memory of other cards over PCIe, whatever the board can do."""


def _model(name: str, total_mib: int, reserved_mib: int, capability: tuple[int, int], nvlinks: int = 0) -> GpuModel:
    lacks_pcie_peers = name.startswith(("NVIDIA GeForce RTX 40", "NVIDIA GeForce RTX 50"))
    return GpuModel(name, total_mib * MIB, reserved_mib * MIB, capability, nvlinks, lacks_pcie_peers)


GPUS: dict[str, GpuModel] = {
    # Data center
    "B200": _model("NVIDIA B200", 183359, 717, (10, 0), 18),
    "H200": GpuModel("NVIDIA H200", 150_754_820_096, 644_939_776, (9, 0), 18),
    "H100": _model("NVIDIA H100 80GB HBM3", 81559, 551, (9, 0), 18),
    "A100-80": _model("NVIDIA A100-SXM4-80GB", 81920, 768, (8, 0), 12),
    "A100-40": _model("NVIDIA A100-SXM4-40GB", 40960, 625, (8, 0), 12),
    "L40S": _model("NVIDIA L40S", 46068, 602, (8, 9)),
    "L40": _model("NVIDIA L40", 46068, 602, (8, 9)),
    "L4": _model("NVIDIA L4", 23034, 475, (8, 9)),
    "A10": _model("NVIDIA A10", 23028, 441, (8, 6)),
    "A10G": _model("NVIDIA A10G", 23028, 441, (8, 6)),
    "T4": _model("Tesla T4", 15360, 451, (7, 5)),
    "V100-32": _model("Tesla V100-SXM2-32GB", 32768, 276, (7, 0), 6),
    "V100-16": _model("Tesla V100-SXM2-16GB", 16384, 254, (7, 0), 6),
    # Workstation
    "RTXPRO6000": _model("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, 637, (12, 0)),
    "RTX6000Ada": _model("NVIDIA RTX 6000 Ada Generation", 49140, 500, (8, 9)),
    "A6000": _model("NVIDIA RTX A6000", 49140, 464, (8, 6), 4),
    "A5000": _model("NVIDIA RTX A5000", 24564, 450, (8, 6), 4),
    # Consumer
    "5090": _model("NVIDIA GeForce RTX 5090", 32607, 494, (12, 0)),
    "4090": _model("NVIDIA GeForce RTX 4090", 24564, 480, (8, 9)),
    "4070TiSUPER": _model("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, 402, (8, 9)),
    "3090": _model("NVIDIA GeForce RTX 3090", 24576, 317, (8, 6), 4),
    "3060": _model("NVIDIA GeForce RTX 3060", 12288, 357, (8, 6)),
}

ALIASES = {"A100": "A100-80", "H100-80": "H100", "V100": "V100-32"}
"""Names that leave the memory open mean the larger card."""


def find_gpu(name: str) -> GpuModel | None:
    """A card by the name people write: ``rtx-4090``, ``NVIDIA A100 80GB`` and ``a100-80`` are all understood."""
    return _BY_KEY.get(_key(name))


def _key(name: str) -> str:
    key = "".join(character for character in name.casefold() if character.isalnum())
    for prefix in ("nvidia", "geforce", "tesla", "rtx"):
        key = key.removeprefix(prefix)
    return key.removesuffix("gb")


_BY_KEY = {_key(model.name): model for model in GPUS.values()}
_BY_KEY |= {_key(name): model for name, model in GPUS.items()}
_BY_KEY |= {_key(alias): GPUS[name] for alias, name in ALIASES.items()}
