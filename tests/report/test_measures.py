"""The sections on secondary SAEs, learning dynamics and speed draw the numbers of their results."""

from dataclasses import replace

import pytest
from report_inputs import RUN, estimate, figures_by_name, traces
from report_runs import run_of

from sae_nfm.experiments.dynamics.results import CheckpointRow, Counted, DynamicsResult, Movement, Transitions
from sae_nfm.experiments.secondary.results import MEAN, PRIMARY, ZERO, Reconstruction, SecondaryResult, SecondaryRow
from sae_nfm.experiments.synthetic.results import Floor, LeftOut, PairScore, RecoveryResult, RecoveryRow, Score
from sae_nfm.profiling.results import Rates, SpeedResult, SpeedRow
from sae_nfm.report.blocks import Table
from sae_nfm.report.chapters import dynamics as dynamics_chapter
from sae_nfm.report.chapters import recovery as recovery_chapter
from sae_nfm.report.chapters import secondary as secondary_chapter
from sae_nfm.report.chapters import speed as speed_chapter
from sae_nfm.report.chapters.secondary import ABLATED, ACROSS, CONTROL, ELSEWHERE, OTHER, PERMUTED, REPLACED, TRUE
from sae_nfm.report.page import section_html


def secondary_row(name, rise, trained_on=None, explained=0.5, true=None):
    sae = None
    if trained_on is not None:
        sae = Reconstruction(
            trained_on=trained_on,
            d_in=64,
            d_sae=128,
            k=8,
            l0=8.0,
            dead=1,
            explained=estimate(explained),
            explained_true=None if true is None else estimate(true),
        )
    fixed = {name: estimate(0.1) for name in ("fvu_x", "fvu_x_hat", "kl_nats", "ce_delta_nats")}
    return SecondaryRow(name=name, sae=sae, kl_rise=estimate(rise, 0.01), **fixed)


SECONDARY = SecondaryResult(
    rows=(
        secondary_row(PRIMARY, 0.0),
        secondary_row(MEAN, 0.02),
        secondary_row(ZERO, 0.08),
        secondary_row("hidden code, k 8", 0.003, "hidden code", 0.8),
        secondary_row("permuted hidden code, k 8", 0.013, "permuted hidden code", 0.75, 0.51),
        secondary_row("residual, k 8", 0.6, "residual", 0.7),
    ),
    provenance={},
)


def test_variance_explained_beside_the_permuted_code():
    drawn = figures_by_name(secondary_chapter.section(run_of(RUN, SECONDARY)))
    found = {name: list(trace.x) for name, trace in traces(drawn["explained-0"]).items()}
    assert found == {TRUE: [0.8], PERMUTED: [0.75], ACROSS: [0.51], OTHER: [0.7]}
    assert {name: list(trace.x) for name, trace in traces(drawn["rise-0"]).items()} == {
        ABLATED: [0.02, 0.08],
        REPLACED: [0.003],
        CONTROL: [0.013],
    }
    assert list(traces(drawn["rise-elsewhere-0"])[ELSEWHERE].x) == [0.6]
    assert drawn["rise-0"].data["low"].tolist() == pytest.approx([0.01, 0.07, -0.007, 0.003])


def test_no_difference_from_the_permuted_code_is_said():
    section = secondary_chapter.section(run_of(RUN, SECONDARY))
    assert section is not None
    assert any("no difference shown: no structure across dimensions is shown" in told for told in section.verdicts)
    assert secondary_chapter.section(run_of(RUN)) is None


def counted(observed):
    return Counted(observed=observed, expected=4.0, low=2.0, high=6.0, p_value=0.5)


def transitions(first):
    table = ((first, 0, 1), (2, 3, 4), (5, 6, 7))
    return Transitions(table=table, to_identity=counted(5), to_integration=counted(1), stayed=counted(first + 10))


def checkpoint(run, tokens, share):
    paths = {"direct": 1 - share, "linear": share - 0.01, "nonlinear": 0.01, "square": 0.0, "integration": share}
    fixed = {"direct": 0.99, "linear": 0.0, "nonlinear": 0.01, "square": 0.0, "integration": 0.01}
    shares = {"raw": paths, "canonical": fixed} if run == "joint_nfm" else {}
    return CheckpointRow(
        run=run,
        tokens=tokens,
        active=20,
        norm=1 + share,
        canonical_norm=2.0 if shares else None,
        frequency=0.1,
        shares={gauge: {path: estimate(value, 0.02) for path, value in own.items()} for gauge, own in shares.items()},
    )


def dynamics():
    moved = {"raw": transitions(1), "canonical": transitions(2)}
    change = {"raw": estimate(0.1, p_value=0.01), "canonical": estimate(0.0, p_value=0.9)}
    move = Movement(
        run="joint_nfm",
        before=100,
        after=200,
        features=28,
        spearman={},
        change=change,
        transitions=moved,
        reordered=moved,
    )
    return DynamicsResult(
        hook_name="h",
        features=32,
        tokens=1000,
        documents=10,
        not_canonical=None,
        checkpoints=(
            checkpoint("joint_nfm", 100, 0.2),
            checkpoint("joint_nfm", 200, 0.3),
            checkpoint("topk", 100, 0.4),
        ),
        steps=(move,),
        overall=(move,),
        edges={"raw": (0.1, 0.2), "canonical": (0.01, 0.02)},
        provenance={},
    )


def test_shares_over_tokens_by_gauge():
    drawn = figures_by_name(dynamics_chapter.section(run_of(RUN, dynamics())))
    lines = [trace for trace in drawn["shares-0"].plot.data if trace.name == "linear"]
    assert [list(trace.y) for trace in lines] == [pytest.approx([0.19, 0.29])]  # in the canonical gauge there is none
    direct, fixed = (trace for trace in drawn["shares-0"].plot.data if trace.name == "direct")
    assert (list(direct.x), list(direct.y), list(fixed.y)) == ([100, 200], [0.8, 0.7], [0.99, 0.99])
    assert list(direct.error_y.array) == pytest.approx([0.02, 0.02])
    assert list(traces(drawn["norms-0"])["topk"].y) == [1.4]


def test_passages_stand_beside_shuffled_identities():
    section = dynamics_chapter.section(run_of(RUN, dynamics()))
    drawn = figures_by_name(section)["transitions-0"]
    assert [tuple(trace.z[0]) for trace in drawn.plot.data] == [(1, 0, 1), (2, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert len(drawn.data) == 4 * 9
    assert section is not None
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert table.rows[0] == ("Fixed thirds, as trained", "100", "200", "5 (4 [2, 6])", "1 (4 [2, 6])", "11 (4 [2, 6])")
    assert "not significantly different from no change" in section.verdicts[1]
    assert dynamics_chapter.section(run_of(RUN)) is None


def speed_row(arm, seconds, peak, d_sae=512, reason=None):
    timed = seconds is not None
    return SpeedRow(
        arm=arm,
        d_sae=d_sae,
        nfm_dim=8,
        step_seconds=seconds,
        step_quartiles=(seconds - 0.1, seconds + 0.2) if timed else None,
        step_over_topk=seconds / 0.5 if timed else None,
        floor_seconds=None,
        step_over_floor=None,
        peak_bytes=None if peak is None else int(peak * 2**20),
        peak_over_topk=None if peak is None else peak / 4,
        inference_seconds=None,
        inference_over_topk=None,
        step_over_previous=None,
        step_over_first=None,
        reason=reason,
    )


def speed(*rows, scan=None):
    config = {"scan": scan, "dtype": "float32", "autocast": False, "repeats": 3}
    config |= {"d_in": 8, "d_sae": 512, "k": 2, "nfm_dim": 8, "nfm_top_k": None, "batch": 4}
    return SpeedResult(
        rows=rows,
        rates=Rates(flop_per_second=1e9, bytes_per_second=1e9),
        provenance={"config": config, "device": "cpu", "threads": 1},
    )


def test_ratios_to_topk_with_quartiles():
    result = speed(
        speed_row("joint_nfm auto", 0.25, 2),
        speed_row("x", None, None, reason="does not fit"),
        speed_row("topk", 0.5, 4),
    )
    section = speed_chapter.section(run_of(RUN, result))
    drawn = figures_by_name(section)["ratios-0"]
    step, peak = (traces(drawn)[name] for name in (speed_chapter.STEP, speed_chapter.PEAK))
    assert (list(step.x), list(peak.x)) == ([0.5, 1.0], [0.5, 1.0])
    assert list(step.error_x.arrayminus) == pytest.approx([0.2, 0.2])
    assert list(step.error_x.array) == pytest.approx([0.4, 0.4])
    assert section is not None
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert table.rows[1][-1] == "does not fit"
    assert not section.verdicts  # the summary has no timings


def test_a_scan_stands_beside_a_cost_in_proportion():
    rows = [
        speed_row(arm, s, None, d)
        for arm, s, d in (("joint_nfm auto", 0.4, 512), ("topk", 0.5, 512), ("topk", 2.0, 2048))
    ]
    drawn = figures_by_name(speed_chapter.section(run_of(RUN, speed(*rows, scan="d_sae"))))["scan-0"]
    assert list(traces(drawn)["topk"].y) == [0.5, 2.0]
    guide = traces(drawn)["in proportion to the size"]
    assert (list(guide.x), list(guide.y)) == ([512, 2048], [0.4, 1.6])
    assert speed_chapter.section(run_of(RUN)) is None


SPEED = speed(speed_row("topk", 0.5, 4))


def recovery_row(sae, *scores, fvu=0.25):
    shares = {"fvu": fvu, "f1": 0.5, "precision": 0.4, "recall": 0.7, "mcc": 0.8, "mean_cosine": 0.75}
    sizes = {"parameters": 1_000, "l0": 8.0, "dead": 3, "interaction_share": 0.01 if len(scores) > 2 else None}
    return RecoveryRow(sae=sae, architecture=sae, refinement_steps=0, pairs=scores, **shares, **sizes)


LEFT, TOGETHER = (
    PairScore(score=score, auroc=0.9, auroc_decoys=decoys, precision=0.25, cosine=cosine)
    for score, decoys, cosine in ((Score.LEFT, 0.8, 0.3), (Score.TOGETHER, 0.4, None))
)
RECOVERY = RecoveryResult(
    features=64,
    fired=60,
    pairs=4,
    squares=0,
    decoys=4,
    samples=1_000,
    pair_share=0.05,
    floors=(Floor(k=8, fvu=0.01, fvu_linear=0.06),),
    oracle=replace(LEFT, auroc=1.0),
    rows=(
        recovery_row("joint_nfm", replace(LEFT, score=Score.ENERGY), LEFT, TOGETHER),
        recovery_row("topk", LEFT, TOGETHER),
    ),
    provenance={},
)


def test_what_was_found_of_a_known_truth_beside_the_control():
    section = recovery_chapter.section(run_of(RUN, RECOVERY))
    figures = figures_by_name(section)
    assert [float(x) for x in traces(figures["features-0"])["1 - FVU"].x] == [0.75, 0.75]
    drawn = traces(figures["pairs-0"])
    assert [float(x) for x in drawn[str(Score.TOGETHER)].x] == [0.4, 0.4]
    assert drawn[str(Score.TOGETHER)].marker.symbol.endswith("open")
    assert len(drawn[str(Score.ENERGY)].x) == 1
    html = section_html(section)
    assert "FVU 0.0100; without pairs 0.0600" in html
    assert (
        "AUROC of 0.80 (firing together: 0.40), and 25% of the 4 highest pairs are planted (firing together: 25%)"
        in html
    )
    assert "the true features" in html
    rate, energy = (replace(TOGETHER, score=score) for score in (Score.RATE, Score.FEATURE_ENERGY))
    squares = replace(recovery_row("joint_nfm"), squares=(LEFT, rate, energy), square_share=0.02, mean_directions=True)
    left_out = (LeftOut(sae="narrow", reason="it has d_in 8"),)
    found = replace(RECOVERY, squares=2, oracle_squares=LEFT, rows=(squares,), left_out=left_out)
    html = section_html(recovery_chapter.section(run_of(RUN, found)))
    for told in (
        "squares ranked by",
        "AUROC, all features",
        "control: firing rate",
        "2.00%",
        "joint_nfm*",
        "Left out: narrow",
    ):
        assert told in html
    linear = replace(RECOVERY, pairs=0, decoys=0, oracle=None, rows=(recovery_row("topk"),))
    html = section_html(recovery_chapter.section(run_of(RUN, linear)))
    assert "nothing is planted" in html
    assert "decoys with an AUROC" not in html


@pytest.mark.parametrize(
    ("module", "result"),
    [
        (secondary_chapter, SECONDARY),
        (dynamics_chapter, dynamics()),
        (speed_chapter, SPEED),
        (recovery_chapter, RECOVERY),
    ],
)
def test_several_results_keep_their_names_apart_and_repeat(module, result):
    one, other = (module.section(run_of(RUN, result, result)) for _ in range(2))
    assert section_html(one) == section_html(other)
    names = [block.name for block in one.blocks if hasattr(block, "name")]
    assert len(set(names)) == len(names) > 1
