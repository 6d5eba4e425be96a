"""A benchmark result in plain text: the table, and what it says in words, whichever way it points."""

from sae_nfm.common import aligned
from sae_nfm.comparison.benchmark_results import BenchmarkResult, Comparison

PAPER_HEADING = "The paper's figure (the model against a part of itself that was never trained to stand alone)"
FAIR_HEADING = "The fair figure (against SAEs trained on their own, same tokens and steps)"
PUBLISHED = (
    "For the paper's comparison arXiv 2507.00269 reports -41.3% reconstruction error and -51.6% KL "
    "(OpenLLaMA-3B, 5M tokens; not measured here)."
)
COLUMNS = ("SAE", "parameters", "L0", "FVU", "KL (nats)", "CE increase (nats)", "train tok/s")
COLUMN_HELP = {
    "parameters": "trainable numbers of the SAE",
    "L0": "active features per token",
    "FVU": "fraction of variance unexplained on held-out tokens; lower is better",
    "KL (nats)": "KL(original || spliced) of the next-token distributions, per token; lower is better",
    "CE increase (nats)": "rise of the language model's cross-entropy when the SAE is spliced in; lower is better",
    "train tok/s": "training tokens per second of the SAE alone, all SAEs in one run on one machine",
}


def cells(result: BenchmarkResult) -> list[tuple[str, ...]]:
    """The table's rows as text, one tuple of `COLUMNS` each."""
    return [
        (
            row.name,
            f"{row.parameters:,}",
            f"{row.fidelity.l0:.1f}",
            f"{row.fidelity.fvu:.4f}",
            f"{row.fidelity.kl_nats:.4f}",
            f"{row.fidelity.ce_delta_nats:+.4f}",
            "" if row.training_tokens_per_second is None else f"{row.training_tokens_per_second:,.0f}",
        )
        for row in result.rows
    ]


def table(result: BenchmarkResult) -> str:
    """The table in aligned columns."""
    return "\n".join(aligned([COLUMNS, *cells(result)]))


def sentence(comparison: Comparison) -> str:
    """One comparison in words."""
    change = f"FVU {comparison.fvu_change:+.1%}, KL {comparison.kl_change:+.1%}"
    if comparison.kind == "paper":
        gauge = " in the canonical gauge" if comparison.against.endswith("canonical gauge") else ""
        return f"all paths against the direct path alone{gauge}: {change}"
    return f"against {comparison.against} ({comparison.parameter_ratio:.2f} x its parameters): {change} ({verdict(comparison)})"


def verdict(comparison: Comparison) -> str:
    """Which way this run points, by the signs of both changes; not how surely."""
    if comparison.fvu_change < 0 and comparison.kl_change < 0:
        return "better on both"
    if comparison.fvu_change >= 0 and comparison.kl_change >= 0:
        return "no better on either"
    return "mixed"


def caveats(result: BenchmarkResult) -> list[str]:
    """What limits these figures."""
    config, seeds = result.provenance["config"], result.provenance["seeds"]
    limits = [
        f"One seed ({seeds[0]}): one run is one draw. Differences of a few per cent need several seeds before they are a "
        "finding."
        if len(seeds) == 1
        else f"{len(seeds)} seeds.",
        f"{config['training_tokens']:,} training tokens; one learning rate ({config['lr']:g}) for all SAEs, "
        "none was tuned by itself.",
    ]
    if config["dataset"] is None:
        limits.append(
            "The tokens were sampled from the embedded model itself: this shows the tool, it is no evidence about real text."
        )
    return [*limits, PUBLISHED]


def words(result: BenchmarkResult) -> str:
    """Under the table: the paper's figure and the fair figure of each joint NFM-SAE, and what limits them."""
    lines: list[str] = []
    for name in dict.fromkeys(comparison.row for comparison in result.comparisons):
        own = [comparison for comparison in result.comparisons if comparison.row == name]
        lines += [name, f"  {PAPER_HEADING}:"]
        lines += [f"    {sentence(comparison)}" for comparison in own if comparison.kind == "paper"]
        lines += [f"  {FAIR_HEADING}:"]
        lines += [f"    {sentence(comparison)}" for comparison in own if comparison.kind == "fair"]
    return "\n".join([*lines, "", *(f"* {caveat}" for caveat in caveats(result))])
