"""Configuration of a comparison; its docstrings are the help of `sae-nfm compare`."""

from dataclasses import dataclass

from sae_nfm import demo
from sae_nfm.comparison.arms import ALL_ARMS, DEFAULT_ARMS, refuse_unknown_arms


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare, on what, and where the results go."""

    model_name: str = demo.MODEL_NAME
    """A TransformerLens model name or a local Hugging Face folder; the default is the embedded model."""
    hook_name: str = "blocks.2.hook_resid_post"
    """The TransformerLens hook point whose activations are reconstructed."""
    dataset: str | None = None
    """Training text: a parquet, jsonl or txt file, or a hub name; None takes tokens sampled from the embedded model."""
    validation: str | None = None
    """Held-out text, likewise; None takes a hub data set's validation split, or the embedded tokens."""
    arms: tuple[str, ...] = DEFAULT_ARMS
    """Which arms, in quotes where a name has spaces; "all" takes every one there is (`sae_nfm.comparison.arms`)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of initialisation and data order; verdicts need five."""
    k: tuple[int, ...] = (32,)
    """Active features per token; several values make several comparisons."""
    d_sae: int = 2_048
    """Features of each arm but the matched ones."""
    nfm_dim: int = 64
    """Interaction dimensions."""
    nfm_dropout: float = 0.0
    """Dropout on the pooled interactions (the paper's is 0.15)."""
    training_tokens: int = 400_000
    """Activations that each arm is trained on, for each seed."""
    validation_tokens: int = 40_000
    """Held-out tokens that arms are compared on, at most."""
    batch_size: int = 2_048
    """Activations per training step."""
    context_size: int = 256
    """Tokens per row, BOS included; at most the model's context."""
    learning_rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2)
    """Adam's learning rates to try for each arm; a single one is taken as it is, for all."""
    sweep_tokens: int = 200_000
    """Activations that each arm is trained on at each of these rates."""
    sweep_validation_tokens: int = 10_000
    """Held-out tokens that the rates are chosen on; they follow those that arms are compared on."""
    sweep_seed: int = 1_000
    """Seed of the sweep; none of the compared."""
    standard_l1: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Coefficients of the arm "standard", between whose L0s it is interpolated."""
    gated_l1: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Coefficients of the arm "gated", likewise."""
    jumprelu_l0: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Coefficients of the arm "jumprelu", likewise."""
    n_checkpoints: int = 0
    """Exact checkpoints within a training, besides the one an interruption leaves."""
    device: str = "cpu"
    """Device of the language model and the SAEs."""
    output: str = "runs/compare"
    """Folder for SAEs, tables and results."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        positive = ("training_tokens", "validation_tokens", "d_sae", "nfm_dim", "batch_size")
        for name in (*positive, "sweep_tokens", "sweep_validation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive whole number")
        for name in ("arms", "seeds", "k", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {list(values)}; give at least one value, each once")
        for name in ("k", "learning_rates"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} is {list(getattr(self, name))}; give positive numbers")
        if self.sweep_seed in self.seeds or min(*self.seeds, self.sweep_seed) < 0:
            raise ValueError(
                f"seeds are {list(self.seeds)} and sweep_seed is {self.sweep_seed}; give seeds from 0, the sweep's not among them"
            )
        if self.context_size < 2:
            raise ValueError(f"context_size is {self.context_size}; give at least 2: position 0 is left out")
        for name in ("training_tokens", "sweep_tokens"):
            if getattr(self, name) < self.batch_size:
                raise ValueError(f"{name} is {getattr(self, name)}, less than one batch of {self.batch_size}; raise it")
        refuse_unknown_arms(self.chosen_arms)

    @property
    def chosen_arms(self) -> tuple[str, ...]:
        """The arms by name."""
        return ALL_ARMS if self.arms == ("all",) else self.arms

    @property
    def sweeps(self) -> bool:
        """Whether there are learning rates to choose from."""
        return len(self.learning_rates) > 1
