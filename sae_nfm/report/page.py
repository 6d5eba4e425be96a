"""One self-contained HTML page of a benchmark result: plotly inlined, opens offline."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sae_nfm.report.figures import claims_figure, fidelity_figure, training_figure
from sae_nfm.results import ALL_PATHS, BenchmarkResult
from sae_nfm.summary import COLUMN_HELP, COLUMNS, FAIR_HEADING, PAPER_HEADING, caveats, cells, sentence
from sae_nfm.whole_files import whole

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto } th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } tr.whole td { font-weight: 600 } tr.part td:first-child { padding-left: 1.6rem }
figure { margin: 2rem 0 } figcaption, small { color: #555 } pre { white-space: pre-wrap; background: #f6f6f6; padding: 1rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem }
.card { border: 1px solid #ccc; border-radius: .4rem; padding: .2rem 1rem } @media print { .modebar { display: none } }
"""  # noqa: E501


def write_report(result: BenchmarkResult, record: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write the page, under a temporary name first.

    Args:
        result: rows, comparisons, provenance.
        record: lines of `read_training_record`; without any the training curves are left out.
        path: the HTML file.
    """
    with whole(path) as partial:
        partial.write_text(render(result, record), encoding="utf-8")
    return Path(path)


def render(result: BenchmarkResult, record: Sequence[dict[str, Any]]) -> str:
    """The page as one string."""
    config = result.provenance["config"]
    figures = [
        (
            claims_figure(result),
            "The same model, two comparisons. Paper: all paths against the direct path alone, a part that was never trained "
            "to stand alone. Fair: against SAEs trained on their own on the same tokens. Below zero the joint model is better.",
        ),
        (
            fidelity_figure(result),
            "Every row of the table. Filled: whole SAEs. Hollow: the same SAE with paths switched off (written as zero).",
        ),
    ]
    if record:
        figures.append(
            (
                training_figure(record, result),
                "Explained variance on training batches. Dotted: what the direct path of a joint SAE explains by itself "
                "while the other paths carry part of its work.",
            )
        )
    title = f"joint_nfm at {config['hook_name']} of {config['model_name']}"
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
            f"<h1>{escape(title)}</h1>{_in_words(result)}<h2>Table</h2>{_table(result)}",
            *(_figure(figure, caption) for figure, caption in figures),
            f"<h2>How to repeat it</h2><pre>{escape(json.dumps(result.provenance, indent=1))}</pre></body></html>",
        ]
    )


def _in_words(result: BenchmarkResult) -> str:
    cards: list[str] = []
    for name in dict.fromkeys(comparison.row for comparison in result.comparisons):
        own = [comparison for comparison in result.comparisons if comparison.row == name]
        parts = [f"<div class=card><h3>{escape(name)}</h3>"]
        for kind, heading in (("paper", PAPER_HEADING), ("fair", FAIR_HEADING)):
            items = "".join(f"<li>{escape(sentence(c))}</li>" for c in own if c.kind == kind)
            parts.append(f"<b>{heading}</b><ul>{items}</ul>")
        cards.append("".join(parts) + "</div>")
    limits = "".join(f"<li>{escape(caveat)}</li>" for caveat in caveats(result))
    return f"<div class=cards>{''.join(cards)}</div><ul>{limits}</ul>"


def _table(result: BenchmarkResult) -> str:
    head = "".join(f'<th title="{escape(COLUMN_HELP.get(name, ""))}">{escape(name)}</th>' for name in COLUMNS)
    body = "".join(
        f'<tr class="{"whole" if row.paths == ALL_PATHS else "part"}">'
        + "".join(f"<td>{escape(text)}</td>" for text in line)
        + "</tr>"
        for row, line in zip(result.rows, cells(result), strict=True)
    )
    legend = "; ".join(f"{name}: {text}" for name, text in COLUMN_HELP.items())
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<small>{escape(legend)}.</small>"
    )


def _figure(figure: go.Figure, caption: str) -> str:
    html = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    return f"<figure>{html}<figcaption>{escape(caption)}</figcaption></figure>"
