"""Verdicts as forest plots: relative differences with their intervals, and the words."""

from collections.abc import Sequence

import pandas as pd

from sae_nfm.comparison import Answer
from sae_nfm.report.blocks import Figure
from sae_nfm.report.dot_plot import Axis, Group, Mark, Row, bounded, dot_plot
from sae_nfm.report.theme import PALETTE

MEASURES = {"fvu": "FVU", "kl_nats": "KL"}
CHANGE = Axis(title="change (left of zero: better)", tickformat="+.0%", form="+.1%", reference=0.0)
WORDS = {
    "better": Group(name="better", colour=PALETTE[2], symbol="circle"),
    "worse": Group(name="worse", colour=PALETTE[4], symbol="square"),
    "no difference shown": Group(name="no difference shown", colour="#6b6b6b", symbol="circle-open"),
    "no claim": Group(name="too few seeds: no claim", colour=PALETTE[3], symbol="x"),
}
INTERVALS = "Lines: 95 % intervals over seeds and documents"


def one_scale_figure(answers: Sequence[Answer], number: int) -> Figure:
    """The paper's comparison and the fair ones on one scale.

    Args:
        answers: of one k.
        number: of the comparison in the run, from 1, for the figure's name.
    """
    groups = (
        Group(name="FVU", colour=PALETTE[0], symbol="circle", offset=-0.16, size=10),
        Group(name="KL", colour=PALETTE[1], symbol="diamond", offset=0.16, size=10),
    )
    kinds = (
        ("ablation", "The paper's comparison: with a part of itself"),
        ("fair", "Fair: with SAEs trained on their own"),
    )
    rows: list[Row] = []
    for kind, heading in kinds:
        own = [Row(key=_pair(answer), label=_pair(answer)) for answer in answers if answer.claim.kind == kind]
        rows += [Row(key=kind, label=heading, heading=True), *dict.fromkeys(own)] if own else []
    marks = [_mark(answer, group=MEASURES[answer.verdict.measure]) for answer in answers]
    return Figure(
        name=f"one-scale-{number}-k{answers[0].k}",
        title="What is left of the paper's figure against SAEs trained on their own",
        plot=dot_plot(marks, groups, rows, CHANGE, label_width=46, narrow_width=24),
        caption="Relative difference of the reconstruction error (FVU) and of KL; left of zero the first arm is "
        "better. Above, as the paper compares: all paths against a part of the same SAE, which was never trained to "
        f"stand alone. Below, the control: SAEs trained on their own on the same tokens. {INTERVALS}; where none is "
        "seen it is narrower than its mark.",
        data=_data(answers),
    )


def fair_figure(answers: Sequence[Answer], number: int) -> Figure:
    """Every fair claim with its verdict.

    Args:
        answers: fair ones of one k.
        number: of the comparison in the run, from 1, for the figure's name.
    """
    rows = list(dict.fromkeys(Row(key=_pair(answer), label=_pair(answer)) for answer in answers))
    marks = [_mark(answer, group=_word(answer).name, panel=MEASURES[answer.verdict.measure]) for answer in answers]
    n = answers[0].verdict.n_seeds
    corrections = dict.fromkeys(a.verdict.difference.correction for a in answers if a.verdict.difference.correction)
    return Figure(
        name=f"fair-{number}-k{answers[0].k}",
        title="The fair comparisons, closer",
        plot=dot_plot(
            marks,
            tuple(WORDS.values()),
            rows,
            Axis(title=CHANGE.title, tickformat="+.1%", form="+.1%", reference=0.0),
            panels=tuple(MEASURES.values()),
            label_width=46,
            narrow_width=24,
        ),
        caption=f"Relative difference over {n} seed{'s' * (n > 1)}. {INTERVALS}, each for itself. The words ask for "
        f"more: p-values adjusted for the number of tests{''.join(f' ({words})' for words in corrections)} and seeds "
        "that agree, so that an interval may leave out zero where no difference is shown. No difference shown does "
        "not mean that there is none. Fewer than five seeds: no claim.",
        data=_data(answers),
    )


def _pair(answer: Answer) -> str:
    return f"{answer.claim.arm} against {answer.claim.against}"


def _word(answer: Answer) -> Group:
    return WORDS.get(answer.verdict.words, WORDS["no claim"])


def _mark(answer: Answer, *, group: str, panel: str = "") -> Mark:
    relative = answer.verdict.relative
    note = f"{answer.verdict.words}: {answer.claim.question}"
    return Mark(
        row=_pair(answer),
        group=group,
        panel=panel,
        x=relative.estimate,
        low=relative.low,
        high=relative.high,
        note=note,
    )


def _data(answers: Sequence[Answer]) -> pd.DataFrame:
    """What is drawn, with the words."""
    rows = [
        (
            a.claim.kind,
            a.claim.arm,
            a.claim.against,
            MEASURES[a.verdict.measure],
            a.verdict.relative.estimate,
            bounded(a.verdict.relative.low),
            bounded(a.verdict.relative.high),
            a.verdict.difference.p_value,
            a.verdict.words,
            a.claim.question,
        )
        for a in answers
    ]
    columns = [
        "kind",
        "arm",
        "against",
        "measure",
        "relative difference",
        "low",
        "high",
        "adjusted p",
        "verdict",
        "question",
    ]
    return pd.DataFrame(rows, columns=columns)
