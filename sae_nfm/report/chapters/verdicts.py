"""Which arm is better, over seeds and documents: every verdict of a comparison, and the learning rates behind it."""

from collections.abc import Iterator, Sequence
from math import isfinite

import pandas as pd

from sae_nfm.comparison.results import Answer, ClaimKind, CompareResult, SweepRow
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section, section_of
from sae_nfm.report.chapters.fidelity import CHANGE, HEADINGS, METRICS
from sae_nfm.report.plots import PALETTE, SYMBOLS, Axis, Group, Mark, dot_plot, ends, headed, mark, plain_rows
from sae_nfm.report.run_folder import Run
from sae_nfm.stats import Outcome

TITLE = "Verdicts: which differences hold"
COMMANDS = ("sae-nfm compare --output RUN/compare",)
MEASURES = {"fvu": "FVU", "kl_nats": "KL"}
OUTCOMES = {
    Outcome.BETTER: Group(name="better", colour=PALETTE[2], symbol="circle"),
    Outcome.WORSE: Group(name="worse", colour=PALETTE[4], symbol="square"),
    Outcome.NO_DIFFERENCE: Group(name="no difference shown", colour="#6b6b6b", symbol="circle-open"),
    Outcome.NO_CLAIM: Group(name="too few seeds: no claim", colour=PALETTE[3], symbol="x"),
}
SHOWN = (Outcome.BETTER, Outcome.WORSE)
CLOSER = {
    ClaimKind.FAIR: ("The fair comparisons, closer", "", "fair tests"),
    ClaimKind.INFERENCE: ("What inference gains, closer", "Gain from inference: ", "tests"),
    ClaimKind.PATHS: (
        "What NFM paths gain on the same inference, closer",
        "Gain from paths on the same inference: ",
        "tests",
    ),
}
"""Kinds of claims with a figure of their own: its title, and what is said before and of their findings."""
INTERVALS = "Lines: 95 % intervals over seeds and documents"
INSIDE = Group(name="chosen", colour="#000000", symbol="circle-open", size=19)
EDGE = Group(name="chosen, at an edge of the sweep", colour=PALETTE[4], symbol="square-open", size=19)


def section(run: Run) -> Section | None:
    """The chapter; None without a comparison over seeds."""
    return section_of(
        [found for found in run.of(CompareResult) if not found.result.changes],
        id="verdicts",
        title=TITLE,
        lead="Does one arm do better than another by more than seeds and documents scatter? Fair claims compare "
        "SAEs trained on their own; what inference gains, and what paths gain on top of the same inference, are told apart; the "
        "paper's comparison of an SAE with a part of itself stands apart.",
        blocks=_blocks,
        findings=lambda result: _said(result.answers),
    )


def _blocks(result: CompareResult, number: int) -> Iterator[Block]:
    ks = list(dict.fromkeys(answer.k for answer in result.answers))
    for k in ks:
        own = [answer for answer in result.answers if answer.k == k]
        if len(ks) > 1:
            yield Heading(text=f"k = {k}")
        yield one_scale_figure(own, number)
        for kind in CLOSER:
            if chosen := [answer for answer in own if answer.claim.kind is kind]:
                yield closer_figure(chosen, number)
    if result.missing:
        yield Prose(lines=[f"No verdict: {reason}." for reason in result.missing], listed=True)
    for k in dict.fromkeys(row.k for row in result.sweep):
        yield rates_figure([row for row in result.sweep if row.k == k], number)


def _said(answers: Sequence[Answer]) -> Iterator[str]:
    """The paper's comparisons; of each other kind the claims that hold, and the names of those that do not."""
    for answer in answers:
        if answer.claim.kind is ClaimKind.ABLATION:
            yield f"The paper's comparison, an ablation: {answer.verdict.sentence}."
    for kind, (_, before, tests) in CLOSER.items():
        fair = [answer for answer in answers if answer.claim.kind is kind]
        for answer in fair:
            if answer.verdict.outcome in SHOWN:
                yield f"{before}{answer.verdict.sentence}."
        for words in dict.fromkeys(answer.verdict.words for answer in fair if answer.verdict.outcome not in SHOWN):
            without = [answer for answer in fair if answer.verdict.words == words]
            told = f"{before}{words}"
            yield f"{told[0].upper()}{told[1:]} in {len(without)} of {len(fair)} {tests}: {_named(without)}."


def _named(answers: Sequence[Answer]) -> str:
    pairs: dict[str, list[str]] = {}
    for answer in answers:
        verdict = answer.verdict
        pairs.setdefault(f"{verdict.arm} against {verdict.against}", []).append(verdict.measure)
    return "; ".join(f"{pair} ({', '.join(dict.fromkeys(measures))})" for pair, measures in pairs.items())


def one_scale_figure(answers: Sequence[Answer], number: int) -> Figure:
    """The paper's comparison and the fair ones at one k, on one scale."""
    rows = headed(
        (heading, plain_rows(_pair(answer) for answer in answers if answer.claim.kind is kind))
        for kind, heading in HEADINGS.items()
    )
    marks = [_mark(answer, group=MEASURES[answer.verdict.measure]) for answer in answers]
    return Figure(
        name=f"one-scale-{number}-k{answers[0].k}",
        title="What is left of the paper's difference against SAEs trained on their own",
        plot=dot_plot(marks, METRICS, rows, CHANGE, label_width=46, narrow_width=24),
        caption="Relative difference of the reconstruction error (FVU) and of KL; left of zero the first arm is "
        "better. Above, as the paper compares: all paths against a part of the same SAE, which was never trained to "
        f"stand alone. Below, the control: SAEs trained on their own on the same tokens. {INTERVALS}; where none is "
        "seen it is narrower than its mark.",
        data=_data(answers),
    )


def closer_figure(answers: Sequence[Answer], number: int) -> Figure:
    """Every claim of one kind at one k with its verdict."""
    rows = plain_rows(map(_pair, answers))
    marks = [
        _mark(answer, group=OUTCOMES[answer.verdict.outcome].name, panel=MEASURES[answer.verdict.measure])
        for answer in answers
    ]
    axis = Axis(title=CHANGE.title, tickformat="+.1%", form="+.1%", reference=0.0)
    n = answers[0].verdict.n_seeds
    corrections = dict.fromkeys(a.verdict.difference.correction for a in answers if a.verdict.difference.correction)
    return Figure(
        name=f"{answers[0].claim.kind}-{number}-k{answers[0].k}",
        title=CLOSER[answers[0].claim.kind][0],
        plot=dot_plot(
            marks,
            tuple(OUTCOMES.values()),
            rows,
            axis,
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


def _mark(answer: Answer, *, group: str, panel: str = "") -> Mark:
    note = f"{answer.verdict.words}: {answer.claim.question}"
    return mark(_pair(answer), group, answer.verdict.relative, panel=panel, note=note)


def _data(answers: Sequence[Answer]) -> pd.DataFrame:
    """What is drawn, with the words."""
    names = [(str(a.claim.kind), a.claim.arm, a.claim.against, MEASURES[a.verdict.measure]) for a in answers]
    told = [(a.verdict.difference.p_value, a.verdict.words, a.claim.question) for a in answers]
    rows = [
        (*name, *ends(answer.verdict.relative), *words)
        for name, answer, words in zip(names, answers, told, strict=True)
    ]
    columns = ["kind", "arm", "against", "measure", "relative difference", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "adjusted p", "verdict", "question"])


def rates_figure(sweep: Sequence[SweepRow], number: int) -> Figure:
    """FVU of every SAE of the sweep of one k at every rate."""
    candidates = sorted({row.learning_rate for row in sweep})
    groups = [
        Group(name=f"{rate:g}", colour=PALETTE[place % len(PALETTE)], symbol=SYMBOLS[place % len(SYMBOLS)])
        for place, rate in enumerate(candidates)
    ]
    rows = plain_rows(row.arm + row.way for row in sweep)
    axis = Axis(title="FVU on the sweep's text (lower is better)", form=".4f")
    marks: list[Mark] = []
    for row in sweep:
        if isfinite(row.fvu):
            name = row.arm + row.way
            marks.append(Mark(row=name, group=f"{row.learning_rate:g}", x=row.fvu, note=f"L0 {row.l0:.1f}"))
            if row.chosen:
                ring = EDGE if row.learning_rate in (candidates[0], candidates[-1]) else INSIDE
                marks.append(Mark(row=name, group=ring.name, x=row.fvu, note=f"learning rate {row.learning_rate:g}"))
    return Figure(
        name=f"rates-{number}-k{sweep[0].k}",
        title="Every arm at the learning rate that suits it",
        plot=dot_plot(marks, [*groups, INSIDE, EDGE], rows, axis, label_width=32),
        caption="Each arm was trained at the same learning rates, on the same tokens, with a seed that is not among "
        "the compared, and took the rate with the lowest FVU on text that nothing is reported on (ringed). Where a "
        "coefficient sets the sparsity, FVU is interpolated at one L0, so the lowest mark need not be the chosen "
        "one. At an edge the best rate may lie beyond; a rate without a mark diverged. One seed.",
        data=pd.DataFrame(
            [(r.arm, r.family, r.learning_rate, r.rescaling, r.l0, r.fvu, r.chosen) for r in sweep],
            columns=["arm", "family", "learning rate", "rescaled", "L0", "FVU", "chosen"],
        ),
    )
