"""1xx, fifth part: modes and services that decide whether a GPU may be used."""

from __future__ import annotations

from collections.abc import Sequence

from ..findings import Finding, Fix
from ..machine import Gpu
from ._check import Check, Facts, Result, alike, found, labels, names, skipped

_DEAD = "The MPS control daemon has died and left its files behind."
_ELSEWHERE = "The files of an MPS control daemon are here, but not the daemon: it may run on the host."


def virtual_gpu(facts: Facts) -> Result:
    """A GPU is a virtual one (vGPU).

    ## What it checks
    The virtualization mode of each GPU, and the licence of a vGPU.

    ## Why it matters
    Without a licence a vGPU is slowed down after a while, and CUDA may refuse to start. It has a slice of the card's
    memory, no NVLink, and as a rule no peer access.

    ## Example
    `warning VLM117 GPU 0 (GRID A100-10C) is a vGPU without a licence: it will be slowed down.`

    ## What to do
    Put the licence token into `/etc/nvidia/ClientConfigToken` and restart `nvidia-gridd`. By hand: `nvidia-smi -q | grep
    -i license`.

    ## When it is fine
    With a licence it is only mentioned. Whole GPUs that are passed through to a virtual machine are not vGPUs.

    ## Sources
    nvmlDeviceGetVirtualizationMode, nvmlDeviceGetGridLicensableFeatures; NVIDIA, Virtual GPU Client Licensing.
    """
    virtual = [gpu for gpu in facts.working if gpu.virtualization == "vgpu"]
    return tuple(_virtual(facts, gpus) for gpus in alike(virtual, lambda gpu: (gpu.name, gpu.is_licensed is False)))


def _virtual(facts: Facts, gpus: Sequence[Gpu]) -> Finding:
    is_bad, is_one = gpus[0].is_licensed is False, len(gpus) == 1
    are = "is a vGPU" if is_one else "are vGPUs"
    says = (
        f"{are} without a licence: {'it' if is_one else 'they'} will be slowed down"
        if is_bad
        else f"{are}: a slice of a card, without NVLink"
    )
    return found(
        "warning" if is_bad else "info",
        f"{labels(gpus)} {says}.",
        evidence=facts.evidence(*(facts.path(gpu, name) for gpu in gpus for name in ("virtualization", "is_licensed"))),
        fix=Fix(
            text="Give the virtual machine its licence token.",
            commands=("ls -l /etc/nvidia/ClientConfigToken", "sudo systemctl restart nvidia-gridd"),
            who="administrator",
        )
        if is_bad
        else None,
        gpus=gpus,
    )


def confidential_not_ready(facts: Facts) -> Result:
    """Confidential computing keeps work off the GPUs.

    ## What it checks
    Whether the GPUs of a machine in confidential computing mode are set ready.

    ## Why it matters
    Until attestation has set them ready, CUDA fails with error 802, "system not yet initialized".

    ## Example
    `error VLM118 The GPUs are in confidential computing mode and not set ready.`

    ## What to do
    Attest them, then `sudo nvidia-smi conf-compute -srs 1`.

    ## When it is fine
    While a virtual machine starts, before attestation.

    ## Sources
    nvmlSystemGetConfComputeGpusReadyState; NVIDIA/nvtrust issue 109.
    """
    is_ready = facts.machine.driver.is_confidential_ready
    if is_ready is None:
        return skipped("no confidential computing")
    if is_ready:
        return ()
    return (
        found(
            "error",
            "The GPUs are in confidential computing mode and not set ready.",
            cause="They are set ready after attestation.",
            evidence=facts.evidence("driver.is_confidential_ready"),
            fix=Fix(
                text="Attest the GPUs, then set them ready.",
                commands=("sudo nvidia-smi conf-compute -srs 1",),
                who="administrator",
            ),
        ),
    )


def dead_mps(facts: Facts) -> Result:
    """The daemon of CUDA's multi-process service has died.

    ## What it checks
    Whether the MPS control daemon, whose files are there, still runs.

    ## Why it matters
    Programs find the files, try to reach the daemon, and CUDA fails with error 805 or waits.

    ## Example
    `error VLM119 The MPS control daemon has died and left its files behind.`

    ## What to do
    Start it again with `nvidia-cuda-mps-control -d`, or remove its folder (`/tmp/nvidia-mps`, or what
    CUDA_MPS_PIPE_DIRECTORY names) to do without.

    ## When it is fine
    In a container that shares the folder but not the processes of the host: there it is only mentioned.

    ## Sources
    `nvidia-cuda-mps-control.pid`; NVIDIA, Multi-Process Service; k8s-device-plugin issue 1118.
    """
    host = facts.machine.host
    if host is None or host.mps in (None, "absent"):
        return skipped("no multi-process service")
    if host.mps == "running":
        return ()
    return (
        found(
            "info" if host.container is not None else "error",
            _DEAD if host.container is None else _ELSEWHERE,
            evidence=facts.evidence("host.mps", "environment.CUDA_MPS_PIPE_DIRECTORY"),
            fix=Fix(
                text="Start the MPS daemon again, or remove its folder.",
                commands=("nvidia-cuda-mps-control -d",),
                who="administrator",
            ),
        ),
    )


def no_persistence(facts: Facts) -> Result:
    """The driver unloads the GPUs whenever nobody uses them.

    ## What it checks
    Persistence mode of GPUs that nothing uses at the moment.

    ## Why it matters
    Every first use then starts the GPU anew: seconds for each process, tens of seconds with eight GPUs.

    ## Example
    `info VLM120 GPUs 0, 1 are unloaded when idle: persistence mode is off.`

    ## What to do
    `sudo systemctl enable --now nvidia-persistenced`.

    ## When it is fine
    Always: it costs time only. Desktops and laptops are better off without.

    ## Sources
    nvmlDeviceGetPersistenceMode; NVIDIA, Driver Persistence.
    """
    idle = [g for g in facts.working if g.persistence_mode is False and not g.processes and not g.display_active]
    if not idle:
        return ()
    return (
        found(
            "info",
            f"{names(idle)} {'are' if len(idle) > 1 else 'is'} unloaded when idle: persistence mode is off.",
            evidence=facts.evidence(*(facts.path(gpu, "persistence_mode") for gpu in idle[:4])),
            fix=Fix(
                text="Let the persistence daemon keep the GPUs up.",
                commands=("sudo systemctl enable --now nvidia-persistenced",),
                who="administrator",
            ),
            gpus=idle,
        ),
    )


CHECKS = (
    Check(code="VLM117", title="virtual GPU", run=virtual_gpu, needs=("gpus[].virtualization",)),
    Check(code="VLM118", title="confidential computing not ready", run=confidential_not_ready, needs=("gpus",)),
    Check(code="VLM119", title="MPS daemon dead", run=dead_mps, needs=("gpus", "host")),
    Check(code="VLM120", title="persistence mode off", run=no_persistence, needs=("gpus[].persistence_mode",)),
)
