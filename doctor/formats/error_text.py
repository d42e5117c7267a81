"""What a pasted error means, as terminal text."""

from __future__ import annotations

from ..answers import ErrorAnswer
from ..machine import Machine
from .page import Page


def write_error(page: Page, answer: ErrorAnswer, machine: Machine, *, verbose: bool = False) -> None:
    """Write the one cause, whether the machine agrees, what to do and what to verify; or that nothing is recognized."""
    if answer.cause is None or answer.explanation is None:
        _write_unknown(page, answer)
        return
    page.ends([("Cause", "bold red"), "  ", (answer.explanation, "bold")], (answer.cause.code, "dim"))
    # Of a log that was not read in full, lines cannot be counted.
    page.item("Text:" if answer.skipped_bytes else f"Line {answer.cause.line}:", answer.cause.text, indent=2)
    for name, value in answer.facts.items():
        page.item(f"{name[0].upper()}{name[1:]}:", value, indent=2)
    _write_confirmation(page, answer, machine)
    if answer.also:
        page.gap()
        page.text(("Also in the text, explained by it or after it", "bold"))
        for one in answer.also:
            where = "" if answer.skipped_bytes else f"line {one.line}: "
            page.item("-", f"{where}{one.text} ({one.code})", indent=2)
    if answer.last_error is not None:
        page.gap()
        page.item("Not known:", f"the text ends with {answer.last_error}")
    page.gap()
    if answer.fix is not None:
        page.item("Do this next:", f"{answer.fix.request} ({answer.cause.code})")
        for command in answer.fix.commands:
            page.verbatim(command, indent=4, style="bold")
    if answer.verify is not None:
        page.item("Then verify with:", (answer.verify, "bold"))
    page.item("More:", (f"vlm-doctor explain {answer.cause.code}", "bold"))
    if verbose and answer.source is not None:
        page.item("Source:", answer.source)
    _write_skipped(page, answer)


def _write_unknown(page: Page, answer: ErrorAnswer) -> None:
    page.text(("Not recognized: nothing in this text is known to the doctor.", "bold yellow"))
    if answer.last_error is not None:
        page.item("It ends with:", answer.last_error, indent=2)
    page.gap()
    page.item("Do this next:", "Look at the machine itself; and paste the whole log, with the first error of every rank.")
    page.verbatim("vlm-doctor", indent=4, style="bold")
    _write_skipped(page, answer)


def _write_confirmation(page: Page, answer: ErrorAnswer, machine: Machine) -> None:
    where = "this machine" if machine.origin == "live" else machine.description
    page.gap()
    if answer.confirmation == "confirmed":
        page.text((f"Confirmed on {where}:", "bold"))
        for finding in answer.confirmed_by:
            page.item("-", f"{finding.message} ({finding.code})", indent=2)
    elif answer.confirmation == "not_seen":
        page.text(f"Not seen on {where} now: the log comes from another one, or what was wrong has changed.")
    elif answer.confirmation == "unknown":
        page.text(f"Whether {where} has this trouble is not known: what would tell could not be read.")
    else:
        page.text("A look at the machine cannot tell: this happens in the program.")


def _write_skipped(page: Page, answer: ErrorAnswer) -> None:
    if answer.skipped_bytes:
        page.gap()
        page.text(
            (f"{answer.skipped_bytes:,} bytes from the middle of {answer.where} were only searched for errors.", "dim")
        )
