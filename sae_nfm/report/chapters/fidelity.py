"""How faithful each SAE is: the table of a benchmark or a comparison, the paper's comparison beside the fair ones."""

from collections.abc import Iterator, Sequence

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.comparison import (
    ALL_PATHS,
    COLUMN_HELP,
    COLUMNS,
    PUBLISHED,
    ArmMean,
    BenchmarkResult,
    Comparison,
    caveats,
    sentence,
)
from sae_nfm.comparison import cells as benchmark_cells
from sae_nfm.comparison.arm_means import arm_means
from sae_nfm.comparison.results import COLUMNS as COMPARE_COLUMNS
from sae_nfm.comparison.results import CompareResult, cells
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section, Table
from sae_nfm.report.plots.dot_plot import Axis, Group, Mark, Row, dot_plot, drawn
from sae_nfm.report.plots.theme import PALETTE, styled, wrapped
from sae_nfm.report.run_folder import Found, Run

TITLE = "Fidelity: what each SAE keeps of the model"
COMMANDS = ("sae-nfm demo --output RUN/demo", "sae-nfm compare --output RUN/compare")
COMPARE_HELP = (
    "Mean (standard deviation) over seeds. MFLOP/token: multiplications and additions of a training step; learning "
    "rate: peak of Adam's; dead: share of features that no token of the training's last half activated; other "
    "columns as in README."
)
PANELS = {"fvu": "FVU, fraction of variance unexplained", "kl_nats": "KL, nats per token"}
CHANGES = (("FVU", "fvu_change", PALETTE[0], ""), ("KL", "kl_change", PALETTE[1], "/"))
KINDS = (("paper", "The paper's comparison: with a part of itself"), ("fair", "Fair: with SAEs trained on their own"))
WIDTH, NARROW_WIDTH = 44, 22
ClaimRows = Sequence[tuple[str, Comparison | None]]
"""Labels from top to bottom; a heading has no comparison."""
SEED = Group(name="one seed", colour="#6b6b6b", symbol="circle", size=5, offset=0.27, opacity=0.6)
JOINT = Group(name="joint_nfm and variants", colour=PALETTE[0], symbol="circle", offset=-0.08)
TOPK = Group(name="TopK", colour=PALETTE[4], symbol="square", offset=-0.08)
OTHERS = Group(name="other architectures", colour=PALETTE[2], symbol="triangle-up", offset=-0.08)
OFF = Group(name="with paths switched off", colour=PALETTE[3], symbol="diamond-open", offset=-0.08)
GROUPS = (SEED, JOINT, TOPK, OTHERS, OFF)


def section(run: Run) -> Section | None:
    """The chapter; None without a benchmark or a comparison."""
    demos, compared = run.of(BenchmarkResult), run.of(CompareResult)
    if not demos and not compared:
        return None
    blocks: list[Block] = []
    for number, found in enumerate(demos, 1):
        blocks += [Heading(text=_heading("One run", found)), *_benchmark(found.result, number)]
    for number, found in enumerate(compared, 1):
        blocks += [Heading(text=_heading("Several seeds", found)), *_comparison(found.result, number)]
    return Section(
        id="fidelity",
        title=TITLE,
        lead="Each SAE is spliced into the language model in place of the activations it reconstructs. How much of "
        "their variance is lost (FVU), and how far do the model's predictions move (KL)? Lower is better.",
        blocks=blocks,
        verdicts=[sentence for found in demos for sentence in _said(found.result)],
    )


def _heading(what: str, found: Found[BenchmarkResult] | Found[CompareResult]) -> str:
    return what if found.label == "." else f"{what}: {found.label}"


def _said(result: BenchmarkResult) -> Iterator[str]:
    """The paper's comparison and the fair ones of each joint SAE, with the words of the terminal."""
    for comparison in result.comparisons:
        kind = "the paper's figure" if comparison.kind == "paper" else "the fair figure"
        yield f"{comparison.row}, {kind}: {sentence(comparison)}."


def _benchmark(result: BenchmarkResult, number: int) -> Iterator[Block]:
    yield claims_figure(result, number)
    yield fidelity_figure(result, number)
    yield Table(
        columns=COLUMNS,
        rows=benchmark_cells(result),
        caption="; ".join(f"{name}: {text}" for name, text in COLUMN_HELP.items()) + ". Bold: whole SAEs.",
        strong=[row.paths == ALL_PATHS for row in result.rows],
    )
    yield Prose(lines=caveats(result), listed=True)


def _comparison(result: CompareResult, number: int) -> Iterator[Block]:
    means = arm_means(result.rows)
    ks = sorted({row.k for row in result.rows})
    for k in ks:
        own = [mean for mean in means if mean.k == k]
        if len(ks) > 1:
            yield Heading(text=f"k = {k}")
        if any(mean.kind == "ablation" for mean in own):
            yield ablation_figure(own, number)
        yield whole_figure(own, number)
        rows = [row for row in result.rows if row.k == k]
        yield Table(
            columns=COMPARE_COLUMNS,
            rows=cells(rows)[1:],
            caption=COMPARE_HELP,
            strong=[
                next(row.kind for row in rows if row.arm == arm) != "ablation"
                for arm in dict.fromkeys(r.arm for r in rows)
            ],
        )
    yield Prose(lines=result.caveats(), listed=True)


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


def whole_figure(means: Sequence[ArmMean], number: int) -> Figure:
    """FVU and KL of every arm at one k, each seed and the mean.

    Args:
        means: of one k; members of a family at other sparsities are left out, as their figures say nothing beside these.
        number: of the comparison in the run, from 1, for the figure's name.
    """
    chosen = [mean for mean in means if mean.kind != "ablation" and mean.arm == mean.family]
    marks, rows = _marks(chosen), _rows(chosen)
    return Figure(
        name=f"arms-{number}-k{chosen[0].k}",
        title="Whole SAEs, each trained on its own",
        plot=dot_plot(
            marks, GROUPS, rows, Axis(title="lower is better"), panels=tuple(PANELS.values()), label_width=32
        ),
        caption=f"Mean over {_seeds(chosen)}{_interval(chosen)}; small dots: the seeds. The axes do not begin at "
        "zero, so that small differences can be seen. All arms see the same tokens in the same order, so their "
        "seeds are paired: intervals that overlap do not show that arms are alike; the verdicts compare them pair "
        "by pair.",
        data=drawn(marks, rows),
    )


def ablation_figure(means: Sequence[ArmMean], number: int) -> Figure:
    """The paper's comparison in absolute numbers: SAEs with paths off beside the whole ones and TopK.

    Args:
        means: of one k.
        number: of the comparison in the run, from 1, for the figure's name.
    """
    ablated = {mean.family for mean in means if mean.kind == "ablation"}
    chosen = [m for m in means if m.arm in ablated or m.kind == "ablation" or m.arm.startswith("topk")]
    marks, rows = _marks(chosen), _rows(chosen)
    return Figure(
        name=f"ablations-{number}-k{chosen[0].k}",
        title="The paper compares an SAE with a part of itself; TopK is the fair neighbour",
        plot=dot_plot(
            marks,
            GROUPS,
            rows,
            Axis(title="lower is better", from_zero=True),
            panels=tuple(PANELS.values()),
            label_width=32,
        ),
        caption="Hollow: paths switched off. The paper's figure is the distance from there to the whole SAE. In the "
        "canonical gauge all that is linear is written by the direct path, which changes no output of the whole "
        "SAE: the distance that is left is what the other paths do. TopK SAEs, trained on their own on the same "
        f"tokens, are the control. Mean over {_seeds(chosen)}{_interval(chosen)}; small dots: the seeds. Axes begin "
        "at zero.",
        data=drawn(marks, rows),
    )


def _rows(means: Sequence[ArmMean]) -> list[Row]:
    return [Row(key=arm, label=arm) for arm in dict.fromkeys(mean.arm for mean in means)]


def _marks(means: Sequence[ArmMean]) -> list[Mark]:
    seeds = [
        Mark(panel=PANELS[mean.measure], row=mean.arm, group=SEED.name, x=value, note=f"seed {seed}")
        for mean in means
        for seed, value in zip(mean.seeds, mean.values, strict=True)
        if len(mean.seeds) > 1
    ]
    averages = [
        Mark(
            panel=PANELS[m.measure],
            row=m.arm,
            group=_group(m).name,
            x=m.mean,
            low=m.low,
            high=m.high,
            note=f"L0 {m.l0:.1f}, {m.kind}",
        )
        for m in means
    ]
    return [*seeds, *averages]


def _group(mean: ArmMean) -> Group:
    if mean.kind == "ablation":
        return OFF
    return next((group for name, group in (("joint_nfm", JOINT), ("topk", TOPK)) if mean.arm.startswith(name)), OTHERS)


def _seeds(means: Sequence[ArmMean]) -> str:
    n = max(len(mean.seeds) for mean in means)
    return "one seed" if n == 1 else f"{n} seeds"


def _interval(means: Sequence[ArmMean]) -> str:
    return " with its 95 % interval (Student's t over seeds)" if any(mean.low is not None for mean in means) else ""
