"""The sweep of learning rates as a figure: what each arm was tried at, what it took, and whether that is an edge."""

from collections.abc import Sequence
from math import isfinite

import pandas as pd

from sae_nfm.comparison import SweepRow, chosen_rates
from sae_nfm.report.blocks import Figure
from sae_nfm.report.dot_plot import Axis, Group, Mark, Row, dot_plot
from sae_nfm.report.theme import PALETTE, SYMBOLS

INSIDE = Group(name="chosen", colour="#000000", symbol="circle-open", size=19)
EDGE = Group(name="chosen, at an edge of the sweep", colour=PALETTE[4], symbol="square-open", size=19)


def rates_figure(sweep: Sequence[SweepRow], number: int) -> Figure:
    """FVU of every SAE of a sweep at every rate.

    Args:
        sweep: of one k.
        number: of the comparison in the run, from 1, for the figure's name.
    """
    candidates = sorted({row.learning_rate for row in sweep})
    groups = [
        Group(name=f"{rate:g}", colour=PALETTE[place % len(PALETTE)], symbol=SYMBOLS[place % len(SYMBOLS)])
        for place, rate in enumerate(candidates)
    ]
    chosen = chosen_rates(sweep, candidates)
    rows = [Row(key=arm, label=arm) for arm in dict.fromkeys(row.arm for row in sweep)]
    marks: list[Mark] = []
    for row in sweep:
        if isfinite(row.fvu):
            marks.append(Mark(row=row.arm, group=f"{row.learning_rate:g}", x=row.fvu, note=f"L0 {row.l0:.1f}"))
            if row.learning_rate == chosen[row.family]:
                ring = EDGE if row.learning_rate in (candidates[0], candidates[-1]) else INSIDE
                marks.append(Mark(row=row.arm, group=ring.name, x=row.fvu, note=f"learning rate {row.learning_rate:g}"))
    return Figure(
        name=f"rates-{number}-k{sweep[0].k}",
        title="Every arm at the learning rate that suits it",
        plot=dot_plot(
            marks,
            [*groups, INSIDE, EDGE],
            rows,
            Axis(title="FVU on the sweep's text (lower is better)", form=".4f"),
            label_width=32,
        ),
        caption="Each arm was trained at the same learning rates, on the same tokens, with a seed that is not among "
        "the compared, and took the rate with the lowest FVU on text that nothing is reported on (ringed). Where a "
        "coefficient sets the sparsity, FVU is interpolated at one L0, so the lowest mark need not be the chosen "
        "one. At an edge the best rate may lie beyond; a rate without a mark diverged. One seed.",
        data=pd.DataFrame(
            [(r.arm, r.family, r.learning_rate, r.l0, r.fvu, r.learning_rate == chosen[r.family]) for r in sweep],
            columns=["arm", "family", "learning rate", "L0", "FVU", "chosen"],
        ),
    )
