"""Which of a feature's firings are shown, with what is marked around them, and its histogram.

    strongest    the firings of largest activation, none in the window of a stronger one that is shown
    quantiles    n firings at the middles of n equal parts of all its firings, ranked by activation: with 5 the ranks at 10, 30,
                 50, 70 and 90 %

The strongest alone flatter a feature: what it does in the rest of its range is in the others. Equal activations go by position.
"""

import numpy as np

from sae_nfm.explorer.activations import Firings
from sae_nfm.explorer.data import Contexts, Floats, Ints

FULL = 255
"""Strength of a mark at the feature's largest activation."""
Window = tuple[int, int]


def feature_contexts(firings: Firings, *, n: int, quantiles: int, window: Window) -> tuple[Contexts, Contexts]:
    """The strongest firings of every feature, and those from its whole range.

    Args:
        firings: of all features.
        n: of the first for each feature, at most.
        quantiles: of the second.
        window: tokens before and after.

    Returns:
        Both, with positions row * pos + position in the rows as given.
    """
    width = firings.tokens.shape[1]
    top, spread = list[Ints](), list[Ints]()
    for feature in range(len(firings.count)):
        places, values = firings.of(feature)
        places = places.astype(np.int64)
        order = np.lexsort((places, -values))
        top.append(_apart(places[order], n, window, width))
        spread.append(places[order[_middles(len(order), quantiles)]])
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
    width, offsets, strengths, counts = firings.tokens.shape[1], list[Ints](), list[Ints](), list[int]()
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
        position=joined(chosen),
        mark_starts=starts_of(counts),
        offset=joined(offsets),
        strength=joined(strengths),
    )


def starts_of(lengths: list[int] | Ints) -> Ints:
    """Where lists of some lengths start in one long list, and where it ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def joined(parts: list[Ints]) -> Ints:
    """One array of several, or of none."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
