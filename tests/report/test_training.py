"""The chapter on training: the lines are those of the record, thinned; records of one folder share figures."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from report_runs import figures, plots, run_of

from sae_nfm.report.blocks import Heading, Prose
from sae_nfm.report.chapters.training import section
from sae_nfm.training.results import LONGEST, training_curves

KL = "held_out/model_behavior_preservation/kl_div_with_sae"
JOINT = [
    {"tokens": 10, "metrics/explained_variance": -0.5, "metrics/fvu_direct": 1.5, "metrics/share_linear": 0.75},
    {
        "tokens": 20,
        "metrics/explained_variance": 0.75,
        "metrics/fvu_direct": 0.5,
        "metrics/share_linear": 0.875,
        KL: 0.125,
    },
]
JOINT = [line | {"sae": "joint", "metrics/share_interaction": 1 - line["metrics/share_linear"]} for line in JOINT]
TOPK = [
    {
        "sae": "topk",
        "tokens": tokens,
        "metrics/explained_variance": 0.5,
        "sparsity/dead_features": dead,
        "metrics/l0": 32.0,
    }
    for tokens, dead in ((10, 0), (20, 3))
]


def record(path: Path, lines: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line | {"seconds": 1.5}) + "\n" for line in lines))
    return path


def lines_of(figure):
    return {trace.name: (list(trace.x), list(trace.y)) for trace in figure.plot.data}


def test_nothing_without_a_record(tmp_path):
    assert section(run_of(tmp_path)) is None


def test_the_lines_of_a_record(tmp_path):
    there = section(run_of(tmp_path, records=[record(tmp_path / "demo" / "training.jsonl", [*JOINT, *TOPK])]))
    unexplained, shares, held_out, dead = figures(there)
    assert lines_of(unexplained) == {
        "joint, all paths": ([10, 20], [1.5, 0.25]),  # 1 - explained variance
        "joint, direct path alone": ([10, 20], [1.5, 0.5]),
        "topk, all paths": ([10, 20], [0.5, 0.5]),
    }
    assert lines_of(shares) == {
        "joint, linear": ([10, 20], [0.75, 0.875]),
        "joint, interaction": ([10, 20], [0.25, 0.125]),
    }
    assert lines_of(held_out) == {"joint": ([20], [0.125])}
    assert lines_of(dead) == {"topk": ([10, 20], [0, 3])}
    assert unexplained.data["training tokens"].tolist() == [10, 20] * 3
    assert unexplained.data["FVU of the batch"].tolist() == [1.5, 0.25, 1.5, 0.5, 0.5, 0.5]
    styles = [(trace.line.color, trace.line.dash) for trace in unexplained.plot.data]
    assert styles[0][0] == styles[1][0] != styles[2][0]  # a colour for an SAE
    assert [dash for _, dash in styles] == ["solid", "dot", "solid"]


def test_an_sae_without_paths_or_dead_features_has_one_figure(tmp_path):
    there = section(run_of(tmp_path, records=[record(tmp_path / "training.jsonl", TOPK[:1])]))
    assert [figure.name for figure in figures(there)] == ["unexplained-1"]
    prose = next(block for block in there.blocks if isinstance(block, Prose))
    assert list(prose.lines) == ["At the end no feature counted as dead in any of these 1 SAEs."]


@pytest.mark.parametrize("beside", [False, True], ids=["in the record", "in the config beside it"])
def test_a_run_in_which_no_feature_can_count_as_dead(beside, tmp_path):
    """A feature counts once it was silent for more steps than the window has."""
    window = {} if beside else {"details/dead_feature_window": 1_000}
    path = record(
        tmp_path / "training.jsonl", [line | {"step": 97, "sparsity/dead_features": 0} | window for line in TOPK]
    )
    if beside:
        path.with_name("runner_cfg.json").write_text(json.dumps({"dead_feature_window": 98}))
    there = section(run_of(tmp_path, records=[path]))
    (told,) = (line for block in there.blocks if isinstance(block, Prose) for line in block.lines)
    assert told.startswith("No feature could count as dead, however many never fired")
    assert f"topk ({98 if beside else '1,000'} of 98 steps)" in told


def test_sparsity_that_changes_is_drawn(tmp_path):
    lines = [{"sae": "standard", "tokens": t, "metrics/l0": l0} for t, l0 in ((1, 200.0), (2, 40.0))]
    (figure,) = figures(section(run_of(tmp_path, records=[record(tmp_path / "training.jsonl", lines)])))
    assert lines_of(figure) == {"standard": ([1, 2], [200.0, 40.0])}


def test_folders_have_figures_of_their_own_and_the_rest_is_named(tmp_path):
    many = [
        record(tmp_path / "compare" / f"arm {n}" / "training.jsonl", [TOPK[0] | {"sae": f"arm {n}"}]) for n in range(8)
    ]
    alone = record(tmp_path / "demo" / "training.jsonl", TOPK[:1])
    there = section(run_of(tmp_path, records=[*many, alone]))
    assert [block.text for block in there.blocks if isinstance(block, Heading)] == ["compare", "demo"]
    assert list(lines_of(figures(there)[0])) == [f"arm {n}" for n in range(6)]
    told = [line for block in there.blocks if isinstance(block, Prose) for line in block.lines]
    assert "The first 6 of 8 training records are drawn; not: arm 6, arm 7." in told


def test_saes_trained_one_by_one_lie_over_one_another(tmp_path):
    """As `sae-nfm train` leaves them: a folder each, one SAE in it; named by their folders. Others keep figures of their own."""
    mine = [record(tmp_path / name / "training.jsonl", TOPK) for name in ("mine", "other", "older/one")]
    together = record(tmp_path / "demo" / "training.jsonl", [*JOINT, *TOPK])
    there = section(run_of(tmp_path, records=[together, *mine]))
    assert [block.text for block in there.blocks if isinstance(block, Heading)] == ["SAEs trained one by one", "demo"]
    assert list(lines_of(figures(there)[0])) == ["mine", "other", "older/one"]
    only = section(run_of(tmp_path, records=mine[:2]))
    assert not [block for block in only.blocks if isinstance(block, Heading)]
    assert list(lines_of(figures(only)[0])) == ["mine", "other"]


@pytest.mark.parametrize("n", [1, LONGEST, LONGEST + 1, 1_000])
def test_thinned_evenly_with_both_ends(tmp_path, n):
    lines = [{"sae": "a", "tokens": step, "metrics/explained_variance": 0.5} for step in range(n)]
    (curves,) = training_curves(record(tmp_path / "training.jsonl", lines))
    tokens = curves.unexplained.tokens
    assert len(tokens) == min(n, LONGEST)
    assert (tokens[0], tokens[-1]) == (0, n - 1)
    steps = {b - a for a, b in pairwise(tokens)}
    assert not steps or max(steps) - min(steps) <= 1


def test_a_damaged_record_is_an_error_that_names_it(tmp_path):
    path = record(tmp_path / "training.jsonl", TOPK)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"training\.jsonl.*training record"):
        training_curves(path)


def test_the_same_twice_whatever_it_took(tmp_path):
    first = run_of(tmp_path, records=[record(tmp_path / "training.jsonl", [*JOINT, *TOPK])])
    before = plots(section(first))
    record(tmp_path / "training.jsonl", [line | {"seconds": 9.0} for line in (*JOINT, *TOPK)])
    assert plots(section(first)) == before
