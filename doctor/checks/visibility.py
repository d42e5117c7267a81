"""2xx: which GPUs may this process see, and in which order?"""

from __future__ import annotations

import shlex

import msgspec

from ..findings import Fix
from ..machine import TorchView
from ..visibility import VARIABLE, quote, visible_gpus
from ._check import Check, Facts, Result, found, label, names, plain, skipped
from ._remedy import WITH_NVML, python, start_anew

_PATH = f"environment.{VARIABLE}"
_ORDER = "CUDA_DEVICE_ORDER"


def all_hidden(facts: Facts) -> Result:
    """CUDA_VISIBLE_DEVICES is set and hides every GPU.

    ## What it checks
    What CUDA makes of CUDA_VISIBLE_DEVICES on this machine.

    ## Why it matters
    torch then sees no GPU, and `device_map="auto"` loads the model onto the CPU without an error. An empty value,
    `-1`, a repeated entry and words such as `all` (which belongs to NVIDIA_VISIBLE_DEVICES) hide everything.

    ## Example
    `error VLM201 CUDA_VISIBLE_DEVICES='' hides every GPU.`

    ## What to do
    `unset CUDA_VISIBLE_DEVICES`, or set the value that the finding gives.

    ## When it is fine
    In a job that is meant to run on the CPU: ignore it with `--ignore VLM201`.

    ## Sources
    CUDA programming guide, environment variables; `torch.cuda._parse_visible_devices` of torch 2.13.
    """
    seen = facts.visibility
    if seen.problem is None or seen.gpus:
        return ()
    if seen.value == "NoDevFiles":
        cause = "Slurm sets it for a job that was given no GPU."
        fix = Fix(text="Ask Slurm for GPUs.", commands=("srun --gpus=1 --pty bash",))
    else:
        is_empty = not seen.value or not seen.value.strip()
        cause = (
            "An empty value names no GPU; only where the variable is not set are all of them visible."
            if is_empty
            else "CUDA drops the first entry it does not accept and everything after it, without a message."
        )
        is_named = bool(seen.corrected) and not is_empty and (seen.value or "").strip() != "-1"
        fix = (
            Fix(text="Set the corrected value.", commands=(f"export {VARIABLE}={shlex.quote(seen.corrected or '')}",))
            if is_named
            else Fix(text="Unset the variable, or name in it the GPUs you want.", commands=(f"unset {VARIABLE}",))
        )
    return (
        found(
            "error",
            seen.problem,
            cause=cause,
            evidence={_PATH: quote(facts.machine.environment[VARIABLE])},
            fix=fix,
        ),
    )


def list_cut(facts: Facts) -> Result:
    """An entry of CUDA_VISIBLE_DEVICES cuts the list short, or is read in another way than it looks.

    ## What it checks
    Each entry: does it name a GPU of this machine, in a form that CUDA reads?

    ## Why it matters
    CUDA stops at the first entry it does not accept and says nothing: `0,9,1` on two GPUs gives one GPU. `0 1` and
    `0;1` are read as `0`.

    ## Example
    `error VLM202 CUDA_VISIBLE_DEVICES='0,x,1': 'x' is not a GPU index or UUID, so only GPU 0 can be seen.`

    ## What to do
    Set the corrected value that the finding gives.

    ## When it is fine
    `-1` in the middle ends the list on purpose: it is a warning. At the end it is not reported.

    ## Sources
    CUDA programming guide, environment variables; `torch.cuda._parse_visible_devices` of torch 2.13.
    """
    seen = facts.visibility
    if seen.problem is None or not seen.gpus:
        return ()
    is_certain_loss = seen.cut_by is not None and seen.cut_by.strip("' ") != "-1"
    value = shlex.quote(seen.corrected or "")
    return (
        found(
            "error" if is_certain_loss else "warning",
            seen.problem,
            cause="CUDA reads the list up to the first entry it does not accept.",
            evidence={_PATH: quote(facts.machine.environment[VARIABLE])},
            fix=Fix(text="Set the corrected value.", commands=(f"export {VARIABLE}={value}",)),
        ),
    )


def some_hidden(facts: Facts) -> Result:
    """CUDA_VISIBLE_DEVICES hides some of the GPUs, as it says.

    ## What it checks
    Which GPUs a valid CUDA_VISIBLE_DEVICES leaves out: the third step of the count PCI, driver, visible, torch.

    ## Why it matters
    Plans and checks look at the visible GPUs only. torch's `cuda:0` is the first entry, not nvidia-smi's GPU 0.

    ## Example
    `info VLM203 CUDA_VISIBLE_DEVICES shows 2 of 4 GPUs: GPUs 0, 2 are hidden.`

    ## What to do
    Nothing, or `unset CUDA_VISIBLE_DEVICES` to use all.

    ## When it is fine
    Always: it is only mentioned.

    ## Sources
    CUDA programming guide, environment variables.
    """
    hidden = [gpu for gpu in facts.working if gpu.index in facts.counts.hidden]
    if not hidden:
        return ()
    verb = "are" if len(hidden) > 1 else "is"
    return (
        found(
            "info",
            f"{VARIABLE} shows {len(facts.visible)} of {len(facts.machine.gpus)} GPUs: {names(hidden)} {verb} hidden.",
            evidence={_PATH: quote(facts.machine.environment[VARIABLE])},
            gpus=hidden,
        ),
    )


def order_differs(facts: Facts) -> Result:
    """CUDA may number the GPUs otherwise than nvidia-smi does.

    ## What it checks
    Different GPU models without `CUDA_DEVICE_ORDER=PCI_BUS_ID`. Where torch gives UUIDs, its order decides.

    ## Why it matters
    CUDA puts the GPU it believes fastest first and leaves the rest unspecified, NVML goes by PCI address: a model
    planned for the large card lands on the small one.

    ## Example
    `warning VLM204 CUDA may number these GPUs in another order than nvidia-smi: they are of 2 models.`

    ## What to do
    `export CUDA_DEVICE_ORDER=PCI_BUS_ID` in the launcher, before Python starts, or name GPUs by UUID.

    ## When it is fine
    Where only UUIDs are used, as the plans of vlm-doctor do.

    ## Sources
    CUDA programming guide, CUDA_DEVICE_ORDER (default FASTEST_FIRST); unsloth issue 6352.
    """
    machine, seen = facts.machine, facts.visibility
    models = len({gpu.name for gpu in facts.working})
    is_named = (seen.value or "").startswith(("GPU-", "MIG-"))
    if models < 2 or not seen.gpus or is_named or machine.environment.get(_ORDER) == "PCI_BUS_ID":
        return ()
    if machine.origin == "synthetic":
        return skipped("a made-up machine does not say")
    if seen.is_order_certain:
        by_bus = {**machine.environment, _ORDER: "PCI_BUS_ID"}
        unasked = TorchView(state="not_asked")
        if seen.gpus == visible_gpus(msgspec.structs.replace(machine, environment=by_bus, torch=unasked)).gpus:
            return ()
        mapping = ", ".join(f"cuda:{ordinal} is GPU {index}" for ordinal, index in enumerate(seen.gpus))
        message = f"CUDA numbers these GPUs in another order than nvidia-smi: {mapping}."
    else:
        message = f"CUDA may number these GPUs in another order than nvidia-smi: they are of {models} models."
    return (
        found(
            "warning",
            message,
            cause="CUDA_DEVICE_ORDER is FASTEST_FIRST unless it is set.",
            evidence=facts.evidence(f"environment.{_ORDER}", *(facts.path(gpu, "name") for gpu in facts.working)),
            fix=Fix(text="Make CUDA number GPUs by PCI address.", commands=("export CUDA_DEVICE_ORDER=PCI_BUS_ID",)),
        ),
    )


def container_without_gpus(facts: Facts) -> Result:
    """The container was started without the GPUs, or without a part of the driver.

    ## What it checks
    In a container on a computer with NVIDIA hardware: device files, NVIDIA_VISIBLE_DEVICES, NVIDIA_DRIVER_CAPABILITIES.

    ## Why it matters
    GPUs, libcuda and NVML come into a container only when it is started so; nothing inside can add them later.

    ## Example
    `error VLM205 This docker container was started without GPUs, though the computer has 4.`

    ## What to do
    `docker run --gpus all …`, in Kubernetes a limit of `nvidia.com/gpu`, in Compose a device reservation. For a
    missing part: `NVIDIA_DRIVER_CAPABILITIES=compute,utility`.

    ## When it is fine
    A container that is meant to use the CPU only: ignore it with `--ignore VLM205`.

    ## Sources
    NVIDIA Container Toolkit, "Specialized Configurations with Docker".
    """
    machine, driver = facts.machine, facts.machine.driver
    if facts.container is None:
        return skipped("not in a container")
    if not facts.has_hardware:
        return skipped("no GPU")
    capabilities = machine.environment.get("NVIDIA_DRIVER_CAPABILITIES") or "compute,utility"
    granted = {word.strip() for word in capabilities[:200].split(",")}
    has_devices = any(name.removeprefix("/dev/nvidia").isdecimal() for name in driver.device_files)
    where = f"This {plain(facts.container)} container"
    options: tuple[str, ...] = WITH_NVML
    if not machine.gpus and not has_devices:
        count = f", though the computer has {len(machine.pci_devices)}" if machine.pci_devices else ""
        message, options = f"{where} was started without GPUs{count}.", ()
    elif driver.libcuda_path is None and granted.isdisjoint(("compute", "all")):
        message = f"{where} has the GPUs but not libcuda: NVIDIA_DRIVER_CAPABILITIES={quote(capabilities)} lacks compute."
    elif driver.nvml_state == "no_library" and granted.isdisjoint(("utility", "all")):
        message = f"{where} has the GPUs but not NVML: NVIDIA_DRIVER_CAPABILITIES={quote(capabilities)} lacks utility."
    else:
        return ()
    variables = ("environment.NVIDIA_VISIBLE_DEVICES", "environment.NVIDIA_DRIVER_CAPABILITIES")
    return (
        found(
            "error",
            message,
            cause="GPUs and driver libraries are put into a container when it is created.",
            evidence=facts.evidence("host.container", "driver.device_files", "driver.libcuda_path", *variables),
            fix=start_anew(
                facts,
                "Give the pod a limit of nvidia.com/gpu."
                if facts.container == "kubernetes"
                else "Start the container anew with GPU access.",
                *options,
            ),
        ),
    )


def torch_sees_fewer(facts: Facts) -> Result:
    """PyTorch sees fewer GPUs than are visible, and no other check says why.

    ## What it checks
    The last step of the count PCI, driver, visible, torch.

    ## Why it matters
    The driver is fine, the variable is fine, and yet CUDA does not start or misses a GPU: `device_map="auto"` would
    use what is left, down to the CPU.

    ## Example
    `error VLM206 torch sees 1 of 2 visible GPUs: GPU 1 (NVIDIA L4) is missing.`

    ## What to do
    Run the command of the finding: it makes CUDA say its own error. 802 is a fabric that is not up, 803 and 804 a
    driver library that does not match, 46 a busy GPU, 999 a module that needs reloading.

    ## When it is fine
    With MIG, where torch sees one slice: that is VLM110.

    ## Sources
    `torch.cuda.device_count()` in a child process; CUDA runtime API, cudaError_t.
    """
    torch, visible = facts.machine.torch, facts.visible
    if torch.state != "ok" or torch.device_count is None:
        return skipped("torch did not answer")
    if torch.device_count >= len(visible):
        return ()
    missing = [gpu for gpu in visible if gpu.index in facts.counts.lost_by_torch]
    which = f": {', '.join(map(label, missing))} {'is' if len(missing) == 1 else 'are'} missing" if missing else ""
    if torch.device_count:
        message = f"torch sees {torch.device_count} of {len(visible)} visible GPUs{which}"
    else:
        message = f"torch sees no GPU, though {len(visible)} {'is' if len(visible) == 1 else 'are'} visible"
    said = f" ({plain(torch.message)})" if torch.message else ""
    return (
        found(
            "error",
            f"{message}{said}.",
            cause="CUDA does not start, or misses a GPU.",
            evidence=facts.evidence("torch.device_count", "torch.is_available", "torch.cuda", "driver.cuda_version"),
            fix=Fix(
                text="Let CUDA say its own error, and give it to vlm-doctor explain-error.",
                commands=(f"{python(facts)} -c 'import torch; torch.cuda.init()'",),
            ),
            gpus=missing,
        ),
    )


_WHY_TORCH_SEES_FEWER = (
    *("VLM106", "VLM108", "VLM109", "VLM110", "VLM112", "VLM118", "VLM119", "VLM201", "VLM205", "VLM301"),
    *("VLM302", "VLM303", "VLM304", "VLM305", "VLM306", "VLM403"),
)

CHECKS = (
    Check(code="VLM201", title="CUDA_VISIBLE_DEVICES hides every GPU", run=all_hidden, needs=("gpus",)),
    Check(code="VLM202", title="CUDA_VISIBLE_DEVICES cut short", run=list_cut, needs=("gpus",), explained_by=("VLM201",)),
    Check(
        code="VLM203",
        title="some GPUs hidden",
        run=some_hidden,
        needs=("gpus",),
        explained_by=("VLM201", "VLM202"),
    ),
    Check(code="VLM204", title="CUDA order differs", run=order_differs, needs=("gpus",)),
    Check(code="VLM205", title="container without GPUs", run=container_without_gpus, needs=("host",)),
    Check(
        code="VLM206",
        title="torch sees fewer GPUs",
        run=torch_sees_fewer,
        needs=("gpus", "torch"),
        explained_by=_WHY_TORCH_SEES_FEWER,
    ),
)
