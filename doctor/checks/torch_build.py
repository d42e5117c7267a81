"""3xx about torch: does it import, and was it built for this driver and these GPUs?"""

from __future__ import annotations

import re

from ..data.versions import MINIMUM_DRIVER
from ..findings import Fix
from ..machine import Gpu
from ._check import Check, Facts, Result, found, names, plain, skipped, unknown
from ._remedy import python
from ._wheels import Capability, has_code, torch_command

_ABSENT = "torch is not installed"

_IMPORT_CAUSES = (
    (
        "undefined symbol",
        "A library of another version is found before the one torch was built with (LD_LIBRARY_PATH, conda).",
    ),
    ("cannot open shared object file", "A library that torch needs is not installed or not found."),
    ("glibc", "torch was built for a newer Linux than this one."),
    ("no module named", "torch or something it needs is only half installed."),
)
"""Text in the exception, lower case, to its usual cause. Seen in pytorch issues 119932 and 152783, nccl issue 1180."""

_OF_A_TORSO = re.compile(r"No module named 'torch\b|module 'torch\b.* has no attribute")
"""What importing a half-installed torch says. Any other error has a cause of its own."""


def cpu_only_torch(facts: Facts) -> Result:
    """The installed torch cannot use NVIDIA GPUs.

    ## What it checks
    Which CUDA version torch was built for, read from its files without importing it.

    ## Why it matters
    A CPU or ROCm build sees no GPU: `torch.cuda.is_available()` is False, and models load onto the CPU without an
    error.

    ## Example
    `error VLM303 torch 2.13.0+cpu is built for the CPU only, and this machine has 2 GPUs.`

    ## What to do
    Reinstall torch from the index of a CUDA version that the driver supports; the finding gives the command.

    ## When it is fine
    In an environment that is only for planning: ignore it with `--ignore VLM303`.

    ## Sources
    `torch/version.py` (`cuda = None`); pytorch.org, installation.
    """
    libraries = facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    if build is None:
        return skipped(_ABSENT)
    if build.cuda is not None:
        return ()
    kind = "ROCm" if build.hip is not None else "the CPU only"
    count = len(facts.working)
    gpus = f"{count} GPU{'s' if count != 1 else ''}"
    return (
        found(
            "error",
            f"torch {plain(build.version)} is built for {kind}, and this machine has {gpus}.",
            cause="pip found this build first: it was asked for, or another index was preferred.",
            evidence=facts.evidence("libraries.torch_build.version", "libraries.torch_build.cuda", "driver.cuda_version"),
            fix=Fix(text="Reinstall torch with CUDA.", commands=(torch_command(facts),)),
        ),
    )


def torch_import_fails(facts: Facts) -> Result:
    """The package torch is installed, but importing it, or asking it about CUDA, raises an error.

    ## What it checks
    `import torch` in a child process.

    ## Why it matters
    Nothing that loads a model can start.

    ## Example
    `error VLM304 torch cannot be imported: ImportError: libcudnn.so.9: cannot open shared object file.`

    ## What to do
    Try it without foreign libraries: `env -u LD_LIBRARY_PATH python -c 'import torch'`. If that works, unset the
    variable; otherwise reinstall torch.

    ## When it is fine
    Never.

    ## Sources
    The exception's own text, from a child process with a deadline.
    """
    torch = facts.machine.torch
    if torch.state == "absent":
        return skipped(_ABSENT)
    if torch.state != "failed":
        return ()
    text = plain(torch.message or "no message")
    libraries = facts.machine.libraries
    if libraries is not None and libraries.torch_problem is not None and _OF_A_TORSO.search(text):
        return skipped("explained by VLM302")
    return (
        found(
            "error",
            f"torch cannot be imported: {text.rstrip('.')}.",
            cause=next((cause for sign, cause in _IMPORT_CAUSES if sign in text.lower()), None),
            evidence=facts.evidence("torch.state", "torch.message"),
            fix=_reinstall(facts, "Reinstall torch."),
        ),
    )


def torch_import_dies(facts: Facts) -> Result:
    """Importing torch kills the process or does not end.

    ## What it checks
    `import torch` in a child process: a signal, or no end before the deadline.

    ## Why it matters
    A test session would die without a report, or hang. Tools that import torch themselves print nothing at all here.

    ## Example
    `error VLM305 Importing torch crashes the process (SIGSEGV).`

    ## What to do
    See where it happens: `timeout -s ABRT 60 python -X faulthandler -c 'import torch'`. Then reinstall torch. A hang is
    often a network disk or a driver that does not answer: try `nvidia-smi`.

    ## When it is fine
    A first import from a slow disk can take longer than the deadline: run the doctor again.

    ## Sources
    Exit status of the child process.
    """
    torch = facts.machine.torch
    if torch.state == "absent":
        return skipped(_ABSENT)
    if torch.state == "crashed":
        message = f"Importing torch crashes the process ({plain(torch.message or 'no signal known')})."
    elif torch.state == "timed_out":
        waited = f" within {torch.seconds:.0f} s" if torch.seconds is not None else ""
        message = f"Importing torch does not end{waited}."
    else:
        return ()
    return (
        found(
            "error",
            message,
            evidence=facts.evidence("torch.state", "torch.message", "torch.seconds"),
            fix=_reinstall(
                facts,
                "See where it happens, then reinstall torch.",
                f"timeout -s ABRT 60 {python(facts)} -X faulthandler -c 'import torch'",
            ),
        ),
    )


def _reinstall(facts: Facts, text: str, *first: str) -> Fix:
    """Reinstall torch; where LD_LIBRARY_PATH is set, try it without first: that is often the whole fault."""
    if facts.machine.environment.get("LD_LIBRARY_PATH"):
        text = f"Try it without LD_LIBRARY_PATH (if it works, unset that). {text}"
        first = (f"env -u LD_LIBRARY_PATH {python(facts)} -c 'import torch'", *first)
    return Fix(text=text, commands=(*first, torch_command(facts)))


def driver_too_old(facts: Facts) -> Result:
    """The driver is older than the CUDA version torch was built for.

    ## What it checks
    The CUDA major version of torch against the newest that the driver supports. Minor versions are compatible.

    ## Why it matters
    torch only warns ("the NVIDIA driver on your system is too old") and goes on without a GPU.

    ## Example
    `error VLM306 torch 2.13.0+cu130 needs CUDA 13, the driver 550.54.14 supports CUDA 12.4.`

    ## What to do
    Update the driver, or install a torch for the CUDA version of the driver; the finding gives both.

    ## When it is fine
    Where a forward-compatibility package is installed: the check passes as soon as torch says that it can use CUDA.

    ## Sources
    NVIDIA, CUDA Compatibility (minimum driver branches); nvmlSystemGetCudaDriverVersion.
    """
    driver, libraries = facts.machine.driver, facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    wanted = re.match(r"[0-9]{1,3}", build.cuda or "", re.ASCII) if build is not None else None
    if build is None or wanted is None:
        return skipped("torch has no CUDA")
    if driver.cuda_version is None:
        return unknown("driver.cuda_version is not known")
    major = int(wanted[0])
    if driver.cuda_version[0] >= major or facts.machine.torch.is_available:
        return ()
    branch = MINIMUM_DRIVER.get(major)
    update = f"Update the driver to {branch} or newer" if branch is not None else "Update the driver"
    supported = ".".join(map(str, driver.cuda_version))
    return (
        found(
            "error",
            f"torch {plain(build.version)} needs CUDA {major}, the driver {plain(driver.driver_version or 'here')} "
            f"supports CUDA {supported}.",
            evidence=facts.evidence("libraries.torch_build.cuda", "driver.cuda_version", "driver.driver_version"),
            fix=Fix(text=f"{update}, or install a torch for its CUDA version.", commands=(torch_command(facts),)),
        ),
    )


def architecture_missing(facts: Facts) -> Result:
    """The installed torch has no machine code for a GPU.

    ## What it checks
    The compute capability of each visible GPU against the architectures (`sm_XX`) in the wheel.

    ## Why it matters
    Loading a model works, the first kernel fails: "no kernel image is available for execution on the device". Older
    GPUs were dropped from newer CUDA versions, new GPUs are missing from older ones.

    ## Example
    `error VLM307 torch 2.13.0+cu130 has no code for GPU 0 (Tesla V100-SXM2-16GB): sm_70 is not in it.`

    ## What to do
    Reinstall torch from the index of a CUDA version that has it; the finding gives the command.

    ## When it is fine
    Hide a GPU that is not to be used with CUDA_VISIBLE_DEVICES.

    ## Sources
    CUDA C++ programming guide, binary compatibility; torch's own tables of its wheels.
    """
    libraries = facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    if build is None or build.cuda is None:
        return skipped("torch has no CUDA")
    if not build.archs:
        return unknown("libraries.torch_build.archs is not known")
    groups: dict[tuple[str, Capability], list[Gpu]] = {}
    for gpu in facts.visible:
        if gpu.compute_capability is not None and not has_code(build.archs, gpu.compute_capability):
            groups.setdefault((gpu.name, gpu.compute_capability), []).append(gpu)
    return tuple(
        found(
            "error",
            f"torch {plain(build.version)} has no code for {names(gpus)} ({plain(name)}): sm_{major}{minor} is not in it.",
            cause="The wheel was built without this GPU generation.",
            evidence=facts.evidence(facts.path(gpus[0], "compute_capability"), "libraries.torch_build.archs"),
            fix=Fix(text=f"Install a torch that has sm_{major}{minor}.", commands=(torch_command(facts),)),
            gpus=gpus,
        )
        for (name, (major, minor)), gpus in groups.items()
    )


CHECKS = (
    Check(
        code="VLM303",
        title="torch without CUDA",
        run=cpu_only_torch,
        needs=("gpus", "libraries"),
        explained_by=("VLM301", "VLM302"),
    ),
    Check(
        code="VLM304",
        title="torch cannot be imported",
        run=torch_import_fails,
        needs=("torch",),
        explained_by=("VLM301", "VLM316"),
    ),
    Check(code="VLM305", title="torch dies on import", run=torch_import_dies, needs=("torch",)),
    Check(
        code="VLM306",
        title="driver too old for torch",
        run=driver_too_old,
        needs=("gpus", "libraries"),
        explained_by=("VLM303",),
    ),
    Check(
        code="VLM307",
        title="torch lacks this GPU's architecture",
        run=architecture_missing,
        needs=("gpus[].compute_capability", "libraries"),
        explained_by=("VLM303",),
    ),
)
