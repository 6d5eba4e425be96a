"""What an explorer shows of one SAE, and its file: columns over features, their contexts, the logits they move, their pairs.

Lists of different length are one long array with `starts`: those of item i are [starts[i] : starts[i + 1]]. Texts are in
`vocab`; a token is an index into it, and a position is an index into `stream.ids`.

explorer.json.gz is one compressed JSON object of these columns, small enough to embed in a page. Numbers have four significant
digits, those of logits and context norms three; no space, time stamp or file name, so that equal content gives equal bytes.
Beside the fields below it has `bins` (of every histogram), `paths` and `gauges` (of the shares).
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_nfm.common import ShortRepr, checked, reading, whole
from sae_nfm.common.options import sampled_text
from sae_nfm.common.results import without_kind

FULL = 255
"""Strength of a mark at the feature's largest activation."""
KIND, FILENAME = "explore/1", "explorer.json.gz"
LARGEST = 512 * 2**20
"""Bytes of an unpacked explorer file that is read."""
REMEDY = "regenerate it with `sae-nfm explore`"
PLAIN = ("sae", "architecture", "model_name", "hook_name", "d_in", "d_sae", "k", "tokens", "documents")
"""Fields that are written as they are, first of all."""
PLAIN_LAST = ("logit_count", "logit_direction", "logits_note", "provenance")

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenTable(ShortRepr):
    """The pieces of the held-out rows in which some context lies."""

    row_starts: Ints
    """Where each piece begins in `ids`, and where the last one ends."""
    ids: Ints


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Contexts(ShortRepr):
    """Tokens on which each feature fires, and where else in their windows it does."""

    starts: Ints
    """Of each feature, into `position`; one more than features."""
    position: Ints
    """The token, in the stream; of one feature descending by activation."""
    mark_starts: Ints
    """Of each context, into `offset` and `strength`; one more than contexts."""
    offset: Ints
    """A token of the window on which the feature fires, relative to the context's."""
    strength: Ints
    """Its activation there in 255ths of the feature's largest, 1 to 255."""

    def of(self, feature: int) -> range:
        """The contexts of a feature, as places in `position`."""
        return range(int(self.starts[feature]), int(self.starts[feature + 1]))

    def marks(self, context: int) -> Iterator[tuple[int, int]]:
        """Offset and strength of every mark of a context."""
        here = slice(self.mark_starts[context], self.mark_starts[context + 1])
        yield from zip(self.offset[here].tolist(), self.strength[here].tolist(), strict=True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FeatureFigures(ShortRepr):
    """Statistics of every feature, [d_sae]; 0 for one that never fired."""

    tokens: Ints
    """Tokens on which it fires (its activation is positive)."""
    max: Floats
    mean: Floats
    """Mean activation where it fires."""
    histogram: Ints
    """[d_sae, bins]: firings by activation; the bins divide (0, max] of each feature equally."""
    shares: Mapping[str, Mapping[str, Floats]]
    """By gauge and path: the path's part of the sum of the feature's root-mean-square contributions (`path_sums`)."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenEffects(ShortRepr):
    """Logits that move most, for each feature or pair: as many up, descending, as then down, ascending."""

    starts: Ints
    """Of each feature or pair; one more than there are."""
    token: Ints
    value: Floats
    """What its logit gains, less the mean over all tokens."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PairFigures(ShortRepr):
    """Pairs of features, descending by energy."""

    first: Ints
    second: Ints
    tokens: Ints
    share: Floats
    """Part of the summed energy ||o_ij||^2 of all pairs that fired."""
    norm: Floats
    """Mean ||o_ij|| where the pair fires."""
    max_norm: Floats
    context_starts: Ints
    """Of each pair, into `position` and `context_norm`; one more than pairs."""
    position: Ints
    """A token on which the pair writes much, in the stream; of one pair descending by norm."""
    context_norm: Floats
    """||o_ij|| there."""
    logits: TokenEffects
    """For the mean of what the pair writes, every gate at its mean over all tokens; without any for the weaker pairs."""
    fired: int
    """Pairs that fired, those that are not kept here too."""
    firings: int
    """Pairs that fired, summed over tokens."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Explorer:
    """Everything about one SAE on held-out text."""

    sae: str
    architecture: str
    model_name: str
    hook_name: str
    d_in: int
    d_sae: int
    k: int | None
    """Features active on a token, where that is fixed."""
    tokens: int
    """Tokens looked at: not special, not in position 0."""
    documents: int
    vocab: tuple[str, ...]
    stream: TokenTable
    features: FeatureFigures
    contexts: Contexts
    quantile_contexts: Contexts
    """Firings of each from its whole range, at evenly spaced ranks."""
    window: tuple[int, int]
    """Tokens before and after a context's that its marks cover."""
    logits: TokenEffects
    """What a unit of each feature adds to the logits on the direct path."""
    logit_count: int
    logit_direction: str
    """Along which rows: "W_dec", or "W_dec + W_lin"."""
    logits_note: str
    """Why there are none; else empty."""
    pairs: PairFigures
    """Pairs of features on the interaction path."""
    provenance: Mapping[str, Any]
    """Configuration, versions, sha256 of tokens and SAE."""

    @property
    def alive(self) -> Ints:
        """The features that fired."""
        return np.flatnonzero(self.features.tokens).astype(np.int64)

    @property
    def sampled(self) -> str:
        """What is to be said of its text where that was sampled from the model; else nothing."""
        config = self.provenance.get("config", {})
        return sampled_text(self.model_name, config["held_out"]) if "held_out" in config else ""

    def save(self, path: str | Path) -> int:
        """Write it, under a temporary name first; returns the file's size in bytes. Equal content gives equal bytes."""
        text = json.dumps(_content(self), separators=(",", ":"), ensure_ascii=False)
        packed = gzip.compress(text.encode(), compresslevel=9, mtime=0)
        with whole(path) as partial:
            partial.write_bytes(packed)
        return len(packed)

    @classmethod
    def load(cls, path: str | Path) -> "Explorer":
        """Read what `save` wrote: `explorer.json.gz`, or the folder that has it.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is damaged, or of another kind.
        """
        path = Path(path) / FILENAME if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; give an {FILENAME}, or make one with `sae-nfm explore`")
        checked(path)
        with reading(path, f"an undamaged {FILENAME}", remedy=REMEDY), gzip.open(path) as packed:
            text = packed.read(LARGEST + 1)
            if len(text) > LARGEST:
                raise ValueError(f"unpacked it has more than {LARGEST:,} bytes")
            return _explorer(without_kind(KIND, json.loads(text)))


def _content(explorer: Explorer) -> dict[str, Any]:
    features, pairs = explorer.features, explorer.pairs
    gauges = list(features.shares)
    return {
        "kind": KIND,
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
        **{name: getattr(explorer, name) for name in ("logit_count", "logit_direction", "logits_note")},
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
    features, window, bins = content["features"], content["window"], content["bins"]
    pairs, at_pairs, n_pairs = content["pairs"], content["pair_contexts"], len(content["pairs"]["first"])
    floats = {name: _floats(pairs[name], n_pairs) for name in ("share", "norm", "max_norm")}
    if len(window) != 2:
        raise ValueError(f"the window is {window}, two numbers are expected")
    return Explorer(
        **{name: content[name] for name in PLAIN},
        vocab=tuple(content["vocab"]),
        stream=TokenTable(
            row_starts=_starts(content["stream"]["row_starts"], None, n_ids),
            ids=_indices(content["stream"]["ids"], n_vocab),
        ),
        features=FeatureFigures(
            tokens=_ints(features["tokens"], n),
            max=_floats(features["max"], n),
            mean=_floats(features["mean"], n),
            histogram=_ints(features["histogram"], n * bins).reshape(n, bins),
            shares={
                gauge: {path: _floats(features["shares"][gauge][path], n) for path in content["paths"]}
                for gauge in content["gauges"]
            },
        ),
        contexts=_contexts(content, features["context_starts"], "contexts", "marks"),
        quantile_contexts=_contexts(content, features["quantile_starts"], "quantile_contexts", "quantile_marks"),
        window=(window[0], window[1]),
        logits=_token_effects(content["logits"], n, n_vocab),
        **{name: content[name] for name in PLAIN_LAST},
        pairs=PairFigures(
            first=_indices(pairs["first"], n),
            second=_indices(pairs["second"], n, n_pairs),
            tokens=_ints(pairs["tokens"], n_pairs),
            **floats,
            context_starts=_starts(pairs["context_starts"], n_pairs, len(at_pairs["position"])),
            position=_indices(at_pairs["position"], n_ids),
            context_norm=_floats(at_pairs["norm"], len(at_pairs["position"])),
            logits=_token_effects(content["pair_logits"], n_pairs, n_vocab),
            fired=content["pair_totals"]["pairs"],
            firings=content["pair_totals"]["firings"],
        ),
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


def _ints(values: Sequence[float], n: int | None = None, dtype: Any = np.int64) -> NDArray[Any]:
    found = np.asarray(values, dtype=dtype)
    if found.ndim != 1 or n not in (None, len(found)):
        raise ValueError(f"a column of shape {found.shape} where {n} numbers are expected")
    return found


def _floats(values: Sequence[float], n: int) -> Floats:
    return _ints(values, n, np.float64)


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


def starts_of(lengths: list[int] | Ints) -> Ints:
    """Where lists of some lengths start in one long list, and where it ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
