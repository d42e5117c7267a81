"""What changed since it last worked, as terminal text."""

from __future__ import annotations

from ..answers import Change, Changes
from .page import Page

_MAX_SHOWN = 20


def write_changes(page: Page, changes: Changes, *, shown: tuple[Change, ...] = (), verbose: bool = False) -> None:
    """Write the differences, those in ``shown`` left out: they are on the page already."""
    fresh = [change for change in changes.changes if change not in shown]
    if shown and not fresh:
        return
    when = changes.since
    state = {None: "", 0: ", when it was usable"}.get(changes.saved_exit_status, ", when it was not usable either")
    page.gap()
    if not changes.changes:
        page.text(f"Nothing has changed since {when}{state}.")
        return
    page.text((f"Changed since {when}{state}", "bold"))
    listed = fresh if verbose else fresh[:_MAX_SHOWN]
    for change in listed:
        page.item("-", change.text, indent=2)
    if len(listed) < len(fresh):
        page.text((f"and {len(fresh) - len(listed)} more (--verbose lists them)", "dim"), indent=2)
