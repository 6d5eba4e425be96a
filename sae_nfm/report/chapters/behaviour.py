"""What an SAE's error does to the model, beside other changes of its size."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.evaluation.results import ArmKL, MeasuredKL, lacks_summary
from sae_nfm.experiments.reproduce.results import GURNEE_RATIOS, PAPER_RATIO
from sae_nfm.interventions.results import UNDER_TEST, Role
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section
from sae_nfm.report.plots import (
    PALETTE,
    SYMBOLS,
    Axis,
    Group,
    Mark,
    Row,
    bars,
    dot_plot,
    drawn,
    ends,
    headed,
    line,
    mark,
    styled,
)
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
PUBLISHED = "published: arXiv 2507.00269, not measured here"
HERE = Group(name="this SAE", colour=PALETTE[0], symbol="circle", offset=0.12)
PAPER = Group(name=PUBLISHED, colour="#000000", symbol="star-open", size=13, offset=-0.16)
GURNEE = Group(name="published: Gurnee 2024, range", colour=PALETTE[1], symbol="line-ns-open", offset=-0.34)


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
    for sae, ratios in measured.ratios.items():
        name = f"{number}-{sae.replace(' ', '-')}"
        if len(measured.ratios) > 1:
            yield Heading(text="The SAE under test" if sae == UNDER_TEST else sae)
        yield arms_figure(measured, sae, f"arms-{name}")
        if any(arm.role is Role.SCALED for arm in measured.of(sae)):
            yield scales_figure(measured.of(sae), f"scales-{name}")
        yield ratios_figure(ratios, f"ratios-{name}")


def _said(measured: MeasuredKL) -> Iterator[str]:
    for sae, ratios in measured.ratios.items():
        words = [f"{r.estimate:.2f} [{r.low:.2f}, {r.high:.2f}] against {control}" for control, r in ratios.items()]
        yield f"KL of {'the SAE' if sae == UNDER_TEST else sae} over that of a change of equal distance: {'; '.join(words)}."


def arms_figure(measured: MeasuredKL, sae: str, name: str) -> Figure:
    """KL of every arm of one SAE, and of the others beside it."""
    beside = [arm for arm in measured.arms if arm.role is Role.OTHER] if sae == UNDER_TEST else []
    arms = [arm for arm in (*measured.of(sae), *beside) if arm.kl.estimate > 0]  # none on a logarithmic axis
    rows = headed(
        (heading, [Row(key=a.arm, label="all paths" if role is Role.SAE else a.name) for a in arms if a.role == role])
        for role, (heading, _) in ROLES.items()
    )
    marks = [mark(arm.arm, ROLES[arm.role][1].name, arm.kl) for arm in arms if arm.role in ROLES]
    whole = next(arm for arm in measured.of(sae) if arm.role is Role.SAE)
    axis = Axis(title="KL, nats per token (logarithmic)", log=True, reference=whole.kl.estimate)
    return Figure(
        name=name,
        title="How far predictions move, under the SAE and under changes of the same size",
        plot=dot_plot(marks, [group for _, group in ROLES.values()], rows, axis, label_width=42),
        caption=f"Mean KL(original || changed) of next-token distributions over {whole.kl.n:,} held-out tokens of "
        f"{whole.kl.n_clusters} documents; the line is the whole SAE. Parts: ablated paths write zero, or with means "
        "kept their mean over other text: the second removes no constant. Controls put another change in place, at "
        "each token as far from the activation as the SAE's output. Against a random direction, which is nearly "
        "orthogonal to all that the model reads, an SAE's error looks harmful; against noise that points where "
        f"activations do it need not. {INTERVALS}.",
        data=drawn(marks, rows, group="role"),
    )


def scales_figure(arms: Sequence[ArmKL], name: str) -> Figure:
    """KL over the scale of an SAE's error, with the controls at scale 1."""
    scaled = sorted(
        (a for a in arms if a.scale is not None and a.role is not Role.SAE), key=lambda arm: arm.scale or 0.0
    )
    controls = [arm for arm in arms if arm.role is Role.CONTROL and arm.scale is None]
    rows = [(a.name, 1.0 if a.scale is None else a.scale, *ends(a.kl)) for a in [*scaled, *controls]]
    return Figure(
        name=name,
        title="A larger error of the same direction, and other directions of the same size",
        plot=_scales_plot(scaled, controls),
        caption="The activation plus s times the SAE's error, at every token: 0 is the original model, 1 the SAE, "
        "-1 the error with its sign turned. Symbols at 1: other directions at the same distance; those below the "
        f"curve do less than the error at its size, those above more. {INTERVALS}.",
        data=pd.DataFrame(rows, columns=["arm", "scale", "KL nats", "low", "high"]),
    )


def _scales_plot(scaled: Sequence[ArmKL], controls: Sequence[ArmKL]) -> go.Figure:
    figure = go.Figure()
    figure.add_trace(
        line(
            [arm.scale for arm in scaled],
            [arm.kl.estimate for arm in scaled],
            "the SAE's error, scaled",
            0,
            size=9,
            error_y=bars([ends(arm.kl) for arm in scaled], width=3),
            hovertemplate="error x %{x:g}: %{y:.4f} nats<extra></extra>",
        )
    )
    for place, arm in enumerate(controls, 1):
        figure.add_scatter(
            x=[1.0],
            y=[arm.kl.estimate],
            error_y=bars([ends(arm.kl)], width=3),
            mode="markers",
            marker={"size": 11, "color": PALETTE[place % len(PALETTE)], "symbol": SYMBOLS[place % len(SYMBOLS)]},
            name=arm.name,
            hovertemplate=f"{arm.name}: %{{y:.4f}} nats<extra></extra>",
        )
    figure.update_xaxes(title="scale of the error", zeroline=True)
    figure.update_yaxes(title="KL, nats per token", rangemode="tozero")
    return styled(figure, height=460, narrow={"height": 400 + 22 * (1 + len(controls))})


def ratios_figure(ratios: Mapping[str, Estimate], name: str) -> Figure:
    """KL of the SAE over that of each control, the published ratios beside the first."""
    rows = [Row(key=name, label=f"{name}: {CONTROLS[name]}" if name in CONTROLS else name) for name in ratios]
    marks = [mark(control, HERE.name, ratio) for control, ratio in ratios.items()]
    if "isotropic" in ratios:
        low, high = GURNEE_RATIOS
        marks.append(Mark(row="isotropic", group=PAPER.name, x=PAPER_RATIO))
        marks.append(Mark(row="isotropic", group=GURNEE.name, x=(low + high) / 2, low=low, high=high))
    axis = Axis(title="KL of the SAE over KL of the control", form=".2f", reference=1.0)
    return Figure(
        name=name,
        title="The error beside other changes of its size, control by control",
        plot=dot_plot(marks, (HERE, PAPER, GURNEE), rows, axis),
        caption="Above 1 the SAE's error does more than the control at the same distance from the activation, below "
        "1 less. The published ratios are against the first control alone, on other models and SAEs. Gurnee's is a "
        f"range with no estimate in it: its tick only marks the middle. {INTERVALS}.",
        data=drawn(marks, rows, group="source"),
    )
