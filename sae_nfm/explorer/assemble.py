"""From activations and pairs to an explorer: which text is needed, how it is numbered, which logits move.

Logits are those of the direct path, through the final normalisation and the unembedding alone. For a vector v that a path writes,
with the scale of the final normalisation held:

    logits(v) = factor * N(v) W_U,     less the mean over all tokens

N is the linear part of the final normalisation and `factor` its 1 / scale averaged over the held-out tokens
(`Firings.logit_factor`), so that this is the exact mean of what v adds on these tokens. A soft cap is left out.

The vector of a feature is what one unit of it writes: W_dec_i; and where W_dec and W_lin are one decoder up to gauge, their sum,
which no gauge changes.

Shown are the pairs of most energy, and of every feature the few strongest that it is in, so that each feature that interacts has
partners.
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
from sae_nfm.attribution import Corpus, DirectPath, PairSums, pair_sums, strongest_firings
from sae_nfm.common import check_positive
from sae_nfm.explorer.activations import Firings, feature_contexts, histograms, maxima
from sae_nfm.explorer.results import (
    Explorer,
    FeatureFigures,
    Ints,
    PairFigures,
    TokenEffects,
    TokenTable,
    starts_of,
)
from sae_nfm.models import LanguageModel, token_text

AT_ONCE = 128
"""Vectors whose logits [vectors, d_vocab] exist at one time: with 250,000 tokens, 128 MB."""

NONE, ZERO = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
NO_LOGITS = TokenEffects(starts=ZERO, token=NONE, value=np.zeros(0))
NO_PAIRS = PairFigures(
    first=NONE, second=NONE, tokens=NONE, share=np.zeros(0), norm=np.zeros(0), max_norm=np.zeros(0), position=NONE,
    context_starts=ZERO, context_norm=np.zeros(0), logits=NO_LOGITS, fired=0, firings=0,
)  # fmt: skip
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
        check_positive(self, "bins", "batch_rows")
        for field in fields(ExplorerSizes):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; give 0 or more")


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
    sizes: ExplorerSizes,
    *,
    show_progress: bool = True,
) -> tuple[PairFigures, Float[Tensor, "described d_in"]]:
    """Choose pairs of an SAE that `has_pairs` and find their contexts: two passes, three where more pairs fire than fit.

    Returns:
        The pairs, without logits and with positions row * pos + position; and what the first of them write on average.
    """
    corpus = Corpus(model, sae, tokens, batch_rows=sizes.batch_rows, show_progress=show_progress)
    sums, weights = pair_sums(corpus), PathWeights.of(sae)
    table: Any = sums.table.iloc[_chosen(*sums.features(), sizes.pairs, sizes.partners)]
    first, second = sums.features(table)
    keys = np.asarray(table.index, dtype=np.int64)
    firings: Any = strongest_firings(corpus, keys, n=sizes.pair_contexts)
    pair = table.index.get_indexer(firings.index)
    order = np.argsort(pair, kind="stable")  # as the pairs stand, by energy
    figures = PairFigures(
        first=first,
        second=second,
        tokens=table["tokens"].to_numpy().astype(np.int64),
        share=table["energy"].to_numpy() / sums.energy if sums.energy else table["energy"].to_numpy(),
        norm=(table["norm"] / table["tokens"]).to_numpy(),
        max_norm=table["norm_max"].to_numpy(),
        context_starts=starts_of(np.bincount(pair, minlength=len(table))),
        position=firings["place"].to_numpy()[order],
        context_norm=firings["norm"].to_numpy()[order],
        logits=NO_LOGITS,
        fired=len(sums.table),
        firings=sums.firings,
    )
    return figures, mean_written(sums, weights, table.iloc[: sizes.pair_logits])


def _chosen(first: Ints, second: Ints, pairs: int, partners: int) -> Ints:
    """Places of the first pairs and of the first few of each feature, in their order."""
    place = np.tile(np.arange(len(first)), 2)
    ends: Any = pd.DataFrame({"feature": np.concatenate([first, second]), "place": place})
    by_feature = ends.drop_duplicates()  # the square of a feature has one
    strongest = by_feature.sort_values("place", kind="stable").groupby("feature").head(partners)
    return np.union1d(np.arange(min(pairs, len(first))), strongest["place"].to_numpy()).astype(np.int64)


@torch.no_grad()
def mean_written(sums: PairSums, weights: PathWeights, table: Any) -> Float[Tensor, "pairs d_in"]:
    """mean(f_i f_j) ((v_i * v_j) W_1 mean(D)) W_2: what pairs write on average where they fire, but for the gates' variation."""
    first, second = (torch.from_numpy(features).to(weights.V.device) for features in sums.features(table))
    product = torch.tensor((table["product"] / table["tokens"]).to_numpy()).to(weights.V)
    if weights.B is None:
        pooled = product[:, None] * weights.V[first] * weights.V[second]
    else:
        pooled = product[:, None] * weights.products(first, second)
    return ((pooled @ weights.W_1) * sums.gates.to(weights.V)) @ weights.W_2


def assembled(
    model: LanguageModel,
    sae: SAE[Any],
    firings: Firings,
    pairs: PairFigures,
    written: Float[Tensor, "described d_in"],
    documents: Int[Tensor, "rows pos"] | None,
    *,
    name: str,
    sizes: ExplorerSizes,
    provenance: Mapping[str, Any],
) -> Explorer:
    """The explorer of what was found; pairs and what the first of them write are those of `shown_pairs`."""
    window, k = (sizes.before, sizes.after), getattr(sae.cfg, "k", None)
    top, spread = feature_contexts(firings, n=sizes.contexts, quantiles=sizes.quantile_contexts, window=window)
    note = note_without(model, sae)
    n_logits, factor = 0 if note else sizes.logits, firings.logit_factor
    alive, d_sae = np.flatnonzero(firings.count), sae.cfg.d_sae
    effects = (
        token_effects(model, sae, directions(sae, alive), alive, d_sae, factor, n_logits),
        token_effects(model, sae, written, np.arange(len(written)), len(pairs.first), factor, n_logits),
    )
    counted = firings.counted
    if documents is None:
        n_documents = int(counted.any(axis=1).sum())
    else:
        n_documents = len(np.unique(documents.cpu().numpy()[counted]))
    table, new_place = text_of(firings.tokens, (top.position, spread.position, pairs.position), window)
    vocab = np.unique(np.concatenate([table.ids, effects[0].token, effects[1].token]))
    numbered = [replace(one, token=np.searchsorted(vocab, one.token)) for one in effects]
    return Explorer(
        sae=name,
        architecture=sae.cfg.architecture(),
        model_name=str(sae.cfg.metadata.model_name),
        hook_name=str(sae.cfg.metadata.hook_name),
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        k=k if isinstance(k, int) else None,
        tokens=int(firings.counted.sum()),
        documents=n_documents,
        vocab=token_texts(model, vocab),
        stream=replace(table, ids=np.searchsorted(vocab, table.ids)),
        features=_feature_figures(firings, sizes.bins),
        contexts=replace(top, position=new_place[top.position]),
        quantile_contexts=replace(spread, position=new_place[spread.position]),
        window=window,
        logits=numbered[0],
        logit_count=n_logits,
        logit_direction="W_dec + W_lin" if has_canonical(sae) else "W_dec",
        logits_note=note,
        pairs=replace(pairs, position=new_place[pairs.position], logits=numbered[1]),
        provenance=provenance,
    )


def text_of(tokens: NDArray[np.int64], positions: tuple[Ints, ...], window: tuple[int, int]) -> tuple[TokenTable, Ints]:
    """The pieces of rows that the windows around some positions (row * pos + position) cover.

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
    """The text of each token by itself, with the space that SentencePiece loses; its number where there is no tokenizer."""
    tokenizer: Any = model.tokenizer

    def text_of_one(token: int) -> str:
        text, piece = token_text(model, token), None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
        loses_space = isinstance(piece, str) and piece.startswith(METASPACE) and not text.startswith(" ")
        return f" {text}" if loses_space else text

    return tuple(map(text_of_one, ids.tolist()))


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
        of: which feature or pair each vector is of, ascending; the others have no logits.
        total: features, or pairs.
        factor: see the module.
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
