"""Small invented results of comparisons for the report's tests: every number is chosen, none is measured."""

from typing import Any

from sae_nfm.comparison.results import (
    ARM_GROUPS,
    Answer,
    ArmGroup,
    Claim,
    ClaimKind,
    CompareResult,
    CompareRow,
    Paths,
    RowKind,
    SweepRow,
    changes,
)
from sae_nfm.stats.estimates import Estimate
from sae_nfm.stats.seed_document_test import Verdict


def compare_row(arm: str, fvu: float | None, kl: float | None, **changes: Any) -> CompareRow:
    fields: dict[str, Any] = {
        "k": 32, "seed": 0, "kind": RowKind.TRAINED, "family": arm.partition(":")[0], "parameters": 100, "training_flops": 2e6,
        "learning_rate": 0.005, "training_tokens_per_second": 1234.5, "dead_fraction": 0.0, "l0": 32.0, "ce_nats": 4.0,
        "ce_delta_nats": 0.125, "tokens": 1000,
    }  # fmt: skip
    fields |= {"group": ARM_GROUPS.get(fields["family"], ArmGroup.OTHER)} | changes
    return CompareRow(arm=arm, fvu=fvu, kl_nats=kl, **fields)


def part(family: str, paths: Paths, fvu: float, kl: float, **changes: Any) -> CompareRow:
    """An SAE with some of its paths ablated."""
    own: dict[str, Any] = {"family": family, "paths": paths, "kind": RowKind.ABLATION, "dead_fraction": None}
    return compare_row(paths.of(family), fvu, kl, training_tokens_per_second=None, **(own | changes))


def answer(
    arm: str,
    against: str,
    measure: str,
    change: float,
    *,
    kind: ClaimKind = ClaimKind.FAIR,
    n_seeds: int = 5,
    p: float = 0.5,
) -> Answer:
    """A verdict with an interval of 0.01 on both sides."""

    def estimate(value: float) -> Estimate:
        return Estimate(
            estimate=value,
            low=value - 0.01,
            high=value + 0.01,
            n=50,
            n_clusters=10,
            test="t",
            p_value=p,
            correction=None,
        )

    verdict = Verdict(
        arm=arm, against=against, measure=measure, difference=estimate(change / 10), relative=estimate(change),
        n_seeds=n_seeds, relabelled=0.03,
    )  # fmt: skip
    return Answer(claim=Claim(kind=kind, question="why?", arm=arm, against=against), k=32, verdict=verdict)


SEEDS = (0, 1, 2)
ROWS = tuple(
    row
    for seed in SEEDS
    for row in (
        compare_row("joint_nfm", 0.10 + 0.01 * seed, 0.20, seed=seed),
        part("joint_nfm", Paths.DIRECT, 0.40, 0.50, seed=seed),
        compare_row("topk", 0.12, 0.25, seed=seed),
    )
)
ANSWERS = (
    answer("joint_nfm", "joint_nfm: direct only", "fvu", -0.75, kind=ClaimKind.ABLATION, p=0.001),
    answer("joint_nfm", "joint_nfm: direct only", "kl_nats", -0.60, kind=ClaimKind.ABLATION, p=0.001),
    answer("joint_nfm", "topk", "fvu", -0.05, p=0.001),
    answer("joint_nfm", "topk", "kl_nats", 0.02),
)
SWEEP = (
    SweepRow(k=32, arm="joint_nfm", family="joint_nfm", learning_rate=0.001, l0=32.0, fvu=0.3),
    SweepRow(k=32, arm="joint_nfm", family="joint_nfm", learning_rate=0.002, l0=32.0, fvu=0.2, chosen=True),
    SweepRow(k=32, arm="joint_nfm", family="joint_nfm", learning_rate=0.004, l0=32.0, fvu=float("nan")),
    SweepRow(k=32, arm="topk", family="topk", learning_rate=0.001, l0=32.0, fvu=0.35),
    SweepRow(k=32, arm="topk", family="topk", learning_rate=0.002, l0=32.0, fvu=0.25),
    SweepRow(k=32, arm="topk", family="topk", learning_rate=0.004, l0=32.0, fvu=0.15, chosen=True),
)


def compared(**changes: Any) -> CompareResult:
    config = {
        "model": "m", "hook": "blocks.0.hook_resid_post", "dataset": "t.parquet", "k": [32],
        "training_tokens": 400, "learning_rates": [0.001, 0.002, 0.004],
    }  # fmt: skip
    fields: dict[str, Any] = {
        "rows": ROWS, "answers": ANSWERS, "sweep": SWEEP, "missing": (), "provenance": {"config": config, "seeds": [0]},
    }  # fmt: skip
    return CompareResult(**(fields | changes))


def sparsity_rows() -> tuple[CompareRow, ...]:
    """Three k of two arms, and an arm whose sparsity a coefficient sets, with two seeds."""
    rows: list[CompareRow] = []
    for seed in (0, 1):
        for k, fvu in ((16, 0.20), (32, 0.10), (64, 0.05)):
            same: dict[str, Any] = {"k": k, "seed": seed}
            rows.append(compare_row("joint_nfm", fvu + 0.01 * seed, 2 * fvu, l0=float(k), **same))
            rows.append(compare_row("topk", 1.1 * fvu, 2.3 * fvu, l0=float(k), **same))
        for coefficient, l0, fvu in ((3, 20.0, 0.22), (1, 50.0, 0.09)):
            name = f"standard {coefficient}"
            rows.append(compare_row(name, fvu, 2.5 * fvu, l0=l0, family="standard", seed=seed))
        rows.append(compare_row("standard", 0.15, 0.4, kind=RowKind.INTERPOLATED, seed=seed))
        rows.append(compare_row("gated", None, None, kind=RowKind.INTERPOLATED, l0=None, seed=seed))
    return tuple(rows)


JOINT: dict[str, Any] = {"group": ArmGroup.JOINT, "parameters": 150, "seed": 7}
ONCE = (
    compare_row("joint", 0.10, 0.20, **JOINT),
    part("joint", Paths.DIRECT, 0.40, 0.25, **JOINT),
    part("joint", Paths.LINEAR, 0.20, 0.22, **JOINT),
    compare_row("topk", 0.08, 0.25, seed=7),
    compare_row("matched", 0.05, 0.10, parameters=150, group=ArmGroup.TOPK, seed=7),
)
"""The table of a demo."""


def compared_once(rows: tuple[CompareRow, ...] = ONCE, dataset: str | None = "corpus.parquet") -> CompareResult:
    """The result of a demo."""
    config = {
        "model": "m" if dataset else "sae-nfm-demo", "hook": "blocks.0.hook_resid_post", "dataset": dataset,
        "training_tokens": 400, "learning_rates": [0.001],
    }  # fmt: skip
    return CompareResult(rows=rows, changes=changes(rows), provenance={"config": config, "seeds": [7]})
