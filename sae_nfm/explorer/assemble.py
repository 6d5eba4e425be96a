"""From activations and pairs to an explorer: which text is needed, how it is numbered, which logits move.

Logits are those of the direct path, through the final normalisation and the unembedding alone. For a vector v that a path writes,
with the scale of the final normalisation held:

    logits(v) = factor * N(v) W_U,     less the mean over all tokens

N is the linear part of the final normalisation and `factor` its 1 / scale averaged over the held-out tokens
(`Firings.logit_factor`), so that this is the exact mean of what v adds on these tokens. A soft cap is left out.

The vector of a feature is what one unit of it writes: W_dec_i; and where W_dec and W_lin are one decoder up to gauge, their sum,
which no gauge changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor

from sae_nfm.analysis import gauges, has_canonical
from sae_nfm.architectures import PathWeights, attributable
from sae_nfm.attribution import CAPACITY, Corpus, DirectPath, PairSums, pair_sums, strongest_firings
from sae_nfm.explorer.activations import Firings, feature_contexts, histograms, maxima
from sae_nfm.explorer.results import (
    Contexts,
    Explorer,
    FeatureFigures,
    Floats,
    Ints,
    PairFigures,
    TokenEffects,
    TokenTable,
    starts_of,
)
from sae_nfm.models import LanguageModel

AT_ONCE = 128
"""Vectors whose logits [vectors, d_vocab] exist at one time: with 250,000 tokens, 128 MB."""

NONE = np.zeros(0, dtype=np.int64)
METASPACE = "\u2581"
"""What SentencePiece tokens begin with in place of a space; decoded alone they lose it."""


@dataclass(frozen=True, kw_only=True)
class ExplorerSizes:
    """How much of an SAE to show."""

    contexts: int = 15
    """Contexts of each feature where it is strongest."""
    quantile_contexts: int = 5
    """Contexts of each feature from its whole range, at evenly spaced ranks of its activations."""
    before: int = 14
    """Tokens before a context's token."""
    after: int = 6
    """Tokens after it."""
    bins: int = 20
    """Bins of each feature's histogram."""
    logits: int = 8
    """Logits that each feature and pair moves most: as many up as down."""
    pairs: int = 4_000
    """Pairs of features, those of most energy."""
    partners: int = 3
    """Strongest pairs of each feature, beside those."""
    pair_contexts: int = 5
    """Contexts of each pair."""
    pair_logits: int = 1_000
    """Pairs, of most energy, with logits."""
    batch_rows: int = 16
    """Rows in a forward pass."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for field in fields(ExplorerSizes):
            value, least = getattr(self, field.name), 1 if field.name in ("bins", "batch_rows") else 0
            if value < least:
                raise ValueError(f"{field.name} is {value}; give {'a positive whole number' if least else '0 or more'}")


def assembled(
    model: LanguageModel,
    sae: SAE[Any],
    firings: Firings,
    pairs: ShownPairs | None,
    documents: Int[Tensor, "rows pos"] | None,
    *,
    name: str,
    sizes: ExplorerSizes,
    provenance: Mapping[str, Any],
) -> Explorer:
    """The explorer of what was found.

    Args:
        pairs: of its features, where it has them.
        sizes: how much of it.
        provenance: where it is from.
    """
    window = sizes.before, sizes.after
    top, spread = feature_contexts(firings, n=sizes.contexts, quantiles=sizes.quantile_contexts, window=window)
    note = note_without(model, sae)
    n_logits = 0 if note else sizes.logits
    effects = _feature_logits(model, sae, firings, n_logits), _pair_logits(model, sae, firings, pairs, n_logits)
    at_pairs = NONE if pairs is None else pairs.position
    table, new_place = text_of(firings.tokens, (top.position, spread.position, at_pairs), window)
    vocab = np.unique(np.concatenate([table.ids, effects[0].token, effects[1].token]))
    numbered = [replace(one, token=np.searchsorted(vocab, one.token)) for one in effects]
    return Explorer(
        sae=name,
        **_described(sae),
        tokens=int(firings.counted.sum()),
        documents=_documents(firings.counted, documents),
        vocab=token_texts(model, vocab),
        stream=replace(table, ids=np.searchsorted(vocab, table.ids)),
        features=_feature_figures(firings, sizes.bins),
        contexts=_moved(top, new_place),
        quantile_contexts=_moved(spread, new_place),
        window=window,
        logits=numbered[0],
        logit_count=n_logits,
        logit_direction=direction_name(sae),
        logits_note=note,
        pairs=_pair_figures(pairs, numbered[1], new_place),
        provenance=provenance,
    )


def _described(sae: SAE[Any]) -> dict[str, Any]:
    k: Any = getattr(sae.cfg, "k", None)
    return {
        "architecture": sae.cfg.architecture(),
        "model_name": str(sae.cfg.metadata.model_name),
        "hook_name": str(sae.cfg.metadata.hook_name),
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "k": k if isinstance(k, int) else None,
    }


def text_of(tokens: NDArray[np.int64], positions: tuple[Ints, ...], window: tuple[int, int]) -> tuple[TokenTable, Ints]:
    """The pieces of rows that the windows around some positions cover.

    Args:
        tokens: [rows, pos].
        positions: row * pos + position.
        window: tokens before and after.

    Returns:
        The text, its ids still the model's; and where each token of the rows stands in it.
    """
    chosen, width = np.unique(np.concatenate(positions)), tokens.shape[1]
    row = chosen - chosen % width
    edges = np.zeros(tokens.size + 1, dtype=np.int64)
    np.add.at(edges, np.maximum(chosen - window[0], row), 1)
    np.add.at(edges, np.minimum(chosen + window[1] + 1, row + width), -1)
    kept = np.cumsum(edges)[:-1] > 0
    before = np.roll(kept, 1)
    before[::width] = False
    new_place = np.cumsum(kept) - 1
    starts = np.append(new_place[kept & ~before], int(kept.sum()))
    return TokenTable(row_starts=starts, ids=tokens.ravel()[kept]), new_place


def token_texts(model: LanguageModel, ids: Ints) -> tuple[str, ...]:
    """The text of each token by itself; its number where the model has no tokenizer."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return tuple(map(str, ids.tolist()))
    return tuple(_text(tokenizer, one) for one in ids.tolist())


def _text(tokenizer: Any, token: int) -> str:
    text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    loses_space = isinstance(piece, str) and piece.startswith(METASPACE) and not text.startswith(" ")
    return f" {text}" if loses_space else text


def _feature_figures(firings: Firings, bins: int) -> FeatureFigures:
    count = firings.count
    totals = np.bincount(firings.feature, weights=firings.values, minlength=len(count))
    return FeatureFigures(
        tokens=count,
        max=maxima(firings),
        mean=np.divide(totals, count, out=np.zeros_like(totals), where=count > 0),
        histogram=histograms(firings, bins),
        shares=firings.shares,
    )


def _feature_logits(model: LanguageModel, sae: SAE[Any], firings: Firings, n: int) -> TokenEffects:
    alive, d_sae = np.flatnonzero(firings.count), sae.cfg.d_sae
    return token_effects(model, sae, directions(sae, alive), alive, d_sae, firings.logit_factor, n)


def _pair_logits(
    model: LanguageModel, sae: SAE[Any], firings: Firings, pairs: ShownPairs | None, n: int
) -> TokenEffects:
    mean, total = (torch.zeros(0, sae.cfg.d_in), 0) if pairs is None else (pairs.mean, len(pairs.first))
    return token_effects(model, sae, mean, np.arange(len(mean)), total, firings.logit_factor, n)


def _moved(contexts: Contexts, new_place: Ints) -> Contexts:
    return replace(contexts, position=new_place[contexts.position])


def _pair_figures(pairs: ShownPairs | None, logits: TokenEffects, new_place: Ints) -> PairFigures:
    if pairs is None:
        none: Any = np.zeros(0)
        return PairFigures(
            first=NONE, second=NONE, tokens=NONE, share=none, norm=none, max_norm=none, position=NONE,
            context_starts=np.zeros(1, dtype=np.int64), context_norm=none, logits=logits, fired=0, firings=0,
        )  # fmt: skip
    table = pairs.table
    return PairFigures(
        first=pairs.first,
        second=pairs.second,
        tokens=table["tokens"].to_numpy().astype(np.int64),
        share=pairs.share,
        norm=(table["norm"] / table["tokens"]).to_numpy(),
        max_norm=table["norm_max"].to_numpy(),
        context_starts=pairs.context_starts,
        position=new_place[pairs.position],
        context_norm=pairs.norm,
        logits=logits,
        fired=pairs.fired,
        firings=pairs.firings,
    )


def _documents(counted: NDArray[np.bool_], documents: Tensor | None) -> int:
    if documents is None:
        return int(counted.any(axis=1).sum())
    return len(np.unique(documents.cpu().numpy()[counted]))


def direction_name(sae: SAE[Any]) -> str:
    """Along which rows a feature's logits are."""
    return "W_dec + W_lin" if has_canonical(sae) else "W_dec"


def directions(sae: SAE[Any], features: Ints) -> Float[Tensor, "features d_in"]:
    """What one unit of some features writes there."""
    *_, rows = gauges(sae).values()
    return rows.direct[torch.from_numpy(features).to(rows.direct.device)]


def note_without(model: LanguageModel, sae: SAE[Any]) -> str:
    """Why there are no logits; empty where there are."""
    try:
        DirectPath(model, sae)
    except ValueError as error:
        return str(error)
    return ""


@torch.no_grad()
def token_effects(
    model: LanguageModel,
    sae: SAE[Any],
    vectors: Float[Tensor, "some d_in"],
    of: Ints,
    total: int,
    factor: float,
    n: int,
) -> TokenEffects:
    """The n logits that move most up, and down, for each vector; token ids as the model's.

    Args:
        vectors: what is written.
        of: which feature or pair each is of, ascending; the others have no logits.
        total: features, or pairs.
        factor: see the module.
        n: up and down; 0 for none.
    """
    tokens, values = [np.zeros((0, 2 * n), dtype=np.int64)], [np.zeros((0, 2 * n))]
    for some in vectors.split(AT_ONCE) if n and len(of) else ():
        logits = _logits(model, sae, some, factor)
        if 2 * n > logits.shape[-1]:
            raise ValueError(f"logits is {n}, up and down, but the model has {logits.shape[-1]} tokens; give fewer")
        up, down = logits.topk(n), logits.topk(n, largest=False)
        tokens.append(torch.cat([up.indices, down.indices], -1).cpu().numpy())
        values.append(torch.cat([up.values, down.values], -1).double().cpu().numpy())
    lengths = np.zeros(total, dtype=np.int64)
    lengths[of] = 2 * n
    return TokenEffects(
        starts=starts_of(lengths), token=np.concatenate(tokens).ravel(), value=np.concatenate(values).ravel()
    )


def _logits(model: LanguageModel, sae: SAE[Any], vectors: Tensor, factor: float) -> Float[Tensor, "some d_vocab"]:
    """What vectors add to the logits, less the mean over all tokens."""
    weight = next(model.parameters())
    scale = torch.full((1, 1), 1 / factor).to(weight)
    logits = DirectPath(model, sae).logits(vectors.to(weight), scale).float()
    return logits - logits.mean(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownPairs:
    """The pairs shown, descending by energy."""

    table: pd.DataFrame
    """Their rows of `PairSums.table`."""
    first: Ints
    second: Ints
    share: Floats
    """Energy of each over that of all pairs."""
    context_starts: Ints
    """Of each pair, into `position` and `norm`."""
    position: Ints
    """Where each writes most, row * pos + position."""
    norm: Floats
    """||o_ij|| there."""
    mean: Float[Tensor, "pairs d_in"]
    """What each writes on average where it fires, every gate at its mean over all tokens; of the first pairs only."""
    fired: int
    firings: int
    """The same summed over tokens."""


def has_pairs(sae: SAE[Any]) -> bool:
    """Whether the interaction path is a sum over pairs."""
    try:
        attributable(sae)
    except ValueError:
        return False
    return True


def shown_pairs(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Tensor,
    *,
    pairs: int,
    partners: int,
    contexts: int,
    described: int,
    capacity: int = CAPACITY,
    batch_rows: int = 16,
    show_progress: bool = True,
) -> ShownPairs:
    """Choose pairs and find their contexts: two passes over the tokens, three where more pairs fire than fit.

    Args:
        sae: an SAE that `has_pairs`.
        pairs: pairs of most energy.
        partners: strongest pairs of each feature beside them.
        contexts: of each pair, at most.
        described: pairs, of most energy, of which the mean is kept.
        capacity: see `pair_sums`.
    """
    corpus = Corpus(model, sae, tokens, batch_rows=batch_rows, show_progress=show_progress)
    sums, weights = pair_sums(corpus, capacity=capacity), PathWeights.of(sae)
    table: Any = sums.table.iloc[_chosen(*sums.features(), pairs, partners)]
    first, second = sums.features(table)
    keys = np.asarray(table.index, dtype=np.int64)
    firings: Any = strongest_firings(corpus, keys, n=contexts)
    pair = table.index.get_indexer(firings.index)
    order = np.argsort(pair, kind="stable")  # as the pairs stand, by energy
    return ShownPairs(
        table=table,
        first=first,
        second=second,
        share=table["energy"].to_numpy() / sums.energy if sums.energy else table["energy"].to_numpy(),
        context_starts=starts_of(np.bincount(pair, minlength=len(table))),
        position=firings["place"].to_numpy()[order],
        norm=firings["norm"].to_numpy()[order],
        mean=mean_written(sums, weights, table.iloc[:described]),
        fired=len(sums.table),
        firings=sums.firings,
    )


def _chosen(first: Ints, second: Ints, pairs: int, partners: int) -> Ints:
    """Places of the first pairs and of the first few of each feature, in their order."""
    place = np.tile(np.arange(len(first)), 2)
    by_feature: Any = pd.DataFrame({"feature": np.concatenate([first, second]), "place": place})
    strongest = by_feature.sort_values("place", kind="stable").groupby("feature").head(partners)
    return np.union1d(np.arange(min(pairs, len(first))), strongest["place"].to_numpy()).astype(np.int64)


@torch.no_grad()
def mean_written(sums: PairSums, weights: PathWeights, table: Any) -> Float[Tensor, "pairs d_in"]:
    """mean(f_i f_j) ((v_i * v_j) W_1 mean(D)) W_2: what pairs write on average where they fire, but for the gates' variation."""
    first, second = (torch.from_numpy(features).to(weights.V.device) for features in sums.features(table))
    product = torch.tensor((table["product"] / table["tokens"]).to_numpy()).to(weights.V)
    pooled = product[:, None] * weights.V[first] * weights.V[second]
    return ((pooled @ weights.W_1) * sums.gates.to(weights.V)) @ weights.W_2
