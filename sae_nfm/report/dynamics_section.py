"""How do features move while an SAE is trained? Shares by gauge, norms and frequency over tokens, passages between thirds."""

import itertools
from typing import Any

import pandas as pd

from sae_nfm.experiments.dynamics import LEVELS
from sae_nfm.experiments.dynamics.results import DynamicsResult, Movement, counted
from sae_nfm.report.blocks import Block, Figure, Prose, Section, Table
from sae_nfm.report.dynamics_figures import GAUGES, norms_figure, shares_figure, transitions_figure
from sae_nfm.report.run_folder import Found, Run
from sae_nfm.report.several import section_of

TITLE = "Learning dynamics"
COMMAND = "sae-nfm dynamics CHECKPOINTS --output RUN/dynamics"
THIRDS = {"fixed": "Fixed thirds", "own": "Own tertiles"}
LEAD = (
    "Do features begin in the integration paths and move to the direct one, or the other way? As trained the answer "
    "is set by the gauge, so it stands beside the canonical one, and passages of single features beside those of "
    "shuffled identities."
)
SHARES_CAPTION = (
    "Mean over features of each path's part in what a feature writes (root mean square on held-out tokens), by tokens "
    "trained on. As trained, the division between direct and linear is a gauge, which training sets from "
    "initialisation and learning rate; in the canonical gauge all that is linear is direct. Bars: 95 % intervals over "
    "documents, often smaller than the marks. One run."
)
NORMS_CAPTION = (
    "Mean decoder norm of the active features and median share of tokens on which a feature is active, beside the "
    "reference where there is one. Norms are in the unit of raw activations. One run and one seed each, no intervals."
)
TRANSITIONS_CAPTION = (
    "Features by third of their integration share at the first checkpoint (rows) and at the last (columns). With "
    "fixed thirds a shift of all features shows; with each checkpoint's own tertiles only changes of order do. What "
    "chance gives stands in the table below."
)
TABLE_CAPTION = (
    "Features that pass between thirds of the integration share; in brackets mean and 95 % when identities of "
    "features are shuffled. A number inside the brackets is no sign that single features move."
)


def section(run: Run) -> Section | None:
    """All results on learning dynamics of a run; None without any."""
    found = run.of(DynamicsResult)
    return section_of(found, id="dynamics", title=TITLE, lead=LEAD, blocks=_blocks, findings=DynamicsResult.findings)


def _blocks(found: Found[DynamicsResult], number: int) -> list[Block]:
    result = found.result
    shares = [row for row in result.checkpoints if row.shares]
    return [
        Prose(lines=result.findings(), listed=True),
        Figure(
            name=f"shares-{number}",
            title="Where the features' work is done, by gauge",
            plot=shares_figure(shares, list(result.edges)),
            caption=SHARES_CAPTION,
            data=pd.DataFrame(_share_rows(result)),
        ),
        Figure(
            name=f"norms-{number}",
            title="Norm and frequency while training",
            plot=norms_figure(result.checkpoints),
            caption=NORMS_CAPTION,
            data=pd.DataFrame(
                [
                    {
                        name: getattr(row, name)
                        for name in ("run", "tokens", "norm", "canonical_norm", "frequency", "active")
                    }
                    for row in result.checkpoints
                ]
            ),
        ),
        Figure(
            name=f"transitions-{number}",
            title="Where features went, first checkpoint to last",
            plot=transitions_figure(result.overall[0], THIRDS),
            caption=TRANSITIONS_CAPTION,
            data=pd.DataFrame(_transition_rows(result.overall[0])),
        ),
        _passages(result),
    ]


def _share_rows(result: DynamicsResult) -> list[dict[str, Any]]:
    return [
        {"gauge": gauge, "tokens": row.tokens, "path": path, "share": one.estimate, "low": one.low, "high": one.high}
        for row in result.checkpoints
        for gauge, shares in row.shares.items()
        for path, one in shares.items()
    ]


def _transition_rows(move: Movement) -> list[dict[str, Any]]:
    return [
        {"thirds": thirds, "gauge": gauge, "from": LEVELS[i], "to": LEVELS[j], "features": table[i][j]}
        for thirds, own in (("fixed", move.transitions), ("own", move.reordered))
        for gauge, table in ((gauge, found.table) for gauge, found in own.items())
        for i, j in itertools.product(range(len(LEVELS)), repeat=2)
    ]


def _passages(result: DynamicsResult) -> Table:
    rows: list[tuple[str, ...]] = []
    moves = [move for move in (*result.steps, *result.overall) if move.transitions]
    for thirds, gauge in itertools.product(THIRDS, result.edges):
        for move in moves:
            found = (move.transitions if thirds == "fixed" else move.reordered)[gauge]
            passed = (found.to_identity, found.to_integration, found.stayed)
            rows.append(
                (
                    f"{THIRDS[thirds]}, {GAUGES[gauge]}",
                    f"{move.before:,}",
                    f"{move.after:,}",
                    *(counted(one) for one in passed),
                )
            )
    columns = (
        "thirds and gauge",
        "from tokens",
        "to tokens",
        "integration to identity",
        "identity to integration",
        "stayed",
    )
    whole = {(move.before, move.after) for move in result.overall}
    strong = [any((f"{a:,}", f"{b:,}") == row[1:3] for a, b in whole) for row in rows]
    return Table(columns=columns, rows=rows, caption=TABLE_CAPTION, strong=strong)
