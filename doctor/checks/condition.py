"""1xx, fourth part: does each GPU give what it could, and in the way that is expected of it?"""

from __future__ import annotations

from collections.abc import Sequence

from ..findings import Finding, Fix
from ..machine import Gpu
from ..units import format_gib
from ._check import Check, Facts, Result, alike, found, ids, label, labels, names

_LANES = "nvidia-smi -q -i {gpus} | grep -A 2 'Link Width'"
_RISER_LANES = 4
"""At most this many lanes have the risers and extension cards that mining rigs use."""
_BFLOAT16 = (8, 0)
"""First compute capability with bfloat16 arithmetic. Source: CUDA C++ programming guide, arithmetic instructions."""
_INFOROM = "inforom"
_SLOWDOWNS = {
    "hw_thermal": "it is too hot",
    "sw_thermal": "the driver keeps it cool",
    "hw_power_brake": "the power supply asks for it",
    "hw_slowdown": "the hardware asks for it",
}
"""Worst-explained last: ``hw_slowdown`` comes with the others, too."""


def narrow_pcie(facts: Facts) -> Result:
    """A GPU uses fewer PCIe lanes than it could.

    ## What it checks
    The width of each GPU's PCIe link against what card and slot allow together, and against GPUs of the same model. The
    generation is left out: idle links go down to the first by design.

    ## Why it matters
    Loading a model, offloading, and a split without NVLink go over these lanes.

    ## Example
    `warning VLM115 GPU 1 (NVIDIA A10) uses 4 of 16 PCIe lanes, GPUs of its model here use 16.`

    ## What to do
    Reseat the card, look at risers and at the board's lane sharing. By hand: `nvidia-smi
    --query-gpu=index,pcie.link.width.current,pcie.link.width.max --format=csv`.

    ## When it is fine
    Laptops, virtual machines and boards that give every card 8 lanes: where all GPUs of a model are alike it is only
    mentioned.

    ## Sources
    nvmlDeviceGetCurrPcieLinkWidth, nvmlDeviceGetMaxPcieLinkWidth.
    """
    return tuple(_narrow(facts, gpus) for gpus in alike(facts.working, _lanes_lost))


def _lanes_lost(gpu: Gpu) -> tuple[str, int, int] | None:
    """Name, width and possible width of a GPU that could use more lanes."""
    width, most = gpu.pcie_width, gpu.pcie_width_max
    return (gpu.name, width, most) if width is not None and most is not None and width < most else None


def _narrow(facts: Facts, gpus: Sequence[Gpu]) -> Finding:
    gpu = gpus[0]
    width, most = gpu.pcie_width or 0, gpu.pcie_width_max
    best = max(other.pcie_width or 0 for other in facts.working if other.name == gpu.name)
    is_bare = facts.machine.host is not None and facts.machine.host.is_virtual_machine is False
    is_wrong = best > width or (is_bare and width <= _RISER_LANES and "Laptop" not in gpu.name)
    others = f", GPUs of its model here use {best}" if best > width else ""
    return found(
        "warning" if is_wrong else "info",
        f"{labels(gpus)} {'uses' if len(gpus) == 1 else 'use'} {width} of {most} PCIe lanes{others}.",
        cause="A card or riser that sits badly, or lanes that the board shares." if is_wrong else None,
        evidence=facts.evidence(*(facts.path(gpu, name) for gpu in gpus for name in ("pcie_width", "pcie_width_max"))),
        fix=Fix(
            text="Reseat the card, and look at risers and at the board's lane sharing.",
            commands=(_LANES.format(gpus=ids(gpus)),),
            who="administrator",
        ),
        gpus=gpus,
    )


def held_down(facts: Facts) -> Result:
    """The clocks of a GPU are held down at this moment.

    ## What it checks
    The driver's reasons for low clocks: heat, and slowdowns that hardware or power supply ask for. Idle clocks and the
    power cap under load are normal and left out.

    ## Why it matters
    One slow GPU slows every stage of a split.

    ## Example
    `warning VLM116 GPU 0 (NVIDIA A100) runs at reduced clocks: it is too hot.`

    ## What to do
    Look at temperature and power: `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`. Heat: fans, air flow. Power brake:
    cables and power supply.

    ## When it is fine
    On a laptop that runs on its battery.

    ## Sources
    nvmlDeviceGetCurrentClocksEventReasons.
    """
    slow = [gpu for gpu in facts.working if gpu.slowdowns]
    return tuple(_slow(facts, gpus) for gpus in alike(slow, lambda gpu: (gpu.name, _reason(gpu))))


def _reason(gpu: Gpu) -> str:
    return next(text for name, text in _SLOWDOWNS.items() if name in (gpu.slowdowns or ()))


def _slow(facts: Facts, gpus: Sequence[Gpu]) -> Finding:
    reason = _reason(gpus[0]) if len(gpus) == 1 else _reason(gpus[0]).replace("it is", "they are").replace(" it ", " them ")
    return found(
        "info" if "Laptop" in gpus[0].name else "warning",
        f"{labels(gpus)} {'runs' if len(gpus) == 1 else 'run'} at reduced clocks: {reason}.",
        evidence=facts.evidence(*(facts.path(gpu, "slowdowns") for gpu in gpus)),
        fix=Fix(
            text="Look at temperature and power.",
            commands=(f"nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER -i {ids(gpus)}",),
            who="administrator",
        ),
        gpus=gpus,
    )


def corrupt_inforom(facts: Facts) -> Result:
    """The infoROM of a GPU is damaged.

    ## What it checks
    Whether NVML answered any question about a GPU with error 14, "infoROM is corrupted".

    ## Why it matters
    The GPU computes, but its error counters and serial number are lost.

    ## Example
    `warning VLM121 GPU 0 (Tesla T4): the infoROM is corrupted.`

    ## What to do
    Power the machine off and on. If it stays, ask the maker for a replacement.

    ## When it is fine
    Mostly harmless; nvidia-smi ends with exit status 14 all the same, which scripts take for a failure.

    ## Sources
    nvmlReturn_t 14; NVIDIA GPU Operator, Troubleshooting.
    """
    told = [gap.path for gap in facts.machine.gaps if _INFOROM in gap.reason.lower()]
    damaged = [gpu for gpu in facts.machine.gpus if _has_damaged_rom(facts, gpu, told)]
    if not damaged:
        return ()
    return (
        found(
            "warning",
            f"{labels(damaged)}: the infoROM is corrupted.",
            evidence=facts.evidence(*(facts.path(gpu, name) for gpu in damaged for name in ("name", "ecc_uncorrected"))),
            fix=Fix(text="Power the machine off and on; if it stays, have the card replaced.", who="administrator"),
            gpus=damaged,
        ),
    )


def _has_damaged_rom(facts: Facts, gpu: Gpu, told: Sequence[str]) -> bool:
    where = facts.path(gpu, "")
    return _INFOROM in (gpu.error or "").lower() or any(f"{path}.".startswith(where) for path in told)


def no_bfloat16(facts: Facts) -> Result:
    """A visible GPU has no bfloat16 arithmetic.

    ## What it checks
    The compute capability of each visible GPU: bfloat16 came with 8.0 (Ampere).

    ## Why it matters
    Most checkpoints are in bfloat16, and transformers loads them so by default. On older GPUs torch converts at each
    step: slow, and flash-attention does not run at all. `torch.cuda.is_bf16_supported()` says yes all the same, and looks
    at one GPU only.

    ## Example
    `warning VLM122 GPU 0 (Tesla T4) has no bfloat16, other visible GPUs have: one slow stage slows the whole model.`

    ## What to do
    `dtype=torch.float16`, or hide the old GPU with CUDA_VISIBLE_DEVICES.

    ## When it is fine
    Where all GPUs are alike it is only mentioned.

    ## Sources
    nvmlDeviceGetCudaComputeCapability; CUDA C++ programming guide; torch 2.13, `torch.cuda.is_bf16_supported`.
    """
    known = [gpu for gpu in facts.visible if gpu.compute_capability is not None]
    old = [gpu for gpu in known if (gpu.compute_capability or _BFLOAT16) < _BFLOAT16]
    if not old:
        return ()
    is_mixed = len(old) < len(known)
    whose = label(old[0]) if len(old) == 1 else names(old)
    verb = "has" if len(old) == 1 else "have"
    tail = ", other visible GPUs have: one slow stage slows the whole model" if is_mixed else ""
    newer = ",".join(str(o) for o, index in enumerate(facts.visibility.gpus) if index not in {gpu.index for gpu in old})
    is_free = is_mixed and facts.visibility.value is None
    commands = (
        (f"export CUDA_VISIBLE_DEVICES={newer}",) if is_free else ("nvidia-smi --query-gpu=name,compute_cap --format=csv",)
    )
    return (
        found(
            "warning" if is_mixed else "info",
            f"{whose} {verb} no bfloat16{tail}.",
            cause="bfloat16 came with compute capability 8.0.",
            evidence=facts.evidence(*(facts.path(gpu, "compute_capability") for gpu in old[:4])),
            fix=Fix(text="Load in float16 (dtype=torch.float16), or hide the old GPU.", commands=commands),
            gpus=old,
        ),
    )


def shared_memory(facts: Facts) -> Result:
    """A GPU shares the memory of the host.

    ## What it checks
    Whether a GPU has memory of its own.

    ## Why it matters
    Its budget is what the host has left, and weights kept "on the CPU" take from the same memory: offloading gains
    nothing. nvidia-smi shows no memory at all for it.

    ## Example
    `info VLM123 GPU 0 (NVIDIA GB10) has no memory of its own: it shares the host's, 110.0 GiB of which are free.`

    ## What to do
    Nothing. Plan with the host's free memory.

    ## When it is fine
    Always: it is only mentioned.

    ## Sources
    nvmlDeviceGetMemoryInfo ("Not Supported"); nvitop issue 208, ollama issue 12619.
    """
    sharing = [gpu for gpu in facts.working if gpu.has_unified_memory]
    host = facts.machine.host
    free = host.memory_available_bytes if host is not None else None
    amount = f", {format_gib(free)} of which are free" if free is not None else ""
    return tuple(
        found(
            "info",
            f"{label(gpu)} has no memory of its own: it shares the host's{amount}.",
            evidence=facts.evidence(facts.path(gpu, "has_unified_memory"), "host.memory_available_bytes"),
            gpus=(gpu,),
        )
        for gpu in sharing
    )


CHECKS = (
    Check(code="VLM115", title="PCIe link narrower than it could be", run=narrow_pcie, needs=("gpus[].pcie_width",)),
    Check(code="VLM116", title="clocks held down", run=held_down, needs=("gpus[].slowdowns",)),
    Check(code="VLM121", title="infoROM damaged", run=corrupt_inforom, needs=("gpus",)),
    Check(code="VLM122", title="GPU without bfloat16", run=no_bfloat16, needs=("gpus[].compute_capability",)),
    Check(code="VLM123", title="memory shared with the host", run=shared_memory, needs=("gpus[].has_unified_memory",)),
)
