"""What a comparison claims: which arm against which, on seeds and documents, and what was too little to say.

A fair claim compares two arms, each trained on its own. An ablation compares a joint model with a part of itself that was never
trained to stand alone: the paper's comparison, kept apart from the others.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from sae_nfm.comparison.results import ARM_GROUPS, Answer, ArmName, Claim, ClaimKind, Paths
from sae_nfm.stats import corrected_verdicts, verdict_from_rows

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


A = ArmName
CLAIMS: tuple[Claim, ...] = (
    _fair(A.JOINT, A.TOPK, "what the paths buy at the same width and sparsity"),
    _fair(A.JOINT, A.MATCHED, "whether they are the better use of parameters"),
    _fair(A.JOINT, A.MATCHED_FOLDED, "the same, parameters that fold away not counted"),
    _fair(A.JOINT, A.MATCHED_FLOPS, "whether they are the better use of training FLOPs"),
    _fair(A.JOINT, A.MLP, "products of features, or the capacity of the head"),
    _fair(A.JOINT, A.WITHOUT_NONLINEAR, "what the interaction path adds"),
    _fair(A.JOINT, A.WITHOUT_LINEAR, "what the linear path adds"),
    _fair(A.JOINT, A.HALF, "reading all features, or the strongest half"),
    _fair(A.WITHOUT_NONLINEAR, A.TOPK, "what a second decoder does"),
    _fair(A.WITHOUT_NONLINEAR, A.DOUBLED, "whether that is more than its learning rate"),
    _fair(A.SQUARE, A.JOINT, "the square path in place of the linear one"),
    *(_fair(A.SQUARE, topk, "the square path, likewise") for topk in (A.TOPK, A.MATCHED)),
    *(_fair(A.JOINT, other, "against another architecture") for other in ArmName if other not in ARM_GROUPS),
    *(_ablation(arm, part) for arm in ABLATED for part in (Paths.DIRECT, Paths.CANONICAL)),
)
"""All of them; a comparison answers those whose arms it has."""


def answers(documents: pd.DataFrame, ks: Sequence[int], n_seeds: int) -> tuple[list[Answer], list[str]]:
    """A verdict for each claim and metric, and for each that cannot be given one the reason.

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
            for metric, weight in WEIGHTS.items():
                verdict = verdict_from_rows(rows, metric, arm=claim.arm, against=claim.against, weight=weight)
                found.append(Answer(claim=claim, k=k, verdict=verdict))
    return _corrected(found), missing


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


def _corrected(found: Sequence[Answer]) -> list[Answer]:
    fair = [answer.verdict for answer in found if answer.claim.kind is ClaimKind.FAIR]
    adjusted = iter(corrected_verdicts(fair, "holm") if fair else ())
    return [
        replace(answer, verdict=next(adjusted)) if answer.claim.kind is ClaimKind.FAIR else answer for answer in found
    ]
