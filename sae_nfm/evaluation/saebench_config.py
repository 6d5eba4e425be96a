"""What an evaluation of `sae_nfm.evaluation.saebench` is given and what it finds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro

from sae_nfm.common.options import SavedSAEOptions

EvaluationName = Literal["core", "sparse_probing", "mdl"]


@dataclass(frozen=True, kw_only=True)
class SAEBenchConfig(SavedSAEOptions):
    """Which SAEs, which evaluation, on what."""

    saes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of saved SAEs, or released ones as release:sae_id."""
    evaluation: EvaluationName = "sparse_probing"
    """core: KL, cross-entropy, reconstruction, sparsity. sparse_probing: sae-probes. mdl: description length (needs CUDA)."""
    held_out: str | None = None
    """Text or tokens for core and mdl: a file, a folder or a hub name; the embedded model's held-out tokens unless given."""
    context_size: int | None = None
    """Tokens in a row for core; the one in the SAE's metadata unless given."""
    batch_size_prompts: int = 16
    """Rows in a batch for core and mdl."""
    batches: int = 10
    """Batches for each half of core."""
    probing_datasets: tuple[str, ...] = ()
    """Which of sae-probes's data sets; all 113 unless given."""
    ks: tuple[int, ...] = (1, 2, 5)
    """How many features a probe reads."""
    seed: int = 42
    """Seed of the probes' splits and of mdl."""
    output: str = "runs/saebench"
    """Folder for SAEBench's result files, the probes and the cached activations of the model. The cache goes by the model's
    name: take another folder for another model of that name."""

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        if self.evaluation not in get_args(EvaluationName):
            raise ValueError(
                f"evaluation is {self.evaluation!r}; give one of {', '.join(map(repr, get_args(EvaluationName)))}"
            )
        for name in ("batch_size_prompts", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive whole number")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks is {self.ks}; give one or more positive numbers of features")
        if self.evaluation == "mdl" and torch.device(self.device).type != "cuda":
            raise ValueError(
                f"device is {self.device!r}, but SAEBench 0.6's mdl calls .cuda() whatever its device; give --device cuda"
            )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What SAEBench found for one SAE."""

    sae: str
    """The SAE's name."""
    evaluation: EvaluationName
    """Which evaluation."""
    metrics: dict[str, float]
    """SAEBench's metrics by its names: accuracies, AUCs and F1 in [0, 1], KL and CE in nats, description lengths in bits."""
    file: Path
    """SAEBench's own result file."""

    def words(self) -> str:
        """The figures, aligned, and where the file is."""
        width = max(map(len, self.metrics))
        lines = [f"    {name:<{width}}  {value:>12.4f}" for name, value in self.metrics.items()]
        return "\n".join([f"{self.sae}: SAEBench {self.evaluation}", *lines, f"    {self.file}"])
