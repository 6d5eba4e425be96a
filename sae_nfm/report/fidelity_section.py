"""How faithful each SAE is: the table of a benchmark or a comparison, the paper's comparison beside the fair ones."""

from collections.abc import Iterator

from sae_nfm.comparison import ALL_PATHS, COLUMN_HELP, COLUMNS, BenchmarkResult, caveats, sentence
from sae_nfm.comparison import cells as benchmark_cells
from sae_nfm.comparison.arm_means import arm_means
from sae_nfm.comparison.results import COLUMNS as COMPARE_COLUMNS
from sae_nfm.comparison.results import CompareResult, cells
from sae_nfm.report.blocks import Block, Heading, Prose, Section, Table
from sae_nfm.report.compared_fidelity_figures import ablation_figure, whole_figure
from sae_nfm.report.fidelity_figures import claims_figure, fidelity_figure
from sae_nfm.report.run_folder import Found, Run

TITLE = "Fidelity: what each SAE keeps of the model"
COMMAND = "sae-nfm demo --output RUN/demo, or sae-nfm compare --output RUN/compare"
COMPARE_HELP = (
    "Mean (standard deviation) over seeds. MFLOP/token: multiplications and additions of a training step; learning "
    "rate: peak of Adam's; dead: share of features that no token of the training's last half activated; other "
    "columns as in README."
)


def section(run: Run) -> Section | None:
    """The chapter; None without a benchmark or a comparison."""
    demos, compared = run.of(BenchmarkResult), run.of(CompareResult)
    if not demos and not compared:
        return None
    blocks: list[Block] = []
    for number, found in enumerate(demos, 1):
        blocks += [Heading(text=_heading("One run", found)), *_benchmark(found.result, number)]
    for number, found in enumerate(compared, 1):
        blocks += [Heading(text=_heading("Several seeds", found)), *_comparison(found.result, number)]
    return Section(
        id="fidelity",
        title=TITLE,
        lead="Each SAE is spliced into the language model in place of the activations it reconstructs. How much of "
        "their variance is lost (FVU), and how far do the model's predictions move (KL)? Lower is better.",
        blocks=blocks,
        verdicts=[sentence for found in demos for sentence in _said(found.result)],
    )


def _heading(what: str, found: Found[BenchmarkResult] | Found[CompareResult]) -> str:
    return what if found.label == "." else f"{what}: {found.label}"


def _said(result: BenchmarkResult) -> Iterator[str]:
    """The paper's comparison and the fair ones of each joint SAE, with the words of the terminal."""
    for comparison in result.comparisons:
        kind = "the paper's figure" if comparison.kind == "paper" else "the fair figure"
        yield f"{comparison.row}, {kind}: {sentence(comparison)}."


def _benchmark(result: BenchmarkResult, number: int) -> Iterator[Block]:
    yield claims_figure(result, number)
    yield fidelity_figure(result, number)
    yield Table(
        columns=COLUMNS,
        rows=benchmark_cells(result),
        caption="; ".join(f"{name}: {text}" for name, text in COLUMN_HELP.items()) + ". Bold: whole SAEs.",
        strong=[row.paths == ALL_PATHS for row in result.rows],
    )
    yield Prose(lines=caveats(result), listed=True)


def _comparison(result: CompareResult, number: int) -> Iterator[Block]:
    means = arm_means(result.rows)
    ks = sorted({row.k for row in result.rows})
    for k in ks:
        own = [mean for mean in means if mean.k == k]
        if len(ks) > 1:
            yield Heading(text=f"k = {k}")
        if any(mean.kind == "ablation" for mean in own):
            yield ablation_figure(own, number)
        yield whole_figure(own, number)
        rows = [row for row in result.rows if row.k == k]
        yield Table(
            columns=COMPARE_COLUMNS,
            rows=cells(rows)[1:],
            caption=COMPARE_HELP,
            strong=[
                next(row.kind for row in rows if row.arm == arm) != "ablation"
                for arm in dict.fromkeys(r.arm for r in rows)
            ],
        )
    yield Prose(lines=result.caveats(), listed=True)
