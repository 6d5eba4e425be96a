"""What `sae-nfm dry-run` found out about a training run, as a table."""

from dataclasses import dataclass

from sae_nfm.profiling.run_spec import Device


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One part of the memory."""

    name: str
    """What it is."""
    gib: float
    """GiB."""
    phase: str
    """When: "always", "step" (of the SAE) or "refill" (of the buffer, by the model)."""
    device: str
    """Where."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a training run would be and take."""

    name: str
    """The experiment's name."""
    command: str
    """The command line that it is."""
    device: Device
    """The device, with its rates."""
    rates_measured: bool
    """Whether the rates were measured here; else they are as given."""
    hook_name: str
    """Where activations are taken, by the model's own name."""
    model_parameters: int
    """Parameters of the language model."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter of the SAE."""
    parameters: int
    """Parameters of the SAE."""
    topk_parameters: int
    """Parameters of a TopK SAE of the same width."""
    kernel: str
    """Form of the SAE's step: "dense" or "sparse"."""
    memory: tuple[MemoryRow, ...]
    """All parts of the memory."""
    needed_gib: float
    """GiB needed on the SAE's device at the worse time of step and refill."""
    steps: int
    """Training steps."""
    model_flops_per_token: float
    """FLOPs of the model's forward pass up to the hook point."""
    sae_flops_per_token: float
    """FLOPs of a training step of the SAE."""
    model_seconds: float
    """Seconds that the model takes at least, for all tokens."""
    sae_seconds: float
    """Seconds that the SAE's steps take at least."""

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
