"""A plan as YAML: environment, ``device_map`` and ``max_memory``, for configuration files of other programs.

Written by hand, since the only thing needed is mappings of scalars; whatever could be read as anything but the same text is
put in double quotes (YAML 1.1, as PyYAML reads it, takes ``no``, ``1_000`` and ``0x1F`` for something else).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..machine import Libraries
from ..placement import Plan
from ..report import Report
from .look import Look
from .to_python import attention_word, environment_of, unpacks_while_loading

Scalar = str | int | bool | None
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[./-][A-Za-z0-9_]+)*", re.ASCII)
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"})
"""Plain words that YAML 1.1 does not read as text (``none`` for the reader's sake)."""
_NAMED_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def render(report: Report, _look: Look) -> str:
    """Write the plan of a report.

    Raises:
        UsageError: The report has no plan.
    """
    plan = report.plan
    if plan is None:
        raise UsageError("--format yaml: only a plan can be written as YAML; use vlm-doctor plan MODEL --format yaml.")
    lines = [_entry("model", plan.model)]
    if plan.revision:
        lines.append(_entry("revision", plan.revision))
    lines.append(_entry("fits", plan.fits))
    if plan.fits:
        lines += _loading(plan, report.machine.libraries, is_live=report.machine.origin == "live")
    elif plan.shortage is not None:
        lines.append(_entry("why", plan.shortage.message))
    return "\n".join(lines) + "\n"


def _loading(plan: Plan, libraries: Libraries | None, *, is_live: bool) -> list[str]:
    lines = [_entry("dtype", plan.dtype)]
    if word := attention_word(plan):
        lines.append(_entry("attn_implementation", word))
    if plan.workload.quantization:
        lines.append(_entry("quantization", plan.workload.quantization))
    elif unpacks_while_loading(plan, libraries):
        lines.append("# With transformers 5: quantization_config=CompressedTensorsConfig(dequantize=True).")
        lines.append(_entry("dequantize", True))
    lines += [
        _entry("trust_remote_code", plan.is_remote_code),
        _entry("prompt_tokens", plan.prompt_tokens),
        _entry("longest_prompt_tokens", plan.longest_prompt_tokens),
    ]
    if not is_live:
        lines.append("# Planned for another machine than this one: put the GPUs of yours here (nvidia-smi -L).")
    lines += _mapping("environment", environment_of(plan))
    lines += _mapping("device_map", plan.device_map)
    lines.append("# Bytes of weights for each GPU of the map; with device_map: auto, what comes nearest to it.")
    limits: dict[int | str, int] = dict(plan.max_memory.items())
    if plan.offloaded is not None:
        limits["cpu"] = plan.offloaded.weights_bytes
    return lines + _mapping("max_memory", limits)


def _mapping(name: str, entries: Mapping[Any, Any]) -> list[str]:
    return [f"{name}:", *(f"  {_entry(key, value)}" for key, value in entries.items())]


def _entry(key: str | int, value: Scalar) -> str:
    return f"{scalar(key)}: {scalar(value)}"


def scalar(value: Scalar) -> str:
    """Write a value so that YAML 1.1 and 1.2 read the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return f'"{"".join(map(_escaped, value))}"'


def _escaped(char: str) -> str:
    if char in _NAMED_ESCAPES:
        return _NAMED_ESCAPES[char]
    if " " <= char <= "~":
        return char
    code = ord(char)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
