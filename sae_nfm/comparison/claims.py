"""What a comparison claims: which arm against which, on seeds and documents, and what was too little to say.

A fair claim compares two arms, each trained on its own. An ablation compares a joint model with a part of itself that was never
trained to stand alone: the paper's figure, kept apart from the others and named for what it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from sae_nfm.comparison.arms import ALL_ARMS, DOUBLED, JOINT, SQUARE
from sae_nfm.stats import Verdict, corrected_verdicts, verdict_from_rows

DIRECT, CANONICAL = "direct only", "direct only, canonical gauge"
WEIGHTS = {"fvu": "variance_energy", "kl_nats": "tokens"}
"""What is compared, and what a document counts for in it."""
ABLATED = (JOINT, SQUARE, "joint_nfm half")
"""Arms that are compared with a part of themselves too."""
L0_TOLERANCE = 0.05
"""Relative difference of two arms' L0 at inference up to which they are compared; batchtopk has k only on average."""
_TOPK = ("topk", "topk matched", "topk matched folded", "topk matched flops")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One arm against another."""

    kind: Literal["fair", "ablation"]
    """"fair": against an arm trained on its own. "ablation": against a part of the same model."""
    question: str
    """What the comparison tells apart."""
    arm: str
    """Name of the arm."""
    against: str
    """Name of the arm it is compared with."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the seeds and documents say about a claim."""

    claim: Claim
    """The claim."""
    k: int
    """Active features a token."""
    verdict: Verdict
    """Differences with their intervals; p-values of fair claims are adjusted for their number."""


def _fair(arm: str, against: str, question: str) -> Claim:
    return Claim(kind="fair", question=question, arm=arm, against=against)


def _ablation(arm: str, part: str) -> Claim:
    question = "how the trained model divides its work between its paths: the paper's figure"
    return Claim(kind="ablation", question=question, arm=arm, against=f"{arm}: {part}")


_OTHERS = [name for name in ALL_ARMS if not name.startswith(("joint_nfm", "topk"))]
CLAIMS: tuple[Claim, ...] = (
    _fair(JOINT, "topk", "what the paths buy at the same width and sparsity"),
    _fair(JOINT, "topk matched", "whether they are the better use of parameters"),
    _fair(JOINT, "topk matched folded", "the same, parameters that fold away not counted"),
    _fair(JOINT, "topk matched flops", "whether they are the better use of training FLOPs"),
    _fair(JOINT, "joint_nfm mlp", "products of features, or the capacity of the head"),
    _fair(JOINT, "joint_nfm without nonlinear", "what the interaction path adds"),
    _fair(JOINT, "joint_nfm without linear", "what the linear path adds"),
    _fair(JOINT, "joint_nfm half", "reading all features, or the strongest half"),
    _fair("joint_nfm without nonlinear", "topk", "what a second decoder does"),
    _fair("joint_nfm without nonlinear", DOUBLED, "whether that is more than its learning rate"),
    _fair(SQUARE, JOINT, "the square path in place of the linear one"),
    *(_fair(SQUARE, topk, "the square path, likewise") for topk in _TOPK[:2]),
    *(_fair(JOINT, other, "against another architecture") for other in _OTHERS),
    *(_ablation(arm, part) for arm in ABLATED for part in (DIRECT, CANONICAL)),
)
"""All of them; a comparison answers those whose arms it has."""


def answers(documents: pd.DataFrame, ks: Sequence[int], n_seeds: int) -> tuple[list[Answer], list[str]]:
    """A verdict for each claim and measure, and for each that cannot be given one the reason.

    P-values of the fair claims are adjusted by Holm's method over all of them together.

    Args:
        documents: sums by k, seed, arm and document, with the columns of `held_out_sums`.
        ks: values of k.
        n_seeds: how many seeds every arm should have.
    """
    found: list[Answer] = []
    missing: list[str] = []
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
            for measure, weight in WEIGHTS.items():
                verdict = verdict_from_rows(rows, measure, arm=claim.arm, against=claim.against, weight=weight)
                found.append(Answer(claim=claim, k=k, verdict=verdict))
    return _corrected(found), missing


def _unusable(rows: pd.DataFrame, arms: Sequence[str], n_seeds: int) -> str | None:
    for arm in arms:
        own: pd.DataFrame = rows.loc[rows["arm"] == arm]
        seeds = len(set(own["seed"]))
        if seeds < n_seeds:
            return f"{arm} has figures for {seeds} of {n_seeds} seeds"
        if not np.isfinite(own[list(WEIGHTS)].to_numpy(dtype=np.float64)).all():
            return f"{arm} diverged"
    one, other = (_l0(rows, arm) for arm in arms)
    if abs(one - other) > L0_TOLERANCE * other:
        return f"L0 is {one:.1f} and {other:.1f}: figures at unequal sparsity say nothing"
    return None


def _l0(rows: pd.DataFrame, arm: str) -> float:
    own = rows.loc[rows["arm"] == arm, ["active", "tokens"]].sum()
    return float(own["active"] / own["tokens"])


def _corrected(found: Sequence[Answer]) -> list[Answer]:
    fair = [answer for answer in found if answer.claim.kind == "fair"]
    adjusted = corrected_verdicts([answer.verdict for answer in fair], "holm") if fair else ()
    by_identity = {id(answer): verdict for answer, verdict in zip(fair, adjusted, strict=True)}
    return [
        Answer(claim=answer.claim, k=answer.k, verdict=by_identity.get(id(answer), answer.verdict)) for answer in found
    ]
