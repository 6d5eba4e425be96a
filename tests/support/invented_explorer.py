"""An invented explorer: tokens and where features fire on them, by hand; the file of `sae-nfm explore` made from these."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

ROWS = (
    ["The", " film", " was", " not", " good", ",", " it", " was", " never", " good", ".", "\n", "The", " end", "."],
    [" A", " \t", "<b>", " bold", "</b>", " film", " is", " not", " 12", " x\x01", " 12", " films", "\n", "!", "—"],
    [" not", " so", " good", " not", " so", " bad", " not", " so", " so", " not", " to", " be", " not", " be", " not"],
)
"""Tokens of three sequences; the position of a token is its index in all of them."""
POSITIONS = [token for row in ROWS for token in row]
FIRINGS: Mapping[int, Mapping[int, float]] = {
    0: {3: 4.0, 8: 1.0, 22: 2.0, 30: 0.5, 33: 3.0, 36: 1.5, 39: 1.2, 42: 0.8, 44: 0.6},  # not
    1: {1: 2.0, 20: 1.6, 26: 0.4},  # film
    2: {11: 6.0, 27: 3.0, 9: 0.6},  # line breaks, and weakly good
    4: {17: 1.0, 19: 0.9},  # markup
    5: {4: 5.0, 9: 2.5, 32: 0.5},  # good
    6: {23: 0.25, 25: 0.125},  # 12
}
"""Activation by feature and position; features 3 and 7 are dead."""
PAIRS: Mapping[tuple[int, int], Mapping[int, float]] = {(0, 5): {3: 2.0, 4: 1.0}, (1, 2): {11: 0.5}, (0, 6): {23: 0.2}}
"""Norm of what a pair writes, by position; the strongest pair first."""
SHARES = {(0, 5): 0.6, (1, 2): 0.3, (0, 6): 0.05}
D_SAE, TOKENS, BINS, WINDOW, LOGITS = 8, 1_000, 20, (3, 2), 2
DEAD = (3, 7)
PATHS = {"direct": 0.5, "linear": 0.25, "square": 0.15, "interaction": 0.1}
CANONICAL = {"direct": 0.7, "linear": 0.0, "square": 0.18, "interaction": 0.12}
UP, DOWN = ((" good", 0.5), (" bad", 0.125)), ((" never", -0.75), ("\n", -0.25))
"""Tokens whose logits every feature and the first pair push up and down."""


def content() -> dict[str, Any]:
    """The columns of the file."""
    vocab = list(dict.fromkeys(POSITIONS))
    firings = [FIRINGS.get(feature, {}) for feature in range(D_SAE)]
    most = [max(fired.values(), default=0.0) for fired in firings]
    top, marks = _contexts(firings, lambda fired: sorted(fired, key=fired.__getitem__, reverse=True))
    spread, spread_marks = _contexts(firings, lambda fired: sorted(fired, key=fired.__getitem__, reverse=True)[::4])
    pairs = list(PAIRS)
    positions = [sorted(norms, key=norms.__getitem__, reverse=True) for norms in PAIRS.values()]
    logits = [_logits(vocab) if fired else ([], []) for fired in firings]
    pair_logits = [_logits(vocab), ([], []), ([], [])]
    return {
        "kind": "explore/1",
        "sae": "runs/invented",
        "architecture": "joint_nfm",
        "model_name": "invented",
        "hook_name": "blocks.0.hook_resid_post",
        "d_in": 16,
        "d_sae": D_SAE,
        "k": 4,
        "tokens": TOKENS,
        "documents": 3,
        "paths": list(PATHS),
        "gauges": ["as trained", "canonical"],
        "bins": BINS,
        "vocab": vocab,
        "stream": {"row_starts": _starts(ROWS), "ids": [vocab.index(token) for token in POSITIONS]},
        "features": {
            "tokens": [len(fired) for fired in firings],
            "max": most,
            "mean": [sum(fired.values()) / max(len(fired), 1) for fired in firings],
            "histogram": [count for fired in firings for count in _histogram(fired)],
            "shares": {
                gauge: {path: [share * (peak > 0) for peak in most] for path, share in shares.items()}
                for gauge, shares in (("as trained", PATHS), ("canonical", CANONICAL))
            },
            "context_starts": _starts(firings),
            "quantile_starts": _starts([range(0, len(fired), 4) for fired in firings]),
        },
        "contexts": top,
        "marks": marks,
        "quantile_contexts": spread,
        "quantile_marks": spread_marks,
        "window": list(WINDOW),
        "logits": _table(logits),
        "logit_count": LOGITS,
        "logit_direction": "W_dec",
        "logits_note": "",
        "pairs": {
            "first": [first for first, _ in pairs],
            "second": [second for _, second in pairs],
            "tokens": [len(norms) for norms in PAIRS.values()],
            "share": [SHARES[pair] for pair in pairs],
            "norm": [sum(norms.values()) / len(norms) for norms in PAIRS.values()],
            "max_norm": [max(norms.values()) for norms in PAIRS.values()],
            "context_starts": _starts(positions),
        },
        "pair_contexts": {
            "position": [position for places in positions for position in places],
            "norm": [PAIRS[pair][at] for pair, places in zip(pairs, positions, strict=True) for at in places],
        },
        "pair_logits": _table(pair_logits),
        "pair_totals": {"pairs": 40, "firings": 99},
        "provenance": {"config": {}, "versions": {}, "tokens_sha256": "", "sae_sha256": ""},
    }


def packed(columns: Mapping[str, Any]) -> bytes:
    """The file's bytes."""
    return gzip.compress(json.dumps(columns).encode(), mtime=0)


def row_of(position: int) -> range:
    """Positions of the sequence that a position is in."""
    starts = _starts(ROWS)
    return next(range(a, b) for a, b in pairwise(starts) if a <= position < b)


def window(position: int) -> range:
    """Positions of the context around a position."""
    row = row_of(position)
    return range(max(row.start, position - WINDOW[0]), min(row.stop, position + WINDOW[1] + 1))


def _contexts(
    firings: Sequence[Mapping[int, float]], chosen: Callable[[Mapping[int, float]], list[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    position: list[int] = []
    marks: list[list[tuple[int, int]]] = []
    for fired in firings:
        for at in chosen(fired):
            position.append(at)
            most = max(fired.values())
            marks.append([(p - at, max(1, round(255 * fired[p] / most))) for p in window(at) if p in fired])
    flat = [mark for some in marks for mark in some]
    return (
        {"position": position, "mark_starts": _starts(marks)},
        {"offset": [offset for offset, _ in flat], "strength": [strength for _, strength in flat]},
    )


def _histogram(fired: Mapping[int, float]) -> list[int]:
    most = max(fired.values(), default=1.0)
    bins = [min(BINS - 1, int(BINS * value / most)) for value in fired.values()]
    return [bins.count(i) for i in range(BINS)]


def _logits(vocab: Sequence[str]) -> tuple[list[int], list[float]]:
    return [vocab.index(token) for token, _ in UP + DOWN], [value for _, value in UP + DOWN]


def _table(rows: Sequence[tuple[list[int], list[float]]]) -> dict[str, Any]:
    return {
        "starts": _starts([tokens for tokens, _ in rows]),
        "token": [token for tokens, _ in rows for token in tokens],
        "value": [value for _, values in rows for value in values],
    }


def _starts(rows: Sequence[Any]) -> list[int]:
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    return starts
