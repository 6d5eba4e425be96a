"""How training went: unexplained variance, what each path does, dead features, of every training record."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section
from sae_nfm.report.plots import DASHES, DECADES, line, styled
from sae_nfm.report.run_folder import Run
from sae_nfm.training.results import Curve, TrainingCurves, training_curves

TITLE = "Training: how they got there"
COMMANDS = (
    "sae-nfm train --output RUN/mine",
    "sae-nfm demo --output RUN/demo",
    "sae-nfm compare --output RUN/compare",
)
MOST = 6
"""SAEs in a figure."""
TOGETHER = "SAEs trained one by one"
Named = Mapping[str, TrainingCurves]
Line = tuple[str, str, Curve]
"""Of an SAE a part, such as a path, and its curve; all lines of a part have one style."""


def section(run: Run) -> Section | None:
    """The chapter; None without a training record. Records of one folder of the run share their figures, and so do all SAEs
    that are the only one in theirs, as of `sae-nfm train`.
    """
    groups: dict[str, list[tuple[str, TrainingCurves]]] = {}
    places: dict[str, str] = {}
    for path in run.records:
        label = run.label(path.parent)
        folder, _, inside = label.partition("/")
        places[folder] = label
        for curves in training_curves(path):
            groups.setdefault(folder, []).append((_name(inside, curves.sae), curves))
    alone = [folder for folder, named in groups.items() if len(named) == 1]
    if len(alone) > 1:
        together = [(places[folder], groups.pop(folder)[0][1]) for folder in alone]
        groups = {TOGETHER: together} | groups
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
    too_short = {name: own for name, own in named if own.dead is not None and _never_dead(own)}
    counted = [own.dead.values[-1] for name, own in named if own.dead is not None and name not in too_short]
    if counted and not any(counted):
        yield Prose(lines=[f"At the end no feature counted as dead in any of these {len(counted)} SAEs."])
    if too_short:
        windows = ", ".join(
            f"{name} ({own.dead_feature_window:,} of {own.steps:,} steps)" for name, own in too_short.items()
        )
        yield Prose(
            lines=[
                "No feature could count as dead, however many never fired: the steps for which it has to be silent "
                f"(dead_feature_window) are no fewer than those of the run, for {windows}. The explorer counts features "
                "that fire on no held-out token."
            ]
        )
    if len(named) > MOST:
        left = ", ".join(name for name, _ in named[MOST:])
        yield Prose(lines=[f"The first {MOST} of {len(named)} training records are drawn; not: {left}."])


def _never_dead(curves: TrainingCurves) -> bool:
    """Whether the run was too short for a feature to count as dead."""
    window, steps = curves.dead_feature_window, curves.steps
    return window is not None and steps is not None and steps <= window


def unexplained_figure(curves: Named, number: int) -> Figure | None:
    """FVU of the whole output, and dotted of the direct path alone; None without."""
    lines = [
        (name, part, curve)
        for name, own in curves.items()
        for part, curve in (("all paths", own.unexplained), ("direct path alone", own.direct))
        if curve is not None
    ]
    return _figure(
        lines,
        f"unexplained-{number}",
        "What is left unexplained, and what the direct path alone would leave",
        "Fraction of the training batch's variance that is not explained (FVU, logarithmic); lower is better. "
        "Solid: all paths. Dotted: the direct path alone, in the same SAE. It is trained together with the others, "
        "never to stand alone: its gap to the solid line says how the work is divided. The fair comparison is with "
        "the solid lines of other SAEs. Secondary SAEs are measured on what they are trained on, not on the model's "
        "activations.",
        axis={"title": "FVU of the batch", **DECADES},
    )


def shares_figure(curves: Named, number: int) -> Figure | None:
    """Shares of the integration paths; None where no SAE has several."""
    several = {name: own.shares for name, own in curves.items() if len(own.shares) > 1}
    lines = [(sae, path, curve) for sae, paths in several.items() for path, curve in paths.items()]
    return _figure(
        lines,
        f"shares-{number}",
        "Which integration path writes how much",
        "Mean absolute value of what each integration path writes, as a share of the sum of these: the paper's 94 % "
        "linear, 6 % nonlinear. Constants count in it, and the linear share depends on the gauge: what the linear "
        "path writes, the direct path could write as well. The chapters on norms and shares have the controls.",
        axis={"title": "share of what integration writes", "range": [0, 1], "tickformat": ".0%"},
    )


def l0_figure(curves: Named, number: int) -> Figure | None:
    """Active features; None where k fixes them."""
    lines = [(n, "L0", own.l0) for n, own in curves.items() if own.l0 is not None]
    if all(len(set(curve.values)) == 1 for _, _, curve in lines):
        return None
    return _figure(
        lines,
        f"l0-{number}",
        "Active features while they were trained",
        "Features active on a token, mean over the batch. FVU of SAEs is comparable at equal L0 only.",
        axis={"title": "active features per token", "rangemode": "tozero"},
    )


def held_out_figure(curves: Named, number: int) -> Figure | None:
    """KL on held-out text; None where it was not recorded."""
    lines = [(n, "held-out KL", own.held_out_kl) for n, own in curves.items() if own.held_out_kl is not None]
    return _figure(
        lines,
        f"held-out-{number}",
        "Divergence of the model's predictions on held-out text",
        "KL(original || spliced) by SAELens's evaluation on the same held-out rows each time, nats per token "
        "(logarithmic); lower is better.",
        axis={"title": "KL, nats per token", **DECADES},
    )


def dead_figure(curves: Named, number: int) -> Figure | None:
    """Dead features; None where there never were any."""
    lines = [(n, "dead features", own.dead) for n, own in curves.items() if own.dead is not None]
    if not any(value for _, _, curve in lines for value in curve.values):
        return None
    return _figure(
        lines,
        f"dead-{number}",
        "Features that fell silent",
        "Features that no token of SAELens's dead-feature window activated, over training tokens. A count of zero "
        "in the first steps only says that the window was not yet full.",
        axis={"title": "dead features", "rangemode": "tozero"},
    )


def _figure(lines: list[Line], name: str, title: str, caption: str, *, axis: dict[str, Any]) -> Figure | None:
    if not lines:
        return None
    rows = [
        (sae, part, tokens, value)
        for sae, part, curve in lines
        for tokens, value in zip(curve.tokens, curve.values, strict=True)
    ]
    return Figure(
        name=name,
        title=title,
        plot=_plot(lines, axis),
        caption=caption,
        data=pd.DataFrame(rows, columns=["SAE", "part", "training tokens", str(axis["title"])]),
    )


def _plot(lines: list[Line], axis: dict[str, Any]) -> go.Figure:
    """A colour and symbol for each SAE, a dash for each part."""
    saes, parts = (list(dict.fromkeys(one[place] for one in lines)) for place in (0, 1))
    dashes = dict(zip(parts, ("solid", "dot", *DASHES[1:2], *DASHES[3:]), strict=False))
    figure = go.Figure()
    for sae, part, curve in lines:
        name = sae if len(parts) == 1 else f"{sae}, {part}"
        told = f"{sae}, {part}<br>%{{x:,}} tokens: %{{y:.4g}}<extra></extra>"
        trace = line(curve.tokens, curve.values, name, saes.index(sae), hovertemplate=told)
        trace.update(line_dash=dashes[part], marker_maxdisplayed=7, marker_line_width=0)
        figure.add_trace(trace)
    figure.update_xaxes(title="training tokens", rangemode="tozero", nticks=6, tickangle=0)
    figure.update_yaxes(**axis)
    entries = -(-len(lines) // 3)  # of the legend, some three in a line
    styled(figure, height=380 + 24 * entries, narrow={"height": 400 + 24 * len(lines), "xaxis": {"nticks": 4}})
    figure.update_layout(legend={"traceorder": "normal"})
    return figure
