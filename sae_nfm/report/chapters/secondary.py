"""What do features of the interactions' hidden code explain, and does the model need it? Beside a code without structure."""

from typing import Any

from sae_nfm.experiments.secondary.results import (
    COLUMNS,
    LEGEND,
    MEAN,
    PRIMARY,
    ZERO,
    SecondaryResult,
    SecondaryRow,
    cells,
)
from sae_nfm.report.blocks import Block, Figure, Prose, Section, Table, dots_figure, section_of
from sae_nfm.report.plots import Axis, Dot
from sae_nfm.report.run_folder import Run

TITLE = "Secondary SAEs"
COMMANDS = ("sae-nfm secondary SAE --output RUN/secondary",)
TRUE, PERMUTED = "hidden code", "permuted code (control)"
ACROSS, OTHER = "true code by the permuted SAE", "other activations"
ABLATED, REPLACED, CONTROL = "no SAE", "SAE of the hidden code", "SAE of the permuted code (control)"
ELSEWHERE = "SAE of another activation"
SHARE_AXIS = Axis(title="variance explained, held-out tokens", tickformat=".0%", form=".1%", reference=0)
RISE_AXIS = Axis(title="rise of KL, nats per token", form="+.4f", reference=0)
LEAD = (
    "A secondary SAE is trained on the hidden code of the interaction path. Does it find structure, or does any code "
    "of so few dimensions reconstruct as well? And what do the model's predictions lose when its reconstruction is "
    "put in?"
)
EXPLAINED = (
    "Fraction of variance explained on held-out tokens. The control is an SAE trained alike on the same code with "
    "every dimension shuffled among tokens, so that nothing but the single dimensions is left to learn: what the true "
    "code has above it is structure across dimensions. Shares do not compare across widths. Bars: 95 % intervals over "
    "documents (of the permuted code: over tokens)."
)
RISE = (
    "Rise of KL(original || spliced) over the SAE as it is, nats per token, when what stands on the left is put in "
    "place of the activation. The code's mean says what there is to lose; what a replacement rises less than that, it "
    "keeps. Bars: 95 % intervals over documents, paired by token. One seed."
)


def section(run: Run) -> Section | None:
    """All results on secondary SAEs of a run; None without any."""
    found = run.of(SecondaryResult)
    return section_of(found, id="secondary", title=TITLE, lead=LEAD, blocks=_blocks, findings=SecondaryResult.findings)


def _blocks(result: SecondaryResult, number: int) -> list[Block]:
    explained, rises = explained_dots(result), rise_dots(result)
    others = [dot for dot in rises if dot.series == ELSEWHERE]
    title = "Variance explained, beside a code without structure"
    options: dict[str, Any] = {"hollow": (PERMUTED,), "limits": (0, 1.02)}
    blocks: list[Block] = [
        Prose(lines=list(result.findings()), listed=True),
        dots_figure(f"explained-{number}", title, explained, SHARE_AXIS, EXPLAINED, **options),
        _rise(f"rise-{number}", "What the predictions lose", [dot for dot in rises if dot.series != ELSEWHERE]),
    ]
    if others:
        blocks.append(_rise(f"rise-elsewhere-{number}", "The same of other activations, on a wider axis", others))
    rows = [(row.name, *cells(row)) for row in result.rows]
    blocks.append(Table(columns=("replacement", *COLUMNS), rows=rows, caption=LEGEND.replace("\n", " ")))
    return blocks


def _rise(name: str, title: str, dots: list[Dot]) -> Figure:
    return dots_figure(name, title, dots, RISE_AXIS, RISE, hollow=(CONTROL,))


def explained_dots(result: SecondaryResult) -> list[Dot]:
    """Under each k the true code, the permuted one and the true one by the SAE of the permuted one; then other activations."""
    dots: list[Dot] = []
    for sae in (row.sae for row in result.rows if row.sae is not None):
        heading = f"k = {sae.k} of {sae.d_in}"
        label = {"hidden code": TRUE, "permuted hidden code": PERMUTED}.get(sae.trained_on)
        series = label or OTHER
        dots.append(Dot(heading=heading, label=label or sae.trained_on, series=series, figure=sae.explained))
        if label == PERMUTED and sae.explained_true is not None:
            dots.append(Dot(heading=heading, label=ACROSS, series=ACROSS, figure=sae.explained_true))
    return dots


def rise_dots(result: SecondaryResult) -> list[Dot]:
    """A row for each replacement; that of the primary by itself has no rise."""
    return [Dot(label=row.name, series=_kind(row), figure=row.kl_rise) for row in result.rows if row.name != PRIMARY]


def _kind(row: SecondaryRow) -> str:
    if row.sae is None:
        assert row.name in (MEAN, ZERO)
        return ABLATED
    return {"hidden code": REPLACED, "permuted hidden code": CONTROL}.get(row.sae.trained_on, ELSEWHERE)
