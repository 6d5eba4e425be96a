"""How is the work divided between the paths? Shares and their correlations as published, beside the controls they need."""

from collections.abc import Iterator, Sequence

from sae_nfm.analysis.results import Figure as Value
from sae_nfm.experiments.reproduce import ReproducedRow
from sae_nfm.experiments.reproduce.results import ReproduceResult
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section
from sae_nfm.report.plots.dot_plot import Axis
from sae_nfm.report.plots.dot_rows import Dot, dot_data, dot_rows
from sae_nfm.report.run_folder import Found, Run

TITLE = "Shares of the paths"
COMMANDS = ("sae-nfm reproduce --output RUN/reproduce",)
PUBLISHED, HERE, CONTROL = "arXiv 2507.00269", "this SAE, as published", "this SAE, under a control"
CHANCE, DEALT_OUT = "chance: unrelated rows", "rows dealt out"
LEAD = (
    "How much of the work is linear, how much nonlinear, and does it depend on the norm of a feature? Each published "
    "statistic stands beside the same one on this SAE and under every control: another unit, another gauge, rows "
    "dealt out at random."
)
WRITTEN = ("share of what the integration paths write", "nonlinear share of what is written")
WEIGHTS, SPEARMAN = "share of weight norm, ", "Spearman of squared norm and share"
SHARE_AXIS = Axis(title="share", tickformat=".0%", form=".1%", reference=0)
CORRELATION_AXIS = Axis(title="Spearman's correlation", tickformat="+.1f", form="+.3f", reference=0)
CAPTIONS = {
    "written": (
        "Share of what the paths write on held-out tokens. Published: mean absolute values, biases included. "
        "Controls: energy about the mean, which leaves biases out, and the same in the canonical gauge, where all "
        "that is linear belongs to the direct path. Bars: 95 % intervals over documents. One SAE: the intervals say "
        "nothing about other seeds."
    ),
    "weights": (
        "Mean share of each path in a feature's summed weight norms. Controls are the same SAE with all rows in one "
        "unit, in the canonical gauge, weighted by activation, and before any training. Where these disagree, the "
        "share is a matter of units and gauge. No intervals: these are all features of one SAE."
    ),
    "correlations": (
        "Spearman's correlation of a feature's squared decoder norm with its shares. The norm is a term of every "
        "share, so that unrelated weights correlate too: 'rows dealt out' is the mean when the integration rows are "
        "given to other features at random. A correlation shows something where it is far from that one, not from 0; "
        "p is of that comparison."
    ),
}
TITLES = {
    "written": "What the paths write",
    "weights": "Where a feature's weights are",
    "correlations": "Norm and share correlate by construction",
}


def section(run: Run) -> Section | None:
    """Of every reproduction of a run; None without any."""
    blocks: list[Block] = []
    verdicts: list[str] = []
    found = run.of(ReproduceResult)
    for number, one in enumerate(found):
        own, told = list(_figures(one, number)), findings(one.result)
        if own and len(found) > 1:
            blocks.append(Heading(text=one.label))
        blocks += [*own, *([Prose(lines=told, listed=True)] if told else [])]
        verdicts += told
    return Section(id="shares", title=TITLE, lead=LEAD, blocks=blocks, verdicts=verdicts) if blocks else None


def findings(result: ReproduceResult) -> list[str]:
    """Correlations of norm and share, each beside what it is by construction."""
    said: list[str] = []
    for row in result.rows:
        here, null = row.here, row.controlled
        if row.published == "-" or not row.name.startswith(SPEARMAN) or DEALT_OUT not in row.control:
            continue
        if isinstance(here, float) and isinstance(null, float):
            share = row.name.removeprefix(f"{SPEARMAN}, ")
            said.append(
                f"Squared norm and {share} share correlate at {here:+.3f} (published {row.published}); unrelated rows "
                f"at {null:+.3f} ({row.control.rpartition(', ')[2]})."
            )
    return said


def _figures(found: Found[ReproduceResult], number: int) -> Iterator[Figure]:
    rows = [row for row in found.result.rows if row.section in ("paths", "norms")]
    chosen = {
        "written": [row for row in rows if row.name.startswith(WRITTEN)],
        "weights": [row for row in rows if row.name.startswith(WEIGHTS) and "squared norm" not in row.name],
        "correlations": [row for row in rows if row.name.startswith(SPEARMAN) and "canonical gauge," not in row.name],
    }
    chosen["correlations"] = [row for row in chosen["correlations"] if "weighted," not in row.name]
    for name, own in chosen.items():
        if own:
            share = name != "correlations"
            drawn = dots(own)
            axis = SHARE_AXIS if share else CORRELATION_AXIS
            plot = dot_rows(drawn, axis, hollow=(PUBLISHED, CHANCE), limits=(-0.06, 1.06) if share else (-1.12, 1.12))
            yield Figure(
                name=f"{name}-{number}", title=TITLES[name], plot=plot, caption=CAPTIONS[name], data=dot_data(drawn)
            )


def dots(rows: Sequence[ReproducedRow]) -> list[Dot]:
    """Under each statistic the published figure where there is one, this SAE's, and one row for each control."""
    found: list[Dot] = []
    for name in dict.fromkeys(row.name for row in rows):
        same = [row for row in rows if row.name == name]
        first = same[0]
        heading = _heading(name)
        published = published_value(first.published)
        if published is not None:
            found.append(_dot(heading, PUBLISHED, PUBLISHED, published))
        found.append(_dot(heading, HERE, HERE, first.here))
        for row in same:
            if row.controlled is not None:
                series = CHANCE if DEALT_OUT in row.control else CONTROL
                found.append(_dot(heading, row.control, series, row.controlled))
    return found


def published_value(text: str) -> float | None:
    """The number of a published figure such as "94 %" or "-0.987"; None where it is words."""
    number, _, unit = text.partition(" ")
    try:
        return float(number) / (100 if unit == "%" else 1)
    except ValueError:
        return None


def _heading(name: str) -> str:
    return name.removeprefix(WEIGHTS).removeprefix(f"{SPEARMAN}, ").replace(f"{WRITTEN[0]}, ", "of integration: ")


def _dot(heading: str, label: str, series: str, figure: Value) -> Dot:
    return Dot(heading=heading, label=label, series=series, figure=figure)
