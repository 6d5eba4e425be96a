"""A benchmark of one seed as figures: the paper's comparison beside the fair ones, and every row of the table."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.comparison import ALL_PATHS, PUBLISHED, BenchmarkResult, Comparison
from sae_nfm.report.blocks import Figure
from sae_nfm.report.dot_plot import Axis, Group, Mark, Row, dot_plot, drawn
from sae_nfm.report.theme import PALETTE, styled, wrapped

PANELS = {"fvu": "FVU, fraction of variance unexplained", "kl_nats": "KL, nats per token"}
CHANGES = (("FVU", "fvu_change", PALETTE[0], ""), ("KL", "kl_change", PALETTE[1], "/"))
KINDS = (("paper", "The paper's comparison: with a part of itself"), ("fair", "Fair: with SAEs trained on their own"))
WIDTH, NARROW_WIDTH = 44, 22
ClaimRows = Sequence[tuple[str, Comparison | None]]
"""Labels from top to bottom; a heading has no comparison."""


def claims_figure(result: BenchmarkResult, number: int) -> Figure:
    """Change of FVU and KL in every comparison, the paper's above the fair ones.

    Args:
        result: of a benchmark.
        number: of the result in the run, from 1, for the figure's name.
    """
    rows = _claim_rows(result)
    data = [
        (_against(c), c.kind, measure, getattr(c, attribute))
        for _, c in rows
        if c is not None
        for measure, attribute, _, _ in CHANGES
    ]
    return Figure(
        name=f"claims-{number}",
        title="The same models, two comparisons",
        plot=_claims_plot(rows),
        caption="Relative change of the reconstruction error (FVU) and of the divergence of the model's predictions "
        "(KL); left of zero the joint SAE is better. Above, the paper's comparison: all paths against the direct "
        "path alone, a part of the same SAE that was never trained to stand alone. Below, its control: SAEs trained "
        "on their own on the same tokens. One seed each: no intervals, and differences of a few per cent may be "
        f"chance. {PUBLISHED}",
        data=pd.DataFrame(data, columns=["comparison", "kind", "measure", "relative change"]),
    )


def _claim_rows(result: BenchmarkResult) -> ClaimRows:
    rows: list[tuple[str, Comparison | None]] = []
    for kind, heading in KINDS:
        own = [comparison for comparison in result.comparisons if comparison.kind == kind]
        rows += [(heading, None), *((_against(comparison), comparison) for comparison in own)] if own else []
    return rows


def _against(comparison: Comparison) -> str:
    part = comparison.against.removeprefix(f"{comparison.row}: ")
    if comparison.kind == "paper":
        return f"{comparison.row} against its own part, {part}"
    return f"{comparison.row} against {part} ({comparison.parameter_ratio:.2f} x its parameters)"


def _claims_plot(rows: ClaimRows) -> go.Figure:
    figure = go.Figure()
    places = [(place, comparison) for place, (_, comparison) in enumerate(rows) if comparison is not None]
    for name, attribute, colour, pattern in CHANGES:
        values = [getattr(comparison, attribute) for _, comparison in places]
        figure.add_bar(
            x=values,
            y=[place for place, _ in places],
            orientation="h",
            name=name,
            marker={
                "color": colour,
                "pattern": {"shape": pattern, "fgcolor": "white", "fillmode": "overlay", "size": 6},
            },
            text=[f"{value:+.1%}" for value in values],
            textposition="outside",
            cliponaxis=False,
            hovertext=[
                f"{_against(comparison)}<br>{name}: {value:+.1%}"
                for (_, comparison), value in zip(places, values, strict=True)
            ],
            hoverinfo="text",
        )

    _claims_axes(figure, rows)
    wide, narrow = _span(places, 0.12), _span(places, 0.4)
    styled(
        figure,
        height=110 + 50 * len(rows),
        narrow={
            "height": 130 + 76 * len(rows),
            "yaxis": {"ticktext": _labels(rows, NARROW_WIDTH)},
            "xaxis": {"range": narrow},
        },
    )
    figure.update_layout(barmode="group", bargap=0.3, legend={"traceorder": "normal"}, xaxis={"range": wide})
    figure.update_yaxes(ticks="")
    return figure


def _claims_axes(figure: go.Figure, rows: ClaimRows) -> None:
    title = "change (left of zero: better)"
    figure.update_xaxes(title=title, tickformat="+.0%", zerolinewidth=2, nticks=6, tickangle=0)
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=_labels(rows, WIDTH),
        range=[len(rows) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )


def _labels(rows: ClaimRows, width: int) -> list[str]:
    return [wrapped(text, width) if comparison else f"<b>{wrapped(text, width)}</b>" for text, comparison in rows]


def _span(places: Sequence[tuple[int, Comparison]], room: float) -> list[float]:
    """Ends of the axis, with room on both sides, a share of the whole, for the texts beside the bars."""
    ends = [0.0, *(getattr(comparison, attribute) for _, comparison in places for _, attribute, _, _ in CHANGES)]
    low, high = min(ends), max(ends)
    return [low - room * (high - low), high + room * (high - low)]


def fidelity_figure(result: BenchmarkResult, number: int) -> Figure:
    """FVU and KL of every row.

    Args:
        result: of a benchmark.
        number: of the result in the run, from 1, for the figure's name.
    """
    groups = (
        Group(name="whole SAE", colour=PALETTE[0], symbol="circle"),
        Group(name="with paths switched off", colour=PALETTE[4], symbol="diamond-open"),
    )
    rows = [Row(key=row.name, label=row.name) for row in result.rows]
    marks = [
        Mark(panel=panel, row=row.name, group=groups[row.paths != ALL_PATHS].name, x=getattr(row.fidelity, measure))
        for measure, panel in PANELS.items()
        for row in result.rows
    ]
    return Figure(
        name=f"rows-{number}",
        title="Error and divergence of every SAE, whole and with paths off",
        plot=dot_plot(
            marks, groups, rows, Axis(title="lower is better", from_zero=True), panels=tuple(PANELS.values())
        ),
        caption=f"Held-out text, {result.rows[0].fidelity.tokens:,} tokens, position 0 and special tokens left out. "
        "Filled: SAEs as they were trained. Hollow: the same SAE with paths switched off (they write zero). The "
        "distance between the two says how an SAE divides its work, not how good it is: for that, compare the "
        "filled ones. One seed.",
        data=drawn(marks, rows),
    )
