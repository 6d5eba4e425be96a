"""Every activation of an SAE's features on held-out text, feature by feature, and which of them are shown.

One pass of the language model. All activations are held in memory: 12 bytes each while they are read (twice that when they are
sorted by feature), so that 1M tokens with 100 active features take about 2.4 GB. What is said of a feature is therefore exact.
Shown of each feature, with what is marked around them:

    strongest    its largest activations, none in the window of a stronger one that is shown
    quantiles    n activations at the middles of n equal parts of all of them, ranked: with 5 the ranks at 10, 30, 50, 70 and 90 %

The strongest alone flatter a feature: what it does in the rest of its range is in the others. Equal activations go by position.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from sae_lens import SAE, TrainingSAE
from scipy.sparse import coo_array
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.analysis import PathSums, present_paths
from sae_nfm.attribution import HIDDEN, OUTPUT, RECONS, SCALE, unit_written
from sae_nfm.common import ShortRepr
from sae_nfm.explorer.results import FULL, Contexts, Floats, Ints, starts_of
from sae_nfm.models import (
    LanguageModel,
    check_counted,
    check_finite,
    counted_tokens,
    keeping,
    real_tokens,
    run_rows,
    splice,
)

Window = tuple[int, int]

ACTS = "hook_sae_acts_post"
MOST = 2**28
"""Firings kept at most: about 6 GB."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Firings(ShortRepr):
    """Where features have positive activations on the counted tokens of some rows."""

    starts: NDArray[np.int64]
    """Of each feature, into `places` and `values`; one more than features."""
    places: NDArray[np.int32]
    """Tokens on which a feature fires, row * pos + position, ascending."""
    values: NDArray[np.float32]
    tokens: NDArray[np.int64]
    """The tokens, [rows, pos]."""
    counted: NDArray[np.bool_]
    """Which of them are counted, [rows, pos]: not special, not in position 0."""
    shares: dict[str, dict[str, NDArray[np.float64]]]
    """By gauge and path, [d_sae]: see `path_sums`."""
    logit_factor: float
    """What a unit that a path writes is on its way into the unembedding, averaged over tokens: 1 / scale of the final
    normalisation, times its length at the hook point."""

    def of(self, feature: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Where a feature fires, and how strongly."""
        here = slice(self.starts[feature], self.starts[feature + 1])
        return self.places[here], self.values[here]

    @property
    def count(self) -> NDArray[np.int64]:
        """Tokens on which each feature fires, [d_sae]."""
        return np.diff(self.starts)

    @property
    def feature(self) -> NDArray[np.int64]:
        """The feature of each firing."""
        return np.repeat(np.arange(len(self.starts) - 1), self.count)


class _Found:
    """What batches leave behind."""

    def __init__(self, sae: SAE[Any]) -> None:
        self.sums, self.factors, self._total = PathSums(sae), list[Tensor](), 0
        self._parts = list[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]]()

    def add(self, seen: dict[str, Tensor], counted: Bool[Tensor, "rows pos"], first: int) -> None:
        """Add what passed in a forward pass; `first` is the place of its first token."""
        acts = seen[ACTS].to_dense()[counted]
        self.sums.add(acts, seen[HIDDEN][counted] > 0 if HIDDEN in seen else None)
        unit = unit_written(seen)
        self.factors.append((unit / seen[SCALE] if SCALE in seen else unit)[counted])
        token, feature = (acts > 0).nonzero(as_tuple=True)
        place = counted.flatten().nonzero()[:, 0][token] + first
        values, places, features = (part.cpu().numpy() for part in (acts[token, feature].float(), place, feature))
        self._parts.append((values, places.astype(np.int32), features.astype(np.int32)))
        self._total += len(values)
        if self._total > MOST:
            raise ValueError(f"more than {MOST:,} firings, too many to keep; give fewer tokens with --n-tokens")

    def by_feature(self, shape: tuple[int, int]) -> Any:
        """[tokens, d_sae], features one after the other, each with its tokens ascending."""
        values, places, features = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        self._parts.clear()
        acts = coo_array((values, (places, features)), shape=shape).tocsc()
        acts.sort_indices()
        return acts


@torch.no_grad()
def firings_of(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Int[Tensor, "rows pos"],
    *,
    batch_rows: int = 16,
    show_progress: bool = True,
) -> Firings:
    """Read every firing.

    Raises:
        ValueError: for an SAE in training, a hook point that the model does not have, no counted token, or too many firings.
    """
    if isinstance(sae, TrainingSAE):
        raise ValueError("this SAE is in training; save it for inference (save_inference_model) and load that")
    real, found = real_tokens(model, tokens), _Found(sae)
    counted = counted_tokens(model, tokens, real)
    check_counted(counted)
    with tqdm(total=len(tokens), desc="Features", unit="row", disable=not show_progress) as progress:
        for first in range(0, len(tokens), batch_rows):
            rows = slice(first, first + batch_rows)
            seen = _seen(model, sae, tokens[rows], real[rows])
            check_finite(seen[OUTPUT].flatten(2)[counted[rows]], counted[rows], "what the SAE writes", first)
            found.add(seen, counted[rows], first * tokens.shape[1])
            progress.update(len(tokens[rows]))
    acts = found.by_feature((tokens.numel(), sae.cfg.d_sae))
    shares = found.sums.shares()
    return Firings(
        starts=acts.indptr.astype(np.int64),
        places=acts.indices,
        values=acts.data,
        tokens=tokens.cpu().numpy(),
        counted=counted.cpu().numpy(),
        shares={gauge: {path: share.numpy() for path, share in one.items()} for gauge, one in shares.items()},
        logit_factor=float(torch.cat(found.factors).double().mean()),
    )


def _seen(model: LanguageModel, sae: SAE[Any], rows: Tensor, real: Tensor) -> dict[str, Tensor]:
    """What passes in a forward pass: features, reconstruction, hidden code, scale of the final normalisation."""
    seen = dict[str, Tensor]()
    names = [ACTS, RECONS, OUTPUT, *([HIDDEN] if "interaction" in present_paths(sae) else [])]
    scale: list[Any] = [(SCALE, keeping(seen, SCALE))] if SCALE in model.hook_dict else []
    hooks = {name: keeping(seen, name) for name in names}
    with splice(model, sae) as found, found.hooks(hooks), model.hooks(fwd_hooks=scale):
        run_rows(model, rows, real)
    return seen


def feature_contexts(firings: Firings, *, n: int, quantiles: int, window: Window) -> tuple[Contexts, Contexts]:
    """The n strongest firings of every feature, and `quantiles` from its whole range; positions are row * pos + position."""
    width = firings.tokens.shape[1]
    top, spread = list[Ints](), list[Ints]()
    for feature in range(len(firings.count)):
        places, values = firings.of(feature)
        order = np.lexsort((places, -values))
        ranked = places.astype(np.int64)[order]
        top.append(_apart(ranked, n, window, width))
        spread.append(ranked[_middles(len(order), quantiles)])
    return _marked(firings, top, window), _marked(firings, spread, window)


def histograms(firings: Firings, bins: int) -> Ints:
    """Firings by activation, [d_sae, bins]; bin b of feature i is (b, b + 1] * max_i / bins."""
    d_sae, feature = len(firings.count), firings.feature
    largest = maxima(firings)[feature]
    place = np.ceil(firings.values.astype(np.float64) / largest * bins).astype(np.int64) - 1
    flat = np.bincount(feature * bins + place.clip(0, bins - 1), minlength=d_sae * bins)
    return flat.reshape(d_sae, bins).astype(np.int64)


def maxima(firings: Firings) -> Floats:
    """Largest activation of each feature; 0 where it never fires."""
    found = np.zeros(len(firings.count))
    np.maximum.at(found, firings.feature, firings.values)
    return found


def _middles(total: int, n: int) -> Ints:
    """Ranks at the middles of n equal parts, each once."""
    return np.unique((2 * np.arange(n) + 1) * total // (2 * n)) if total else np.zeros(0, dtype=np.int64)


def _apart(places: Ints, n: int, window: Window, width: int) -> Ints:
    """The first n places of which none lies in the window of an earlier one."""
    taken = list[int]()
    for place in places.tolist():
        if len(taken) == n:
            break
        if not any(-window[0] <= place - one <= window[1] and place // width == one // width for one in taken):
            taken.append(place)
    return np.asarray(taken, dtype=np.int64)


def _marked(firings: Firings, chosen: list[Ints], window: Window) -> Contexts:
    """Contexts at some places of each feature."""
    width, none = firings.tokens.shape[1], np.zeros(0, dtype=np.int64)
    offsets, strengths, counts = list[Ints](), list[Ints](), list[int]()
    for feature, places in enumerate(chosen):
        if not len(places):
            continue
        fires, values = firings.of(feature)
        strength = np.rint(FULL * values.astype(np.float64) / values.max()).clip(1, FULL).astype(np.int64)
        row = places - places % width
        first = np.searchsorted(fires, np.maximum(places - window[0], row))
        last = np.searchsorted(fires, np.minimum(places + window[1], row + width - 1), side="right")
        for place, start, stop in zip(places, first, last, strict=True):
            offsets.append(fires[start:stop] - place)
            strengths.append(strength[start:stop])
            counts.append(stop - start)
    return Contexts(
        starts=starts_of([len(places) for places in chosen]),
        position=np.concatenate([none, *chosen]),
        mark_starts=starts_of(counts),
        offset=np.concatenate([none, *offsets]),
        strength=np.concatenate([none, *strengths]),
    )
