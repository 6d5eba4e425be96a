"""Results of a benchmark as plain frozen data: rows, comparisons between rows, provenance; to and from JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sae_nfm.common.results import SavedResult
from sae_nfm.evaluation import Fidelity

ALL_PATHS = "all paths"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: an SAE, whole or with some of its paths switched off."""

    sae: str
    """Name of the SAE."""
    paths: str
    """Which paths write: "all paths", "direct", "direct + linear", ..."""
    parameters: int
    """Trainable numbers of the whole SAE."""
    fidelity: Fidelity
    """Held-out figures."""
    training_tokens_per_second: float | None
    """Speed of training steps, the language model not counted; None for a row with paths switched off."""

    @property
    def name(self) -> str:
        """Unique name of the row."""
        return self.sae if self.paths == ALL_PATHS else f"{self.sae}: {self.paths}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Relative change of one row's figures against another's; negative is better."""

    kind: Literal["paper", "fair"]
    """"paper": against a part of the same model, an ablation. "fair": against an SAE trained on its own."""
    row: str
    """Name of the row."""
    against: str
    """Name of the row it is compared with."""
    fvu_change: float
    """(FVU - other FVU) / other FVU."""
    kl_change: float
    """(KL - other KL) / other KL."""
    parameter_ratio: float
    """Parameters over the other's."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(SavedResult):
    """Everything a benchmark found, and what is needed to repeat it."""

    kind: ClassVar[str] = "demo/1"

    rows: tuple[Row, ...]
    """The table, whole SAEs each followed by their ablations."""
    comparisons: tuple[Comparison, ...]
    """The paper's figure and the fair one, for each joint model."""
    provenance: dict[str, Any]
    """Configuration, seed, versions, hashes of the tokens, command."""

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def table(self) -> list[tuple[Any, ...]]:
        """The rows without timings: what two runs with one seed must agree on."""
        return [(row.name, row.parameters, row.fidelity) for row in self.rows]


def compare(kind: Literal["paper", "fair"], row: Row, other: Row) -> Comparison:
    """Relative change of a row against another."""

    def change(name: str) -> float:
        value, reference = getattr(row.fidelity, name), getattr(other.fidelity, name)
        return (value - reference) / reference

    return Comparison(
        kind=kind,
        row=row.name,
        against=other.name,
        fvu_change=change("fvu"),
        kl_change=change("kl_nats"),
        parameter_ratio=row.parameters / other.parameters,
    )


def comparisons(rows: Sequence[Row], joint: Sequence[str]) -> tuple[Comparison, ...]:
    """For each joint SAE: all paths against its direct path alone, then against every SAE trained on its own."""
    whole = [row for row in rows if row.paths == ALL_PATHS]
    found: list[Comparison] = []
    for row in (row for row in whole if row.sae in joint):
        parts = [part for part in rows if part.sae == row.sae and part.paths.startswith("direct only")]
        found += [compare("paper", row, part) for part in parts]
        found += [compare("fair", row, other) for other in whole if other.sae not in joint]
    return tuple(found)
