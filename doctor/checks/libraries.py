"""3xx about packages: is everything installed that loads a model, in versions that go together?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..findings import Finding, Fix
from ..machine import Libraries, VersionRule
from ._check import Check, Facts, Result, found, plain, skipped, unknown
from ._remedy import pip
from ._wheels import COMPANIONS, index_of, torch_command

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_LOADERS = ("transformers", "accelerate")
"""What loading with a ``device_map`` takes besides torch."""
_VITAL = ("torch", "accelerate")
"""Optional to transformers, and not to a model on GPUs. Source: transformers, utils/import_utils.py (below its minimum
torch counts as absent) and integrations/accelerate.py (check_and_set_device_map)."""


def torch_missing(facts: Facts) -> Result:
    """The package torch is not installed for this Python.

    ## What it checks
    The metadata of the Python that runs the doctor.

    ## Why it matters
    Planning works without torch, loading a model does not.

    ## Example
    `error VLM301 torch is not installed for Python 3.12.3, and this machine has 2 GPUs.`

    ## What to do
    Run the doctor with the Python of your project; if that is this one, install torch with the command of the finding.

    ## When it is fine
    Where the doctor has an environment of its own, as with pipx: ignore it with `--ignore VLM301`.

    ## Sources
    Package metadata; nothing is imported.
    """
    libraries = facts.machine.libraries
    if libraries is None or libraries.version("torch") or libraries.torch_build or libraries.torch_problem:
        return ()
    count = len(facts.working)
    return (
        found(
            "error",
            f"torch is not installed for Python {plain(libraries.python)}, and this machine has {count} "
            f"GPU{'s' if count != 1 else ''}.",
            evidence=facts.evidence("libraries.python", "libraries.executable", "libraries.torch_build"),
            fix=Fix(
                text="Install torch, or run the doctor with your project's Python.",
                commands=(torch_command(facts, is_there=False),),
            ),
        ),
    )


def torch_torso(facts: Facts) -> Result:
    """The package torch is only half installed.

    ## What it checks
    Metadata without package, package without metadata, an empty `torch/` folder that Python takes for a namespace
    package.

    ## Why it matters
    `import torch` may seem to work and give a module without content: "module 'torch' has no attribute …".

    ## Example
    `error VLM302 torch is half installed: metadata of torch 2.13.0 without the package.`

    ## What to do
    Uninstall until pip finds nothing more, then install again.

    ## When it is fine
    A torch that is used from its source folder (PYTHONPATH) need not be registered. One that works all the same, with CUDA
    where there are GPUs, is only a warning.

    ## Sources
    Package metadata and the files they list; nothing is imported.
    """
    libraries = facts.machine.libraries
    if libraries is None or libraries.torch_problem is None:
        return ()
    torch = facts.machine.torch
    has_what_it_needs = torch.cuda is not None or not facts.machine.gpus
    works = libraries.torch_build is not None and torch.state == "ok" and has_what_it_needs
    return (
        found(
            "warning" if works else "error",
            f"torch is half installed: {plain(libraries.torch_problem).rstrip('.')}.",
            cause="An installation or removal was interrupted, or two of them met.",
            evidence=facts.evidence("libraries.torch_problem"),
            fix=Fix(
                text="Remove what is left, then install torch again.",
                commands=(pip(facts, "uninstall", "torch"), torch_command(facts)),
            ),
        ),
    )


def loader_missing(facts: Facts) -> Result:
    """The packages that load a sharded model are not installed.

    ## What it checks
    The two packages that load a model with a `device_map`, next to torch.

    ## Why it matters
    transformers places a model over several GPUs only with accelerate.

    ## Example
    `warning VLM308 accelerate is not installed.`

    ## What to do
    `python -m pip install transformers accelerate`.

    ## When it is fine
    Where models are loaded in another way.

    ## Sources
    Package metadata; transformers, "Loading models" (device_map needs accelerate).
    """
    libraries = facts.machine.libraries
    if libraries is None or libraries.torch_build is None:
        return skipped("torch is not installed")
    missing = [name for name in _LOADERS if libraries.version(name) is None]
    if not missing:
        return ()
    return (
        found(
            "warning",
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed.",
            evidence=facts.evidence("libraries.executable") | {"libraries.packages": f"without {', '.join(missing)}"},
            fix=Fix(text="Install what is missing.", commands=(pip(facts, "install", *missing),)),
        ),
    )


def rule_not_met(facts: Facts) -> Result:
    """An installed library does not get the version of another that it asks for.

    ## What it checks
    The requirements that transformers, accelerate and torch themselves declare, against what is installed. No table
    of ours.

    ## Why it matters
    The error is often misleading: with accelerate too old, transformers says that accelerate is not installed; with
    torch too old it behaves as if there were none.

    ## Example
    `error VLM309 accelerate 1.0.1 does not suit transformers 5.23.0, which asks for accelerate>=1.1.0.`

    ## What to do
    Install a version that suits; the finding gives the command. `pip check` sees only a part of these rules.

    ## When it is fine
    An optional package that is not used: it is a warning. torch and accelerate are optional to transformers as well, but
    not to a model on GPUs: without the first no model loads, without the second none gets a `device_map`.

    ## Sources
    `Requires-Dist` of the installed packages, transformers' `dependency_versions_table.py` and `import_utils.py`.
    """
    libraries = facts.machine.libraries
    if libraries is None or not libraries.rules:
        return skipped("no library declares rules")
    # Late: it loads logging and more, and without these libraries there are no rules.
    from packaging.requirements import InvalidRequirement
    from packaging.version import InvalidVersion

    findings: dict[tuple[str, str], Finding] = {}
    unread: list[str] = []
    for position, rule in enumerate(libraries.rules):
        try:
            violated = _violated(libraries, rule)
        except (InvalidRequirement, InvalidVersion) as error:
            unread.append(plain(str(error).partition("\n")[0]))
            continue
        if violated is not None:
            findings.setdefault((rule.requirer, violated.name), _violation(facts, rule, violated, position))
    return tuple(findings.values()) or (unknown(f"rule not readable: {unread[0]}") if unread else ())


def _violated(libraries: Libraries, rule: VersionRule) -> Requirement | None:
    """The requirement, when what is installed does not satisfy it. What is absent altogether is for VLM301 and VLM308."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    requirement = Requirement(rule.requirement[:500])
    name = canonicalize_name(requirement.name)
    installed = libraries.python if name == "python" else libraries.version(name)
    if installed is None:
        return None
    if requirement.marker is not None and not requirement.marker.evaluate(
        {"python_version": _minor(libraries), "extra": ""}
    ):
        return None
    return None if requirement.specifier.contains(Version(installed), prereleases=True) else requirement


def is_violated(libraries: Libraries, rule: VersionRule) -> bool:
    """Whether what is installed breaks a rule; one that cannot be read is not known to be broken."""
    from packaging.requirements import InvalidRequirement
    from packaging.version import InvalidVersion

    try:
        return _violated(libraries, rule) is not None
    except (InvalidRequirement, InvalidVersion):
        return False


def _minor(libraries: Libraries) -> str:
    return ".".join(libraries.python.split(".")[:2])


def _violation(facts: Facts, rule: VersionRule, requirement: Requirement, position: int) -> Finding:
    from packaging.utils import canonicalize_name

    libraries = facts.machine.libraries
    name = canonicalize_name(requirement.name)
    is_python = name == "python"
    is_vital = rule.requirer == "transformers" and name in _VITAL and facts.has_hardware
    version = libraries.version(rule.requirer) if libraries is not None else None
    installed = (libraries.python if is_python else libraries.version(name)) if libraries is not None else None
    wanted = f"{requirement.name}{requirement.specifier}"
    if is_python:
        fix = Fix(text=f"Use a Python that suits ({requirement.specifier}), or an older {plain(rule.requirer)}.")
    elif name == "torch" and rule.requirer in COMPANIONS:
        fix = _with_torch(facts, rule.requirer, installed or "")
    else:
        command = torch_command(facts, wanted) if name == "torch" else pip(facts, "install", wanted)
        fix = Fix(text=f"Install a {name} that suits.", commands=(command,))
    return found(
        "warning" if rule.is_optional and not is_vital else "error",
        f"{requirement.name} {plain(installed or '')} does not suit {plain(rule.requirer)} {plain(version or '')}, "
        f"which asks for {wanted}.",
        cause="transformers then says that accelerate is not installed." if name == "accelerate" else None,
        evidence=facts.evidence(f"libraries.rules[{position}].requirement", f"libraries.rules[{position}].source"),
        fix=fix,
    )


def _with_torch(facts: Facts, companion: str, torch: str) -> Fix:
    """Move the companion, not torch: what else is installed was made for the torch that is there."""
    build = facts.machine.libraries.torch_build if facts.machine.libraries is not None else None
    index = index_of(build) if build is not None else None
    where = ("--extra-index-url", index) if index is not None else ()
    return Fix(
        text=f"Install the {companion} that goes with torch {plain(torch)}.",
        commands=(pip(facts, "install", "--upgrade", companion, f"torch=={torch}", *where),),
    )


def pynvml_shadowed(facts: Facts) -> Result:
    """Another package shadows the module of nvidia-ml-py.

    ## What it checks
    Which installed packages ship a module named `pynvml`: it should be nvidia-ml-py alone.

    ## Why it matters
    The deprecated package `pynvml` writes over the module or redirects it: calls are missing, and `pip check` sees
    nothing. Its newer versions print a FutureWarning in every process, an error under `filterwarnings = error`.

    ## Example
    `warning VLM310 The module pynvml belongs to pynvml as well as to nvidia-ml-py.`

    ## What to do
    `python -m pip uninstall -y pynvml`, then `python -m pip install --force-reinstall nvidia-ml-py`.

    ## When it is fine
    When nothing asks NVML, which here it does.

    ## Sources
    `importlib.metadata`; codecarbon issue 933.
    """
    libraries, driver = facts.machine.libraries, facts.machine.driver
    others = [name for name in (libraries.pynvml_owners if libraries is not None else ()) if name != "nvidia-ml-py"]
    if not others:
        return ()
    has_own = libraries is not None and "nvidia-ml-py" in libraries.pynvml_owners
    whose = f"{plain(', '.join(others))}{' as well as to nvidia-ml-py' if has_own else ''}"
    return (
        found(
            "error" if driver.nvml_state == "no_binding" and facts.has_hardware else "warning",
            f"The module pynvml belongs to {whose}.",
            cause="Two packages install a module of the same name; the last one installed wins.",
            evidence=facts.evidence("libraries.pynvml_owners", "driver.nvml_state"),
            fix=Fix(
                text="Remove the other package, then reinstall nvidia-ml-py.",
                commands=(
                    pip(facts, "uninstall", *others),
                    pip(facts, "install", "--force-reinstall", "nvidia-ml-py"),
                ),
            ),
        ),
    )


_NO_TORCH = ("VLM301", "VLM302")

CHECKS = (
    Check(
        code="VLM301",
        title="torch not installed",
        run=torch_missing,
        needs=("gpus", "libraries"),
    ),
    Check(code="VLM302", title="torch half installed", run=torch_torso, needs=("libraries",)),
    Check(
        code="VLM308",
        title="transformers or accelerate missing",
        run=loader_missing,
        needs=("gpus", "libraries"),
        explained_by=_NO_TORCH,
    ),
    Check(code="VLM309", title="version rule not met", run=rule_not_met, needs=("libraries",)),
    Check(code="VLM310", title="pynvml shadows nvidia-ml-py", run=pynvml_shadowed, needs=("libraries",)),
)
