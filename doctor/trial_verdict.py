"""From what a trial's processes told to a verdict: sentences, findings, what an error means. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from .answers import ErrorAnswer
from .error_answer import answer_error
from .findings import Finding, Fix, Severity
from .placement import Plan
from .trial import Attempt, Peak, Trial
from .units import MIB, format_gib
from .workload import Workload

TITLES = {
    "VLM640": "the trial did not come to its end",
    "VLM641": "tensors are elsewhere than planned",
    "VLM642": "the trial took more GPU memory than planned",
    "VLM643": "the answer of the trial means nothing",
}
"""Code to the title of its finding and of its page."""
TOLERANCE = 0.02
"""Predictions are within 1 percent of measured peaks of true-size models (benchmarks/README.md)."""
TOLERANCE_BYTES = 64 * MIB
"""Three of torch's segments of 20 MiB: what one more of each size class takes of a tiny model."""
_DURING = {
    "start": "while torch and transformers were imported",
    "imports": "while the weights were loaded",
    "weights": "while the prompt was made",
    "prompt": "in the first call",
    "call": "in the second call",
    "second call": "at the end",
}
_SIGNALS = {
    "SIGKILL": "the process was killed (SIGKILL), which is what the kernel does when the host or the container runs out of "
    "memory",
    "SIGSEGV": "the process crashed inside a library (SIGSEGV)",
    "SIGABRT": "a library gave up (SIGABRT)",
    "SIGBUS": "the process read memory that is not there (SIGBUS): a file of weights was cut short, or /dev/shm is full",
    "SIGALRM": "the process was stopped by its own alarm (SIGALRM)",
}
_SIGNAL = re.compile(r"(SIG[A-Z0-9]+)(?:: (.*))?", re.DOTALL)
_MAX_CHARS = 300


def judged(
    attempts: Sequence[Attempt],
    *,
    model: str,
    machine: str,
    workload: Workload,
    plan: Plan | None,
    gpus: Mapping[str, Sequence[int]],
) -> Trial:
    """Say what came of a trial.

    Args:
        attempts: As they were told; the plan's (or the CPU's) first.
        model: Its name.
        machine: Its description.
        workload: The call that was made.
        plan: What was to be followed; ``None`` on the CPU.
        gpus: Route to the GPU index behind each CUDA ordinal of its process.
    """
    explained = tuple(explain(attempt, plan, gpus.get(attempt.route, ())) for attempt in attempts)
    first = explained[0] if explained and explained[0].route != "auto" else None
    if first is None:
        shortage = plan.shortage.message if plan is not None and plan.shortage is not None else "The plan does not fit."
        return Trial(
            model=model,
            machine=machine,
            workload=workload,
            is_good=False,
            sentence=f"Nothing was loaded by plan, since none fits. {shortage}",
            attempts=explained,
        )
    findings = tuple(_findings(first, model))
    errors = [finding for finding in findings if finding.severity == "error"]
    return Trial(
        model=model,
        machine=machine,
        workload=workload,
        is_good=not errors,
        sentence=errors[0].message if errors else first.sentence,
        attempts=explained,
        findings=findings,
    )


def explain(attempt: Attempt, plan: Plan | None, gpus: Sequence[int]) -> Attempt:
    """Add what can be said of one attempt: its sentence, the meaning of its error, GPU indices and predictions."""
    peaks = tuple(_with_plan(peak, plan if attempt.route == "plan" else None, gpus) for peak in attempt.peaks)
    error = _meaning(attempt)
    attempt = msgspec.structs.replace(attempt, peaks=peaks, error=error)
    return msgspec.structs.replace(attempt, sentence=sentence(attempt))


def _with_plan(peak: Peak, plan: Plan | None, gpus: Sequence[int]) -> Peak:
    ordinal = int(peak.device.rpartition(":")[2])
    gpu = gpus[ordinal] if ordinal < len(gpus) else None
    stage = next((stage for stage in plan.stages if stage.gpu == gpu), None) if plan is not None else None
    if stage is None:
        return msgspec.structs.replace(peak, gpu=gpu)
    return msgspec.structs.replace(
        peak, gpu=gpu, planned_allocated_bytes=stage.peak_bytes, planned_reserved_bytes=stage.reserved_bytes
    )


def _meaning(attempt: Attempt) -> ErrorAnswer | None:
    text = attempt.traceback or attempt.message
    if attempt.state == "ran" or text is None:
        return None
    return answer_error(text, where="the trial")


def sentence(attempt: Attempt) -> str:
    """What came of one attempt, in one sentence."""
    if attempt.state == "ran":
        return (
            f"Loaded in {attempt.load_seconds or 0:.1f} s, then {attempt.new_tokens or 0} tokens in "
            f"{attempt.call_seconds or 0:.1f} s from a prompt of {attempt.prompt_tokens or 0:,}."
        )
    during = _DURING[attempt.reached]
    if attempt.state == "timed_out":
        return f"It was stopped {during}: {_closed(attempt.message or 'it did not answer')}"
    if attempt.state == "crashed":
        return f"It crashed {during}: {_closed(_how(attempt.message or 'for an unknown reason'))}"
    return f"It failed {during}: {_closed(_reason(attempt))}"


def _closed(text: str) -> str:
    return text if text.endswith(("!", "?")) else f"{text}."


def _how(message: str) -> str:
    match = _SIGNAL.fullmatch(message)
    if match is None:
        return _short(message)
    how = _SIGNALS.get(match[1], f"the process was ended by {match[1]}")
    return f"{how}; its last words: {_short(match[2])}" if match[2] else how


def _reason(attempt: Attempt) -> str:
    """The error itself: its exception, or what is known of it."""
    lines = [line.strip() for line in (attempt.traceback or "").splitlines() if line.strip()]
    said = attempt.error.cause.text if attempt.error is not None and attempt.error.cause is not None else None
    return _short(said or next((line for line in reversed(lines) if _EXCEPTION.match(line)), attempt.message or "unknown"))


_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning)\b")


def _short(text: str) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]} ..."


def _findings(attempt: Attempt, model: str) -> list[Finding]:
    found = []
    if attempt.state != "ran":
        found.append(_not_ended(attempt, model))
    if attempt.astray_count:
        found.append(_astray(attempt))
    found += _nonsense(attempt, model)
    found += _larger(attempt, model)
    return found


def _finding(code: str, message: str, fix: Fix, *, is_warning: bool = False, **more: str | None) -> Finding:
    severity: Severity = "warning" if is_warning else "error"
    return Finding(code=code, severity=severity, title=TITLES[code], message=message, fix=fix, cause=more.get("cause"))


def _not_ended(attempt: Attempt, model: str) -> Finding:
    error = attempt.error
    known = error.fix if error is not None else None
    other = {
        "timed_out": Fix(text="Allow more time with --deadline, or see with vlm-doctor whether a GPU or disk hangs."),
        "crashed": Fix(
            text="See with vlm-doctor whether the host, a GPU or a library is broken.", commands=("vlm-doctor",)
        ),
    }.get(attempt.state, Fix(text="Read the traceback.", commands=(f"vlm-doctor try {model} --verbose",)))
    if known is not None:
        # The command that led here would be no news.
        known = msgspec.structs.replace(
            known, commands=tuple(command.replace("MODEL", model) for command in known.commands)
        )
    cause = error.explanation if error is not None else None
    return _finding("VLM640", attempt.sentence, known or other, cause=cause)


def _astray(attempt: Attempt) -> Finding:
    more = attempt.astray_count - len(attempt.astray)
    counted = "1 tensor is" if attempt.astray_count == 1 else f"{attempt.astray_count} tensors are"
    named = "; ".join([*attempt.astray, *([f"and {more} more"] if more else [])])
    return _finding(
        "VLM641",
        f"{counted} elsewhere than planned: {named}.",
        Fix(text="Report it with this output: transformers or accelerate did not follow the map."),
    )


def _nonsense(attempt: Attempt, model: str) -> list[Finding]:
    found = []
    if attempt.missing_count:
        more = attempt.missing_count - len(attempt.missing)
        named = ", ".join([*attempt.missing, *([f"and {more} more"] if more else [])])
        found.append(
            _finding(
                "VLM643",
                f"The checkpoint lacks {attempt.missing_count} of the model's weights, which are random now: {named}.",
                Fix(text=f"Download {model} again, or install the transformers version that it was saved with."),
            )
        )
    if attempt.is_finite is False:
        found.append(
            _finding(
                "VLM643",
                "The logits hold NaN or infinity: the answer means nothing.",
                Fix(text="Load it in bfloat16 or float32: float16 overflows in many vision-language models."),
            )
        )
    if attempt.is_repeatable is False:
        found.append(
            _finding(
                "VLM643",
                "The same call, asked again, gave other tokens, although the likeliest one was taken each time.",
                Fix(text="Try again with --dtype float32; if it stays so, look at the GPUs.", commands=("vlm-doctor",)),
                is_warning=True,
            )
        )
    return found


def _larger(attempt: Attempt, model: str) -> list[Finding]:
    """Findings about GPUs whose peak is above the prediction: of segments where that was told, else of tensors."""
    found = []
    for peak in attempt.peaks:
        planned, measured = peak.planned_reserved_bytes, peak.reserved_bytes
        if planned is None:
            planned, measured = peak.planned_allocated_bytes, peak.allocated_bytes
        if planned is None or measured <= planned + max(TOLERANCE_BYTES, int(planned * TOLERANCE)):
            continue
        found.append(
            _finding(
                "VLM642",
                f"GPU {peak.gpu} took {format_gib(measured)} at most; {format_gib(planned)} were planned.",
                Fix(
                    text="Plan with more --headroom, or by the model's own code; please report it with this output.",
                    commands=(f"vlm-doctor plan {model} --trace",),
                ),
                is_warning=True,
            )
        )
    return found
