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
    RATE = "control: firing rate"
    """Of squares: share of samples on which the feature fires."""
    FEATURE_ENERGY = "control: energy of the feature"
    """Of squares: its mean squared activation."""


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """How well a score tells the planted pairs from others, or the features whose square is planted."""

    score: Score
    auroc: float
    """Planted pairs against all other pairs of true features; one that is not found, or of which one is not, has score 0."""
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
    square_share: float | None = None
    """The same of the square path."""
    mean_directions: bool = False
    """Whether directions are of what features write on average, since the linear path reads the strongest of them only."""
    pairs: tuple[PairScore, ...]
    """Empty where no pair is planted; those of the interaction path where there is one whose pairs can be told apart."""
    squares: tuple[PairScore, ...] = ()
    """Empty where no square is planted; energies where a square path or a bilinear head writes squares."""

    @property
    def label(self) -> str:
        """Its name in tables, marked where directions are means."""
        return self.sae + ("*" if self.mean_directions else "")


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What the truth itself leaves of the variance of the held-out samples, with as many features as an SAE may have active."""

    k: int
    fvu: float
    """With all features and pairs, of the k strongest features of each sample."""
    fvu_linear: float
    """The same without pairs."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An SAE that could not be measured."""

    sae: str
    reason: str


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
    """Planted, of a feature and itself."""
    decoys: int
    samples: int
    """Held-out samples."""
    pair_share: float
    """What planted pairs and squares write, over the variance of the held-out samples."""
    floors: tuple[Floor, ...]
    oracle: PairScore | None
    """Pairs by what the true features leave over, with their own directions and activations: what no SAE has to find first. None
    where nothing is planted."""
    oracle_squares: PairScore | None = None
    """Squares likewise."""
    rows: tuple[RecoveryRow, ...]
    left_out: tuple[LeftOut, ...] = ()
    """SAEs of the folder that were not measured."""
    provenance: dict[str, Any]

    def words(self) -> str:
        """A table of features, one of pairs, and what they say."""
        pairs = self._pairs() if any(row.pairs for row in self.rows) else []
        squares = self._squares() if any(row.squares for row in self.rows) else []
        sections = [
            [self.head()],
            [*self._features(), *self.notes(), *self.floor_lines()],
            pairs,
            squares,
            [f"* {line}" for line in self.findings()],
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)

    def head(self) -> str:
        """What there was to find."""
        counts = {"pairs": self.pairs, "squares of single features": self.squares}
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

    def notes(self) -> list[str]:
        """What is to be known about single SAEs of the table, and which are not in it."""
        marked = (
            "* The linear path reads the strongest features only: a feature's direction is what it writes on average."
        )
        means = [marked] if any(row.mean_directions for row in self.rows) else []
        return [*means, *(f"Left out: {one.sae}: {one.reason}" for one in self.left_out)]

    def findings(self) -> list[str]:
        """What interaction paths and codes tell of planted pairs and squares, beside the control."""
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
            by = {one.score: one for one in row.squares}
            for score in (Score.ENERGY, Score.LEFT):
                if score not in by:
                    continue
                own, rate, energy = (by[one] for one in (score, Score.RATE, Score.FEATURE_ENERGY))
                found.append(
                    f"{name}: ranked by '{score}' features with a planted square are told from all others with an AUROC of "
                    f"{own.auroc:.2f} (firing rate: {rate.auroc:.2f}, energy of the feature: {energy.auroc:.2f}), and "
                    f"{own.precision:.0%} of the {self.squares} highest have one ({rate.precision:.0%}, {energy.precision:.0%})."
                )
        if found:
            found.append("One SAE and one draw of the truth each: no intervals, no verdict. Chance is an AUROC of 0.5.")
        return found

    def _features(self) -> list[str]:
        header = ["SAE", "R", "parameters", "L0", "FVU", "F1", "precision", "recall", "MCC", "mean cosine", "dead"]
        with_squares = any(row.square_share is not None for row in self.rows)
        header += ["interaction", *(["square"] if with_squares else [])]
        lines = [header]
        for row in self.rows:
            shares = [row.fvu, row.f1, row.precision, row.recall, row.mcc, row.mean_cosine]
            both = (row.interaction_share, row.square_share)[: 1 + with_squares]
            cells = [f"{value:.3f}" for value in shares]
            lines.append(
                [
                    row.label,
                    f"{row.refinement_steps}",
                    f"{row.parameters:,}",
                    f"{row.l0:.1f}",
                    *cells,
                    f"{row.dead}",
                    *("" if share is None else f"{share:.2%}" for share in both),
                ]
            )
        return aligned(lines)

    def _pairs(self) -> list[str]:
        told = [
            "Planted pairs fire together, and a high AUROC against all pairs may say no more than that: see the control, and the",
            "decoys, which fire together as often and write nothing. 0.5 is chance.",
        ]
        return [*self._scores("pairs", "AUROC, all pairs", self.pairs, self.oracle), *told]

    def _squares(self) -> list[str]:
        told = [
            "Features with a planted square fire more often, and a high AUROC may say no more than that: see the controls, and",
            "the decoys, features whose rate is raised as much and that write no square. 0.5 is chance.",
        ]
        return [*self._scores("squares", "AUROC, all features", self.squares, self.oracle_squares), *told]

    def _scores(self, what: str, everything: str, planted: int, oracle: PairScore | None) -> list[str]:
        header = ["SAE", "R", f"{what} ranked by", everything, "AUROC, decoys", f"precision at {planted}", "cosine"]
        lines: list[Sequence[str]] = [header]
        for row in self.rows:
            for n, one in enumerate(row.pairs if what == "pairs" else row.squares):
                lines.append([row.label if n == 0 else "", f"{row.refinement_steps}", str(one.score), *one.cells()])
        if oracle is not None:
            lines.append(["the true features", "", str(oracle.score), *oracle.cells()])
        return aligned(lines)
