"""Dot plots: marks stand in their rows, intervals are as long as they should be, both screens have labels."""

import math
from types import SimpleNamespace

import pytest
from report_runs import marks, row

from sae_nfm.report.plots import Axis, Group, Mark, Row, dot_plot, drawn

GROUPS = (
    Group(name="one", colour="#000000", symbol="circle"),
    Group(name="two", colour="#ff0000", symbol="x", offset=0.2),
)
ROWS = (Row(key="h", label="heading", heading=True), row("a"), row("a rather long label of a row"))
LONG = "a rather long label of a row"
MARKS = (
    Mark(row="a", group="one", x=1.0, low=0.5, high=2.5, panel="P"),
    Mark(row=LONG, group="one", x=3.0, panel="P"),
    Mark(row=LONG, group="two", x=4.0, low=-math.inf, high=math.inf, panel="P", note="why"),
    Mark(row="a", group="one", x=5.0, low=4.0, high=6.0, panel="Q"),
)


def plot(**changes):
    return dot_plot(
        MARKS, GROUPS, ROWS, Axis(title="nats"), panels=("P", "Q"), label_width=14, narrow_width=8, **changes
    )


def test_marks_stand_in_their_rows_with_their_intervals():
    first = [trace for trace in plot().data if trace.xaxis == "x"]
    found = [(t.name, list(t.x), list(t.y), t.error_x.arrayminus, t.error_x.array) for t in first]
    assert found == [
        ("one", [1.0], [1.0], (0.5,), (1.5,)),
        ("one", [3.0], [2.0], None, None),  # no interval, and none of width 0
        ("two", [4.0], [2.2], None, None),  # no bounds: said, not drawn
    ]
    assert first[2].hovertext[0].split("<br>")[-2:] == ["two: 4.0000 (an interval without bounds)", "why"]
    assert first[0].hovertext[0].endswith("one: 1.0000 [0.5000, 2.5000]")


def test_a_group_has_one_entry_in_the_legend():
    assert [(trace.name, trace.showlegend) for trace in plot().data] == [
        ("one", True), ("one", False), ("two", True), ("one", False),
    ]  # fmt: skip


def test_labels_are_wrapped_for_both_screens_and_panels_do_not_touch():
    layout = plot().layout
    assert list(layout.yaxis.ticktext) == ["<b>heading</b>", "a", "a rather long<br>label of a row"]
    narrow = layout.meta["narrow"]
    assert narrow["yaxis2"]["ticktext"][2] == "a rather<br>long<br>label of<br>a row"
    assert narrow["height"] > layout.height
    for axes in (
        layout,
        SimpleNamespace(yaxis=SimpleNamespace(**narrow["yaxis"]), yaxis2=SimpleNamespace(**narrow["yaxis2"])),
    ):
        assert axes.yaxis.domain[1] == 1.0
        assert axes.yaxis.domain[0] > axes.yaxis2.domain[1] > axes.yaxis2.domain[0] >= 0.0
    assert [(a.text, a.x) for a in layout.annotations] == [("<b>P</b>", 0), ("<b>Q</b>", 0)]


def test_the_data_has_a_row_for_each_mark_and_no_infinity():
    data = drawn(MARKS, ROWS, group="who")
    assert list(data.columns) == ["measure", "row", "who", "value", "low", "high"]
    assert data["value"].tolist() == [1.0, 3.0, 4.0, 5.0]
    assert data["low"].tolist()[0] == 0.5
    assert data["low"].isna().tolist() == [False, True, True, False]
    assert "measure" not in drawn([Mark(row="a", group="one", x=1.0)], ROWS).columns


@pytest.mark.parametrize(
    ("axis", "line"), [(Axis(title="t", reference=1.0), [1.0]), (Axis(title="t", reference=0.0), [])]
)
def test_a_reference_is_a_line_and_zero_the_axis_line(axis, line):
    figure = dot_plot([Mark(row="a", group="one", x=2.0)], GROUPS, [row("a")], axis)
    assert [shape.x0 for shape in figure.layout.shapes] == line
    assert figure.layout.xaxis.zeroline is (not line)
    assert marks(SimpleNamespace(plot=figure)) == {("a", "one", 2.0)}


def test_the_same_twice_is_the_same_bytes():
    assert plot().to_json() == plot().to_json()
