"""Which arm is better, over seeds and documents: every verdict of a comparison, and the learning rates behind it."""

from collections.abc import Iterator, Sequence

from sae_nfm.comparison import Answer, SweepRow
from sae_nfm.comparison.results import CompareResult
from sae_nfm.report.blocks import Block, Heading, Prose, Section
from sae_nfm.report.rates_figure import rates_figure
from sae_nfm.report.run_folder import Run
from sae_nfm.report.several import section_of
from sae_nfm.report.verdicts_figures import fair_figure, one_scale_figure

TITLE = "Verdicts: which differences hold"
COMMAND = "sae-nfm compare --output RUN/compare"


def section(run: Run) -> Section | None:
    """The chapter; None without a comparison."""
    return section_of(
        run.of(CompareResult),
        id="verdicts",
        title=TITLE,
        lead="Does one arm do better than another by more than seeds and documents scatter? Fair claims compare "
        "SAEs trained on their own; the paper's figure compares an SAE with a part of itself, and is kept apart.",
        blocks=lambda found, number: _blocks(found.result, number),
        findings=lambda result: _said(result.answers),
    )


def _blocks(result: CompareResult, number: int) -> Iterator[Block]:
    ks = list(dict.fromkeys(answer.k for answer in result.answers))
    for k in ks:
        own = [answer for answer in result.answers if answer.k == k]
        fair = [answer for answer in own if answer.claim.kind == "fair"]
        if len(ks) > 1:
            yield Heading(text=f"k = {k}")
        yield one_scale_figure(own, number)
        if fair:
            yield fair_figure(fair, number)
    if result.missing:
        yield Prose(lines=[f"No verdict: {reason}." for reason in result.missing], listed=True)
    yield from _rates(result.sweep, number)


def _rates(sweep: Sequence[SweepRow], number: int) -> Iterator[Block]:
    for k in dict.fromkeys(row.k for row in sweep):
        yield rates_figure([row for row in sweep if row.k == k], number)


def _said(answers: Sequence[Answer]) -> Iterator[str]:
    """The paper's figures, each fair claim that holds, and the names of those that do not."""
    fair = [answer for answer in answers if answer.claim.kind == "fair"]
    for answer in answers:
        if answer.claim.kind == "ablation":
            yield f"The paper's figure, an ablation: {_sentence(answer)}"
    for answer in fair:
        if answer.verdict.words in ("better", "worse"):
            yield _sentence(answer)
    for words in dict.fromkeys(answer.verdict.words for answer in fair):
        without = [answer for answer in fair if answer.verdict.words == words]
        if words not in ("better", "worse"):
            yield f"{words[0].upper()}{words[1:]} in {len(without)} of {len(fair)} fair tests: {_named(without)}."


def _sentence(answer: Answer) -> str:
    return f"{answer.verdict.sentence}."


def _named(answers: Sequence[Answer]) -> str:
    pairs: dict[str, list[str]] = {}
    for answer in answers:
        verdict = answer.verdict
        pairs.setdefault(f"{verdict.arm} against {verdict.against}", []).append(verdict.measure)
    return "; ".join(f"{pair} ({', '.join(dict.fromkeys(measures))})" for pair, measures in pairs.items())
