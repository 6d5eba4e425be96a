"""The chapter on sparsity: lines over L0 for each arm, interpolated figures beside them."""

from invented_comparison import ROWS, compared, sparsity_rows
from report_runs import figures, plots, run_of

from sae_nfm.comparison.results import arm_means, lines_over_l0
from sae_nfm.report.chapters.pareto import section


def test_one_l0_is_no_line(tmp_path):
    assert section(run_of(tmp_path)) is None
    assert section(run_of(tmp_path, compared())) is None
    assert lines_over_l0(arm_means(ROWS)) == {}


def test_lines_by_arm_in_the_order_of_l0():
    lines = lines_over_l0(arm_means(sparsity_rows()))
    assert list(lines) == ["joint_nfm", "topk", "standard"]
    assert [(m.row.arm, m.l0) for m in lines["standard"] if m.metric == "fvu"] == [
        ("standard 3", 20.0),
        ("standard 1", 50.0),
    ]


def test_the_marks_are_the_means(tmp_path):
    (figure,) = figures(section(run_of(tmp_path, compared(rows=sparsity_rows()))))
    shown = {(t.name, t.yaxis, t.marker.symbol): (list(t.x), [round(y, 9) for y in t.y]) for t in figure.plot.data}
    assert shown == {
        ("joint_nfm", "y", "circle"): ([16, 32, 64], [0.205, 0.105, 0.055]),  # mean of 0.20 and 0.21, ...
        ("topk", "y", "diamond"): ([16, 32, 64], [0.22, 0.11, 0.055]),
        ("standard", "y", "square"): ([20, 50], [0.22, 0.09]),
        ("standard", "y", "square-open"): ([32], [0.15]),
        ("joint_nfm", "y2", "circle"): ([16, 32, 64], [0.4, 0.2, 0.1]),
        ("topk", "y2", "diamond"): ([16, 32, 64], [0.46, 0.23, 0.115]),
        ("standard", "y2", "square"): ([20, 50], [0.55, 0.225]),
        ("standard", "y2", "square-open"): ([32], [0.4]),
    }
    drawn = sorted(y for _, ys in shown.values() for y in ys)
    assert sorted(figure.data["mean"].round(9)) == drawn
    assert list(figure.plot.layout.xaxis.tickvals) == [16, 32, 64]
    assert [t.name for t in figure.plot.data if t.showlegend] == ["joint_nfm", "topk", "standard"]


def test_the_same_twice(tmp_path):
    run = run_of(tmp_path, compared(rows=sparsity_rows()))
    assert plots(section(run)) == plots(section(run))
