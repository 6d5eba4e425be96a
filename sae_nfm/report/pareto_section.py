"""Error and KL against sparsity: whether an arm is better at every L0, or at one."""

from sae_nfm.comparison.arm_means import arm_means, lines_over_l0
from sae_nfm.comparison.results import CompareResult
from sae_nfm.report.blocks import Block, Heading, Section
from sae_nfm.report.pareto_figures import pareto_figure
from sae_nfm.report.run_folder import Run

TITLE = "Sparsity: error and KL against L0"
COMMAND = "sae-nfm compare --k 16 32 64 --output RUN/compare"


def section(run: Run) -> Section | None:
    """The chapter; None without a comparison that has SAEs of several L0s."""
    compared = [(found.label, arm_means(found.result.rows)) for found in run.of(CompareResult)]
    several = [(label, means) for label, means in compared if lines_over_l0(means)]
    blocks: list[Block] = []
    for number, (label, means) in enumerate(several, 1):
        if len(several) > 1:
            blocks.append(Heading(text=label))
        between = [mean for mean in means if mean.kind == "interpolated"]
        blocks.append(pareto_figure(lines_over_l0(means), between, number))
    if not blocks:
        return None
    return Section(
        id="pareto",
        title=TITLE,
        lead="More active features explain more. An architecture is better where its line lies below the others' at "
        "the same L0.",
        blocks=blocks,
    )
