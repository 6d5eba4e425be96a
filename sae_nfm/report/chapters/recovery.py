"""Which features of a known truth SAEs have, and whether they tell planted pairs from decoys."""

from collections.abc import Iterator

from sae_nfm.experiments.synthetic.results import RecoveryResult, RecoveryRow, Score
from sae_nfm.report.blocks import Block, Prose, Section, Table, dots_figure, section_of
from sae_nfm.report.plots import Axis, Dot
from sae_nfm.report.run_folder import Run

TITLE = "Where the answer is known"
COMMANDS = (
    "sae-nfm synthetic --output RUN/synthetic",
    "sae-nfm recovery RUN --samples RUN/synthetic --output RUN/recovery",
)
LEAD = (
    "Activations were drawn from known features, with pairs planted among them. Which of both did the SAEs find? A lower error "
    "does not say."
)
FOUND = Axis(title="fraction (1: all of it)", form=".3f", from_zero=True)
TOLD_APART = Axis(title="AUROC, planted pairs against decoys (0.5: chance)", form=".3f", reference=0.5, from_zero=True)
FEATURES_CAPTION = (
    "F1 of firing, of each true feature and the SAE's feature matched with it one to one, averaged over true features; MCC: mean "
    "absolute cosine of directions matched one to one; 1 - FVU: share of the variance that is reconstructed. One SAE each: no "
    "intervals. An SAE can reconstruct well without having the features."
)
PAIRS_CAPTION = (
    "Probability that a planted pair has a higher score than a decoy, a pair of features that fire together as often and write "
    "nothing. A score at the control's place says how often features fire together, not that they interact. Scores above 0.5 are "
    "not yet detectors: the table has the share of planted pairs among the highest."
)
SQUARES_TOLD = (
    " A feature with a planted square fires more often: see the controls, and the decoys, features whose rate is raised as much "
    "and that write no square."
)
FEATURES_COLUMNS = (
    "SAE",
    "refinements",
    "parameters",
    "L0",
    "FVU",
    "F1",
    "precision",
    "recall",
    "MCC",
    "dead",
    "interaction",
    "square",
)
PAIRS_COLUMNS = ("SAE", "refinements", "pairs ranked by", "AUROC, all pairs", "AUROC, decoys", "precision", "cosine")


def section(run: Run) -> Section | None:
    """All measurements against a known truth; None without any."""
    return section_of(
        run.of(RecoveryResult), id="recovery", title=TITLE, lead=LEAD, blocks=_blocks, findings=RecoveryResult.findings
    )


def _label(row: RecoveryRow) -> str:
    return row.sae + (f", {row.refinement_steps} refinements" if row.refinement_steps else "")


def _blocks(result: RecoveryResult, number: int) -> Iterator[Block]:
    yield Prose(lines=[result.head(), *result.findings()], listed=True)
    dots = [
        Dot(heading=what, label=_label(row), series=what, figure=value)
        for what in ("F1", "MCC", "1 - FVU")
        for row in result.rows
        for value in [{"F1": row.f1, "MCC": row.mcc, "1 - FVU": 1 - row.fvu}[what]]
    ]
    yield dots_figure(f"features-{number}", "Features found", dots, FOUND, FEATURES_CAPTION)
    yield Table(
        columns=FEATURES_COLUMNS,
        rows=[_features(row) for row in result.rows],
        caption=" ".join([*result.notes(), *result.floor_lines()]),
    )
    pairs = [
        Dot(heading=_label(row), label=str(one.score), series=str(one.score), figure=one.auroc_decoys)
        for row in result.rows
        for one in row.pairs
        if one.auroc_decoys is not None
    ]
    if pairs:
        hollow = (str(Score.TOGETHER),)
        yield dots_figure(
            f"pairs-{number}", "Planted pairs against decoys", pairs, TOLD_APART, PAIRS_CAPTION, hollow=hollow
        )
    scores = {
        "pairs": ("pair", result.pairs, result.oracle, [(row, one) for row in result.rows for one in row.pairs]),
        "squares": (
            "square",
            result.squares,
            result.oracle_squares,
            [(row, s) for row in result.rows for s in row.squares],
        ),
    }
    for what, (one, planted, oracle, found) in scores.items():
        rows = [(row.label, f"{row.refinement_steps}", str(score.score), *score.cells()) for row, score in found]
        if not rows:
            continue
        if oracle is not None:
            rows.append(("the true features", "", str(oracle.score), *oracle.cells()))
        columns = tuple(column.replace("pairs", what) for column in PAIRS_COLUMNS)
        yield Table(
            columns=tuple("AUROC, all features" if column == "AUROC, all squares" else column for column in columns),
            rows=rows,
            caption=f"Precision among the {planted} highest scores. Cosine: what is found to be written for a planted {one}, and "
            "what the truth writes." + (SQUARES_TOLD if what == "squares" else ""),
            text_columns=(0, 2),
        )


def _features(row: RecoveryRow) -> tuple[str, ...]:
    share, square = ("" if one is None else f"{one:.2%}" for one in (row.interaction_share, row.square_share))
    numbers = (row.fvu, row.f1, row.precision, row.recall, row.mcc)
    told = tuple(f"{value:.3f}" for value in numbers)
    return (
        *(row.label, f"{row.refinement_steps}", f"{row.parameters:,}", f"{row.l0:.1f}"),
        *(*told, f"{row.dead}", share, square),
    )
