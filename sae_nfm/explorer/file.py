"""explorer.json.gz: an explorer as one compressed JSON object of columns, small enough to be embedded in a page.

Numbers have four significant digits, those of logits and context norms three; there is no space, no time stamp and no file
name, so that equal content gives equal bytes. What a reader needs beside `explorer_data`: `bins` (of every histogram),
`paths` and `gauges` (of the shares).
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_nfm.common import whole
from sae_nfm.explorer.data import (
    Contexts,
    Explorer,
    FeatureFigures,
    Floats,
    Ints,
    PairFigures,
    TokenEffects,
    TokenTable,
)

FORMAT = "sae-nfm explorer 1"
FILENAME = "explorer.json.gz"
REMEDY = "make it anew with `sae-nfm explore`"
PLAIN = ("sae", "architecture", "model_name", "hook_name", "d_in", "d_sae", "k", "tokens", "documents")
"""Fields that are written as they are, first of all."""


def write(explorer: Explorer, path: str | Path) -> int:
    """Write an explorer; returns the file's size in bytes."""
    text = json.dumps(_content(explorer), separators=(",", ":"), ensure_ascii=False)
    packed = gzip.compress(text.encode(), compresslevel=9, mtime=0)
    with whole(path) as partial:
        partial.write_bytes(packed)
    return len(packed)


def read(path: str | Path) -> Explorer:
    """Read an explorer, from its file or the folder that has it.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, or of another format.
    """
    path = Path(path) / FILENAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give an {FILENAME}, or make one with `sae-nfm explore`")
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no {FILENAME} ({error}); {REMEDY}") from error
    given = content.get("format") if isinstance(content, dict) else None
    if given != FORMAT:
        raise ValueError(f"{path} is of the format {given!r}, this version reads {FORMAT!r}; {REMEDY}")
    try:
        return _explorer(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from error


def _content(explorer: Explorer) -> dict[str, Any]:
    features, pairs = explorer.features, explorer.pairs
    gauges = list(features.shares)
    return {
        "format": FORMAT,
        **{name: getattr(explorer, name) for name in PLAIN},
        "paths": list(features.shares[gauges[0]]),
        "gauges": gauges,
        "bins": features.histogram.shape[1],
        "vocab": list(explorer.vocab),
        "stream": _columns(explorer.stream, "row_starts", "ids"),
        "features": {
            **_columns(features, "tokens", "max", "mean"),
            "histogram": features.histogram.ravel().tolist(),
            "shares": {
                gauge: {path: rounded(share) for path, share in shares.items()}
                for gauge, shares in features.shares.items()
            },
            "context_starts": explorer.contexts.starts.tolist(),
            "quantile_starts": explorer.quantile_contexts.starts.tolist(),
        },
        "contexts": _columns(explorer.contexts, "position", "mark_starts"),
        "marks": _columns(explorer.contexts, "offset", "strength"),
        "quantile_contexts": _columns(explorer.quantile_contexts, "position", "mark_starts"),
        "quantile_marks": _columns(explorer.quantile_contexts, "offset", "strength"),
        "window": list(explorer.window),
        "logits": _effects(explorer.logits),
        "logit_count": explorer.logit_count,
        "logit_direction": explorer.logit_direction,
        "logits_note": explorer.logits_note,
        "pairs": _columns(pairs, "first", "second", "tokens", "share", "norm", "max_norm", "context_starts"),
        "pair_contexts": {"position": pairs.position.tolist(), "norm": rounded(pairs.context_norm, digits=3)},
        "pair_logits": _effects(pairs.logits),
        "pair_totals": {"pairs": pairs.fired, "firings": pairs.firings},
        "provenance": explorer.provenance,
    }


def _columns(of: Any, *names: str) -> dict[str, list[Any]]:
    return {name: rounded(getattr(of, name)) for name in names}


def _effects(effects: TokenEffects) -> dict[str, list[Any]]:
    return _columns(effects, "starts", "token") | {"value": rounded(effects.value, digits=3)}


def rounded(values: Ints | Floats, *, digits: int = 4) -> list[Any]:
    """Numbers for the file: floats to some significant digits, whole ones as whole numbers; whole numbers as they are."""
    if values.dtype.kind in "iu":
        return values.tolist()
    short = (float(f"{value:.{digits}g}") for value in values.tolist())
    return [int(value) if value.is_integer() else value for value in short]


def _explorer(content: Mapping[str, Any]) -> Explorer:
    n, n_ids, n_vocab = content["d_sae"], len(content["stream"]["ids"]), len(content["vocab"])
    features, window = content["features"], content["window"]
    if len(window) != 2:
        raise ValueError(f"the window is {window}, two numbers are expected")
    return Explorer(
        **{name: content[name] for name in PLAIN},
        vocab=tuple(content["vocab"]),
        stream=TokenTable(
            row_starts=_starts(content["stream"]["row_starts"], None, n_ids),
            ids=_indices(content["stream"]["ids"], n_vocab),
        ),
        features=_features(content, n),
        contexts=_contexts(content, features["context_starts"], "contexts", "marks"),
        quantile_contexts=_contexts(content, features["quantile_starts"], "quantile_contexts", "quantile_marks"),
        window=(window[0], window[1]),
        logits=_token_effects(content["logits"], n, n_vocab),
        logit_count=content["logit_count"],
        logit_direction=content["logit_direction"],
        logits_note=content["logits_note"],
        pairs=_pairs(content, n, n_ids, n_vocab),
        provenance=content["provenance"],
    )


def _features(content: Mapping[str, Any], n: int) -> FeatureFigures:
    features = content["features"]
    histogram = _ints(features["histogram"], n * content["bins"])
    return FeatureFigures(
        tokens=_ints(features["tokens"], n),
        max=_floats(features["max"], n),
        mean=_floats(features["mean"], n),
        histogram=histogram.reshape(n, content["bins"]),
        shares={
            gauge: {path: _floats(features["shares"][gauge][path], n) for path in content["paths"]}
            for gauge in content["gauges"]
        },
    )


def _contexts(content: Mapping[str, Any], starts: Sequence[int], name: str, marks: str) -> Contexts:
    contexts, marks_of = content[name], content[marks]
    n = len(contexts["position"])
    return Contexts(
        starts=_starts(starts, content["d_sae"], n),
        position=_indices(contexts["position"], len(content["stream"]["ids"])),
        mark_starts=_starts(contexts["mark_starts"], n, len(marks_of["offset"])),
        offset=_ints(marks_of["offset"]),
        strength=_ints(marks_of["strength"], len(marks_of["offset"])),
    )


def _token_effects(content: Mapping[str, Any], n: int, n_vocab: int) -> TokenEffects:
    return TokenEffects(
        starts=_starts(content["starts"], n, len(content["token"])),
        token=_indices(content["token"], n_vocab),
        value=_floats(content["value"], len(content["token"])),
    )


def _pairs(content: Mapping[str, Any], d_sae: int, n_ids: int, n_vocab: int) -> PairFigures:
    pairs, contexts, n = content["pairs"], content["pair_contexts"], len(content["pairs"]["first"])
    return PairFigures(
        first=_indices(pairs["first"], d_sae),
        second=_indices(pairs["second"], d_sae, n),
        tokens=_ints(pairs["tokens"], n),
        share=_floats(pairs["share"], n),
        norm=_floats(pairs["norm"], n),
        max_norm=_floats(pairs["max_norm"], n),
        context_starts=_starts(pairs["context_starts"], n, len(contexts["position"])),
        position=_indices(contexts["position"], n_ids),
        context_norm=_floats(contexts["norm"], len(contexts["position"])),
        logits=_token_effects(content["pair_logits"], n, n_vocab),
        fired=content["pair_totals"]["pairs"],
        firings=content["pair_totals"]["firings"],
    )


def _ints(values: Sequence[int], n: int | None = None) -> Ints:
    found = np.asarray(values, dtype=np.int64)
    if found.ndim != 1 or n not in (None, len(found)):
        raise ValueError(f"a column of shape {found.shape} where {n} numbers are expected")
    return found


def _floats(values: Sequence[float], n: int) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (n,):
        raise ValueError(f"a column of shape {found.shape} where {n} numbers are expected")
    return found


def _indices(values: Sequence[int], below: int, n: int | None = None) -> Ints:
    found = _ints(values, n)
    if len(found) and not 0 <= found.min() <= found.max() < below:
        raise ValueError(f"an index outside 0 to {below - 1}")
    return found


def _starts(values: Sequence[int], n: int | None, total: int) -> Ints:
    found = _ints(values, None if n is None else n + 1)
    if len(found) == 0 or found[0] != 0 or found[-1] != total or bool((np.diff(found) < 0).any()):
        raise ValueError(f"starts that do not divide {total} entries")
    return found
