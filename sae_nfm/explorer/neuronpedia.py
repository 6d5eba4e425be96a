"""An explorer's features as JSON lines with the names that Neuronpedia and SAEDashboard use for the same things.

One line for each feature that fired, with its contexts in it:

    modelId, layer, index           layer: the source, such as "2-res"; index is a text there
    maxActApprox, frac_nonzero      largest activation, share of tokens on which it fires
    pos_str, pos_values             logits that it moves most up, descending; neg_str, neg_values: down, ascending
    freq_hist_data_bar_values       middles of the bins of its histogram; freq_hist_data_bar_heights: firings in them
    activations                     contexts: tokens, values, maxValue, maxValueTokenIndex, minValue, qualifyingTokenIndex (the
                                    token that the context was chosen for), binMin, binMax, binContains

The strongest contexts have binMin -1, binMax the largest activation and binContains -1, as there; one from the whole range has
in binContains the share of firings that it stands for, and null limits. Values are in 255ths of the largest activation.

What an explorer does not have is left out: alignment with neurons, correlated neurons and features, the histogram of all logits,
the distribution over heads, vectors, explanations. Nothing there is for pairs of features: they get a file of their own, with
the names of `explorer_data.PairFigures`.

Source: field names of SAEDashboard's neuronpedia converter and of Neuronpedia's tables Neuron (here Feature) and Activation.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_nfm.common import check_writable, whole
from sae_nfm.explorer.results import FULL, Contexts, Explorer, TokenEffects

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which explorer, and where its features go."""

    explorer: str
    """An explorer.json.gz, or the folder that has it."""
    output: str
    """File for the features, a line each: .jsonl, or .jsonl.gz to compress it."""
    model_id: str | None = None
    """Neuronpedia's name of the model; the explorer's unless given."""
    source_id: str | None = None
    """Neuronpedia's name of the SAE there, such as 2-res; the hook point unless given."""
    pairs: bool = False
    """Write the pairs too, to a file beside it that ends in .pairs.jsonl."""

    def __post_init__(self) -> None:
        """Refuse an output that is no file of lines."""
        if not self.output.endswith(SUFFIXES):
            raise ValueError(f"the output {self.output!r} ends in neither .jsonl nor .jsonl.gz; give a file that does")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `sae-nfm export` wrote."""

    file: str
    features: int
    contexts: int
    pairs_file: str | None
    pairs: int
    without_logits: bool
    """Whether the explorer has no logits."""

    def words(self) -> str:
        """For the terminal."""
        lines = [f"{self.file}: {self.features:,} features with {self.contexts:,} contexts"]
        if self.pairs_file is not None:
            lines.append(f"{self.pairs_file}: {self.pairs:,} pairs")
        if self.without_logits:
            lines.append("the explorer has no logits, so that pos_str and neg_str are empty")
        return "\n".join(lines)


def export(config: ExportConfig) -> Exported:
    """Write the features of an explorer, and its pairs where asked for, as JSON lines.

    Raises:
        FileNotFoundError: when there is no explorer.
        ValueError: when it is damaged or of another format, or pairs are asked for and it has none; nothing is written.
    """
    suffix = next(suffix for suffix in SUFFIXES if config.output.endswith(suffix))
    pairs_file = f"{config.output.removesuffix(suffix)}.pairs{suffix}" if config.pairs else None
    check_writable(config.output)
    check_writable(pairs_file)
    explorer = Explorer.load(config.explorer)
    n_pairs = len(explorer.pairs.first)
    if config.pairs and not n_pairs:
        raise ValueError(f"{explorer.sae} ({explorer.architecture}) has no pairs of features; leave --pairs out")
    ids = {"modelId": config.model_id or explorer.model_name, "layer": config.source_id or explorer.hook_name}
    _write(config.output, (ids | feature for feature in features(explorer)))
    if pairs_file is not None:
        _write(pairs_file, (ids | pair for pair in pairs(explorer)))
    return Exported(
        file=config.output,
        features=len(explorer.alive),
        contexts=len(explorer.contexts.position) + len(explorer.quantile_contexts.position),
        pairs_file=pairs_file,
        pairs=n_pairs if config.pairs else 0,
        without_logits=explorer.logit_count == 0,
    )


def features(explorer: Explorer) -> Iterator[dict[str, Any]]:
    """The lines of the features, without the names of model and source."""
    figures, bins = explorer.features, explorer.features.histogram.shape[1]
    for feature in explorer.alive.tolist():
        largest = float(figures.max[feature])
        middles = (np.arange(bins) + 0.5) * largest / bins
        top, spread = explorer.contexts.of(feature), explorer.quantile_contexts.of(feature)
        of_top = {"binMin": -1, "binMax": largest, "binContains": -1}
        of_spread = {"binMin": None, "binMax": None, "binContains": 1 / max(1, len(spread))}
        yield {
            "index": str(feature),
            "maxActApprox": largest,
            "frac_nonzero": float(figures.tokens[feature]) / explorer.tokens,
            **_logits(explorer, explorer.logits, feature),
            "freq_hist_data_bar_values": [_short(middle) for middle in middles.tolist()],
            "freq_hist_data_bar_heights": figures.histogram[feature].tolist(),
            "activations": [
                *(_activation(explorer, explorer.contexts, one, largest) | of_top for one in top),
                *(_activation(explorer, explorer.quantile_contexts, one, largest) | of_spread for one in spread),
            ],
        }


def pairs(explorer: Explorer) -> Iterator[dict[str, Any]]:
    """The lines of the pairs, without the names of model and source; `activations` have the norm at the pair's token."""
    figures = explorer.pairs
    for pair in range(len(figures.first)):
        here = slice(figures.context_starts[pair], figures.context_starts[pair + 1])
        contexts = zip(figures.position[here].tolist(), figures.context_norm[here].tolist(), strict=True)
        yield {
            "pair": [int(figures.first[pair]), int(figures.second[pair])],
            "tokens": int(figures.tokens[pair]),
            "share": float(figures.share[pair]),
            "norm": float(figures.norm[pair]),
            "max_norm": float(figures.max_norm[pair]),
            **_logits(explorer, figures.logits, pair),
            "activations": [
                {
                    "tokens": [explorer.vocab[explorer.stream.ids[place]] for place in _window(explorer, position)],
                    "qualifyingTokenIndex": position - _window(explorer, position).start,
                    "norm": norm,
                }
                for position, norm in contexts
            ],
        }


def _activation(explorer: Explorer, contexts: Contexts, context: int, largest: float) -> dict[str, Any]:
    position = int(contexts.position[context])
    window = _window(explorer, position)
    values = [0.0] * len(window)
    for offset, strength in contexts.marks(context):
        values[position + offset - window.start] = _short(strength / FULL * largest)
    return {
        "tokens": [explorer.vocab[explorer.stream.ids[place]] for place in window],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "qualifyingTokenIndex": position - window.start,
    }


def _window(explorer: Explorer, position: int) -> range:
    """The tokens around one, as places in the stream, within its piece."""
    starts, (before, after) = explorer.stream.row_starts, explorer.window
    piece = int(np.searchsorted(starts, position, side="right")) - 1
    return range(max(position - before, int(starts[piece])), min(position + after + 1, int(starts[piece + 1])))


def _logits(explorer: Explorer, effects: TokenEffects, of: int) -> dict[str, Any]:
    here = slice(effects.starts[of], effects.starts[of + 1])
    texts, values = [explorer.vocab[token] for token in effects.token[here]], effects.value[here].tolist()
    n = len(texts) // 2
    return {"pos_str": texts[:n], "pos_values": values[:n], "neg_str": texts[n:], "neg_values": values[n:]}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _write(path: str, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line; equal content gives equal bytes."""
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode()
    with whole(path) as partial:
        Path(partial).write_bytes(gzip.compress(text, mtime=0) if path.endswith(".gz") else text)
