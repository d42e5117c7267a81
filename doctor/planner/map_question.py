"""One question about a map, and the words in which its findings are written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import msgspec

from ..findings import Finding, Fix, Severity
from ..machine import Machine
from ..model import ModelProfile
from ..visibility import visible_gpus
from ..workload import Policy, Workload
from .budget import Budgets, budgets
from .constraints import chain
from .map_devices import shown
from .problem import Problem, ask
from .release import Release, release_of

TITLES = {
    "VLM610": "the map names a module that the model does not have",
    "VLM611": "the map gives no device to a part of the model",
    "VLM612": "the map has a key and a key inside it",
    "VLM613": "a key takes tensors of other modules while loading",
    "VLM614": "a block is cut between devices",
    "VLM615": "tensors that are joined are on different devices",
    "VLM616": "tied weights are on different devices",
    "VLM617": "the map names a device that cannot be used",
    "VLM618": "a device is written in a way that misleads",
    "VLM619": "weights are kept off the GPUs",
    "VLM620": "the map needs more memory than a GPU has",
    "VLM621": "the map sends the prompt back and forth",
    "VLM622": "the stages are not in the order of the fastest links",
    "VLM623": "logits end on another device than the inputs",
    "VLM624": "a block has no key of its own where the device changes",
    "VLM625": "fewer GPUs would do",
    "VLM626": "a loaded model is on several devices without hooks",
}
"""Codes of findings about a map; the page of each is in ``data/pages``."""


class Question(msgspec.Struct, frozen=True, dict=True):
    """A model, what it is to do, and where."""

    profile: ModelProfile
    machine: Machine
    workload: Workload
    policy: Policy
    gpus: tuple[int, ...]
    """GPU index behind each number of a map."""
    budgets: Budgets

    @classmethod
    def of(cls, profile: ModelProfile, machine: Machine, workload: Workload, policy: Policy) -> Question:
        """Number the GPUs: as the policy lists them, otherwise as CUDA shows them to a process of this machine."""
        visible = visible_gpus(machine).gpus
        return cls(profile, machine, workload, policy, policy.gpus or visible, budgets(machine, policy))

    @property
    def release(self) -> Release:
        """Major and minor version of the transformers installed on the machine."""
        return release_of(self.machine)

    @cached_property
    def problem(self) -> Problem:
        """The same model, workload and GPUs, as the planner asks about them."""
        found, parts = self.budgets, chain(self.profile)
        return ask(self.profile, self.workload, self.policy, self.machine, chain=parts, found=found)

    def gpu_of(self, device: int | str | None) -> int | None:
        """GPU index behind a number of the map."""
        return self.gpus[device] if isinstance(device, int) and device < len(self.gpus) else None


def finding(
    question: Question,
    code: str,
    severity: Severity,
    message: str,
    *,
    fix: str,
    cause: str | None = None,
    seen: Iterable[tuple[str, int | str]] = (),
    devices: Iterable[int | str] = (),
    links: tuple[str, ...] = (),
) -> Finding:
    """Make a finding; ``seen`` are keys with their devices, ``devices`` those it is about."""
    indices = {question.gpu_of(device) for device in devices}
    return Finding(
        code=code,
        severity=severity,
        title=TITLES[code],
        message=message,
        cause=cause,
        evidence={f'device_map["{key}"]': shown(device) for key, device in seen},
        fix=Fix(text=fix),
        gpus=tuple(sorted(index for index in indices if index is not None)),
        links=links,
    )


def mismatch(devices: Iterable[int | str]) -> str:
    """What torch will say."""
    places = " and ".join(sorted(map(shown, devices)))
    return f'"Expected all tensors to be on the same device, but found at least two devices, {places}!"'
