"""A comparison over seeds as figures: whole SAEs, and the paper's comparison of an SAE with a part of itself."""

from collections.abc import Sequence

from sae_nfm.comparison import ArmMean
from sae_nfm.report.blocks import Figure
from sae_nfm.report.dot_plot import Axis, Group, Mark, Row, dot_plot, drawn
from sae_nfm.report.fidelity_figures import PANELS
from sae_nfm.report.theme import PALETTE

SEED = Group(name="one seed", colour="#6b6b6b", symbol="circle", size=5, offset=0.27, opacity=0.6)
JOINT = Group(name="joint_nfm and variants", colour=PALETTE[0], symbol="circle", offset=-0.08)
TOPK = Group(name="TopK", colour=PALETTE[4], symbol="square", offset=-0.08)
OTHERS = Group(name="other architectures", colour=PALETTE[2], symbol="triangle-up", offset=-0.08)
OFF = Group(name="with paths switched off", colour=PALETTE[3], symbol="diamond-open", offset=-0.08)
GROUPS = (SEED, JOINT, TOPK, OTHERS, OFF)


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
