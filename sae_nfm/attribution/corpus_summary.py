"""The pairs of a corpus in words: the strongest with their contexts, the weight-only view, the co-occurrence control."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.corpus import Corpus, first_reads
from sae_nfm.attribution.graph import InteractionGraph, interaction_graph
from sae_nfm.attribution.pair_table import Context, pair_sums, top_contexts
from sae_nfm.attribution.weight_only import Correlation, PairControls, pair_controls


@dataclass(frozen=True, kw_only=True)
class CorpusAttribution:
    """Pairs over held-out tokens."""

    tokens: int
    """Tokens looked at: not special, not in position 0."""
    pairs: int
    """Pairs in the table."""
    firings: int
    """Pairs that fired, summed over tokens."""
    complete: bool
    """Whether the table has every pair that fired; its figures are exact in any case."""
    slack_share: float
    """Otherwise the largest energy share that a pair outside the table can have."""
    target: str | None
    """What effects are on: a target's direct effect, at the token where the pair fires."""
    graph: InteractionGraph
    """The strongest pairs with their figures, and their features."""
    contexts: tuple[tuple[Context, ...], ...]
    """Where the first of them write most."""
    controls: PairControls
    """What pair strength goes with."""

    def words(self) -> str:
        """For the terminal."""
        scope = (
            "every pair that fired is counted"
            if self.complete
            else (
                f"figures of the pairs kept are exact; a pair that was dropped has at most {self.slack_share:.1e} of the energy"
            )
        )
        lines = [
            f"{self.pairs:,} pairs over {self.tokens:,} tokens, {self.firings / self.tokens:.1f} firing a token; {scope}",
            "",
            f"Strongest pairs by energy{f'; effect: direct, on {self.target}' if self.target else ''}",
            self._table(),
            "",
            "Where they write most (||o_ij||; the token in [[ ]])",
        ]
        for edge, contexts in zip(self.graph.edges, self.contexts, strict=False):
            lines.append(f"  {edge.first} x {edge.second}")
            lines += [f"    {one.norm:.3g}  {one.text!r}" for one in contexts]
        return "\n".join([*lines, "", control_words(self.controls)])

    def _table(self) -> str:
        rows = [
            {
                "pair": f"{edge.first} x {edge.second}",
                "tokens": f"{edge.tokens:,}",
                "share of tokens": f"{edge.frequency:.2%}",
                "mean norm": f"{edge.norm_mean:.3g}",
                "max norm": f"{edge.norm_max:.3g}",
                "share of energy": f"{edge.energy_share:.2%}",
                **({} if edge.effect_mean is None else {"mean effect": f"{edge.effect_mean:+.4f}"}),
            }
            for edge in self.graph.edges[: len(self.contexts)]
        ]
        return pd.DataFrame(rows).to_string(index=False)


def attribute_corpus(
    corpus: Corpus,
    *,
    target: str | None = None,
    top: int = 10,
    graph_pairs: int = 500,
    n_contexts: int = 3,
    capacity: int | None = None,
    control_tokens: int = 10_000,
    n_permutations: int = 2,
    seed: int = 0,
) -> CorpusAttribution:
    """Sums, contexts and controls of a corpus.

    Args:
        corpus: held-out tokens.
        target: name of the corpus's target or direction, where it has one.
        top: pairs with contexts.
        graph_pairs: pairs in the graph.
        n_contexts: tokens for each of the top pairs.
        capacity: see `pair_sums`.
        control_tokens: tokens that the controls hold in memory, with every pair that fires on them.
        n_permutations: how often the controls deal the rows of V out anew.
        seed: of these permutations.
    """
    weights, sums = PathWeights.of(corpus.sae), pair_sums(corpus, capacity=capacity)
    keys = np.asarray(sums.table.index[:top], dtype=np.int64)
    contexts = top_contexts(corpus, keys, n=n_contexts)
    reads = first_reads(corpus.batches("Control tokens"), control_tokens)
    return CorpusAttribution(
        tokens=sums.tokens,
        pairs=len(sums.table),
        firings=sums.firings,
        complete=sums.complete,
        slack_share=sums.slack / sums.energy if sums.energy else 0.0,
        target=target,
        graph=interaction_graph(sums, weights, n=max(top, graph_pairs), directed=target is not None),
        contexts=tuple(contexts[int(key)] for key in keys),
        controls=pair_controls(reads, weights, seed=seed, n_permutations=n_permutations),
    )


def control_words(controls: PairControls) -> str:
    """The controls as two tables with what they say."""
    head = f"over {controls.pairs:,} pairs that fire on at least {controls.min_tokens} of {controls.tokens:,} tokens"
    weights = [_row(one) for one in controls.weights_against_tokens]
    cooccurrence = [
        _row(one) | {"null r": _range(one.null_pearson), "null rho": _range(one.null_spearman)}
        for one in controls.cooccurrence
    ]
    return "\n".join(
        [
            f"Weights alone against what pairs do on tokens, {head}",
            pd.DataFrame(weights).to_string(index=False),
            "",
            f"Is it co-occurrence? {head}; null: rows of V dealt out to other features",
            pd.DataFrame(cooccurrence).to_string(index=False),
            "A correlation that the null has too is due to the features' activations, not to which embeddings interact.",
        ]
    )


def _row(one: Correlation) -> dict[str, Any]:
    return {
        "pair strength": one.measure,
        "against": one.against,
        "r": _figure(one.pearson),
        "rho": _figure(one.spearman),
    }


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _range(values: tuple[float, ...]) -> str:
    if not values:
        return ""
    return f"{min(values):+.2f} to {max(values):+.2f}"
