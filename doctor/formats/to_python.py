"""A plan as Python to paste: environment, ``device_map`` and the calls that load the model.

Names come from checkpoints and snapshots that others wrote, so each one enters the text as a Python literal, never as code.
"""

from __future__ import annotations

import re
from itertools import groupby

from ..errors import UsageError
from ..machine import Libraries
from ..placement import Plan
from ..report import Report
from .key_runs import KeyRun, runs
from .look import Look

DTYPE_SINCE = "4.56"
"""First transformers whose ``from_pretrained`` takes ``dtype``; before, ``torch_dtype``. Source: its release notes."""

ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
"""Of torch's allocator. Every torch reads this name, and reads it first (``CUDAAllocatorConfig.h`` of 2.13); the new one,
``PYTORCH_ALLOC_CONF``, is not heeded by 2.9 for expandable segments (pytorch#183387)."""

_PLAIN_PATH = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)


def render(report: Report, _look: Look) -> str:
    """Write the plan of a report as a Python script.

    Returns:
        The script; for a plan that does not fit, one that only says so and stops.

    Raises:
        UsageError: The report has no plan.
    """
    if report.plan is None:
        raise UsageError(
            "--format python: only a plan can be written as Python; use vlm-doctor plan MODEL --format python."
        )
    return snippet(report.plan, report.machine.libraries, is_live=report.machine.origin == "live")


def snippet(plan: Plan, libraries: Libraries | None = None, *, is_live: bool = False) -> str:
    """Write a plan as Python that fits the installed transformers.

    Args:
        plan: The plan.
        libraries: What is installed where it will run; ``None`` means the newest.
        is_live: True when the plan is for the machine it was made on.
    """
    if not plan.fits:
        why = plan.shortage.message if plan.shortage else "The model does not fit."
        return f"raise SystemExit({literal(why)})\n"
    quantization = _quantization(plan, libraries)
    blocks = [
        _environment(plan, is_live=is_live),
        _imports(plan, quantization),
        f"MODEL = {literal(plan.model)}",
        device_map_source(plan),
    ]
    if plan.offloaded is not None:
        blocks.append(f"# {_inert(plan.offloaded.cost)}")
    if quantization:
        blocks.append(f"quantization = {quantization}")
    blocks.append(_loading(plan, dtype_argument(libraries), is_quantized=quantization is not None))
    return "\n\n".join(blocks) + "\n"


def dtype_argument(libraries: Libraries | None) -> str:
    """Name of the argument that sets the dtype in the installed transformers: ``dtype``, or ``torch_dtype`` before 4.56."""
    return "torch_dtype" if _is_before(libraries, DTYPE_SINCE) else "dtype"


def _is_before(libraries: Libraries | None, version: str) -> bool:
    """True when the installed transformers is known to be older."""
    installed = libraries.version("transformers") if libraries else None
    if installed is None:
        return False
    from packaging.version import InvalidVersion, Version

    try:
        return Version(installed) < Version(version)
    except InvalidVersion:
        return False


def device_map_source(plan: Plan) -> str:
    """Write ``device_map = {...}`` so that running it gives ``plan.device_map``, layers of one GPU on one line."""
    entries = [
        _entry(run, position)
        for position, items in groupby(plan.device_map.items(), key=lambda item: item[1])
        for run in runs(key for key, _ in items)
    ]
    if len(entries) == 1:
        return f"device_map = {{{entries[0]}}}"
    return "\n".join(["device_map = {", *(f"    {entry}," for entry in entries), "}"])


def _entry(run: KeyRun, device: int | str) -> str:
    position = device if isinstance(device, int) else literal(device)
    if run.first is None or run.last is None:
        return f"{literal(run.prefix)}: {position}"
    numbers = f"range({run.first}, {run.last + 1})" if run.first else f"range({run.last + 1})"
    key = f'f"{run.prefix}{{i}}"' if _PLAIN_PATH.fullmatch(run.prefix) else f"{literal(run.prefix)} + str(i)"
    return f"**{{{key}: {position} for i in {numbers}}}"


def environment_of(plan: Plan) -> dict[str, str]:
    """Variables that must be set before torch is imported."""
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": plan.cuda_visible_devices}
    if plan.workload.allocator == "expandable":
        variables[ALLOCATOR_VARIABLE] = "expandable_segments:True"
    return variables


def attention_word(plan: Plan) -> str | None:
    """What ``attn_implementation`` of transformers calls the attention of a plan; ``None`` where it must not be named.

    Classes of a checkpoint may refuse sdpa by name, too, though it is what they run by default.
    """
    attention = plan.workload.attention
    if attention == "sdpa" and (plan.refuses_sdpa or plan.is_remote_code):
        return None
    return "flash_attention_2" if attention == "flash" else attention


def _environment(plan: Plan, *, is_live: bool) -> str:
    lines = ["import os", ""]
    if not is_live:
        lines.append("# Planned for another machine than this one: put the GPUs of yours here (nvidia-smi -L).")
    return "\n".join(
        [
            *lines,
            "# Before torch is imported: it and CUDA read these once.",
            *(f"os.environ[{literal(name)}] = {literal(value)}" for name, value in environment_of(plan).items()),
        ]
    )


def _model_class(plan: Plan) -> str:
    return "AutoModelForCausalLM" if plan.is_remote_code else "AutoModelForImageTextToText"


def _imports(plan: Plan, quantization: str | None) -> str:
    names = [_model_class(plan), "AutoProcessor", *([quantization.partition("(")[0]] if quantization else [])]
    return f"from transformers import {', '.join(names)}"


def unpacks_while_loading(plan: Plan, libraries: Libraries | None) -> bool:
    """Whether ``dequantize=True`` has to be passed; transformers 4 neither knows nor needs it."""
    return plan.workload.quantization is None and plan.loses_hooks and not _is_before(libraries, "5")


def _quantization(plan: Plan, libraries: Libraries | None) -> str | None:
    arguments = {
        "int8": "load_in_8bit=True",
        "nf4": f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype={literal(plan.dtype)}',
    }
    kind = plan.workload.quantization
    if unpacks_while_loading(plan, libraries):
        return "CompressedTensorsConfig(dequantize=True)"
    return f"BitsAndBytesConfig({arguments[kind]})" if kind else None


def _loading(plan: Plan, dtype: str, *, is_quantized: bool) -> str:
    trust = ["trust_remote_code=True"] if plan.is_remote_code else []
    source = ["MODEL", *([f"revision={literal(plan.revision)}"] if plan.revision else [])]
    lines = ["# The class of this model comes with the checkpoint: read that code before you run it."] if trust else []
    arguments = [
        *source,
        f"{dtype}={literal(plan.dtype)}",
        "device_map=device_map",
        *([f"attn_implementation={literal(word)}"] if (word := attention_word(plan)) else []),
        *(["quantization_config=quantization"] if is_quantized else []),
        *trust,
    ]
    lines += [
        f"processor = AutoProcessor.from_pretrained({', '.join([*source, *trust])})",
        f"model = {_model_class(plan)}.from_pretrained(",
        *(f"    {argument}," for argument in arguments),
        ")",
    ]
    return "\n".join(lines)


def _inert(text: str) -> str:
    """Text for a comment: on one line, in ASCII."""
    return ascii(text)[1:-1]


def literal(text: str) -> str:
    """Write text as a Python literal, in double quotes where that needs no escape."""
    shown = ascii(text)
    return f'"{shown[1:-1]}"' if shown.startswith("'") and '"' not in shown else shown
