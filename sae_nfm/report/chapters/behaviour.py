"""What an SAE's error does to the model, beside other changes of its size."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.evaluation.results import ArmKL, MeasuredKL, lacks_summary
from sae_nfm.experiments.reproduce.results import GURNEE_RATIOS, PAPER_RATIO
from sae_nfm.interventions.results import UNDER_TEST, Role
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section
from sae_nfm.report.plots.dot_plot import Axis, Group, Mark, Row, bounded, dot_plot, drawn
from sae_nfm.report.plots.theme import PALETTE, SYMBOLS, styled
from sae_nfm.report.run_folder import Run
from sae_nfm.stats import Estimate

TITLE = "Behaviour: what the error does to the model"
COMMANDS = ("sae-nfm reproduce --output RUN/reproduce",)
UNFINISHED = (
    "{folder} is left out: it has rows but no summary.json, because the measurement was interrupted or is of 0.1.0. Run "
    f"the command that measured it again, such as `{COMMANDS[0]}`: it goes on where it stopped, and writes the summary."
)
ROLES: Mapping[Role, tuple[str, Group]] = {
    Role.SAE: ("Whole", Group(name="the SAE", colour=PALETTE[0], symbol="circle", size=13)),
    Role.PART: ("Its parts", Group(name="with paths ablated", colour=PALETTE[3], symbol="diamond-open")),
    Role.CONTROL: ("Controls at its distance", Group(name="control", colour=PALETTE[4], symbol="square")),
    Role.OTHER: ("Other SAEs", Group(name="another SAE", colour=PALETTE[2], symbol="triangle-up")),
    Role.ANCHOR: ("Ablations of the hook point", Group(name="everything removed", colour="#000000", symbol="x")),
}
INTERVALS = "95 % intervals over documents (jackknife, Student's t), one SAE: they say nothing about other seeds"
CONTROLS = {
    "isotropic": "a random direction",
    "isotropic, norm kept": "a random direction, the norm of the activation kept",
    "covariance": "noise with the activations' covariance",
    "covariance mixture": "towards another activation",
    "shuffled error": "the error of another token",
    "flipped error": "the error with its sign turned",
}
"""What a control puts in place, in words."""


def section(run: Run) -> Section | None:
    """The chapter; None without a measurement of an SAE beside its controls."""
    found = run.of(MeasuredKL)
    unfinished = [folder for folder in run.measurements if lacks_summary(folder)]
    blocks: list[Block] = []
    verdicts: list[str] = []
    for number, one in enumerate(found, 1):
        if len(found) + len(unfinished) > 1:
            blocks.append(Heading(text=run.label(one.path.parent)))
        blocks += _blocks(one.result, number)
        verdicts += _said(one.result)
    blocks += [Prose(lines=[UNFINISHED.format(folder=run.label(folder))]) for folder in unfinished]
    if not blocks:
        return None
    return Section(
        id="behaviour",
        title=TITLE,
        lead="An SAE in place of the activations moves the model's predictions. Is that more than any change of the "
        "same size would do? It depends on which change.",
        blocks=blocks,
        verdicts=verdicts,
    )


def _blocks(measured: MeasuredKL, number: int) -> Iterator[Block]:
    for sae in measured.ratios:
        name = sae.replace(" ", "-")
        if len(measured.ratios) > 1:
            yield Heading(text="The SAE under test" if sae == UNDER_TEST else sae)
        yield arms_figure(measured, sae, f"arms-{number}-{name}")
        scales = scales_figure(measured, sae, f"scales-{number}-{name}")
        if scales is not None:
            yield scales
        yield ratios_figure(measured.ratios[sae], f"ratios-{number}-{name}")


def _said(measured: MeasuredKL) -> Iterator[str]:
    for sae, ratios in measured.ratios.items():
        words = [f"{_ratio(ratio)} against {control}" for control, ratio in ratios.items()]
        yield f"KL of {'the SAE' if sae == UNDER_TEST else sae} over that of a change of equal distance: {'; '.join(words)}."


def _ratio(ratio: Estimate) -> str:
    return f"{ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def arms_figure(measured: MeasuredKL, sae: str, name: str) -> Figure:
    """KL of every arm of one SAE, and of the others beside it.

    Args:
        measured: of one measurement.
        sae: the SAE.
        name: of the figure.
    """
    beside = [arm for arm in measured.arms if arm.role is Role.OTHER] if sae == UNDER_TEST else []
    arms = [arm for arm in (*measured.of(sae), *beside) if arm.kl.estimate > 0]  # none on a logarithmic axis
    rows: list[Row] = []
    for role, (heading, _) in ROLES.items():
        own = [Row(key=arm.arm, label=_label(arm)) for arm in arms if arm.role is role]
        rows += [Row(key=heading, label=heading, heading=True), *own] if own else []
    marks = [
        Mark(row=arm.arm, group=ROLES[arm.role][1].name, x=arm.kl.estimate, low=arm.kl.low, high=arm.kl.high)
        for arm in arms
        if arm.role in ROLES
    ]
    whole = next(arm for arm in measured.of(sae) if arm.role is Role.SAE)
    return Figure(
        name=name,
        title="How far predictions move, under the SAE and under changes of the same size",
        plot=dot_plot(
            marks,
            [group for _, group in ROLES.values()],
            rows,
            Axis(title="KL, nats per token (logarithmic)", log=True, reference=whole.kl.estimate),
            label_width=42,
        ),
        caption=f"Mean KL(original || changed) of next-token distributions over {whole.kl.n:,} held-out tokens of "
        f"{whole.kl.n_clusters} documents; the line is the whole SAE. Parts: ablated paths write zero, or with means "
        "kept their mean over other text: the second removes no constant. Controls put another change in place, at "
        "each token as far from the activation as the SAE's output. Against a random direction, which is nearly "
        "orthogonal to all that the model reads, an SAE's error looks harmful; against noise that points where "
        f"activations do it need not. {INTERVALS}.",
        data=drawn(marks, rows, group="role"),
    )


def scales_figure(measured: MeasuredKL, sae: str, name: str) -> Figure | None:
    """KL over the scale of the error, with the controls at scale 1; None where no scales were measured.

    Args:
        measured: of one measurement.
        sae: the SAE.
        name: of the figure.
    """
    own = measured.of(sae)
    line = sorted(
        (arm for arm in own if arm.scale is not None and arm.role is not Role.SAE), key=lambda arm: arm.scale or 0.0
    )
    if not any(arm.role is Role.SCALED for arm in line):
        return None
    controls = [arm for arm in own if arm.role is Role.CONTROL and arm.scale is None]
    rows = [(arm.name, 1.0 if arm.scale is None else arm.scale, *_numbers(arm.kl)) for arm in [*line, *controls]]
    return Figure(
        name=name,
        title="A larger error of the same direction, and other directions of the same size",
        plot=_scales_plot(line, controls),
        caption="The activation plus s times the SAE's error, at every token: 0 is the original model, 1 the SAE, "
        "-1 the error with its sign turned. Symbols at 1: other directions at the same distance; those below the "
        f"curve do less than the error at its size, those above more. {INTERVALS}.",
        data=pd.DataFrame(rows, columns=["arm", "scale", "KL nats", "low", "high"]),
    )


def _scales_plot(line: Sequence[ArmKL], controls: Sequence[ArmKL]) -> go.Figure:
    figure = go.Figure()
    figure.add_scatter(
        x=[arm.scale for arm in line],
        y=[arm.kl.estimate for arm in line],
        error_y=_bars(line),
        mode="lines+markers",
        line={"color": PALETTE[0], "width": 2.5},
        marker={"size": 9},
        name="the SAE's error, scaled",
        hovertemplate="error x %{x:g}: %{y:.4f} nats<extra></extra>",
    )
    for place, arm in enumerate(controls, 1):
        figure.add_scatter(
            x=[1.0],
            y=[arm.kl.estimate],
            error_y=_bars([arm]),
            mode="markers",
            marker={"size": 11, "color": PALETTE[place % len(PALETTE)], "symbol": SYMBOLS[place % len(SYMBOLS)]},
            name=arm.name,
            hovertemplate=f"{arm.name}: %{{y:.4f}} nats<extra></extra>",
        )
    figure.update_xaxes(title="scale of the error", zeroline=True)
    figure.update_yaxes(title="KL, nats per token", rangemode="tozero")
    return styled(figure, height=460, narrow={"height": 400 + 22 * (1 + len(controls))})


def ratios_figure(ratios: Mapping[str, Estimate], name: str) -> Figure:
    """KL of the SAE over that of each control, the published ratios beside the first.

    Args:
        ratios: by control.
        name: of the figure.
    """
    here = Group(name="this SAE", colour=PALETTE[0], symbol="circle", offset=0.12)
    paper = Group(
        name="published: arXiv 2507.00269, not measured here",
        colour="#000000",
        symbol="star-open",
        size=13,
        offset=-0.16,
    )
    gurnee = Group(name="published: Gurnee 2024, range", colour=PALETTE[1], symbol="line-ns-open", offset=-0.34)
    rows = [
        Row(key=control, label=f"{control}: {CONTROLS[control]}" if control in CONTROLS else control)
        for control in ratios
    ]
    marks = [Mark(row=control, group=here.name, x=r.estimate, low=r.low, high=r.high) for control, r in ratios.items()]
    if "isotropic" in ratios:
        low, high = GURNEE_RATIOS
        marks.append(Mark(row="isotropic", group=paper.name, x=PAPER_RATIO))
        marks.append(Mark(row="isotropic", group=gurnee.name, x=(low + high) / 2, low=low, high=high))
    return Figure(
        name=name,
        title="The error beside other changes of its size, control by control",
        plot=dot_plot(
            marks,
            (here, paper, gurnee),
            rows,
            Axis(title="KL of the SAE over KL of the control", form=".2f", reference=1.0),
        ),
        caption="Above 1 the SAE's error does more than the control at the same distance from the activation, below "
        "1 less. The published ratios are against the first control alone, on other models and SAEs. Gurnee's is a "
        f"range with no estimate in it: its tick only marks the middle. {INTERVALS}.",
        data=drawn(marks, rows, group="source"),
    )


def _label(arm: ArmKL) -> str:
    return "all paths" if arm.role is Role.SAE else arm.name


def _bars(arms: Sequence[ArmKL]) -> dict[str, object]:
    minus = [arm.kl.estimate - arm.kl.low for arm in arms]
    return {
        "type": "data",
        "symmetric": False,
        "arrayminus": minus,
        "array": [a.kl.high - a.kl.estimate for a in arms],
        "width": 3,
    }


def _numbers(kl: Estimate) -> tuple[float, float | None, float | None]:
    return kl.estimate, bounded(kl.low), bounded(kl.high)
