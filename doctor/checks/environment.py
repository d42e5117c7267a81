"""2xx, second half: does the environment mean the GPUs that this process gets?"""

from __future__ import annotations

import re
import shlex

from ..findings import Fix
from ..visibility import VARIABLE, quote
from ._check import Check, Facts, Result, found, skipped
from ._remedy import start_anew

_GRANTS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
"""The step's own is the narrower. Source: Slurm, srun and sbatch, output environment variables."""
_FOREIGN = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""Variables of ROCm."""
_INJECTED = "NVIDIA_VISIBLE_DEVICES"


def more_than_granted(facts: Facts) -> Result:
    """This process sees more GPUs than the scheduler gave to the job.

    ## What it checks
    GPUs that Slurm granted against GPUs that CUDA shows.

    ## Why it matters
    Without device isolation a job can take the GPUs of somebody else, and both run out of memory.

    ## Example
    `warning VLM207 Slurm gave this job GPU 2, but CUDA shows 4 GPUs.`

    ## What to do
    Set the value that the finding gives, and do not unset CUDA_VISIBLE_DEVICES in the job.

    ## When it is fine
    On a node that the job has for itself.

    ## Sources
    SLURM_STEP_GPUS, SLURM_JOB_GPUS; Slurm, Generic Resource (GRES) Scheduling.
    """
    environment = facts.machine.environment
    name = next((name for name in _GRANTS if name in environment), None)
    if name is None:
        return skipped("no GPU scheduler")
    granted = list(dict.fromkeys(re.findall(r"[0-9]{1,4}", environment[name][:400], re.ASCII)))
    if not granted or len(facts.visible) <= len(granted):
        return ()
    known = {str(gpu.index) for gpu in facts.machine.gpus}
    value = ",".join(granted) if known.issuperset(granted) else ",".join(map(str, range(len(granted))))
    plural = "s" if len(granted) != 1 else ""
    return (
        found(
            "warning",
            f"Slurm gave this job GPU{plural} {', '.join(granted[:16])}, but CUDA shows {len(facts.visible)} GPUs.",
            cause="CUDA_VISIBLE_DEVICES was changed in the job, and the node does not isolate devices.",
            evidence=facts.evidence(f"environment.{name}", f"environment.{VARIABLE}"),
            fix=Fix(text="Use the GPUs that were granted, no others.", commands=(f"export {VARIABLE}={value}",)),
        ),
    )


def other_gpus_than_asked(facts: Facts) -> Result:
    """NVIDIA_VISIBLE_DEVICES does not do what it says here.

    ## What it checks
    GPUs that NVIDIA_VISIBLE_DEVICES names against those in the container, and the device files that can be opened; whether
    it is set outside a container.

    ## Why it matters
    The NVIDIA container runtime reads it when the container is made. Set later, or outside, it changes nothing: that is
    what CUDA_VISIBLE_DEVICES is for.

    ## Example
    `warning VLM208 NVIDIA_VISIBLE_DEVICES='0,1' names 2 GPUs, but this container has 1.`

    ## What to do
    Start the container with `--gpus '"device=0,1"'`; inside, use CUDA_VISIBLE_DEVICES.

    ## When it is fine
    Outside a container it is only mentioned, as where a process may open fewer device files than the container was made
    with, and each of these GPUs answers: somebody gave it a part on purpose.

    ## Sources
    NVIDIA Container Toolkit, "Specialized Configurations with Docker".
    """
    value = facts.machine.environment.get(_INJECTED)
    if value is None:
        return skipped(f"{_INJECTED} is not set")
    if facts.container is None:
        return (
            found(
                "info",
                f"{_INJECTED}={quote(value)} has no effect outside a container.",
                evidence=facts.evidence(f"environment.{_INJECTED}", "host.container"),
                fix=Fix(text=f"Use {VARIABLE}.", commands=(f"unset {_INJECTED}",)),
            ),
        )
    named = dict.fromkeys(word.strip() for word in value[:4096].split(",") if word.strip())
    is_list = all(re.fullmatch(r"[0-9]{1,4}|GPU-[0-9a-fA-F-]{4,40}", word, re.ASCII) for word in named)
    have = len(facts.machine.gpus)
    if not named or not is_list or have >= len(named):
        return ()
    driver = facts.machine.driver
    files = {name for name in driver.device_files if re.fullmatch(r"/dev/nvidia[0-9]+", name, re.ASCII)}
    # What was withheld from this process is not broken: each GPU whose file it may open answers.
    is_withheld = 0 < have == len(files.difference(driver.forbidden_device_files))
    return (
        found(
            "info" if is_withheld else "warning",
            f"{_INJECTED}={quote(value)} names {len(named)} GPU{'s' if len(named) > 1 else ''}, "
            f"but this container has {have}{', as many as it may open' if is_withheld else ''}.",
            cause="The variable was changed after the container was made, or this process was given fewer of its GPUs."
            if is_withheld
            else "The variable was changed after the container was made, or a GPU is gone.",
            evidence=facts.evidence(
                f"environment.{_INJECTED}",
                "driver.device_files",
                *(["driver.forbidden_device_files"] if is_withheld else []),
            ),
            fix=start_anew(
                facts,
                "Start the container anew with the GPUs that you want.",
                gpus=shlex.quote(f'"device={",".join(named)}"'),
            ),
        ),
    )


def wsl_with_several(facts: Facts) -> Result:
    """WSL2 hides how several GPUs are joined.

    ## What it checks
    Whether several GPUs are used inside WSL2.

    ## Why it matters
    There is no NVLink and no peer access in WSL2, copies go through the host, and NVML leaves most questions open.

    ## Example
    `info VLM209 WSL2 with 2 GPUs: copies between them go through the host, and their links are not told.`

    ## What to do
    Prefer one GPU, or run under Linux itself. If collectives hang: `export NCCL_P2P_DISABLE=1`.

    ## When it is fine
    Always: it is only mentioned.

    ## Sources
    NVIDIA, CUDA on WSL, known limitations; NVIDIA/nccl issue 442.
    """
    host = facts.machine.host
    if host is None or not host.is_wsl:
        return skipped("not in WSL2")
    if len(facts.visible) < 2:
        return ()
    return (
        found(
            "info",
            f"WSL2 with {len(facts.visible)} GPUs: copies between them go through the host, and their links are not told.",
            evidence=facts.evidence("host.is_wsl", "host.kernel"),
            fix=Fix(text="If collectives hang, switch peer access off.", commands=("export NCCL_P2P_DISABLE=1",)),
            gpus=facts.visible,
        ),
    )


def foreign_variables(facts: Facts) -> Result:
    """Variables that choose GPUs of another maker are set.

    ## What it checks
    HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and GPU_DEVICE_ORDINAL on a machine with NVIDIA GPUs.

    ## Why it matters
    They change nothing here, though somebody meant them to; some launchers refuse to start when they disagree with
    CUDA_VISIBLE_DEVICES.

    ## Example
    `info VLM210 HIP_VISIBLE_DEVICES is set, which says nothing to NVIDIA GPUs.`

    ## What to do
    `unset HIP_VISIBLE_DEVICES`; for NVIDIA GPUs use CUDA_VISIBLE_DEVICES.

    ## When it is fine
    Always: it is only mentioned.

    ## Sources
    ROCm, "GPU isolation techniques"; `torch.cuda._parse_visible_devices` of torch 2.13.
    """
    present = [name for name in _FOREIGN if name in facts.machine.environment]
    if not present:
        return ()
    verb = "is set, which says" if len(present) == 1 else "are set, which say"
    return (
        found(
            "info",
            f"{', '.join(present)} {verb} nothing to NVIDIA GPUs.",
            evidence=facts.evidence(*(f"environment.{name}" for name in present)),
            fix=Fix(text=f"Use {VARIABLE}.", commands=(f"unset {' '.join(present)}",)),
        ),
    )


CHECKS = (
    Check(code="VLM207", title="more GPUs than granted", run=more_than_granted, needs=("gpus",), explained_by=("VLM201",)),
    Check(
        code="VLM208",
        title="NVIDIA_VISIBLE_DEVICES without effect",
        run=other_gpus_than_asked,
        needs=("gpus", "host"),
    ),
    Check(code="VLM209", title="several GPUs in WSL2", run=wsl_with_several, needs=("gpus", "host")),
    Check(code="VLM210", title="variables of another maker", run=foreign_variables, needs=("gpus",)),
)
