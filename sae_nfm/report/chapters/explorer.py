"""The explorer of an SAE's features and pairs: the file of `sae-nfm explore` inside the page, shown by assets/explorer*.js."""

from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from sae_nfm.common import checked, text_of
from sae_nfm.explorer.results import Explorer
from sae_nfm.report.blocks import Block, Embedded, Prose, Section
from sae_nfm.report.run_folder import Run

TITLE = "Features and pairs, one by one"
COMMANDS = ("sae-nfm explore SAE --output RUN/explorer",)
LARGEST_PAGE, REST = 10_000_000, 1_000_000
"""Bytes of a page, and those of it that are neither the explorer's data nor plotly's script."""
FALLBACK = "The explorer of features and pairs needs JavaScript; nothing is fetched."


def section(run: Run) -> Section | None:
    """The chapter: the first explorer by path; None without one. A damaged file is a ValueError."""
    if not run.explorers:
        return None
    shown, *others = sorted(run.explorers)
    explorer = Explorer.load(shown)
    blocks: list[Block] = [Prose(lines=[about(explorer), *_others(run, others)]), _embedded(run, shown)]
    return Section(
        id="features",
        title=TITLE,
        lead="What does a feature respond to, what does it write, and with which others does it interact? Search for a "
        "number, a pair or a token; the address (#feature=12, #pair=12,45) can be shared with the page.",
        blocks=blocks,
        verdicts=list(verdicts(explorer)),
    )


def about(explorer: Explorer) -> str:
    """Which SAE, on what."""
    active = f" (k = {explorer.k})" if explorer.k else ""
    kind, _, details = text_of(explorer.provenance).partition(" (")
    told = details and f" ({details}"
    return (
        f"{explorer.sae}: {explorer.d_sae:,} features of a {explorer.architecture}{active} at {explorer.hook_name} of "
        f"{explorer.model_name}, on {explorer.tokens:,} {kind}, of {explorer.documents:,} documents{told}. Activations, "
        "norms and contexts describe where a feature fires; what the model does with it, an intervention measures."
        + (f" {explorer.sampled}" if explorer.sampled else "")
    )


def verdicts(explorer: Explorer) -> list[str]:
    """How many features never fire, and how much of the interactions the strongest pairs have."""
    alive, pairs = len(explorer.alive), explorer.pairs
    found = [
        f"{explorer.d_sae - alive:,} of {explorer.d_sae:,} features of {explorer.sae} fire on none of {explorer.tokens:,} tokens."
    ]
    if len(pairs.first):
        found.append(
            f"Of the energy of {pairs.fired:,} pairs that fired, the strongest ({pairs.first[0]} x {pairs.second[0]}) has "
            f"{pairs.share[0]:.2%}, the ten strongest {pairs.share[:10].sum():.2%}."
        )
    return found


def _embedded(run: Run, path: Path) -> Block:
    data = checked(path).read_bytes()
    size = len(get_plotlyjs()) + REST + 4 * -(-len(data) // 3)
    if size <= LARGEST_PAGE:
        return Embedded(id="explorer", data=data, fallback=FALLBACK)
    return Prose(
        lines=[
            f"{run.label(path)} is left out: with its {len(data) / 1e6:.1f} MB the page would have {size / 1e6:.1f} MB, "
            f"more than {LARGEST_PAGE / 1e6:.0f} MB. Make it smaller with fewer --contexts, --quantile-contexts or "
            f"--pairs: {COMMANDS[0]}"
        ]
    )


def _others(run: Run, others: Sequence[Path]) -> list[str]:
    if not others:
        return []
    names = ", ".join(run.label(path) for path in others)
    return [
        f"The run has other explorers, which are not on this page: {names}. A report of their folder alone shows them."
    ]
