"""The result of a demo, from invented rows."""

from sae_nfm.comparison.benchmark_results import ALL_PATHS, BenchmarkResult, Row, comparisons
from sae_nfm.evaluation.fidelity import Fidelity


def row(sae: str, paths: str, parameters: int, fvu: float, kl: float) -> Row:
    return Row(
        sae=sae,
        paths=paths,
        parameters=parameters,
        fidelity=Fidelity(fvu=fvu, l0=32.0, kl_nats=kl, ce_nats=4.0, ce_delta_nats=0.125, tokens=1000),
        training_tokens_per_second=1234.5 if paths == ALL_PATHS else None,
    )


ROWS = (
    row("joint", ALL_PATHS, 150, 0.10, 0.20),
    row("joint", "direct only", 150, 0.40, 0.25),
    row("joint", "direct + linear", 150, 0.20, 0.22),
    row("topk", ALL_PATHS, 100, 0.08, 0.25),
    row("matched", ALL_PATHS, 150, 0.05, 0.10),
)


def result(rows: tuple[Row, ...] = ROWS, dataset: str | None = "corpus.parquet") -> BenchmarkResult:
    config = {
        "model_name": "m", "hook_name": "blocks.0.hook_resid_post", "dataset": dataset, "training_tokens": 400, "lr": 0.001,
    }  # fmt: skip
    return BenchmarkResult(
        rows=rows, comparisons=comparisons(rows, ["joint"]), provenance={"config": config, "seeds": [7]}
    )
