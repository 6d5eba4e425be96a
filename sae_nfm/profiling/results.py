"""What `sae-nfm speed` found: rows, a table to print, to and from JSON."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sae_nfm.common.results import SavedResult
from sae_nfm.profiling.arms import Rates

Scan = Literal["d_sae", "nfm_dim"]
COLUMNS = 110
"""Characters in a line of the table."""


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One arm at one size. Ratios are to topk at the same size; None where there is nothing to say."""

    arm: str
    """Name of the arm."""
    d_sae: int
    """Its features."""
    nfm_dim: int
    """Interaction dimensions of joint_nfm at this size."""
    step_seconds: float | None
    """A training step, median."""
    step_quartiles: tuple[float, float] | None
    """Seconds that a quarter and three quarters of the steps stayed below."""
    step_over_topk: float | None
    """step_seconds over topk's."""
    floor_seconds: float | None
    """What a step of joint_nfm takes at least, see `floor_seconds`."""
    step_over_floor: float | None
    """step_seconds over floor_seconds."""
    peak_bytes: int | None
    """Bytes that a process's memory rose by for its steps."""
    peak_over_topk: float | None
    """peak_bytes over topk's."""
    inference_seconds: float | None
    """The inference SAE on a batch, without gradient, median."""
    inference_over_topk: float | None
    """inference_seconds over topk's."""
    step_over_previous: float | None
    """In a scan: step_seconds over those of the size before."""
    step_over_first: float | None
    """In a scan: step_seconds over those of the first size."""
    reason: str | None
    """Why figures are missing."""


@dataclass(frozen=True, kw_only=True)
class SpeedResult(SavedResult):
    """Everything a run of `sae-nfm speed` found."""

    command: ClassVar[str] = "sae-nfm speed --save FILE"

    rows: tuple[SpeedRow, ...]
    """The arms, for each size."""
    rates: Rates
    """Rates behind the floor."""
    provenance: dict[str, Any]
    """Configuration, versions, device, threads."""

    def words(self) -> str:
        """The table, and what its figures are, in at most 110 columns."""
        config, scan = self.provenance["config"], self.provenance["config"]["scan"]
        names = [name for name in ("d_in", "d_sae", "k", "nfm_dim", "nfm_top_k", "batch") if config[name] is not None]
        what = ", ".join(f"{name} {config[name]}" for name in names if name != scan)
        where = f"{config['dtype']}{', autocast' if config['autocast'] else ''}, {self.provenance['device']}"
        rates = f"{self.rates.flop_per_second / 1e9:,.0f} GFLOP/s and {self.rates.bytes_per_second / 1e9:,.1f} GB/s"
        notes = [
            "A step is all that SAELens's trainer does with a batch, from forward to Adam. Ratios are of medians.",
            f"Floor: joint_nfm's products and memory traffic at the {rates} measured in this run.",
            "Peak: what the steps add to a process that has the SAE and its activations.",
        ]
        if scan:
            notes.append(f"/ before, / first: the step's growth from the {scan} before, from the first one.")
        heading = f"{what}, {where}, {self.provenance['threads']} threads; medians of {config['repeats']} rounds"
        return "\n".join([heading, "", *self._table(scan), "", *notes])

    def _table(self, scan: Scan | None) -> list[str]:
        header = ["arm", "step ms", "quartiles", "/ topk", "/ floor", "peak MiB", "/ topk"]
        header = [*header, "/ before", "/ first"] if scan else [*header, "infer ms", "/ topk"]
        lines = [(_cells(row, scan), row.reason) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(header, *(cells for cells, _ in lines), strict=True)]

        def aligned(cells: list[str]) -> str:
            rest = (text.rjust(width) for text, width in zip(cells[1:], widths[1:], strict=True))
            return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

        ruler = "-" * (sum(widths) + 2 * (len(widths) - 1))
        body = [_fitting(f"{aligned(cells)}  {reason or ''}".rstrip()) for cells, reason in lines]
        return [aligned(header), ruler, *body]


def _cells(row: SpeedRow, scan: Scan | None) -> list[str]:
    def shown(value: float | None, digits: int, unit: float = 1.0) -> str:
        return "" if value is None else f"{value / unit:,.{digits}f}"

    cells = [
        f"{row.arm}, {getattr(row, scan):,}" if scan else row.arm,
        shown(row.step_seconds, 1, 1e-3),
        "-".join(shown(seconds, 0, 1e-3) for seconds in row.step_quartiles or ()),
        shown(row.step_over_topk, 3),
        shown(row.step_over_floor, 2),
        shown(row.peak_bytes, 0, 2**20),
        shown(row.peak_over_topk, 3),
    ]
    if scan:
        return [*cells, shown(row.step_over_previous, 2), shown(row.step_over_first, 2)]
    return [*cells, shown(row.inference_seconds, 1, 1e-3), shown(row.inference_over_topk, 3)]


def _fitting(line: str) -> str:
    return line if len(line) <= COLUMNS else f"{line[: COLUMNS - 3]}..."  # the JSON has all of a long reason
