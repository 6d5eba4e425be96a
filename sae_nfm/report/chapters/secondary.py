"""What do features of the interactions' hidden code explain, and does the model need it? Beside a code without structure."""

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
from sae_nfm.report.blocks import Block, Figure, Prose, Section, Table, section_of
from sae_nfm.report.plots.dot_plot import Axis
from sae_nfm.report.plots.dot_rows import Dot, dot_data, dot_rows
from sae_nfm.report.run_folder import Found, Run
from sae_nfm.stats import Estimate

TITLE = "Secondary SAEs"
COMMANDS = ("sae-nfm secondary SAE --output RUN/secondary",)
TRUE, PERMUTED, ACROSS, OTHER = (
    "hidden code",
    "permuted code (control)",
    "true code by the permuted SAE",
    "other activations",
)
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


def _blocks(found: Found[SecondaryResult], number: int) -> list[Block]:
    explained, rises = explained_dots(found.result), rise_dots(found.result)
    others = [dot for dot in rises if dot.series == ELSEWHERE]
    rises = [dot for dot in rises if dot.series != ELSEWHERE]
    return [
        Prose(lines=list(found.result.findings()), listed=True),
        Figure(
            name=f"explained-{number}",
            title="Variance explained, beside a code without structure",
            plot=dot_rows(explained, SHARE_AXIS, hollow=(PERMUTED,), limits=(0, 1.02)),
            caption=EXPLAINED,
            data=dot_data(explained),
        ),
        _rise(f"rise-{number}", "What the predictions lose", rises),
        *(
            [_rise(f"rise-elsewhere-{number}", "The same of other activations, on a wider axis", others)]
            if others
            else []
        ),
        Table(
            columns=("replacement", *COLUMNS),
            rows=[(row.name, *cells(row)) for row in found.result.rows],
            caption=LEGEND.replace("\n", " "),
        ),
    ]


def _rise(name: str, title: str, dots: list[Dot]) -> Figure:
    plot = dot_rows(dots, RISE_AXIS, hollow=(CONTROL,))
    return Figure(name=name, title=title, plot=plot, caption=RISE, data=dot_data(dots))


def explained_dots(result: SecondaryResult) -> list[Dot]:
    """Under each k the true code, the permuted one and the true one by the SAE of the permuted one; then other activations."""
    dots: list[Dot] = []
    for row in result.rows:
        sae = row.sae
        if sae is None:
            continue
        heading = f"k = {sae.k} of {sae.d_in}"
        if sae.trained_on == "hidden code":
            dots.append(_dot(heading, TRUE, TRUE, sae.explained))
        elif sae.trained_on == "permuted hidden code":
            dots.append(_dot(heading, PERMUTED, PERMUTED, sae.explained))
            if sae.explained_true is not None:
                dots.append(_dot(heading, ACROSS, ACROSS, sae.explained_true))
        else:
            dots.append(_dot(heading, sae.trained_on, OTHER, sae.explained))
    return dots


def rise_dots(result: SecondaryResult) -> list[Dot]:
    """A row for each replacement; that of the primary by itself has no rise."""
    return [_dot("", row.name, _kind(row), row.kl_rise) for row in result.rows if row.name != PRIMARY]


def _kind(row: SecondaryRow) -> str:
    if row.sae is None:
        assert row.name in (MEAN, ZERO)
        return ABLATED
    return {"hidden code": REPLACED, "permuted hidden code": CONTROL}.get(row.sae.trained_on, ELSEWHERE)


def _dot(heading: str, label: str, series: str, figure: Estimate) -> Dot:
    return Dot(heading=heading, label=label, series=series, figure=figure)
