"""The chapter on the published figures: read from the paper's words, drawn beside ours and beside the control."""

import math
from typing import Any

import pytest
from report_runs import figures, labels, marks, plots, run_of

from sae_nfm.experiments.reproduce.results import (
    PUBLISHED,
    NoVerdict,
    Published,
    ReproducedRow,
    ReproduceResult,
    Section,
    Unit,
)
from sae_nfm.report.blocks import Heading, Prose, Table
from sae_nfm.report.chapters.reproduced import section
from sae_nfm.stats.estimates import Estimate

STAR, HERE, CONTROL = "published: OpenLLaMA-3B, not measured here", "the same statistic here", "here, under a control"


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(estimate=value, low=low, high=high, n=10, test="t")


ERROR = Published(value=-0.413, unit=Unit.CHANGE, before=0.275, after=0.161)
NOTED = Published(value=0.165, unit=Unit.SHARE, note="for 3 % of the parameters")


def row(
    name: str, published: Published | None, here: Any, controlled: Any, control: str = "means kept", **changes: Any
) -> ReproducedRow:
    fields: dict[str, Any] = {"section": Section.KL, "verdict": str(NoVerdict.ONE_SEED)}
    fields["unit"] = Unit.OTHER if published is None else published.unit
    return ReproducedRow(
        name=name, published=published, here=here, controlled=controlled, control=control, **(fields | changes)
    )


ROWS = (
    row("error", ERROR, estimate(-0.7, -0.8, -0.6), estimate(-0.1, -0.2, 0.1), section=Section.RECONSTRUCTION),
    row("error", ERROR, estimate(-0.7, -0.8, -0.6), -0.05, "against TopK", section=Section.RECONSTRUCTION,
        verdict="worse"),
    row("KL", Published(value=-0.516, to=-0.519, unit=Unit.CHANGE), -0.5, None),
    row("share", NOTED, 0.3, estimate(0.02, -math.inf, math.inf)),
    row("ratio", Published(value=2.99, unit=Unit.RATIO), estimate(1.9, 1.8, 2.0), 0.6, section=Section.ERRORS),
    row("ours", None, 0.1, 0.2, section=Section.PATHS, unit=Unit.SHARE),
)  # fmt: skip


def reproduced(rows: tuple[ReproducedRow, ...] = ROWS) -> ReproduceResult:
    comparison = {"config": {"d_sae": 2048, "training_tokens": 400, "dataset": None}}
    return ReproduceResult(rows=rows, provenance={"config": {}, "comparison": comparison})


@pytest.mark.parametrize(
    ("name", "text", "ends"),
    [
        ("squared error, all paths against the direct path alone", "-41.3 % (0.275 to 0.161)", (-0.413, -0.413)),
        ("KL, all paths against the direct path alone", "-51.6 % to -51.9 %", (-0.519, -0.516)),
        ("reconstruction error, NFM on the residual of a frozen SAE", "-23 % (0.367 to 0.281)", (-0.23, -0.23)),
        ("KL relative to the SAE alone", "-29.8 % (17.8M measurements)", (-0.298, -0.298)),
        ("share of the KL gain that the nonlinear path has by itself", "16.5 % for 3 % of the parameters", (0.165, 0.165)),
        ("share of what the integration paths write, linear", "94 %", (0.94, 0.94)),
        ("share of weight norm, linear, squared norm above 0.2", "29.0 %", (0.29, 0.29)),
        ("KL of the SAE over that of an equal-distance random vector", "2.99 (Gurnee 2 to 4.5)", (2.99, 2.99)),
        ("Spearman of squared norm and share, direct", "+0.987", (0.987, 0.987)),
        ("formality x emotion, clamping secondary feature 4022", "F = 5.06, p = 0.027", (5.06, 5.06)),
        ("modes of the squared norm: p-value of the dip test", "bimodal, means 0.05 and 0.37, untested", None),
    ],
)  # fmt: skip
def test_numbers_in_the_papers_words(name, text, ends):
    assert (PUBLISHED[name].text, PUBLISHED[name].ends) == (text, ends)


def test_nothing_without_a_reproduction(tmp_path):
    assert section(run_of(tmp_path)) is None


def test_published_here_and_controlled(tmp_path):
    reconstruction, changes, shares = figures(section(run_of(tmp_path, reproduced())))
    assert labels(reconstruction.plot) == ["error", "means kept", "against TopK"]
    assert marks(reconstruction) == {
        ("error", STAR, -0.413), ("error", HERE, -0.7, -0.8, -0.6),
        ("means kept", CONTROL, -0.1, -0.2, 0.1), ("against TopK", CONTROL, -0.05),
    }  # fmt: skip
    # a range is a line around its middle; a control without a figure is a row without a mark
    assert marks(changes) == {("KL", STAR, -0.5175, -0.519, -0.516), ("KL", HERE, -0.5)}
    assert marks(shares) == {("share", STAR, 0.165), ("share", HERE, 0.3), ("means kept", CONTROL, 0.02)}
    assert (changes.plot.layout.xaxis.title.text, shares.plot.layout.xaxis.title.text) == ("relative change", "share")
    data = reconstruction.data
    assert data["published low"].tolist() == data["published high"].tolist() == [-0.413, -0.413]
    assert data["controlled"].tolist() == [-0.1, -0.05]
    assert data["here high"].tolist() == [-0.6, -0.6]
    assert shares.data["controlled low"].isna().all()


def test_tables_have_every_published_figure_and_say_what_is_the_same_once(tmp_path):
    there = section(run_of(tmp_path, reproduced()))
    tables = [block for block in there.blocks if isinstance(block, Table)]
    assert list(tables[0].rows) == [
        (
            "error",
            "-41.3 % (0.275 to 0.161)",
            "-70.0% [-80.0%, -60.0%]",
            "means kept",
            "-10.0% [-20.0%, +10.0%]",
            "one seed: no claim",
        ),
        ("", "", "", "against TopK", "-5.0%", "worse"),
    ]
    assert [block.text for block in there.blocks if isinstance(block, Heading)] == [
        "Reconstruction error", "Divergence of the model's predictions (KL)", "Errors beside others of their size",
    ]  # fmt: skip
    assert [line[4] for line in tables[1].rows] == ["none", "2.0% [-inf%, inf%]"]
    assert "ours" not in str(tables)
    prose = next(block for block in there.blocks if isinstance(block, Prose))
    assert prose.lines[-1].endswith("no evidence about real text.")


def test_verdicts_are_those_over_seeds_and_without_any_the_error(tmp_path):
    said = section(run_of(tmp_path, reproduced())).verdicts
    assert said == [
        "error: published -41.3 % (0.275 to 0.161); here -70.0% [-80.0%, -60.0%]; against TopK: -5.0% (worse)."
    ]
    one_seed = section(run_of(tmp_path, reproduced((ROWS[0], ROWS[2])))).verdicts
    assert [line.endswith("(one seed: no claim).") for line in one_seed] == [True]


def test_what_was_not_measured_is_counted(tmp_path):
    rows = (
        row(
            "2x2",
            Published(value=5.06, unit=Unit.F),
            None,
            None,
            section=Section.FACTORIAL,
            verdict=str(NoVerdict.NOT_MEASURED),
        ),
    )
    there = section(run_of(tmp_path, reproduced(rows)))
    assert figures(there) == []
    assert next(b for b in there.blocks if isinstance(b, Table)).caption.endswith("1 were not measured.")


def test_long_words_of_a_control_are_cut_in_the_figure_only(tmp_path):
    control = "against " + "another very long name " * 6
    (figure,) = figures(section(run_of(tmp_path, reproduced((row("KL", ERROR, 0.1, 0.2, control),)))))
    assert labels(figure.plot)[1].endswith(" ...")
    assert figure.data["control"].tolist() == [control]


def test_the_same_twice(tmp_path):
    assert plots(section(run_of(tmp_path, reproduced()))) == plots(section(run_of(tmp_path, reproduced())))
