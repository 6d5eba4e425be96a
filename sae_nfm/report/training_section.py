"""How training went: unexplained variance, what each path does, dead features, of every training record."""

from collections.abc import Iterator, Sequence

from sae_nfm.report.blocks import Block, Heading, Prose, Section
from sae_nfm.report.run_folder import Run
from sae_nfm.report.training_figures import (
    MOST,
    dead_figure,
    held_out_figure,
    l0_figure,
    shares_figure,
    unexplained_figure,
)
from sae_nfm.training import TrainingCurves, training_curves

TITLE = "Training: how they got there"
COMMAND = "sae-nfm demo --output RUN/demo, or any command that trains"


def section(run: Run) -> Section | None:
    """The chapter; None without a training record. Records of one folder of the run share their figures."""
    groups: dict[str, list[tuple[str, TrainingCurves]]] = {}
    for path in run.records:
        label = run.label(path.parent)
        folder, _, inside = label.partition("/")
        for curves in training_curves(path):
            groups.setdefault(folder, []).append((_name(inside, curves.sae), curves))
    if not groups:
        return None
    blocks: list[Block] = []
    for number, (folder, named) in enumerate(groups.items(), 1):
        if len(groups) > 1:
            blocks.append(Heading(text=folder))
        blocks += _blocks(named, number)
    return Section(
        id="training",
        title=TITLE,
        lead="What each SAE left unexplained of the batches it was trained on, and which of its paths wrote how "
        "much. Batches are seen for the first time when they are measured, but held-out figures are in the other "
        "chapters.",
        blocks=blocks,
    )


def _name(inside: str, sae: str) -> str:
    """What a line is called: where its record is, and the SAE in it."""
    return inside if inside.rsplit("/", 1)[-1] == sae else "/".join(part for part in (inside, sae) if part)


def _blocks(named: Sequence[tuple[str, TrainingCurves]], number: int) -> Iterator[Block]:
    drawn = dict(named[:MOST])
    figures = (unexplained_figure, shares_figure, l0_figure, held_out_figure, dead_figure)
    yield from (figure for draw in figures if (figure := draw(drawn, number)) is not None)
    dead = {name: curves.dead.values[-1] for name, curves in named if curves.dead is not None}
    if dead and not any(dead.values()):
        yield Prose(lines=[f"At the end no feature counted as dead in any of these {len(dead)} SAEs."])
    if len(named) > MOST:
        left = ", ".join(name for name, _ in named[MOST:])
        yield Prose(lines=[f"The first {MOST} of {len(named)} training records are drawn; not: {left}."])
