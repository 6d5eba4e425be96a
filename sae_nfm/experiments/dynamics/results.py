"""How features moved while a joint NFM-SAE was trained: as words for the terminal and as JSON."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sae_nfm.common.options import sampled_text
from sae_nfm.common.results import SavedResult, not_held_out
from sae_nfm.stats import Estimate

LEVELS = ("identity", "mixed", "integration")
"""The thirds, from the lowest integration share to the highest."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A number of features beside what it is when features are permuted."""

    observed: int
    expected: float
    """Mean of the null."""
    low: float
    """2.5 % quantile of the null."""
    high: float
    """97.5 % quantile of the null."""
    p_value: float
    """Two-sided: twice the smaller tail, the observed one counted in it."""


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Where features went."""

    table: tuple[tuple[int, ...], ...]
    """Features by third before (rows) and after (columns), in the order of `LEVELS`."""
    to_identity: Counted
    """From the third of most integration to that of least."""
    to_integration: Counted
    """From the third of least integration to that of most."""
    stayed: Counted


RAW, CANONICAL = "raw", "canonical"
"""The gauges: as trained, and with the linear path folded into the decoder."""
QUANTITIES = ("integration share, raw", "integration share, canonical", "norm", "frequency")
"""What features are ranked by, in the order of the table."""
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """One checkpoint on the held-out tokens."""

    run: str
    """The architecture: joint_nfm, or topk for the reference."""
    tokens: int
    active: int
    """Features that are active on the held-out tokens."""
    norm: float
    """Mean decoder norm of these, as trained, in the unit of raw activations."""
    canonical_norm: float | None
    """The same in the canonical gauge; None where there is none."""
    frequency: float
    """Median over these of the share of tokens on which a feature is active."""
    shares: Mapping[str, Mapping[str, Estimate]]
    """By gauge (`RAW`, and `CANONICAL` where there is one) and path: mean over these of the path's part in a feature's
    root-mean-square contributions on tokens; empty for the reference."""


@dataclass(frozen=True, kw_only=True)
class Movement:
    """From one checkpoint to another."""

    run: str
    before: int
    after: int
    features: int
    """Features that are active on the held-out tokens at both; all statistics are over these."""
    spearman: Mapping[str, float | None]
    """By one of `QUANTITIES`: rank correlation of the two checkpoints; None where a quantity is not there or does not vary."""
    change: Mapping[str, Estimate]
    """By gauge: change of the mean integration share, later less earlier; empty for the reference."""
    transitions: Mapping[str, Transitions]
    """By gauge, between thirds that are the same for all checkpoints; empty for the reference."""
    reordered: Mapping[str, Transitions]
    """The same between each checkpoint's own thirds."""


@dataclass(frozen=True, kw_only=True)
class DynamicsResult(SavedResult):
    """What was found, and what is needed to repeat it."""

    kind: ClassVar[str] = "dynamics/1"

    hook_name: str
    features: int
    tokens: int
    documents: int
    not_canonical: str | None
    checkpoints: tuple[CheckpointRow, ...]
    steps: tuple[Movement, ...]
    """From each checkpoint to the next, likewise."""
    overall: tuple[Movement, ...]
    """From the first checkpoint to the last, of the run and of the reference."""
    edges: Mapping[str, tuple[float, float]]
    """By gauge: the integration shares between the thirds."""
    provenance: dict[str, Any]

    def words(self) -> str:
        """Tables of checkpoints, of rank stability and of transitions, and what they say."""
        head = f"{self.features:,} features at {self.hook_name}, on {self.tokens:,} held-out tokens in {self.documents} documents"
        if told := not_held_out(self.provenance):
            head = f"{head.replace('held-out tokens', 'tokens')}. {told[0]}"
        sections = [self._shares(), self._stability(), self._transitions(), self.findings(), self._caveats()]
        return "\n\n".join([head, *("\n".join(lines) for lines in sections)])

    def _shares(self) -> list[str]:
        lines = [
            f"{'run':<10}{'tokens':>9}{'active':>8}{'norm':>8}{'canonical':>11}{'frequency':>11}  "
            f"{'integration, raw':<24}{'nonlinear, raw':<24}{'integration, canonical':<24}".rstrip()
        ]
        for row in self.checkpoints:
            raw, canonical = row.shares.get(RAW, {}), row.shares.get(CANONICAL, {})
            cells = [raw.get("integration"), raw.get("nonlinear"), canonical.get("integration")]
            norm = "" if row.canonical_norm is None else f"{row.canonical_norm:.3f}"
            lines.append(
                f"{row.run:<10}{row.tokens:>9,}{row.active:>8,}{row.norm:>8.3f}{norm:>11}{row.frequency:>11.4f}  "
                f"{''.join(f'{_share(cell):<24}' for cell in cells)}".rstrip()
            )
        return lines

    def _stability(self) -> list[str]:
        lines = [
            "Rank correlation (Spearman) of a feature's statistics at two checkpoints",
            f"{'run':<10}{'from':>9}{'to':>9}{'features':>10}" + "".join(f"{name:>30}" for name in QUANTITIES),
        ]
        for one in (*self.steps, *self.overall):
            rhos = map(one.spearman.get, QUANTITIES)
            cells = "".join(f"{'' if rho is None else f'{rho:+.3f}':>30}" for rho in rhos)
            lines.append(f"{one.run:<10}{one.before:>9,}{one.after:>9,}{one.features:>10,}{cells}".rstrip())
        return lines

    def _transitions(self) -> list[str]:
        heads = "".join(f"{name:<30}" for name in ("integration to identity", "identity to integration", "stayed"))
        lines = [
            "Features that pass between thirds of the integration share; in brackets the mean and 95 % of shuffled identities",
            f"{'thirds':<8}{'gauge':<10}{'from':>9}{'to':>9}  {heads}".rstrip(),
        ]
        for thirds, gauge, one in itertools.product(("fixed", "own"), self.edges, (*self.steps, *self.overall)):
            found = (one.transitions if thirds == "fixed" else one.reordered).get(gauge)
            if found is not None:
                parts = (found.to_identity, found.to_integration, found.stayed)
                line = "".join(f"{counted(part):<30}" for part in parts)
                lines.append(f"{thirds:<8}{gauge:<10}{one.before:>9,}{one.after:>9,}  {line}".rstrip())
        return lines

    def findings(self) -> list[str]:
        """The question that arXiv 2507.00269 leaves open, answered for this run."""
        lines, one = list[str](), self.overall[0]
        for gauge, change in one.change.items():
            fixed, own = one.transitions[gauge], one.reordered[gauge]
            lines.append(
                f"{gauge} gauge: from {one.before:,} to {one.after:,} tokens the mean integration share changes by "
                f"{change.estimate:+.3f} [{change.low:+.3f}, {change.high:+.3f}]: {_direction(change)}. Of {one.features:,} "
                f"features {fixed.to_identity.observed} pass from integration to identity and {fixed.to_integration.observed} "
                f"the other way; in order among features, {counted(own.to_identity)} and {counted(own.to_integration)}."
            )
        return lines

    def _caveats(self) -> list[str]:
        canonical = (
            "* canonical: all that is linear counts as direct; integration is the interaction (and square) path alone."
        )
        edges = "; ".join(f"{gauge} {low:.3f} and {high:.3f}" for gauge, (low, high) in self.edges.items())
        sampled = sampled_text(self.provenance.get("model_name"), self.provenance["config"].get("held_out"))
        return [
            *([f"* {sampled}"] if sampled else []),
            "* One run, one seed: intervals (95 %) are over documents, and say nothing about other trainings. The first "
            "checkpoint is not the initialisation.",
            "* raw: how much of a feature is in W_dec and how much in W_lin is set by initialisation and learning rate where "
            "both read the same features (the gauge): a change of the raw share need not be a change of what the SAE does.",
            canonical if self.not_canonical is None else f"* There is no canonical gauge: {self.not_canonical}.",
            f"* Fixed thirds: divided at the same shares for all checkpoints ({edges}); own: at each checkpoint's tertiles.",
        ]


def _direction(change: Estimate) -> str:
    assert change.p_value is not None
    if change.p_value >= ALPHA:
        return "not significantly different from no change"
    return "towards identity" if change.estimate < 0 else "towards integration"


def _share(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.estimate:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def counted(found: Counted) -> str:
    """A number of features, in brackets the mean and 95 % of the null."""
    return f"{found.observed} ({found.expected:.0f} [{found.low:.0f}, {found.high:.0f}])"
