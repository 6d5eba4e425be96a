"""What `sae-nfm compare` and `sae-nfm demo` save: a table of arms by seed, what is claimed, verdicts, and the same in words.

A fair claim compares two arms, each trained on its own. An ablation compares a joint model with a part of itself that was never
trained to stand alone: the paper's comparison, kept apart from the others.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from enum import StrEnum
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from typing_extensions import override

from sae_nfm.common import aligned, whole
from sae_nfm.common.options import EMBEDDED_MODEL, sampled_text
from sae_nfm.common.results import SavedResult, not_held_out
from sae_nfm.stats import Verdict, corrected_verdicts, paired_t, verdict_from_rows


class ArmName(StrEnum):
    """The arms, as users name them; `sae_nfm.comparison.arms` says what each is."""

    JOINT = "joint_nfm"
    HALF = "joint_nfm half"
    SQUARE = "joint_nfm square"
    WITHOUT_LINEAR = "joint_nfm without linear"
    WITHOUT_NONLINEAR = "joint_nfm without nonlinear"
    WITHOUT_NONLINEAR_MATCHED = "joint_nfm without nonlinear matched"
    MLP = "joint_nfm mlp"
    BILINEAR = "joint_nfm bilinear"
    BILINEAR_MATCHED = "joint_nfm bilinear matched"
    JOINT_STAGED = "joint_nfm staged"
    SQUARE_STAGED = "joint_nfm square staged"
    WITHOUT_NONLINEAR_STAGED = "joint_nfm without nonlinear staged"
    WITHOUT_NONLINEAR_STAGED_MATCHED = "joint_nfm without nonlinear staged matched"
    MLP_STAGED = "joint_nfm mlp staged"
    BILINEAR_STAGED = "joint_nfm bilinear staged"
    BILINEAR_STAGED_MATCHED = "joint_nfm bilinear staged matched"
    TOPK = "topk"
    DOUBLED = "topk doubled decoder rate"
    MATCHED = "topk matched"
    MATCHED_FOLDED = "topk matched folded"
    MATCHED_FLOPS = "topk matched flops"
    MATCHED_INFERENCE = "topk matched inference"
    STAGED = "staged_topk"
    STAGED_MATCHED = "staged_topk matched"
    BATCHTOPK = "batchtopk"
    MATRYOSHKA = "matryoshka"
    STANDARD = "standard"
    GATED = "gated"
    JUMPRELU = "jumprelu"
    MATCHING_PURSUIT = "matching_pursuit"
    MATCHING_PURSUIT_MATCHED = "matching_pursuit matched"


class ArmGroup(StrEnum):
    """What sort of SAE an arm is."""

    JOINT = "joint_nfm and variants"
    TOPK = "TopK"
    OTHER = "other architectures"


A = ArmName
_ARMS_OF = {
    ArmGroup.JOINT: (
        *(A.JOINT, A.HALF, A.SQUARE, A.WITHOUT_LINEAR, A.WITHOUT_NONLINEAR, A.WITHOUT_NONLINEAR_MATCHED, A.MLP),
        *(A.BILINEAR, A.BILINEAR_MATCHED, A.JOINT_STAGED, A.SQUARE_STAGED, A.WITHOUT_NONLINEAR_STAGED),
        *(A.WITHOUT_NONLINEAR_STAGED_MATCHED, A.MLP_STAGED, A.BILINEAR_STAGED, A.BILINEAR_STAGED_MATCHED),
    ),
    ArmGroup.TOPK: (
        *(A.TOPK, A.DOUBLED, A.MATCHED, A.MATCHED_FOLDED, A.MATCHED_FLOPS, A.MATCHED_INFERENCE),
        *(A.STAGED, A.STAGED_MATCHED),
    ),
    ArmGroup.OTHER: (
        *(A.BATCHTOPK, A.MATRYOSHKA, A.STANDARD, A.GATED, A.JUMPRELU),
        *(A.MATCHING_PURSUIT, A.MATCHING_PURSUIT_MATCHED),
    ),
}
STAGED = frozenset(str(arm) for arm in ArmName if "staged" in arm)
"""Arms whose features are chosen in stages."""
ARM_GROUPS = {str(arm): group for group, arms in _ARMS_OF.items() for arm in arms}
"""The group of each arm."""


def refined_name(arm: str) -> str:
    """Name of the row of an arm whose activations are refined at inference."""
    return f"{arm} refined"


class Paths(StrEnum):
    """Which paths of an SAE write; the others are ablated."""

    ALL = "all paths"
    DIRECT = "direct only"
    LINEAR = "direct + linear"
    NONLINEAR = "direct + nonlinear"
    SQUARE = "direct + square"
    CANONICAL = "direct only, canonical gauge"

    def of(self, arm: str) -> str:
        """Name of a row: the arm's, with the paths where some are ablated."""
        return arm if self is Paths.ALL else f"{arm}: {self}"


class RowKind(StrEnum):
    """How a row came about."""

    TRAINED = "trained"
    REFINED = "refined"
    INTERPOLATED = "interpolated"
    ABLATION = "ablation"


class ClaimKind(StrEnum):
    """What an arm is compared with; but for the last, an SAE trained on its own, or one whose activations are refined."""

    FAIR = "fair"
    INFERENCE = "inference"
    """One with another inference."""
    PATHS = "paths"
    """One with the same inference, and without the paths of the NFM."""
    ABLATION = "ablation"
    """A part of itself."""


HEADINGS: Mapping[ClaimKind, str] = {
    ClaimKind.ABLATION: "The paper's comparison (the model against a part of itself that was never trained to stand alone)",
    ClaimKind.FAIR: "The fair comparison (against SAEs trained on their own, same tokens and steps)",
    ClaimKind.INFERENCE: "What inference gains (staged: features chosen in stages; refined: the same SAE, its activations "
    "fitted to its input)",
    ClaimKind.PATHS: "What the NFM's paths gain on top of the same inference (against SAEs without them, trained on their own)",
}
PUBLISHED = (
    "For the paper's comparison arXiv 2507.00269 reports -41.3% reconstruction error and -51.6% KL "
    "(OpenLLaMA-3B, 5M tokens; not measured here)."
)
MEASURED = (
    "Measured on real text, embedded model, 4,000,000 tokens, five seeds, rates swept (docs/results.md): staged_topk in 32 "
    "stages, refined, against topk of as many parameters FVU -41.7% and KL -57.4%, against topk refined -35.5% and -46.7% "
    "(all better). No NFM is in that: joint_nfm against topk of as many parameters FVU +1.7% (worse) and KL +1.2% (no "
    "difference shown)."
)
"""The verdicts of this package beside which a demo's one seed is to be read."""


@dataclass(frozen=True, kw_only=True)
class CompareRow:
    """One arm of one seed. Metrics are averages over held-out tokens; None where an L0 was not reached."""

    k: int
    seed: int
    arm: str
    """Unique for a seed and k."""
    kind: RowKind
    """Trained; interpolated between trained SAEs at the L0 of joint_nfm; or a trained SAE refined, or with some paths ablated."""
    family: str
    """The arm that it is a part of: its own name, that of the SAE with all its paths, or that of all its coefficients."""
    group: ArmGroup = ArmGroup.OTHER
    paths: Paths = Paths.ALL
    parameters: int
    """Trainable numbers of the whole SAE."""
    training_flops: float | None
    """FLOPs of a training step for each token, as `arms.training_flops` counts them."""
    learning_rate: float
    training_tokens_per_second: float | None
    """Speed of training steps, the language model not counted; None for a row that was not trained."""
    dead_fraction: float | None
    """Share of features that no token of the last half of the training activated."""
    l0: float | None
    """Active features per token."""
    fvu: float | None
    """Fraction of variance unexplained."""
    kl_nats: float | None
    """KL(original || spliced) of the next-token distributions, per token."""
    ce_nats: float | None
    """Cross-entropy of the spliced model, per predicted token."""
    ce_delta_nats: float | None
    """Its increase over the original model."""
    tokens: int
    rescaling: bool | None = None
    """Whether activations were multiplied by decoder norms; None as in `SweepRow`."""
    refinement_steps: int = 0
    """Refinements of the activations at inference, of an SAE that was trained without; L0 is counted after them."""
    inference_flops: float | None = None
    """FLOPs of encoding and decoding a token, as `arms.inference_flops` counts them."""

    @property
    def line(self) -> str:
        """What rows of several L0s have in common: the family, refined or not."""
        return refined_name(self.family) if self.refinement_steps else self.family


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One SAE of the sweep of learning rates and of rescaling."""

    k: int
    arm: str
    family: str
    learning_rate: float
    l0: float
    """Active features per held-out token."""
    fvu: float
    """Fraction of held-out variance unexplained; NaN where training diverged."""
    rescaling: bool | None = None
    """Whether activations were multiplied by decoder norms; None for an architecture without that choice, and in files of before
    there was one, whose arms were rescaled where they can be."""
    chosen: bool = False
    """Whether the family was then trained so."""

    @property
    def way(self) -> str:
        """What is said beside a name where activations were not rescaled."""
        return ", not rescaled" if self.rescaling is False else ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One arm against another."""

    kind: ClaimKind
    question: str
    """What the comparison tells apart."""
    arm: str
    against: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the seeds and documents say about a claim."""

    claim: Claim
    k: int
    verdict: Verdict
    """Differences with their intervals; p-values are adjusted for the number of claims, those of ablations are not."""


WEIGHTS = {"fvu": "variance_energy", "kl_nats": "tokens"}
"""What is compared, and what a document counts for in it."""
ABLATED = (ArmName.JOINT, ArmName.SQUARE, ArmName.HALF)
"""Arms that are compared with a part of themselves too."""
L0_TOLERANCE = 0.05
"""Relative difference of two arms' L0 at inference up to which they are compared; batchtopk has k only on average."""


def _fair(arm: ArmName, against: ArmName, question: str) -> Claim:
    return Claim(kind=ClaimKind.FAIR, question=question, arm=str(arm), against=str(against))


def _ablation(arm: ArmName, part: Paths) -> Claim:
    question = "how the trained model divides its work between its paths: the paper's comparison"
    return Claim(kind=ClaimKind.ABLATION, question=question, arm=str(arm), against=part.of(arm))


def _both(kind: ClaimKind, arm: ArmName, others: Sequence[ArmName], question: str) -> list[Claim]:
    """The arm refined against others as they are, and refined too."""
    pairs = [(other, form(other)) for other in others for form in (str, refined_name)]
    return [
        Claim(kind=kind, question=question, arm=refined_name(arm), against=name)
        for other, name in pairs
        if other != arm
    ]


def _inference() -> list[Claim]:
    """The gain from stages, from refinements, and from both together, against every SAE without the one or the other."""
    kind = ClaimKind.INFERENCE
    stages, fit = "choosing features in stages", "fitting the activations of the features chosen"
    found = [
        Claim(kind=kind, question=stages, arm=str(staged), against=str(topk))
        for staged, topk in ((A.STAGED, A.TOPK), (A.STAGED_MATCHED, A.MATCHED))
    ]
    found += [Claim(kind=kind, question=fit, arm=refined_name(arm), against=str(arm)) for arm in ArmName]
    others = [A.TOPK, A.MATCHED, A.MATCHED_INFERENCE, A.BATCHTOPK, A.JUMPRELU]
    others += [A.MATCHING_PURSUIT, A.MATCHING_PURSUIT_MATCHED]
    found += _both(kind, A.STAGED, others, "both together, no paths")
    for joint in (A.JOINT_STAGED, A.SQUARE_STAGED):
        found += _both(kind, joint, others, "both together, and the paths")
    return found


def _staged_heads() -> list[Claim]:
    """Heads of as many parameters, with the same inference."""
    product, two = "products of features, or the capacity of the head", "two projections multiplied, likewise"
    pairs = ((A.JOINT_STAGED, A.MLP_STAGED, product), (A.BILINEAR_STAGED_MATCHED, A.MLP_STAGED, two))
    found = [_fair(arm, against, f"{question}, in stages") for arm, against, question in pairs]
    return [
        *found,
        *(
            replace(
                one,
                arm=refined_name(one.arm),
                against=refined_name(one.against),
                question=f"{one.question}, refined",
            )
            for one in found
        ),
    ]


def _on_top() -> list[Claim]:
    """What paths gain where both sides have the same inference."""
    same_width, same_parameters = "at the same width", "at the same number of parameters"
    found = list[Claim]()
    for joint, staged in ((A.JOINT, A.JOINT_STAGED), (A.SQUARE, A.SQUARE_STAGED)):
        for topk, question in ((A.STAGED, same_width), (A.STAGED_MATCHED, same_parameters)):
            found.append(Claim(kind=ClaimKind.PATHS, question=question, arm=str(staged), against=str(topk)))
            pair = {"arm": refined_name(staged), "against": refined_name(topk)}
            found.append(Claim(kind=ClaimKind.PATHS, question=f"{question}, refined", **pair))
        for topk, question in ((A.TOPK, same_width), (A.MATCHED, same_parameters)):
            pair = {"arm": refined_name(joint), "against": refined_name(topk)}
            found.append(Claim(kind=ClaimKind.PATHS, question=f"{question}, refined, in one stage", **pair))
    for arm, against, question in (
        (A.BILINEAR_STAGED, A.STAGED, same_width),
        (A.BILINEAR_STAGED_MATCHED, A.STAGED_MATCHED, same_parameters),
        (A.WITHOUT_NONLINEAR_STAGED, A.STAGED, same_width),
        (A.WITHOUT_NONLINEAR_STAGED_MATCHED, A.STAGED_MATCHED, same_parameters),
        (A.MLP_STAGED, A.STAGED_MATCHED, same_parameters),
    ):
        found.append(Claim(kind=ClaimKind.PATHS, question=question, arm=str(arm), against=str(against)))
        pair = {"arm": refined_name(arm), "against": refined_name(against)}
        found.append(Claim(kind=ClaimKind.PATHS, question=f"{question}, refined", **pair))
    return found


CLAIMS: tuple[Claim, ...] = (
    _fair(A.JOINT, A.TOPK, "what the paths buy at the same width and sparsity"),
    _fair(A.JOINT, A.MATCHED, "whether they are the better use of parameters"),
    _fair(A.JOINT, A.MATCHED_FOLDED, "the same, parameters that fold away not counted"),
    _fair(A.JOINT, A.MATCHED_FLOPS, "whether they are the better use of training FLOPs"),
    _fair(A.JOINT, A.MLP, "products of features, or the capacity of the head"),
    _fair(A.JOINT, A.WITHOUT_NONLINEAR, "what the interaction path adds"),
    _fair(A.JOINT, A.WITHOUT_NONLINEAR_MATCHED, "the same, at the same number of parameters"),
    _fair(A.JOINT, A.WITHOUT_LINEAR, "what the linear path adds"),
    _fair(A.JOINT, A.HALF, "reading all features, or the strongest half"),
    _fair(A.WITHOUT_NONLINEAR, A.TOPK, "what a second decoder does"),
    _fair(A.WITHOUT_NONLINEAR, A.DOUBLED, "whether that is more than its learning rate"),
    _fair(A.SQUARE, A.JOINT, "the square path in place of the linear one"),
    *(_fair(A.SQUARE, topk, "the square path, likewise") for topk in (A.TOPK, A.MATCHED)),
    _fair(A.BILINEAR, A.TOPK, "a bilinear layer at the same width"),
    _fair(A.BILINEAR_MATCHED, A.MATCHED, "a bilinear layer at the same number of parameters"),
    _fair(A.BILINEAR_MATCHED, A.MLP, "two projections multiplied, or the capacity of the head"),
    _fair(A.BILINEAR_MATCHED, A.JOINT, "a second projection in place of gates"),
    _fair(A.WITHOUT_NONLINEAR_MATCHED, A.MATCHED, "a second decoder at the same number of parameters"),
    *(
        _fair(A.JOINT, other, "against another architecture")
        for other in (A.BATCHTOPK, A.MATRYOSHKA, A.STANDARD, A.GATED, A.JUMPRELU)
    ),
    *_staged_heads(),
    *_inference(),
    *_on_top(),
    *(_ablation(arm, part) for arm in ABLATED for part in (Paths.DIRECT, Paths.CANONICAL)),
)
"""All of them; a comparison answers those whose arms it has."""


def answers(documents: pd.DataFrame, ks: Sequence[int], n_seeds: int) -> tuple[list[Answer], list[str]]:
    """A verdict for each claim and metric, and for each that cannot be given one the reason.

    P-values of all claims but ablations are adjusted by Holm's method over all of them together. `documents` has sums by k, seed,
    arm and document, with the columns of `held_out_sums`; every arm should have so many seeds.
    """
    found, missing = list[Answer](), list[str]()
    for k in ks:
        rows = documents[documents["k"] == k]
        rows = rows.assign(fvu=rows["error_energy"] / rows["variance_energy"], kl_nats=rows["kl_nats"] / rows["tokens"])
        there = set(rows["arm"])
        for claim in CLAIMS:
            if not {claim.arm, claim.against} <= there:
                continue
            reason = _unusable(rows, (claim.arm, claim.against), n_seeds)
            if reason is not None:
                missing.append(f"{claim.arm} against {claim.against} at k = {k}: {reason}")
                continue
            for metric, weight in WEIGHTS.items():
                verdict = verdict_from_rows(rows, metric, arm=claim.arm, against=claim.against, weight=weight)
                found.append(Answer(claim=claim, k=k, verdict=verdict))
    fair = [answer.verdict for answer in found if answer.claim.kind is not ClaimKind.ABLATION]
    adjusted = iter(corrected_verdicts(fair, "holm") if fair else ())
    corrected = [
        answer if answer.claim.kind is ClaimKind.ABLATION else replace(answer, verdict=next(adjusted))
        for answer in found
    ]
    return corrected, missing


def _unusable(rows: pd.DataFrame, arms: Sequence[str], n_seeds: int) -> str | None:
    for arm in arms:
        own: pd.DataFrame = rows.loc[rows["arm"] == arm]
        seeds = len(set(own["seed"]))
        if seeds < n_seeds:
            return f"{arm} has values for {seeds} of {n_seeds} seeds"
        if not np.isfinite(own[list(WEIGHTS)].to_numpy(dtype=np.float64)).all():
            return f"{arm} diverged"
    one, other = (_l0(rows, arm) for arm in arms)
    if abs(one - other) > L0_TOLERANCE * other:
        return f"L0 is {one:.1f} and {other:.1f}: metrics at unequal sparsity say nothing"
    return None


def _l0(rows: pd.DataFrame, arm: str) -> float:
    own = rows.loc[rows["arm"] == arm, ["active", "tokens"]].sum()
    return float(own["active"] / own["tokens"])


@dataclass(frozen=True, kw_only=True)
class Change:
    """Relative change of one row's metrics against another's, for one seed: negative is better; it has no interval."""

    kind: ClaimKind
    arm: str
    against: str
    paths: Paths = Paths.ALL
    """Which paths of that one write."""
    fvu_change: float
    """(FVU - other FVU) / other FVU."""
    kl_change: float
    """(KL - other KL) / other KL."""
    parameter_ratio: float
    """Parameters over the other's."""

    @property
    def sentence(self) -> str:
        """In words, with which way this run points by the signs of both changes; not how surely."""
        change = f"FVU {self.fvu_change:+.1%}, KL {self.kl_change:+.1%}"
        if self.kind is ClaimKind.ABLATION:
            gauge = " in the canonical gauge" if self.paths is Paths.CANONICAL else ""
            return f"all paths against the direct path alone{gauge}: {change}"
        signs = {self.fvu_change < 0, self.kl_change < 0}
        verdict = "mixed" if len(signs) > 1 else "better on both" if True in signs else "no better on either"
        return f"against {self.against} ({self.parameter_ratio:.2f} x its parameters): {change} ({verdict})"


def changes(rows: Sequence[CompareRow]) -> tuple[Change, ...]:
    """What one seed shows: each joint SAE against its direct path alone, and against TopK SAEs of the same inference; SAEs in
    stages, refined where that was measured, against every TopK SAE as it is and refined.
    """
    whole_ones, found = [row for row in rows if row.paths is Paths.ALL], list[Change]()
    most = max((row.refinement_steps for row in rows), default=0)
    for row in whole_ones:
        if row.group is ArmGroup.JOINT and not row.refinement_steps:
            direct = [r for r in rows if r.family == row.family and r.paths in (Paths.DIRECT, Paths.CANONICAL)]
            found += [_change(ClaimKind.ABLATION, row, part) for part in direct]
        others = (other for other in whole_ones if other.group is not ArmGroup.JOINT and other.family != row.family)
        found += [_change(kind, row, other) for other in others if (kind := _kind(row, other, most)) is not None]
    return tuple(found)


def _kind(row: CompareRow, other: CompareRow, most: int) -> ClaimKind | None:
    """What an SAE shows against a TopK SAE, in stages or not; `most` are the refinements with which all were measured."""
    staged, joint = row.family in STAGED, row.group is ArmGroup.JOINT
    alike = (other.family in STAGED) == staged and other.refinement_steps == row.refinement_steps
    if joint and alike and (not staged or row.refinement_steps == most):
        return ClaimKind.PATHS if staged or row.refinement_steps else ClaimKind.FAIR
    chosen_in_one_pass = other.family not in STAGED
    return ClaimKind.INFERENCE if staged and row.refinement_steps == most and chosen_in_one_pass else None


def _change(kind: ClaimKind, row: CompareRow, other: CompareRow) -> Change:
    pairs = ((row.fvu, other.fvu), (row.kl_nats, other.kl_nats))
    fvu, kl = ((mine - theirs) / theirs for mine, theirs in pairs if mine is not None and theirs is not None)
    ratio, paths = row.parameters / other.parameters, other.paths
    return Change(
        kind=kind, arm=row.arm, against=other.arm, paths=paths, fvu_change=fvu, kl_change=kl, parameter_ratio=ratio
    )


@dataclass(frozen=True, kw_only=True)
class CompareResult(SavedResult):
    """Everything a comparison found, and what is needed to repeat it; that of `demo` has `changes` in place of verdicts."""

    kind: ClassVar[str] = "compare/1"

    rows: tuple[CompareRow, ...]
    """The table: trained SAEs, each followed by its ablations, then interpolated arms."""
    sweep: tuple[SweepRow, ...] = ()
    """Every SAE of the sweep of learning rates; none where there was one candidate."""
    answers: tuple[Answer, ...] = ()
    """A verdict for each claim and metric."""
    changes: tuple[Change, ...] = ()
    """The paper's comparison and the fair ones, where one seed is all there is."""
    missing: tuple[str, ...] = ()
    """Claims without a verdict, each with its reason."""
    provenance: dict[str, Any]
    """Configuration, seeds, versions, hashes of the tokens, command."""

    @override
    @classmethod
    def from_0_1_0(cls, content: dict[str, Any]) -> dict[str, Any]:
        """As the base class has it; `demo` and `compare` wrote different files then."""
        return of_0_1_0(content)

    def row(self, arm: str) -> CompareRow:
        """The first row of that name."""
        return next(row for row in self.rows if row.arm == arm)

    def table(self) -> list[CompareRow]:
        """The rows without timings: what two runs with the same seeds must agree on."""
        return [replace(row, training_tokens_per_second=None) for row in self.rows]

    def save_rows(self, path: Path) -> None:
        """The rows as CSV."""
        with whole(path) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([[field.name for field in fields(CompareRow)], *map(astuple, self.rows)])

    def words(self) -> str:
        """The table, the fair comparisons and the ablations, and what limits them."""
        lines = list[str]()
        for k in dict.fromkeys(row.k for row in self.rows):
            own = [row for row in self.rows if row.k == k]
            if not self.changes:
                n = len({row.seed for row in own})
                lines += [f"k = {k}: mean (standard deviation) over {n} seed{'s' * (n > 1)}", ""]
            lines += [*aligned([self.columns, *cells(own, self.columns)]), ""]
            for kind in ClaimKind:
                chosen = [answer for answer in self.answers if answer.k == k and answer.claim.kind is kind]
                if chosen:
                    lines += [f"{HEADINGS[kind]}:", *(f"  {answer.verdict.sentence}" for answer in chosen), ""]
        return "\n".join([*lines, self.findings()])

    def findings(self) -> str:
        """What is to be said of the table of one seed, and what limits it."""
        lines = [*_changes_in_words(self.changes), ""] if self.changes else []
        lines += [f"* no verdict: {reason}" for reason in self.missing]
        return "\n".join([*lines, *(f"* {caveat}" for caveat in self.caveats())])

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings of the table."""
        left_out = ("MFLOP/token", "learning rate", "dead") if self.changes else ("train tok/s",)
        left_out += () if len(self._rescaling) > 1 else ("rescaled",)
        if self.changes or all(row.inference_flops is None for row in self.rows):
            left_out += ("inference MFLOP",)
        return tuple(name for name in COLUMNS if name not in left_out)

    @property
    def _rescaling(self) -> list[str]:
        return self.provenance["config"].get("rescaling", ["on"])

    def caveats(self) -> list[str]:
        """What limits these metrics."""
        config, seeds = self.provenance["config"], self.provenance["seeds"]
        rates, told = config["learning_rates"], list[str]()
        if self.changes:
            one = f"One seed ({seeds[0]}): one run is one draw."
            told.append(f"{one} Differences of a few per cent need several seeds before they are a finding.")
        told.append(f"{config['training_tokens']:,} training tokens an SAE.")
        if len(rates) > 1:
            at_edge = sorted({row.family for row in self.rows if row.learning_rate in (min(rates), max(rates))})
            told.append(f"Learning rates by a sweep of {', '.join(f'{rate:g}' for rate in rates)} for every arm.")
            told += [f"At an edge of the sweep, so perhaps not at their best: {', '.join(at_edge)}."] if at_edge else []
            failed = sorted({f"{r.arm} at {r.learning_rate:g}{r.way}" for r in self.sweep if not isfinite(r.fvu)})
            told += [f"Diverged in the sweep, and scored with an infinite FVU: {', '.join(failed)}."] if failed else []
        else:
            told.append(f"One learning rate ({rates[0]:g}) for all SAEs; none was tuned by itself.")
        staged = sorted({row.family for row in self.rows if row.family in STAGED})
        if staged:
            among = config.get("selection_candidates")
            pool = f", later ones among {among} candidates of the first" if among else ""
            told.append(f"Staged: features chosen in {config['selection_stages']} stages{pool}, in training too.")
        if len(self._rescaling) > 1:
            told.append("Rescaling by decoder norms on or off by the same sweep, for each arm that has it.")
        elif staged and self.changes:
            told.append(
                "Rescaling by decoder norms: off for SAEs in stages, on for the others, as sweeps on real text chose."
            )
        elif staged and self._rescaling == ["on"]:
            told.append(
                "Rescaling by decoder norms was not swept (--rescaling on off); in trials it suited selection in stages less "
                f"than TopK: {', '.join(staged)} may not be at their best."
            )
        if steps := {row.refinement_steps for row in self.rows} - {0}:
            told.append(
                f"Refined: SAEs trained without, that encode with {', '.join(map(str, sorted(steps)))} refinements of the "
                "activations of the features that their encoder chose; L0 is counted after these."
            )
        if cached := self.provenance.get("cached_activations"):
            told.append(f"Trained on cached activations: {cached}.")
        sampled = sampled_text(config.get("model", EMBEDDED_MODEL), config["dataset"])
        return [
            *told,
            *([sampled] if sampled else []),
            *not_held_out(self.provenance),
            *([PUBLISHED] if self.changes else []),
            *([MEASURED] if self.changes and staged else []),
        ]


def _changes_in_words(found: Sequence[Change]) -> list[str]:
    lines = list[str]()
    for name in dict.fromkeys(change.arm for change in found):
        lines.append(name)
        for kind, heading in HEADINGS.items():
            own = [change for change in found if change.arm == name and change.kind is kind]
            lines += [f"  {heading}:", *(f"    {change.sentence}" for change in own)] if own else []
    return lines


def _spread(name: str, form: str, without: str | None = None) -> Callable[[Sequence[CompareRow]], str]:
    """The mean of a field over seeds, with the standard deviation where there are several; a text where the first has none."""

    def written(rows: Sequence[CompareRow]) -> str:
        values = [getattr(row, name) for row in rows]
        if values[0] is None and without is not None:
            return without
        there = [value for value in values if value is not None]
        if len(there) < len(values):
            return "not reached"
        return f"{mean(there):{form}}" + (f" ({stdev(there):{form.lstrip('+')}})" if len(there) > 1 else "")

    return written


COLUMNS: Mapping[str, tuple[Callable[[Sequence[CompareRow]], str], str]] = {
    "SAE": (lambda rows: rows[0].arm, ""),
    "parameters": (lambda rows: f"{rows[0].parameters:,}", "trainable numbers of the SAE"),
    "MFLOP/token": (
        lambda rows: "" if (flops := rows[0].training_flops) is None else f"{flops / 1e6:.2f}",
        "multiplications and additions of a training step",
    ),
    "inference MFLOP": (
        lambda rows: "" if (flops := rows[0].inference_flops) is None else f"{flops / 1e6:.2f}",
        "those of encoding and decoding a token",
    ),
    "learning rate": (lambda rows: f"{rows[0].learning_rate:g}", "peak of Adam's"),
    "rescaled": (
        lambda rows: {True: "yes", False: "no", None: ""}[rows[0].rescaling],
        "whether activations are multiplied by decoder norms",
    ),
    "L0": (_spread("l0", ".1f"), "active features per token"),
    "FVU": (_spread("fvu", ".4f"), "fraction of variance unexplained on held-out tokens; lower is better"),
    "KL (nats)": (
        _spread("kl_nats", ".4f"),
        "KL(original || spliced) of the next-token distributions, per token; lower is better",
    ),
    "CE increase (nats)": (
        _spread("ce_delta_nats", "+.4f"),
        "rise of the language model's cross-entropy when the SAE is spliced in; lower is better",
    ),
    "dead": (
        _spread("dead_fraction", ".1%", ""),
        "share of features that no token of the training's last half activated",
    ),
    "train tok/s": (
        _spread("training_tokens_per_second", ",.0f", ""),
        "training tokens per second of the SAE alone, all SAEs in one run on one machine",
    ),
}
"""The table's columns: how each is written for the rows of one arm, one a seed, and what it means."""


def legend(columns: Sequence[str]) -> str:
    """What the columns mean."""
    return "; ".join(f"{name}: {COLUMNS[name][1]}" for name in columns if COLUMNS[name][1])


def cells(rows: Sequence[CompareRow], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The table of one k as text, a line for each arm: mean (standard deviation) over seeds."""
    by_arm = [[row for row in rows if row.arm == arm] for arm in dict.fromkeys(row.arm for row in rows)]
    return [tuple(COLUMNS[name][0](own) for name in columns) for own in by_arm]


# Means over seeds, for figures.

Metric = Literal["fvu", "kl_nats"]


@dataclass(frozen=True, kw_only=True)
class ArmMean:
    """One metric of one arm: its mean over seeds, which are the units, with the interval of Student's t.

    Differences between arms are paired by seed (`Verdict`): two intervals that overlap do not say that the arms are alike.
    """

    row: CompareRow
    """Of the first seed: what is the same for all."""
    metric: Metric
    seeds: tuple[int, ...]
    """Seeds with a value; those that diverged, or whose L0 was not reached, are left out."""
    values: tuple[float, ...]
    mean: float
    low: float | None
    """Lower end of the 95 % interval over seeds; None for one seed."""
    high: float | None
    l0: float
    """Active features per token, mean over the same seeds."""


def arm_means(rows: Sequence[CompareRow]) -> tuple[ArmMean, ...]:
    """The mean of each metric for each arm and k, in the order of the rows; none for an arm without a value."""
    by_arm = [[row for row in rows if (row.k, row.arm) == one] for one in dict.fromkeys((r.k, r.arm) for r in rows)]
    found = (_mean(own, metric) for own in by_arm for metric in get_args(Metric))
    return tuple(average for average in found if average is not None)


def _mean(rows: Sequence[CompareRow], metric: Metric) -> ArmMean | None:
    there = {row.seed: (value, row.l0) for row in rows if (value := getattr(row, metric)) is not None}
    there = {seed: (value, l0) for seed, (value, l0) in there.items() if isfinite(value) and l0 is not None}
    if not there:
        return None
    values = tuple(float(value) for value, _ in there.values())
    over_seeds = paired_t(values) if len(values) > 1 else None
    return ArmMean(
        row=rows[0],
        metric=metric,
        seeds=tuple(there),
        values=values,
        mean=sum(values) / len(values) if over_seeds is None else over_seeds.estimate,
        low=None if over_seeds is None else over_seeds.low,
        high=None if over_seeds is None else over_seeds.high,
        l0=sum(l0 for _, l0 in there.values()) / len(there),
    )


def lines_over_l0(means: Sequence[ArmMean]) -> Mapping[str, tuple[ArmMean, ...]]:
    """Trained SAEs of each family, refined ones apart, by L0; none at all where no line has two L0s (equal to one decimal)."""
    trained = [one for one in means if one.row.kind in (RowKind.TRAINED, RowKind.REFINED)]
    lines = {
        line: tuple(sorted((one for one in trained if one.row.line == line), key=lambda one: one.l0))
        for line in dict.fromkeys(one.row.line for one in trained)
    }
    several = any(len({round(one.l0, 1) for one in line}) > 1 for line in lines.values())
    return lines if several else {}


# Files of 0.1.0, for one version.

RENAMED = {"model_name": "model", "hook_name": "hook", "validation": "held_out", "validation_tokens": "held_out_tokens"}
RENAMED |= {"sweep_validation_tokens": "sweep_held_out_tokens"}
"""Settings by their names in 0.1.0."""


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with today's names."""
    return {RENAMED.get(name, name): value for name, value in config.items()}


def of_0_1_0(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a results.json of `compare` or `demo` of 0.1.0 in today's form; any other as it is."""
    if set(content) == {"rows", "comparisons", "provenance"}:
        return _demo_of_0_1_0(content)
    if set(content) != {"rows", "sweep", "answers", "missing", "provenance"}:
        return content
    rows = [_row_of_0_1_0(row) for row in content["rows"]]
    rates = {(row["k"], row["family"]): row["learning_rate"] for row in rows}
    sweep = [row | {"chosen": rates.get((row["k"], row["family"])) == row["learning_rate"]} for row in content["sweep"]]
    config = renamed(content["provenance"]["config"])
    return content | {"rows": rows, "sweep": sweep, "provenance": content["provenance"] | {"config": config}}


def _row_of_0_1_0(row: dict[str, Any]) -> dict[str, Any]:
    paths = row["arm"].removeprefix(row["family"]).removeprefix(": ") if row["kind"] == RowKind.ABLATION else Paths.ALL
    return {"group": ARM_GROUPS.get(row["family"], ArmGroup.OTHER), "paths": paths} | row


def _demo_of_0_1_0(content: dict[str, Any]) -> dict[str, Any]:
    config = renamed(content["provenance"]["config"])
    config |= {"k": [config["k"]], "seeds": content["provenance"]["seeds"], "learning_rates": [config["lr"]]}
    rows = [
        {"arm": Paths(row["paths"]).of(row["sae"]), "family": row["sae"], "paths": row["paths"]}
        | {"kind": RowKind.TRAINED if row["paths"] == Paths.ALL else RowKind.ABLATION}
        | {"group": ARM_GROUPS.get(row["sae"], ArmGroup.OTHER), "training_flops": None, "dead_fraction": None}
        | {"k": config["k"][0], "seed": config["seeds"][0], "learning_rate": config["lr"], **row["fidelity"]}
        | {name: row[name] for name in ("parameters", "training_tokens_per_second")}
        for row in content["rows"]
    ]
    paths = {row["arm"]: row["paths"] for row in rows}
    found = [
        {"kind": ClaimKind.ABLATION if change["kind"] == "paper" else ClaimKind.FAIR}
        | {"arm": change["row"], "paths": paths[change["against"]]}
        | {name: change[name] for name in ("against", "fvu_change", "kl_change", "parameter_ratio")}
        for change in content["comparisons"]
    ]
    return {"rows": rows, "changes": found, "provenance": content["provenance"] | {"config": config}}
