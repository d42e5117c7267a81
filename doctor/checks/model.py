"""6xx: what a plan says about one model on this machine."""

from __future__ import annotations

from ..findings import Fix
from ..placement import Plan
from ..units import format_gib
from ._check import Check, Facts, Result, found, plain, skipped

_NO_PLAN = "no model was named"


def does_not_fit(facts: Facts) -> Result:
    """The model does not fit this machine, even with every GPU empty.

    ## What it checks
    The plan that was made for the model that was named.

    ## Why it matters
    Loading it would end in "CUDA out of memory", or in weights on the CPU or the disk.

    ## Example
    `error VLM601 glm-4v-9b does not fit this machine: 3.2 GiB are missing on GPU 0.`

    ## What to do
    Take one of the changes that the plan offers, smallest first: fewer or smaller images, a shorter prompt, 8 or 4 bit
    weights; or another machine.

    ## When it is fine
    Never for this workload. A test that needs the model is skipped (VLM705).

    ## Sources
    The plan's ledger: every number there names its source.
    """
    return _shortage(facts, is_permanent=True)


def does_not_fit_now(facts: Facts) -> Result:
    """The model would fit this machine, but memory is taken at the moment.

    ## What it checks
    The plan that was made for the model that was named, against the memory that is free now.

    ## Why it matters
    Loading it now would end in "CUDA out of memory"; later, or without the other processes, it works.

    ## Example
    `error VLM602 glm-4v-9b does not fit at the moment: 3.2 GiB are missing on GPU 0.`

    ## What to do
    See VLM501 and VLM502 for who holds the memory; wait for them, or take one of the changes that the plan offers.

    ## When it is fine
    On a shared machine, for a while. A test that needs the model is an error, not a skip (VLM711).

    ## Sources
    The plan's ledger: every number there names its source.
    """
    return _shortage(facts, is_permanent=False)


def _shortage(facts: Facts, *, is_permanent: bool) -> Result:
    plan = facts.plan
    if plan is None:
        return skipped(_NO_PLAN)
    shortage = plan.shortage
    if plan.fits or is_permanent is not (shortage is None or shortage.is_permanent):
        return ()
    when = "this machine" if is_permanent else "at the moment"
    why = plain(shortage.message).rstrip(".") if shortage is not None else "no placement was found"
    lacks_memory = shortage is None or shortage.missing_bytes > 0
    missing = ("plan.shortage.missing_bytes",) if lacks_memory else ()
    return (
        found(
            "error",
            f"{plain(plan.model)} does not fit {when}: {why}.",
            evidence=facts.evidence(*missing, "plan.prompt_tokens", "plan.dtype"),
            fix=_change(plan, is_permanent),
        ),
    )


def _change(plan: Plan, is_permanent: bool) -> Fix | None:
    """The first change that makes it fit, as the planner computed it."""
    levers = plan.shortage.levers if plan.shortage is not None else ()
    fitting = [lever for lever in levers if lever.fits]
    if fitting:
        return Fix(
            text=f"It fits with this change: {plain(fitting[0].change)} (saves {format_gib(fitting[0].saves_bytes)})."
        )
    if is_permanent:
        return Fix(text="No single change makes it fit: combine the changes of the plan, or take another machine.")
    return Fix(text="Wait for the other processes, or stop those that are yours.", commands=("nvidia-smi",))


def remote_code(facts: Facts) -> Result:
    """The checkpoint brings its own Python code.

    ## What it checks
    Whether the model's class lives in the checkpoint (`auto_map` in config.json).

    ## Why it matters
    Loading it with `trust_remote_code=True` runs that code with all your rights. A plan does not: it reads headers
    only.

    ## Example
    `warning VLM603 THUDM/glm-4v-9b needs trust_remote_code=True: loading it runs code from the checkpoint.`

    ## What to do
    Read the code and pin a revision, then allow it: `trust_remote_code=True` in the `vlm` marker. Or take a
    checkpoint of the same model in a class that transformers has.

    ## When it is fine
    With a checkpoint you trust.

    ## Sources
    config.json; transformers, "Custom models".
    """
    plan = facts.plan
    if plan is None:
        return skipped(_NO_PLAN)
    if not plan.is_remote_code:
        return ()
    return (
        found(
            "warning",
            f"{plain(plan.model)} needs trust_remote_code=True: loading it runs code from the checkpoint.",
            cause="Its class is not part of transformers.",
            evidence=facts.evidence("plan.is_remote_code"),
            fix=Fix(text="Read the code and pin a revision, then load with trust_remote_code=True."),
        ),
    )


CHECKS = (
    Check(code="VLM601", title="model does not fit this machine", run=does_not_fit),
    Check(code="VLM602", title="model does not fit now", run=does_not_fit_now),
    Check(code="VLM603", title="checkpoint needs remote code", run=remote_code),
)
