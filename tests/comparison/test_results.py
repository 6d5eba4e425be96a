"""From rows to comparisons, words and page: everything here is computed by hand from invented rows."""

import pytest
from invented_comparison import JOINT, ONCE, compared_once, part

from sae_nfm.comparison.results import ClaimKind, CompareResult, Paths


def test_comparisons_by_hand():
    found = {(c.kind, c.against): c for c in compared_once().changes}
    fair = ClaimKind.FAIR
    assert set(found) == {(ClaimKind.ABLATION, "joint: direct only"), (fair, "topk"), (fair, "matched")}
    paper, topk = found[ClaimKind.ABLATION, "joint: direct only"], found[fair, "topk"]
    assert paper.fvu_change == pytest.approx(-0.75)  # 0.1 against 0.4
    assert paper.kl_change == pytest.approx(-0.2)
    assert topk.fvu_change == pytest.approx(0.25)  # 0.1 against 0.08
    assert topk.parameter_ratio == 1.5  # 150 / 100, a binary fraction


def test_words_print_losses_as_plainly_as_wins():
    text = compared_once().words()
    assert "all paths against the direct path alone: FVU -75.0%, KL -20.0%" in text
    assert "against topk (1.50 x its parameters): FVU +25.0%, KL -20.0% (mixed)" in text
    assert "against matched (1.00 x its parameters): FVU +100.0%, KL +100.0% (no better on either)" in text
    assert "One seed (7): one run is one draw" in text
    assert "no evidence about real text" not in text
    assert "no evidence about real text" in compared_once(dataset=None).words()


def test_words_name_the_canonical_gauge():
    text = compared_once((*ONCE, part("joint", Paths.CANONICAL, 0.16, 0.21, **JOINT))).words()
    assert "all paths against the direct path alone in the canonical gauge: FVU -37.5%" in text


def test_table_has_every_row_and_no_speed_for_ablations():
    lines = compared_once().words().split("\n\n")[0].splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [row.arm for row in ONCE]
    assert lines[2].endswith("1,234")
    assert lines[3].endswith("+0.1250")
    assert "0.1000" in lines[2]
    assert "0.2000" in lines[2]


def test_save_and_load_round_trip(tmp_path):
    compared_once().save(tmp_path / "deep" / "results.json")
    assert CompareResult.load(tmp_path / "deep" / "results.json") == compared_once()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["results.json", "results.json.sha256"]


@pytest.mark.parametrize("content", ["{", "{}", '{"rows": [{"sae": 1}]}'])
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json.*`sae-nfm compare`"):
        CompareResult.load(tmp_path / "results.json")
