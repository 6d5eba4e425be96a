"""What `sae-nfm recovery` found: how many known features and pairs each SAE has, as words for the terminal and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from sae_nfm.common import aligned
from sae_nfm.common.results import SavedResult


class Score(StrEnum):
    """What pairs are ranked by."""

    ENERGY = "exact, energy"
    """Sum over samples of the squared norm of what the pair writes."""
    FIRING = "exact, when firing"
    """Mean norm of what it writes where it fires."""
    WEIGHTS = "weights, scaled"
    """Norm of what the weights alone let it write, gates at their average, times the mean activations."""
    LEFT = "left over by the code"
    """How far the part of the error that goes with the product of two activations stands out of the rest; of any SAE."""
    TOGETHER = "control: firing together"
    """Samples on which both fire, over those on which either does: no interaction is in that."""


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """How well a score tells the planted pairs from others."""

    score: Score
    auroc: float
    """Planted pairs against all other pairs of true features; a pair of which one is not found has score 0."""
    auroc_decoys: float | None
    """Planted pairs against decoys, which fire together as often; None without any."""
    precision: float
    """Share of planted pairs among as many of the highest scores as there are planted pairs."""
    cosine: float | None = None
    """Mean over planted pairs of the cosine of what is found to be written for the pair and what the truth writes; 0 for one that
    is not found, None of a score without a direction."""

    def cells(self) -> list[str]:
        """AUROCs, precision and cosine for a table."""
        decoys, cosine = ("" if value is None else f"{value:.3f}" for value in (self.auroc_decoys, self.cosine))
        return [f"{self.auroc:.3f}", decoys, f"{self.precision:.3f}", cosine]


@dataclass(frozen=True, kw_only=True)
class RecoveryRow:
    """One SAE on the held-out samples."""

    sae: str
    """Its folder in the run's."""
    architecture: str
    refinement_steps: int
    parameters: int
    l0: float
    fvu: float
    f1: float
    """Mean over true features of the F1 of firing of each and the feature matched with it; precision and recall likewise."""
    precision: float
    recall: float
    mcc: float
    """Mean absolute cosine of directions matched one to one."""
    mean_cosine: float
    """Mean cosine of those that firing is compared of."""
    dead: int
    """Features that no held-out sample activates."""
    interaction_share: float | None
    """Energy of what the interaction path writes, its mean taken off, over the variance of the samples; None without one."""
    pairs: tuple[PairScore, ...]
    """Empty where nothing is planted; those of the interaction path where there is one whose pairs can be told apart."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What the truth itself leaves of the variance of the held-out samples, with as many features as an SAE may have active."""

    k: int
    fvu: float
    """With all features and pairs, of the k strongest features of each sample."""
    fvu_linear: float
    """The same without pairs."""


@dataclass(frozen=True, kw_only=True)
class RecoveryResult(SavedResult):
    """All SAEs of a run."""

    kind: ClassVar[str] = "recovery/1"

    features: int
    """True features; of these fire in held-out samples `fired`."""
    fired: int
    pairs: int
    """Planted, of two features; decoys likewise."""
    squares: int
    """Planted, of a feature and itself: no score of pairs is for them."""
    decoys: int
    samples: int
    """Held-out samples."""
    pair_share: float
    """What planted pairs and squares write, over the variance of the held-out samples."""
    floors: tuple[Floor, ...]
    oracle: PairScore | None
    """Pairs by what the true features leave over, with their own directions and activations: what no SAE has to find first. None
    where nothing is planted."""
    rows: tuple[RecoveryRow, ...]
    provenance: dict[str, Any]

    def words(self) -> str:
        """A table of features, one of pairs, and what they say."""
        pairs = self._pairs() if any(row.pairs for row in self.rows) else []
        sections = [
            [self.head()],
            [*self._features(), *self.floor_lines()],
            pairs,
            [f"* {line}" for line in self.findings()],
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)

    def head(self) -> str:
        """What there was to find."""
        counts = {"pairs": self.pairs, "squares of single features, which no score is for": self.squares}
        planted = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        told = f"planted are {planted} ({self.pair_share:.1%} of the variance), beside {self.decoys} decoys"
        return (
            f"{self.features:,} true features, of which {self.fired:,} fire in {self.samples:,} held-out samples; "
            + (told if planted else "nothing is planted: all of it is linear")
        )

    def floor_lines(self) -> list[str]:
        """What the truth itself leaves."""
        return [
            f"The truth itself, its {one.k} strongest features a sample: FVU {one.fvu:.4f}; without pairs {one.fvu_linear:.4f}."
            for one in self.floors
        ]

    def findings(self) -> list[str]:
        """What interaction paths and codes tell of planted pairs, beside the control."""
        found = list[str]()
        for row in self.rows:
            by = {one.score: one for one in row.pairs}
            control, name = by.get(Score.TOGETHER), f"{row.sae}, {row.refinement_steps} refinements"
            for score in (Score.ENERGY, Score.LEFT):
                if control is None or score not in by or by[score].auroc_decoys is None:
                    continue
                own = by[score]
                found.append(
                    f"{name}: ranked by '{score}' planted pairs are told from decoys with an AUROC of {own.auroc_decoys:.2f} "
                    f"(firing together: {control.auroc_decoys:.2f}), and {own.precision:.0%} of the {self.pairs} highest pairs "
                    f"are planted (firing together: {control.precision:.0%})."
                )
        if found:
            found.append("One SAE and one draw of the truth each: no intervals, no verdict. Chance is an AUROC of 0.5.")
        return found

    def _features(self) -> list[str]:
        header = ["SAE", "R", "parameters", "L0", "FVU", "F1", "precision", "recall", "MCC", "mean cosine", "dead"]
        header += ["interaction"]
        lines = [header]
        for row in self.rows:
            shares = [row.fvu, row.f1, row.precision, row.recall, row.mcc, row.mean_cosine]
            share = "" if row.interaction_share is None else f"{row.interaction_share:.2%}"
            cells = [f"{value:.3f}" for value in shares]
            lines.append(
                [
                    row.sae,
                    f"{row.refinement_steps}",
                    f"{row.parameters:,}",
                    f"{row.l0:.1f}",
                    *cells,
                    f"{row.dead}",
                    share,
                ]
            )
        return aligned(lines)

    def _pairs(self) -> list[str]:
        lines: list[Sequence[str]] = [
            ["SAE", "R", "pairs ranked by", "AUROC, all pairs", "AUROC, decoys", f"precision at {self.pairs}", "cosine"]
        ]
        for row in self.rows:
            for n, one in enumerate(row.pairs):
                lines.append([row.sae if n == 0 else "", f"{row.refinement_steps}", str(one.score), *one.cells()])
        if self.oracle is not None:
            lines.append(["the true features", "", str(self.oracle.score), *self.oracle.cells()])
        told = [
            "Planted pairs fire together, and a high AUROC against all pairs may say no more than that: see the control, and the",
            "decoys, which fire together as often and write nothing. 0.5 is chance.",
        ]
        return [*aligned(lines), *told]
