"""The chapter on the published figures: read from the paper's words, drawn beside ours and beside the control."""

import math
from typing import Any

import pytest
from report_runs import figures, labels, marks, plots, run_of

from sae_nfm.experiments.reproduce.published import Published, published_share
from sae_nfm.experiments.reproduce.results import ReproduceResult
from sae_nfm.experiments.reproduce.rows import NOT_MEASURED, SINGLE, ReproducedRow
from sae_nfm.report.blocks import Heading, Prose, Table
from sae_nfm.report.chapters.reproduced import section
from sae_nfm.stats.estimates import Estimate

STAR, HERE, CONTROL = "published: OpenLLaMA-3B, not measured here", "the same statistic here", "here, under a control"


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(estimate=value, low=low, high=high, n=10, test="t")


def row(
    name: str, published: str, here: Any, controlled: Any, control: str = "means kept", **changes: Any
) -> ReproducedRow:
    fields: dict[str, Any] = {"section": "KL", "verdict": SINGLE, "form": "+.1%"}
    return ReproducedRow(
        name=name, published=published, here=here, controlled=controlled, control=control, **(fields | changes)
    )


ROWS = (
    row("error", "-41.3 % (0.275 to 0.161)", estimate(-0.7, -0.8, -0.6), estimate(-0.1, -0.2, 0.1), section="reconstruction"),
    row("error", "-41.3 % (0.275 to 0.161)", estimate(-0.7, -0.8, -0.6), -0.05, "against TopK", section="reconstruction",
        verdict="worse"),
    row("KL", "-51.6 % to -51.9 %", -0.5, None),
    row("share", "16.5 % for 3 % of the parameters", 0.3, estimate(0.02, -math.inf, math.inf), form=".1%"),
    row("ratio", "2.99 (Gurnee 2 to 4.5)", estimate(1.9, 1.8, 2.0), 0.6, section="errors", form=".2f"),
    row("ours", "-", 0.1, 0.2, form=".1%", section="paths"),
)  # fmt: skip


def reproduced(rows: tuple[ReproducedRow, ...] = ROWS) -> ReproduceResult:
    comparison = {"config": {"d_sae": 2048, "training_tokens": 400, "dataset": None}}
    return ReproduceResult(rows=rows, provenance={"config": {}, "comparison": comparison})


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("-50.9 %", (-0.509, -0.509)),
        ("94 %", (0.94, 0.94)),
        ("-51.6 % to -51.9 %", (-0.519, -0.516)),
        ("-41.3 % (0.275 to 0.161)", (-0.413, -0.413)),
        ("-29.8 % (17.8M measurements)", (-0.298, -0.298)),
        ("16.5 % for 3 % of the parameters", (0.165, 0.165)),
        ("-", None),
        ("SAE 0.4", None),
        ("2.99 (Gurnee 2 to 4.5)", None),
        ("+0.987", None),
        ("F = 5.06, p = 0.027", None),
        ("bimodal, means 0.05 and 0.37, untested", None),
    ],
)
def test_percentages_in_the_papers_words(text, ends):
    found = published_share(text)
    assert (found and (found.low, found.high)) == (ends and pytest.approx(ends))


def test_a_single_number_has_equal_ends():
    assert published_share("-8.6 %") == Published(low=-0.086, high=-0.086)


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
            SINGLE,
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
    rows = (row("2x2", "F = 5.06", None, None, section="2x2", verdict=NOT_MEASURED),)
    there = section(run_of(tmp_path, reproduced(rows)))
    assert figures(there) == []
    assert next(b for b in there.blocks if isinstance(b, Table)).caption.endswith("1 were not measured.")


def test_long_words_of_a_control_are_cut_in_the_figure_only(tmp_path):
    control = "against " + "another very long name " * 6
    (figure,) = figures(section(run_of(tmp_path, reproduced((row("KL", "-5 %", 0.1, 0.2, control),)))))
    assert labels(figure.plot)[1].endswith(" ...")
    assert figure.data["control"].tolist() == [control]


def test_the_same_twice(tmp_path):
    assert plots(section(run_of(tmp_path, reproduced()))) == plots(section(run_of(tmp_path, reproduced())))
