"""Data sets with a known truth, on which the statistics are tried many times, and what chance allows such a trial."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Tail = Literal["normal", "student", "skewed", "skewed documents"]
Values = NDArray[np.float64]
Documents = NDArray[np.int64]


def clustered_values(
    rng: np.random.Generator, tail: Tail = "student", n_documents: int = 60, length_spread: float = 0.8
) -> tuple[Values, Documents]:
    """Tokens of mean 0 in documents of log-normal length (median 55), a fifth of the variance or less between documents.

    "student": tokens and documents with Student's t on 3 degrees of freedom; "skewed": tokens exponential;
    "skewed documents": document means exponential as well.
    """
    documents = documents_of_tokens(rng, n_documents, length_spread)
    n = len(documents)
    normal_effects = 0.4 * rng.normal(size=n_documents)
    if tail == "student":
        effects, noise = 0.4 * rng.standard_t(3, n_documents), rng.standard_t(3, n)
    elif tail == "normal":
        effects, noise = normal_effects, rng.normal(size=n)
    else:
        skewed = 0.4 * (rng.exponential(size=n_documents) - 1)
        effects, noise = skewed if tail == "skewed documents" else normal_effects, rng.exponential(size=n) - 1
    return effects[documents] + noise, documents


def documents_of_tokens(rng: np.random.Generator, n_documents: int, length_spread: float = 0.8) -> Documents:
    lengths = np.maximum(5, np.exp(rng.normal(4, length_spread, n_documents)).round()).astype(int)
    return np.repeat(np.arange(n_documents), lengths)


def kl_of_two_arms(rng: np.random.Generator, ratio: float, n_documents: int = 60) -> tuple[Values, Values, Documents]:
    """Two arms' log-normal KL on the same tokens: mean(a) / mean(b) is `ratio` in the population."""
    documents = documents_of_tokens(rng, n_documents)
    n = len(documents)
    b = np.exp(0.5 * rng.normal(size=n_documents)[documents] + rng.normal(size=n))
    factor = np.exp(0.3 * rng.normal(size=n_documents)[documents] + 0.4 * rng.normal(size=n) - (0.3**2 + 0.4**2) / 2)
    return ratio * b * factor, b, documents


def arms_by_seed(
    rng: np.random.Generator,
    *,
    change: float = 0.0,
    seed_sd: float = 0.02,
    document_sd: float = 0.1,
    rest_sd: float = 0.1,
    n_seeds: int = 5,
    n_documents: int = 60,
) -> tuple[Values, Values, Values]:
    """Two arms' KL [seeds, documents] and the documents' tokens; a is (1 + change) times b in expectation.

    The standard deviations are relative to KL and per arm: of a seed, of a document in this arm, of what is left.
    """
    shape = (n_seeds, n_documents)
    weights = np.exp(rng.normal(5, 0.6, n_documents))
    difficulty = np.exp(0.5 * rng.normal(size=n_documents))
    a, b = (
        difficulty
        * (
            1
            + seed_sd * rng.normal(size=(n_seeds, 1))
            + document_sd * rng.normal(size=n_documents)
            + rest_sd * rng.normal(size=shape)
        )
        for _ in range(2)
    )
    return (1 + change) * a, b, weights


def counts_by_chance(trials: int, probability: float = 0.05, error: float = 1e-4) -> tuple[int, int]:
    """What a binomial count of `trials` stays between, but for `error` on each side."""
    found = stats.binom.ppf([error, 1 - error], trials, probability)
    return int(found[0]), int(found[1])


@contextmanager
def quick_collection() -> Iterator[None]:
    """`multipletests` collects garbage on every call: with all imports frozen out of its way that takes no time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
