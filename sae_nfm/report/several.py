"""Sections of results of which a run can have several: one after the other, each under its folder's name."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from sae_nfm.report.blocks import Block, Heading, Section
from sae_nfm.report.run_folder import Found

T = TypeVar("T")


def section_of(
    found: Sequence[Found[T]],
    *,
    id: str,
    title: str,
    lead: str,
    blocks: Callable[[Found[T], int], Iterable[Block]],
    findings: Callable[[T], Iterable[str]],
) -> Section | None:
    """The section of all results of one kind; None without any.

    Args:
        found: the results.
        id: the section's anchor.
        title: its heading.
        lead: what question it answers.
        blocks: of a result and its number, from 0.
        findings: of a result, for the summary; where there are several each is told with its folder.
    """
    if not found:
        return None
    shown: list[Block] = []
    verdicts: list[str] = []
    for number, one in enumerate(found):
        several = len(found) > 1
        shown += [Heading(text=one.label)] if several else []
        shown += blocks(one, number)
        verdicts += [f"{one.label}: {told}" if several else told for told in findings(one.result)]
    return Section(id=id, title=title, lead=lead, blocks=shown, verdicts=verdicts)
