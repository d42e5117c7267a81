"""What a check is, and how one is run: its needs, its causes, and the border where a defect becomes a result."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from ..findings import Finding, Fix, Outcome, Severity
from ..machine import Gpu, Machine
from ..placement import Plan
from ..units import format_gib
from ..visibility import Counts, Visibility, counts, visible_gpus

NO_GPU_CAUSES = ("VLM102", "VLM103", "VLM104", "VLM105", "VLM106", "VLM205", "VLM310")
"""Codes that explain why a machine with GPUs shows none: they stand for every check that looks at GPUs."""
_MAX_TEXT_CHARS = 300
_MADE_UP = "a made-up machine does not say"


class NotRun(msgspec.Struct, frozen=True):
    """A check that gave no verdict."""

    state: Literal["skipped", "unknown"]
    reason: str


def skipped(reason: str) -> NotRun:
    """The check does not apply to this machine."""
    return NotRun("skipped", reason)


def unknown(reason: str) -> NotRun:
    """What the check needs could not be read."""
    return NotRun("unknown", reason)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a check may look at."""

    machine: Machine
    plan: Plan | None
    visibility: Visibility
    counts: Counts

    @classmethod
    def of(cls, machine: Machine, plan: Plan | None = None) -> Facts:
        """Take a machine, and a plan if one was made."""
        return cls(machine=machine, plan=plan, visibility=visible_gpus(machine), counts=counts(machine))

    @property
    def working(self) -> tuple[Gpu, ...]:
        """GPUs that answer."""
        return tuple(gpu for gpu in self.machine.gpus if gpu.error is None)

    @property
    def visible(self) -> tuple[Gpu, ...]:
        """GPUs that CUDA shows this process, by index."""
        return tuple(gpu for gpu in self.machine.gpus if gpu.index in self.visibility.gpus)

    @property
    def has_hardware(self) -> bool:
        """True when anything says that there is, or should be, an NVIDIA GPU."""
        driver, host = self.machine.driver, self.machine.host
        is_wsl_gpu = host is not None and host.is_wsl and driver.libcuda_path is not None
        has_driver = driver.kernel_module_version is not None or bool(driver.device_files)
        return bool(self.machine.gpus or self.machine.pci_devices) or has_driver or is_wsl_gpu

    @property
    def container(self) -> str | None:
        """Kind of container, or ``None`` outside one."""
        return self.machine.host.container if self.machine.host is not None else None

    def path(self, gpu: Gpu, name: str) -> str:
        """Field path of ``name`` of a GPU."""
        return f"gpus[{self.machine.gpus.index(gpu)}].{name}"

    def evidence(self, *paths: str) -> dict[str, str]:
        """Field paths with the values seen there; paths into the plan begin with ``plan.``."""
        return {path: shown(self.value(path), path) for path in paths}

    def value(self, path: str) -> Any:
        """Value at a field path, ``None`` where a part of it is missing."""
        record: Any = self if path.startswith("plan.") else self.machine
        for name, index in re.findall(r"(\w*[A-Za-z_]\w*)|\[(\d+)\]", path):
            if record is None:
                return None
            if index:
                record = record[int(index)]
            else:
                record = record.get(name) if isinstance(record, Mapping) else getattr(record, name)
        return record


Result = Sequence[Finding] | NotRun


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One judgement, with its code for ever."""

    code: str
    title: str
    """The pattern in a few words, never the advice."""
    run: Callable[[Facts], Result]
    """Gives findings, none when all is well. Its docstring is the page of the code."""
    needs: tuple[str, ...] = ()
    """Field paths without which it cannot judge; ``gpus[].name`` is that field of every working GPU."""
    explained_by: tuple[str, ...] = ()
    """Codes whose finding is the cause of this one's symptom: it is then skipped, so that one cause gives one error."""
    told_by: tuple[str, ...] = ()
    """Codes that may speak of the same fault: a finding whose first evidence stands in that of one of theirs is left out
    here, so that one fault is said once."""

    @property
    def needs_gpus(self) -> bool:
        """True when it judges GPUs, so that whatever hides all of them explains it."""
        return any(need.startswith("gpus") for need in self.needs)

    @property
    def page(self) -> str:
        """Markdown text of the code's page."""
        import inspect  # Late: only 'explain' reads pages.

        return f"# {self.code}: {self.title}\n\n{inspect.getdoc(self.run) or 'Python runs without docstrings (-OO).'}\n"


def found(
    severity: Severity,
    message: str,
    *,
    evidence: dict[str, str],
    cause: str | None = None,
    fix: Fix | None = None,
    gpus: Sequence[Gpu] = (),
    links: tuple[str, ...] = (),
) -> Finding:
    """Make a finding; code and title are those of the check that returns it."""
    indices = tuple(gpu.index for gpu in gpus)
    return Finding(
        code="",
        title="",
        severity=severity,
        message=message,
        cause=cause,
        evidence=evidence,
        fix=fix,
        gpus=indices,
        links=links,
    )


def examine(check: Check, facts: Facts) -> Outcome:
    """Run one check. Whatever happens becomes an outcome: an error in a check is recorded, never raised."""
    try:
        result = _judge(check, facts)
    except Exception as error:  # noqa: BLE001 - border: a defect of one check must not cost the other verdicts
        return Outcome(
            code=check.code, title=check.title, state="crashed", reason=plain(f"{type(error).__name__}: {error}")
        )
    if isinstance(result, NotRun):
        return Outcome(code=check.code, title=check.title, state=result.state, reason=result.reason)
    findings = tuple(
        msgspec.structs.replace(finding, code=check.code, title=check.title, fix=_placed(finding.fix, facts))
        for finding in result
    )
    return Outcome(code=check.code, title=check.title, state="found" if findings else "passed", findings=findings)


def _placed(fix: Fix | None, facts: Facts) -> Fix | None:
    """Inside a container an administrator's commands belong on the host, and there is no sudo as a rule.

    A command that could not be shown as it is (a snapshot may hold any text) is not given.
    """
    if fix is None:
        return None
    fix = msgspec.structs.replace(fix, commands=tuple(filter(str.isprintable, fix.commands)))
    if facts.container is None or fix.place == "host":
        return fix
    if fix.who == "administrator":
        return msgspec.structs.replace(fix, place="host")
    return msgspec.structs.replace(fix, commands=tuple(command.removeprefix("sudo ") for command in fix.commands))


def _judge(check: Check, facts: Facts) -> Result:
    gaps: list[NotRun] = []
    for need in check.needs:
        places = _places(facts, need)
        lacking = [lack for lack in (_lacking(facts, path) for path in places) if lack is not None]
        if len(lacking) == len(places):
            return lacking[0] if lacking else skipped("no GPU")
        gaps += lacking
    result = check.run(facts)
    if isinstance(result, NotRun):
        return skipped(_MADE_UP) if result.state == "unknown" and facts.machine.origin == "synthetic" else result
    # All is well only as far as everything could be seen.
    return gaps[0] if gaps and not result else result


def _places(facts: Facts, need: str) -> list[str]:
    if need.startswith("gpus[]."):
        return [facts.path(gpu, need.removeprefix("gpus[].")) for gpu in facts.working]
    return [need]


def _lacking(facts: Facts, path: str) -> NotRun | None:
    """Why nothing is known at ``path``; ``None`` when something is."""
    machine = facts.machine
    value = facts.value(path)
    if path == "gpus" and not facts.working:
        return skipped("no GPU")
    if path == "torch" and machine.torch.state != "not_asked":
        return None
    gap = None if value else machine.gap(path)
    if gap is not None:
        return unknown(plain(f"{gap.path}: {gap.reason}"))
    if path == "torch":
        value = None
    if value is not None and not (value == () and machine.origin == "synthetic"):
        return None
    if machine.origin == "synthetic":
        return skipped(_MADE_UP)
    return unknown(
        plain(f"torch: {machine.torch.message or 'was not asked'}" if path == "torch" else f"{path} is not known")
    )


def shown(value: Any, path: str) -> str:
    """A value as evidence: sizes in GiB, versions with dots, text on one line."""
    name = path.rpartition(".")[2]
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and name.endswith("_bytes"):
        return format_gib(value)
    if isinstance(value, tuple):
        return (".".join if name in ("compute_capability", "cuda_version") else ", ".join)(map(str, value))[
            :_MAX_TEXT_CHARS
        ]
    return plain(str(value))


def plain(text: str) -> str:
    """Free text from outside for a report: one line, printable, short."""
    line = " ".join(text[: 4 * _MAX_TEXT_CHARS].split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= _MAX_TEXT_CHARS else f"{line[: _MAX_TEXT_CHARS - 3]}..."


def label(gpu: Gpu) -> str:
    """``GPU 0 (NVIDIA L4)``, safe to print."""
    return plain(gpu.label)


def labels(gpus: Sequence[Gpu]) -> str:
    """``GPU 0 (NVIDIA L4)`` or ``GPUs 0, 1 (NVIDIA L4)``, safe to print."""
    if len(gpus) == 1:
        return label(gpus[0])
    return f"{names(gpus)} ({plain(', '.join(dict.fromkeys(gpu.name for gpu in gpus)))})"


def ids(gpus: Sequence[Gpu]) -> str:
    """``0,1``, as ``nvidia-smi -i`` takes them."""
    return ",".join(str(gpu.index) for gpu in gpus)


def alike(gpus: Iterable[Gpu], key: Callable[[Gpu], Hashable | None]) -> list[list[Gpu]]:
    """GPUs about which the same is to be said, so that one fault gives one finding; without those whose key is ``None``."""
    groups: dict[Hashable, list[Gpu]] = {}
    for gpu in gpus:
        same = key(gpu)
        if same is not None:
            groups.setdefault(same, []).append(gpu)
    return list(groups.values())


def names(gpus: Sequence[Gpu]) -> str:
    """``GPU 1`` or ``GPUs 0, 2``."""
    return f"GPU{'s' if len(gpus) != 1 else ''} {', '.join(str(gpu.index) for gpu in gpus)}"
