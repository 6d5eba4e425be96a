"""From rows to comparisons, words and page: everything here is computed by hand from invented rows."""

import pytest

from sae_nfm.behaviour import Fidelity
from sae_nfm.results import ALL_PATHS, BenchmarkResult, Row, comparisons
from sae_nfm.summary import table, words


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


def test_comparisons_by_hand():
    found = {(c.kind, c.against): c for c in result().comparisons}
    assert set(found) == {("paper", "joint: direct only"), ("fair", "topk"), ("fair", "matched")}
    paper, topk = found["paper", "joint: direct only"], found["fair", "topk"]
    assert paper.fvu_change == pytest.approx(-0.75)  # 0.1 against 0.4
    assert paper.kl_change == pytest.approx(-0.2)
    assert topk.fvu_change == pytest.approx(0.25)  # 0.1 against 0.08
    assert topk.parameter_ratio == 1.5  # 150 / 100, a binary fraction


def test_words_print_losses_as_plainly_as_wins():
    text = words(result())
    assert "all paths against the direct path alone: FVU -75.0%, KL -20.0%" in text
    assert "against topk (1.50 x its parameters): FVU +25.0%, KL -20.0% (mixed)" in text
    assert "against matched (1.00 x its parameters): FVU +100.0%, KL +100.0% (no better on either)" in text
    assert "One seed (7): one run is one draw" in text
    assert "sampled from the embedded model" not in text
    assert "no evidence about real text" in words(result(dataset=None))


def test_words_name_the_canonical_gauge():
    text = words(result((*ROWS, row("joint", "direct only, canonical gauge", 150, 0.16, 0.21))))
    assert "all paths against the direct path alone in the canonical gauge: FVU -37.5%" in text


def test_table_has_every_row_and_no_speed_for_ablations():
    lines = table(result()).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [r.name for r in ROWS]
    assert lines[2].endswith("1,234")
    assert lines[3].endswith("+0.1250")
    assert "0.1000" in lines[2]
    assert "0.2000" in lines[2]


def test_save_and_load_round_trip(tmp_path):
    result().save(tmp_path / "deep" / "results.json")
    assert BenchmarkResult.load(tmp_path / "deep" / "results.json") == result()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["{", "{}", '{"rows": [{"sae": 1}]}'])
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json.*`sae-nfm demo`"):
        BenchmarkResult.load(tmp_path / "results.json")
