"""What `sae-nfm speed` found: rows, a table to print, to and from JSON."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal

from sae_nfm.common import aligned
from sae_nfm.common.results import SavedResult


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast the machine was in the run, at its best."""

    flop_per_second: float
    """Of a square matrix product in the type that products have."""
    bytes_per_second: float
    """Read and written by a copy of a large tensor."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device, and how fast it is at its best."""

    name: str
    memory_gib: float
    flop_per_second: float | None = None
    """FLOP/s of matrix products in the SAE's type; measured unless given."""
    bytes_per_second: float | None = None
    """Bytes per second, read and written, of its memory; measured unless given."""
    model_flop_per_second: float | None = None
    """FLOP/s of matrix products in the model's type; flop_per_second unless given."""

    def __post_init__(self) -> None:
        """Refuse what is no amount."""
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and value > 0
            if not number and not (value is None and field.default is not MISSING):
                raise ValueError(f"the device's {field.name} is {value!r}; give a positive number (in YAML, 1.5e+12)")


TOPK = "topk"
Scan = Literal["d_sae", "nfm_dim"]
COLUMNS = 110
"""Characters in a line of the table."""


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One arm at one size. Ratios are to topk at the same size; None where there is nothing to say."""

    arm: str
    d_sae: int
    nfm_dim: int
    step_seconds: float | None
    """A training step, median."""
    step_quartiles: tuple[float, float] | None
    """Seconds that a quarter and three quarters of the steps stayed below."""
    step_over_topk: float | None
    floor_seconds: float | None
    """What a step of joint_nfm takes at least, see `floor_seconds`."""
    step_over_floor: float | None
    peak_bytes: int | None
    """Bytes that a process's memory rose by for its steps."""
    peak_over_topk: float | None
    inference_seconds: float | None
    """The inference SAE on a batch, without gradient, median."""
    inference_over_topk: float | None
    step_over_previous: float | None
    """In a scan, over the size before."""
    step_over_first: float | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class SpeedResult(SavedResult):
    """Everything a run of `sae-nfm speed` found."""

    kind: ClassVar[str] = "speed/1"

    rows: tuple[SpeedRow, ...]
    rates: Rates
    provenance: dict[str, Any]

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
        head, ruler, *rows = aligned([header, *(cells for cells, _ in lines)])
        body = [_fitting(f"{row}  {reason or ''}".rstrip()) for row, (_, reason) in zip(rows, lines, strict=True)]
        return [head, ruler, *body]


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


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One part of the memory."""

    name: str
    gib: float
    phase: str
    """When: "always", "step" (of the SAE) or "refill" (of the buffer, by the model)."""
    device: str


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a training run would be and take."""

    name: str
    command: str
    device: Device
    rates_measured: bool
    """Whether the rates were measured here; else they are as given."""
    hook_name: str
    model_parameters: int
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    topk_parameters: int
    """Parameters of a TopK SAE of the same width."""
    kernel: str
    """Form of the SAE's step: "dense" or "sparse"."""
    memory: tuple[MemoryRow, ...]
    needed_gib: float
    """GiB needed on the SAE's device at the worse time of step and refill."""
    steps: int
    model_flops_per_token: float
    """FLOPs of the model's forward pass up to the hook point."""
    sae_flops_per_token: float
    """FLOPs of a training step of the SAE."""
    model_seconds: float
    """At least, for all tokens."""
    sae_seconds: float
    """At least, for all steps."""

    @property
    def more_than_topk(self) -> float:
        """How many more parameters than a TopK SAE of the same width, as a fraction."""
        return self.parameters / self.topk_parameters - 1

    def words(self) -> str:
        """The tables."""
        shapes = [f"    {name:<8} {' x '.join(f'{n:,}' for n in shape)}" for name, shape in self.shapes.items()]
        width = max(len(row.name) for row in self.memory)
        memory = [f"    {row.name:<{width}}  {row.gib:>8.2f}  {row.phase:<7} {row.device}" for row in self.memory]
        source = "measured here" if self.rates_measured else "as given"
        device, hours = self.device, (self.model_seconds + self.sae_seconds) / 3600
        assert device.flop_per_second is not None
        assert device.bytes_per_second is not None
        rates = f"{device.flop_per_second / 1e12:,.2f} TFLOP/s and {device.bytes_per_second / 1e9:,.0f} GB/s, {source}"
        return "\n".join(
            [
                f"{self.name}: {self.command}",
                "",
                f"Activations at {self.hook_name} of a model of {self.model_parameters:,} parameters",
                f"SAE: {self.parameters:,} parameters, {self.more_than_topk:+.1%} of a TopK SAE of the same width",
                *shapes,
                "",
                "Memory in GiB",
                *memory,
                f"    needed at once on {device.name}: {self.needed_gib:.2f} of {device.memory_gib:g}",
                "",
                f"Time: {self.steps:,} steps ({self.kernel}), at least, at {rates}",
                f"    model {self.model_flops_per_token / 1e9:,.2f} GFLOP a token, {self.model_seconds / 3600:,.2f} h",
                f"    SAE   {self.sae_flops_per_token / 1e9:,.2f} GFLOP a token, {self.sae_seconds / 3600:,.2f} h",
                f"    both  {hours:,.2f} h",
            ]
        )
