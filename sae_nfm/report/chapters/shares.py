"""How is the work divided between the paths? Shares and their correlations as published, beside the controls they need."""

from collections.abc import Iterator, Sequence

from sae_nfm.analysis.results import Statistic
from sae_nfm.experiments.reproduce.results import ReproducedRow, ReproduceResult
from sae_nfm.report.blocks import Block, Prose, Section, dots_figure, section_of
from sae_nfm.report.plots import Axis, Dot
from sae_nfm.report.run_folder import Run

TITLE = "Shares of the paths"
COMMANDS = ("sae-nfm reproduce --output RUN/reproduce",)
PUBLISHED, HERE, CONTROL = "arXiv 2507.00269", "this SAE, as published", "this SAE, under a control"
CHANCE = "chance: unrelated rows"
LEAD = (
    "How much of the work is linear, how much nonlinear, and does it depend on the norm of a feature? Each published "
    "statistic stands beside the same one on this SAE and under every control: another unit, another gauge, rows "
    "permuted at random."
)
SHARE_AXIS = Axis(title="share", tickformat=".0%", form=".1%", reference=0)
CORRELATION_AXIS = Axis(title="Spearman's correlation", tickformat="+.1f", form="+.3f", reference=0)
CAPTIONS = {
    Statistic.WRITTEN: (
        "Share of what the paths write on held-out tokens. Published: mean absolute values, biases included. "
        "Controls: energy about the mean, which leaves biases out, and the same in the canonical gauge, where all "
        "that is linear belongs to the direct path. Bars: 95 % intervals over documents. One SAE: the intervals say "
        "nothing about other seeds."
    ),
    Statistic.NORM_SHARE: (
        "Mean share of each path in a feature's summed weight norms. Controls are the same SAE with all rows in one "
        "unit, in the canonical gauge, weighted by activation, and before any training. Where these disagree, the "
        "share is a matter of units and gauge. No intervals: these are all features of one SAE."
    ),
    Statistic.CORRELATION: (
        "Spearman's correlation of a feature's squared decoder norm with its shares. The norm is a term of every "
        "share, so that unrelated weights correlate too: 'rows permuted' is the mean when the integration rows are "
        "given to other features at random. A correlation shows something where it is far from that one, not from 0; "
        "p is of that comparison."
    ),
}
TITLES = {
    Statistic.WRITTEN: ("written", "What the paths write"),
    Statistic.NORM_SHARE: ("weights", "Where a feature's weights are"),
    Statistic.CORRELATION: ("correlations", "Norm and share correlate by construction"),
}
"""Names and titles of the figures, in order."""


def section(run: Run) -> Section | None:
    """Of every reproduction of a run; None without any."""
    found = run.of(ReproduceResult)
    return section_of(found, id="shares", title=TITLE, lead=LEAD, blocks=_blocks, findings=findings)


def findings(result: ReproduceResult) -> list[str]:
    """Correlations of norm and share, each beside what it is by construction."""
    return [
        f"Squared norm and {row.path} share correlate at {row.here:+.3f} (published {row.published_text}); unrelated rows "
        f"at {row.controlled:+.3f} (p = {row.p_value:.2g})."
        for row in result.rows
        if row.statistic is Statistic.CORRELATION and row.published is not None and row.p_value is not None
        if isinstance(row.here, float) and isinstance(row.controlled, float)
    ]


def _blocks(result: ReproduceResult, number: int) -> Iterator[Block]:
    for statistic, (name, title) in TITLES.items():
        own = [row for row in result.rows if row.statistic is statistic]
        if own:
            share = statistic is not Statistic.CORRELATION
            axis, limits = (SHARE_AXIS, (-0.06, 1.06)) if share else (CORRELATION_AXIS, (-1.12, 1.12))
            caption, hollow = CAPTIONS[statistic], (PUBLISHED, CHANCE)
            yield dots_figure(f"{name}-{number}", title, dots(own), axis, caption, hollow=hollow, limits=limits)
    told = findings(result)
    if told:
        yield Prose(lines=told, listed=True)


def dots(rows: Sequence[ReproducedRow]) -> list[Dot]:
    """Under each statistic the published value where there is one, this SAE's, and one row for each control."""
    found: list[Dot] = []
    for name in dict.fromkeys(row.name for row in rows):
        same = [row for row in rows if row.name == name]
        first = same[0]
        heading = f"of integration: {first.path}" if first.statistic is Statistic.WRITTEN else first.path
        heading = heading if first.path else name
        if first.published is not None and first.published.value is not None:
            found.append(Dot(heading=heading, label=PUBLISHED, series=PUBLISHED, figure=first.published.value))
        found.append(Dot(heading=heading, label=HERE, series=HERE, figure=first.here))
        for row in same:
            if row.controlled is not None:
                series = CONTROL if row.p_value is None else CHANCE
                found.append(Dot(heading=heading, label=row.control, series=series, figure=row.controlled))
    return found
