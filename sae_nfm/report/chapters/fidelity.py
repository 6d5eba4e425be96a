"""How faithful each SAE is: the table of a demo or a comparison, the paper's comparison beside the fair ones."""

from collections.abc import Iterator, Sequence

import pandas as pd

from sae_nfm.comparison.results import (
    PUBLISHED,
    ArmGroup,
    ArmMean,
    Change,
    ClaimKind,
    CompareResult,
    RowKind,
    arm_means,
    cells,
    legend,
)
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section, Table
from sae_nfm.report.plots.dot_plot import Axis, Group, Mark, Row, dot_plot, drawn
from sae_nfm.report.plots.theme import PALETTE
from sae_nfm.report.run_folder import Run

TITLE = "Fidelity: what each SAE keeps of the model"
COMMANDS = ("sae-nfm demo --output RUN/demo", "sae-nfm compare --output RUN/compare")
PANELS = {"fvu": "FVU, fraction of variance unexplained", "kl_nats": "KL, nats per token"}
METRICS = (
    Group(name="FVU", colour=PALETTE[0], symbol="circle", offset=-0.16, size=10),
    Group(name="KL", colour=PALETTE[1], symbol="diamond", offset=0.16, size=10),
)
HEADINGS = {
    ClaimKind.ABLATION: "The paper's comparison: with a part of itself",
    ClaimKind.FAIR: "Fair: with SAEs trained on their own",
}
CHANGE = Axis(title="change (left of zero: better)", tickformat="+.0%", form="+.1%", reference=0.0)
SEED = Group(name="one seed", colour="#6b6b6b", symbol="circle", size=5, offset=0.27, opacity=0.6)
GROUPS = {
    ArmGroup.JOINT: Group(name=str(ArmGroup.JOINT), colour=PALETTE[0], symbol="circle", offset=-0.08),
    ArmGroup.TOPK: Group(name=str(ArmGroup.TOPK), colour=PALETTE[4], symbol="square", offset=-0.08),
    ArmGroup.OTHER: Group(name=str(ArmGroup.OTHER), colour=PALETTE[2], symbol="triangle-up", offset=-0.08),
}
OFF = Group(name="with paths ablated", colour=PALETTE[3], symbol="diamond-open", offset=-0.08)


def section(run: Run) -> Section | None:
    """The chapter; None without a demo or a comparison."""
    compared = run.of(CompareResult)
    blocks: list[Block] = []
    for number, found in enumerate(compared, 1):
        what = "One run" if found.result.changes else "Several seeds"
        blocks.append(Heading(text=what if found.label == "." else f"{what}: {found.label}"))
        blocks += _blocks(found.result, number)
    if not blocks:
        return None
    return Section(
        id="fidelity",
        title=TITLE,
        lead="Each SAE is spliced into the language model in place of the activations it reconstructs. How much of "
        "their variance is lost (FVU), and how far do the model's predictions move (KL)? Lower is better.",
        blocks=blocks,
        verdicts=[_said(change) for found in compared for change in found.result.changes],
    )


def _said(change: Change) -> str:
    """A comparison with the words of the terminal."""
    kind = "the paper's comparison" if change.kind is ClaimKind.ABLATION else "the fair comparison"
    return f"{change.arm}, {kind}: {change.sentence}."


def _blocks(result: CompareResult, number: int) -> Iterator[Block]:
    if result.changes:
        yield changes_figure(result.changes, number)
    means = arm_means(result.rows)
    ks = sorted({row.k for row in result.rows})
    for k in ks:
        own = [mean for mean in means if mean.row.k == k]
        if len(ks) > 1:
            yield Heading(text=f"k = {k}")
        if any(mean.row.kind is RowKind.ABLATION for mean in own):
            yield ablation_figure(own, number)
        if not result.changes:
            yield whole_figure(own, number)
        rows = [row for row in result.rows if row.k == k]
        kinds = {row.arm: row.kind for row in rows}
        yield Table(
            columns=result.columns,
            rows=cells(rows, result.columns),
            caption=f"Mean over seeds (standard deviation). {legend(result.columns)}. Bold: whole SAEs.",
            strong=[kind is not RowKind.ABLATION for kind in kinds.values()],
        )
    yield Prose(lines=result.caveats(), listed=True)


def changes_figure(changes: Sequence[Change], number: int) -> Figure:
    """Change of FVU and KL in every comparison of one seed, the paper's above the fair ones."""
    rows: list[Row] = []
    for kind, heading in HEADINGS.items():
        own = [Row(key=_against(change), label=_against(change)) for change in changes if change.kind is kind]
        rows += [Row(key=str(kind), label=heading, heading=True), *own] if own else []
    data = [
        (_against(change), str(change.kind), metric.name, value)
        for change in changes
        for metric, value in zip(METRICS, (change.fvu_change, change.kl_change), strict=True)
    ]
    return Figure(
        name=f"claims-{number}",
        title="The same models, two comparisons",
        plot=dot_plot(
            [Mark(row=row, group=metric, x=value) for row, _, metric, value in data],
            METRICS,
            rows,
            CHANGE,
            label_width=46,
            narrow_width=24,
        ),
        caption="Relative change of the reconstruction error (FVU) and of the divergence of the model's predictions "
        "(KL); left of zero the joint SAE is better. Above, the paper's comparison: all paths against the direct "
        "path alone, a part of the same SAE that was never trained to stand alone. Below, its control: SAEs trained "
        "on their own on the same tokens. One seed each: no intervals, and differences of a few per cent may be "
        f"chance. {PUBLISHED}",
        data=pd.DataFrame(data, columns=["comparison", "kind", "measure", "relative change"]),
    )


def _against(change: Change) -> str:
    if change.kind is ClaimKind.ABLATION:
        return f"{change.arm} against its own part, {change.paths}"
    return f"{change.arm} against {change.against} ({change.parameter_ratio:.2f} x its parameters)"


def whole_figure(means: Sequence[ArmMean], number: int) -> Figure:
    """FVU and KL of every arm at one k, each seed and the mean; members of a family at other sparsities are left out."""
    chosen = [m for m in means if m.row.kind is not RowKind.ABLATION and m.row.arm == m.row.family]
    marks, rows = _marks(chosen), _rows(chosen)
    return Figure(
        name=f"arms-{number}-k{chosen[0].row.k}",
        title="Whole SAEs, each trained on its own",
        plot=dot_plot(
            marks,
            (SEED, *GROUPS.values(), OFF),
            rows,
            Axis(title="lower is better"),
            panels=tuple(PANELS.values()),
            label_width=32,
        ),
        caption=f"Mean over {_seeds(chosen)}{_interval(chosen)}; small dots: the seeds. The axes do not begin at "
        "zero, so that small differences can be seen. All arms see the same tokens in the same order, so their "
        "seeds are paired: intervals that overlap do not show that arms are alike; the verdicts compare them pair "
        "by pair.",
        data=drawn(marks, rows),
    )


def ablation_figure(means: Sequence[ArmMean], number: int) -> Figure:
    """The paper's comparison in absolute numbers: SAEs with paths ablated beside the whole ones and TopK."""
    ablated = {mean.row.family for mean in means if mean.row.kind is RowKind.ABLATION}
    chosen = [m for m in means if m.row.family in ablated or m.row.group is ArmGroup.TOPK]
    marks, rows = _marks(chosen), _rows(chosen)
    return Figure(
        name=f"ablations-{number}-k{chosen[0].row.k}",
        title="The paper compares an SAE with a part of itself; TopK is the fair neighbour",
        plot=dot_plot(
            marks,
            (SEED, *GROUPS.values(), OFF),
            rows,
            Axis(title="lower is better", from_zero=True),
            panels=tuple(PANELS.values()),
            label_width=32,
        ),
        caption="Hollow: paths ablated. The paper reports the distance from there to the whole SAE. In the "
        "canonical gauge all that is linear is written by the direct path, which changes no output of the whole "
        "SAE: the distance that is left is what the other paths do. TopK SAEs, trained on their own on the same "
        f"tokens, are the control. Mean over {_seeds(chosen)}{_interval(chosen)}; small dots: the seeds. Axes begin "
        "at zero.",
        data=drawn(marks, rows),
    )


def _rows(means: Sequence[ArmMean]) -> list[Row]:
    return [Row(key=arm, label=arm) for arm in dict.fromkeys(mean.row.arm for mean in means)]


def _marks(means: Sequence[ArmMean]) -> list[Mark]:
    seeds = [
        Mark(panel=PANELS[mean.metric], row=mean.row.arm, group=SEED.name, x=value, note=f"seed {seed}")
        for mean in means
        for seed, value in zip(mean.seeds, mean.values, strict=True)
        if len(mean.seeds) > 1
    ]
    averages = [
        Mark(
            panel=PANELS[m.metric],
            row=m.row.arm,
            group=(OFF if m.row.kind is RowKind.ABLATION else GROUPS[m.row.group]).name,
            x=m.mean,
            low=m.low,
            high=m.high,
            note=f"L0 {m.l0:.1f}, {m.row.kind}",
        )
        for m in means
    ]
    return [*seeds, *averages]


def _seeds(means: Sequence[ArmMean]) -> str:
    n = max(len(mean.seeds) for mean in means)
    return "one seed" if n == 1 else f"{n} seeds"


def _interval(means: Sequence[ArmMean]) -> str:
    return " with its 95 % interval (Student's t over seeds)" if any(mean.low is not None for mean in means) else ""
