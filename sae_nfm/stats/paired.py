"""From tidy rows to paired arrays: two arms on the same tokens, or on the same seeds and documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_nfm.stats.clustered import Floats

TOKEN = ["document", "row", "position"]
"""Columns that together name a token."""


@dataclass(frozen=True, kw_only=True)
class PairedTokens:
    """One measure of two arms on the same tokens; `statistics.mean_difference(pair.a, pair.b, pair.documents)`."""

    a: Floats
    """[tokens], the measure of the arm."""
    b: Floats
    """[tokens], the measure of the arm it is compared with."""
    documents: NDArray[np.int64]
    """[tokens], the document of each token."""


def paired_by_token(rows: pd.DataFrame, measure: str, *, arm: str, against: str) -> PairedTokens:
    """Two arms of tidy rows, token by token; tokens where neither has the measure (no next token) are left out.

    Args:
        rows: one row per token and arm, with the columns document, row, position, arm and the measure.
        measure: name of the column compared, such as "kl_nats".
        arm: value of the column `arm`.
        against: value of the column `arm` that it is compared with.

    Raises:
        ValueError: for a missing column or arm, a token twice in one arm, or arms on different tokens.
    """
    columns = [*TOKEN, "arm", measure]
    _require(rows, columns)
    rows = rows.filter(columns)
    sides: list[pd.DataFrame] = []
    for name in (arm, against):
        side = _of_arm(rows, name).sort_values(by=TOKEN)
        if side.duplicated(TOKEN).any():
            raise ValueError(f"arm {name!r} has {side.duplicated(TOKEN).sum()} token(s) more than once; give each once")
        sides.append(side)
    keys = [side[TOKEN].to_numpy(dtype=np.int64) for side in sides]
    a, b = (side[measure].to_numpy(dtype=np.float64, na_value=np.nan) for side in sides)
    if not np.array_equal(keys[0], keys[1]) or (np.isnan(a) != np.isnan(b)).any():
        counts = [int((~np.isnan(values)).sum()) for values in (a, b)]
        raise ValueError(
            f"{arm!r} and {against!r} have {measure} on different tokens ({counts[0]} and {counts[1]}); "
            "measure both arms on the same held-out rows"
        )
    kept = ~np.isnan(a)
    return PairedTokens(a=a[kept], b=b[kept], documents=keys[0][kept, 0])


@dataclass(frozen=True, kw_only=True)
class PairedSeeds:
    """One measure of two arms, by seed and document."""

    a: Floats
    """[seeds, documents], mean over the document's tokens in the arm."""
    b: Floats
    """[seeds, documents], likewise in the arm it is compared with."""
    weights: Floats
    """[documents], what each document counts for."""


def paired_by_seed(rows: pd.DataFrame, measure: str, *, arm: str, against: str, weight: str) -> PairedSeeds:
    """Two arms of tidy rows as matrices over the same seeds and documents.

    Args:
        rows: one row per seed, arm and document, with the columns seed, arm, document, the measure and the weight.
        measure: name of the column compared, the mean of one document.
        arm: value of the column `arm`.
        against: value of the column `arm` that it is compared with.
        weight: name of the column that says what a document counts for; it may differ by document only.

    Raises:
        ValueError: for a missing column or arm, a cell that is missing or there twice, or weights that differ.
    """
    _require(rows, ["seed", "arm", "document", measure, weight])
    a, b = (_by_seed(rows, name, measure) for name in (arm, against))
    if not (a.index.equals(b.index) and a.columns.equals(b.columns)):
        raise ValueError(
            f"{arm!r} has seeds {list(a.index)} and {a.shape[1]} documents, {against!r} seeds {list(b.index)} and "
            f"{b.shape[1]}, or other documents; train both with the same seeds and measure both on the same text"
        )
    weights = np.concatenate([_by_seed(rows, name, weight).to_numpy(dtype=np.float64) for name in (arm, against)])
    if not np.allclose(weights, weights[0]):
        raise ValueError(
            f"the weight {weight!r} of a document differs between seeds or arms; give the same text to all"
        )
    return PairedSeeds(a=a.to_numpy(dtype=np.float64), b=b.to_numpy(dtype=np.float64), weights=weights[0])


def _by_seed(rows: pd.DataFrame, arm: str, column: str) -> pd.DataFrame:
    side = _of_arm(rows, arm)
    if side.duplicated(["seed", "document"]).any():
        raise ValueError(f"arm {arm!r} has a document twice for one seed; give one row per seed, arm and document")
    table = side.pivot(index="seed", columns="document", values=column)
    if table.isna().any(axis=None):
        missing = table.isna().to_numpy()
        seed, document = (int(i) for i in np.argwhere(missing)[0])
        raise ValueError(
            f"arm {arm!r} has no {column} for {missing.sum()} pair(s) of seed and document, the first seed "
            f"{table.index[seed]}, document {table.columns[document]}; measure every seed on the same text"
        )
    return table


def _of_arm(rows: pd.DataFrame, arm: str) -> pd.DataFrame:
    side: pd.DataFrame = rows.loc[rows["arm"] == arm]
    if side.empty:
        raise ValueError(f"there is no arm {arm!r}; there are {', '.join(map(repr, rows['arm'].unique()))}")
    return side


def _require(rows: pd.DataFrame, columns: Sequence[str]) -> None:
    missing: list[Any] = [name for name in columns if name not in rows.columns]
    if missing:
        raise ValueError(f"the rows have no column {', '.join(missing)}; they have {', '.join(map(str, rows.columns))}")
