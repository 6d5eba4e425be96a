"""Benchmark results as plotly figures. A figure draws numbers that are there; it computes none."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.results import ALL_PATHS, BenchmarkResult

# Okabe & Ito's palette: distinguishable with every common colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
FONT = {"family": "system-ui, sans-serif", "size": 13}


def fidelity_figure(result: BenchmarkResult) -> go.Figure:
    """FVU and KL of every row: whole SAEs filled, ablations hollow, one colour an SAE."""
    figure = make_subplots(
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=("Fraction of variance unexplained", "KL to the original model, nats per token"),
    )
    colours = _colours(result)
    for column, value in ((1, "fvu"), (2, "kl_nats")):
        for row in result.rows:
            whole = row.paths == ALL_PATHS
            figure.add_trace(
                go.Scatter(
                    x=[getattr(row.fidelity, value)],
                    y=[row.name],
                    mode="markers",
                    marker={
                        "size": 12,
                        "color": colours[row.sae],
                        "symbol": "circle" if whole else "circle-open",
                    },
                    hovertemplate=f"{row.name}<br>%{{x:.4f}}<extra></extra>",
                    showlegend=False,
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(rangemode="tozero", title="lower is better")
    figure.update_yaxes(autorange="reversed", col=1)
    return _styled(figure, height=120 + 34 * len(result.rows))


def claims_figure(result: BenchmarkResult) -> go.Figure:
    """The paper's figure beside the fair ones: change of FVU and KL, one bar group a comparison."""
    figure = go.Figure()
    labels = [
        f"{c.row}<br>vs {c.against.removeprefix(f'{c.row}: ')} ({'paper' if c.kind == 'paper' else 'fair'})"
        for c in result.comparisons
    ]
    for name, attribute, colour in (
        ("FVU", "fvu_change", PALETTE[0]),
        ("KL", "kl_change", PALETTE[1]),
    ):
        values = [getattr(comparison, attribute) for comparison in result.comparisons]
        text = [f"{value:+.1%}" for value in values]
        figure.add_bar(x=labels, y=values, name=name, marker_color=colour, text=text, textposition="outside")
    figure.update_yaxes(title="relative change (below zero: better)", tickformat="+.0%", zerolinewidth=2)
    return _styled(figure, height=460)


def training_figure(record: Sequence[dict[str, Any]], result: BenchmarkResult) -> go.Figure:
    """Explained variance of the training batches by tokens seen; dotted: the direct path of a joint NFM-SAE alone."""
    figure = go.Figure()
    colours = _colours(result)
    for name, colour in colours.items():
        lines = [line for line in record if line["sae"] == name]
        for key, dash, suffix in (
            ("metrics/explained_variance", "solid", ""),
            ("metrics/fvu_direct", "dot", ", direct path alone"),
        ):
            points = [(line["tokens"], line[key]) for line in lines if key in line]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            y = [1 - value for value in y] if key == "metrics/fvu_direct" else y
            figure.add_scatter(x=x, y=y, name=name + suffix, mode="lines", line={"color": colour, "dash": dash})
    figure.update_xaxes(title="training tokens")
    figure.update_yaxes(title="explained variance of the batch", range=[0, 1])
    return _styled(figure, height=460)


def _colours(result: BenchmarkResult) -> dict[str, str]:
    names = dict.fromkeys(row.sae for row in result.rows)
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}


def _styled(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        font=FONT,
        margin={"l": 20, "r": 20, "t": 50, "b": 50},
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_yaxes(automargin=True)
    return figure
