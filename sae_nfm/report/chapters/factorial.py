"""Do features act together? A 2x2 experiment: selection, cell means after clamps, the contrast of every arm, controls."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.experiments.factorial.results import (
    PRIMARY_SCALE,
    ArmResult,
    FactorialResult,
    SelectedUnit,
    eta_text,
    p_text,
    who,
)
from sae_nfm.report.blocks import Block, Figure, Prose, Section, Table, dots_figure, section_of
from sae_nfm.report.plots import Axis, Dot, bars, ends, line, styled, wrapped
from sae_nfm.report.run_folder import Run
from sae_nfm.stats import Estimate

TITLE = "2x2 experiments"
COMMANDS = ("sae-nfm factorial --output RUN/factorial",)
PANELS = 12
"""Panels of cell means; the forest plot and the table have every arm."""
LEAD = (
    "Does clamping a feature or a pair change target words by an interaction of two factors of the text? Units are "
    "selected on one half of the stimuli and tested on the other, beside controls that were not selected."
)
SELECTION_CAPTION = (
    "What was selected on one half of the stimuli, and its own activation on the other half. Selected F is inflated "
    "by the choice among the candidates (null p: how often chance does as well); procedure p is that of the whole "
    "procedure on shuffled cells."
)
CONTRAST_AXIS = Axis(title="contrast, nats", form="+.3g", reference=0)
CONTRAST_CAPTION = (
    "Interaction contrast of every clamp, m0 - m1 - m2 + m3 over the four cells, in nats of log-probability, with 95 "
    "% intervals over the held-out stimuli; at 0 the factors add up. Filled: selected units, with Holm's p over all "
    "of them. Hollow: controls, among them units of like activation that were not selected. Clamps of one unit are "
    "not independent; another division of the stimuli selects others."
)
ARMS_CAPTION = (
    "Every clamp: contrast of the cells (nats of log-probability), F and p with the stimuli as units, Holm's p over "
    "the selected, and whether a monotone transform of the change removes the interaction. author's F: the published "
    "statistic, a one-way F on words paired by their place in a list; no valid test."
)
COLUMNS, NARROW_COLUMNS = 4, 2
PANEL = 170
"""Height of a panel of cell means, in pixels."""
Levels = tuple[tuple[str, str], tuple[str, str]]
"""Levels of the first and of the second factor."""
KINDS = {"feature": "features", "pair": "pairs", "secondary": "secondary features"}
"""Kinds of units, in words."""


def section(run: Run) -> Section | None:
    """All experiments of a run; None without any."""
    found = run.of(FactorialResult)
    return section_of(found, id="factorial", title=TITLE, lead=LEAD, blocks=_blocks, findings=FactorialResult.findings)


def _blocks(result: FactorialResult, number: int) -> list[Block]:
    chosen = result.largest_clamps()[:PANELS]
    tested = f"{result.design}. Selected on {result.items[0]} stimuli, tested on the other {result.items[1]}."
    return [
        Prose(lines=[tested, *result.findings()]),
        _selection(result),
        Figure(
            name=f"cells-{number}",
            title="The cells after each unit is clamped: parallel lines are no interaction",
            plot=cells_figure(chosen, _levels(result)),
            caption=_cells_caption(result, chosen),
            data=pd.DataFrame([row for arm in chosen for row in _cell_rows(arm, result)]),
        ),
        *_contrasts(result, number),
        _arms(result),
    ]


def _levels(result: FactorialResult) -> Levels:
    first, second = (tuple(factor["levels"]) for factor in result.provenance["stimuli"]["factors"])
    return (first[0], first[1]), (second[0], second[1])


def _cells_caption(result: FactorialResult, chosen: Sequence[ArmResult]) -> str:
    first, second = (factor["name"] for factor in result.provenance["stimuli"]["factors"])
    intervals = f"This file is of 0.1.0 and has no intervals; `{COMMANDS[0]}` writes one that has."
    if any(ends(cell)[1] is not None for arm in chosen for cell in _cells(arm)):
        intervals = "Bars: 95 % t intervals over the stimuli of a cell."
    return (
        "Mean change of the target words' own interaction pattern by the cells of the stimuli, in nats of "
        f"log-probability: {first} along x, a line for each {second}. One panel a unit, at its largest clamp; axes "
        f"differ. {intervals} Controls are a match in activation and frequency, units insensitive to the factors, and "
        "both features through the linear path only. Lines that are far from parallel in a control show what chance "
        "looks like."
    )


def _cells(arm: ArmResult) -> Sequence[Estimate | float]:
    """Of a file of 0.1.0 the means alone."""
    return arm.tests.items[PRIMARY_SCALE].cell_means if arm.cells is None else arm.cells


def _cell_rows(arm: ArmResult, result: FactorialResult) -> list[dict[str, Any]]:
    first, second = _levels(result)
    names = [(a, b) for a in first for b in second]
    return [
        {"arm": arm.name, "first": a, "second": b, "mean_nats": mean, "low": low, "high": high}
        for (a, b), (mean, low, high) in zip(names, map(ends, _cells(arm)), strict=True)
    ]


def _contrasts(result: FactorialResult, number: int) -> Iterator[Figure]:
    for kind, words in KINDS.items():
        dots = contrast_dots(result.arms, kind)
        if dots:
            name, title = f"contrast-{kind}-{number}", f"How far each clamp of {words} is from additive"
            yield dots_figure(name, title, dots, CONTRAST_AXIS, CONTRAST_CAPTION, hollow=("control",), narrow=34)


def _selection(result: FactorialResult) -> Table:
    tests = ("selected F", "null p", "held-out F", "p", "partial eta^2", "procedure p")
    columns = ("role", "number", "candidates", *tests)
    return Table(columns=columns, rows=[_selected(one) for one in result.selected], caption=SELECTION_CAPTION)


def _selected(one: SelectedUnit) -> tuple[str, ...]:
    chosen, held = one.test.selection, one.test.held_out
    return (
        one.unit.role,
        " x ".join(map(str, one.unit.index)),
        f"{chosen.candidates:,}",
        f"{chosen.f:.1f}",
        p_text(chosen.p_value),
        f"{held.f:.2f}",
        p_text(held.p_value),
        eta_text(held.partial_eta_squared),
        p_text(one.null.p_value),
    )


def _arms(result: FactorialResult) -> Table:
    columns = ("what", "clamp", "contrast", "F", "p", "Holm p", "on scale", "author's F")
    rows = [
        (
            who(arm),
            arm.clamp,
            f"{main.contrast:+.4f}",
            f"{main.f:.2f}",
            p_text(main.p_value),
            p_text(arm.tests.items_p_adjusted) or "control",
            arm.tests.removability.words,
            f"{arm.tests.published_f:.2f}",
        )
        for arm in result.arms
        for main in [arm.tests.items[PRIMARY_SCALE]]
    ]
    return Table(columns=columns, rows=rows, caption=ARMS_CAPTION, strong=[not arm.control for arm in result.arms])


def cells_figure(found: Sequence[ArmResult], levels: Levels) -> go.Figure:
    """A panel an arm: the first factor along x, a line for each level of the second."""
    rows = -(-len(found) // COLUMNS)
    figure = make_subplots(rows=rows, cols=COLUMNS)
    for number, arm in enumerate(found):
        for second in range(2):
            trace = _line(arm, levels, second, legend=number == 0)
            figure.add_trace(trace, row=number // COLUMNS + 1, col=number % COLUMNS + 1)
    styled(figure, height=60 + PANEL * rows)
    wide, narrow = (_grid(found, columns) for columns in (COLUMNS, NARROW_COLUMNS))
    figure.update_layout(wide)
    figure.update_xaxes(range=[-0.3, 1.3], showgrid=False, title_standoff=2)
    figure.update_yaxes(nticks=4, zerolinewidth=1.5, tickfont={"size": 10}, exponentformat="e")
    narrow["height"] = 80 + PANEL * -(-len(found) // NARROW_COLUMNS)
    figure.update_layout(meta={"narrow": narrow})
    return figure


def _line(arm: ArmResult, levels: Levels, second: int, *, legend: bool) -> go.Scatter:
    cells = [ends(_cells(arm)[2 * first + second]) for first in range(2)]
    name = levels[1][second]
    return line(
        levels[0],
        [mean for mean, *_ in cells],
        name,
        second,
        size=8,
        error_y=bars(cells, thickness=1.4, width=3),
        legendgroup=name,
        showlegend=legend,
        hovertemplate=f"{arm.name}<br>%{{x}}, {name}: %{{y:.3g}} nats<extra></extra>",
    )


def _grid(found: Sequence[ArmResult], columns: int) -> dict[str, Any]:
    """Where panels and their headings are, so many in a row."""
    rows, gap = -(-len(found) // columns), 0.09 if columns == COLUMNS else 0.2
    width, height = (1 - gap * (columns - 1)) / columns, 1 / rows
    same = {"xref": "paper", "yref": "paper", "xanchor": "center", "yanchor": "bottom"}
    layout: dict[str, Any] = {"annotations": []}
    for number, arm in enumerate(found):
        left, top = (number % columns) * (width + gap), 1 - (number // columns) * height
        suffix = "" if number == 0 else str(number + 1)
        layout[f"xaxis{suffix}"] = {"domain": [left, left + width]}
        layout[f"yaxis{suffix}"] = {"domain": [top - 0.84 * height, top - 0.2 * height]}
        text = f"<b>{wrapped(arm.role, 26)}</b><br>{_numbers(arm)} at {arm.clamp}"
        place = {"x": left + width / 2, "y": top - 0.18 * height, "showarrow": False, "font": {"size": 10.5}}
        layout["annotations"].append({"text": text, **place, **same})
    return layout


def contrast_dots(arms: Sequence[ArmResult], kind: str) -> list[Dot]:
    """Under each role its clamps, of the arms whose units are of one kind: pairs do far less than features."""
    return [
        Dot(
            heading=f"{role.removesuffix(' (main effect)')}: {_numbers(arm)}",
            label=f"{arm.clamp}{_holm(arm)}",
            series="control" if arm.control else "selected",
            figure=test.contrast if arm.contrast is None else arm.contrast,
            note=f"p = {test.p_value:.2g}, not adjusted",
        )
        for role in dict.fromkeys(arm.role for arm in arms)
        for arm in arms
        if arm.role == role and arm.units[0].kind == kind
        for test in [arm.tests.items[PRIMARY_SCALE]]
    ]


def _holm(arm: ArmResult) -> str:
    p = arm.tests.items_p_adjusted
    return "" if p is None else f", Holm p {'< 0.001' if p < 0.001 else f'= {p:.2f}'}"


def _numbers(arm: ArmResult) -> str:
    return " and ".join(" x ".join(map(str, unit.index)) for unit in arm.units)
