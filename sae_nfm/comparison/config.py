"""Settings of `sae-nfm compare` and of its preset `sae-nfm demo`; their docstrings are the help."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from sae_nfm.common import check_choice, check_number, check_numbers, check_positive
from sae_nfm.common.options import DEFAULT_HOOK, DEFAULT_HOOKS, ModelOptions, TextOptions
from sae_nfm.comparison.results import STAGED, ArmName

A = ArmName
ALL_ARMS = tuple(map(str, ArmName))
DEFAULT_ARMS = tuple(map(str, (A.JOINT, A.SQUARE, A.WITHOUT_LINEAR, A.WITHOUT_NONLINEAR, A.MLP, A.TOPK, A.MATCHED)))
DEFAULT_ARMS += (str(A.MATCHED_FOLDED), str(A.MATCHED_FLOPS))
"""Those that the claims need."""
DEMO_ARMS = tuple(map(str, (A.JOINT, A.STAGED, A.TOPK, A.MATCHED)))


@dataclass(frozen=True, kw_only=True)
class SizeOptions(TextOptions, ModelOptions):
    """What SAEs are trained and evaluated on, and how large they are."""

    d_sae: int = 2_048
    """Features of each SAE but the matched ones."""
    nfm_dim: int = 64
    """Interaction dimensions."""
    nfm_dropout: float = 0.0
    """Dropout on the pooled interactions (the paper's is 0.15)."""
    training_tokens: int = 400_000
    """Activations that each SAE is trained on."""
    held_out_tokens: int = 40_000
    """Held-out tokens evaluated on, at most."""
    batch_size: int = 2_048
    """Activations per training step."""
    context_size: int = 256
    """Tokens per row, BOS included; at most the model's context."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot work; the hook point is the model's default unless given."""
        if self.hook is None and getattr(self, "activations", None) is None:  # else it is the cache's
            object.__setattr__(self, "hook", DEFAULT_HOOKS.get(self.model, DEFAULT_HOOK))
        for name in ("d_sae", "nfm_dim", "training_tokens", "held_out_tokens", "batch_size"):
            check_number(name, getattr(self, name))
        if getattr(self, "context_size", None) is not None and self.context_size < 2:
            raise ValueError(f"context_size must be at least 2, got {self.context_size}: position 0 is left out")
        require_a_batch(self, "training_tokens")

    def sizes(self) -> dict[str, Any]:
        """These options alone."""
        return {field.name: getattr(self, field.name) for field in fields(SizeOptions)}


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SizeOptions):
    """What to compare, on what, and where the results go."""

    model: str = cast(str, None)
    """TransformerLens model name, local Hugging Face folder or smollm2 (`sae-nfm models fetch smollm2`); by default the embedded
    model, or that of --activations."""
    context_size: int = cast(int, None)
    """Tokens per row, BOS included; at most the model's context. By default 256, or as many as the rows of --activations have."""
    activations: str | None = None
    """Folder of `sae-nfm cache` to train on: its activations in place of the model's, its rows in place of --dataset. Model,
    hook point and row length are those of the cache, others are refused; so is held-out text unless given."""
    arms: tuple[str, ...] = DEFAULT_ARMS
    """Which arms, in quotes where a name has spaces; "all" takes every one there is (`sae_nfm.comparison.arms`)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of initialisation and data order; verdicts need five."""
    k: tuple[int, ...] = (32,)
    """Active features per token; several values make several comparisons."""
    nfm_top_fraction: float = 1.0
    """Share of the k active features that the linear and the interaction path read; 1 gives the model a canonical gauge."""
    selection_stages: int = 4
    """Stages in which staged_topk and the other staged arms choose their k features, each among what is left to explain."""
    selection_candidates: int | None = None
    """Of how many features, those that the first stage ranks highest, later stages of these arms choose; None for all."""
    refinement_steps: int = 0
    """Refinements with which every trained SAE is evaluated once more: the activations of its features are fitted to the input
    through its decoder. 0 for none."""
    shuffle: bool = True
    """Whether each seed has the training data in another order (the rows of a cache); without, only the documents of a file are
    shuffled."""
    learning_rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2)
    """Adam's learning rates to try for each arm; a single one is taken as it is, for all."""
    rescaling: tuple[Literal["on", "off"], ...] = ("on",)
    """Whether activations are multiplied by decoder norms, in TopK SAEs and their like; with both, each of these arms is trained
    both ways at each rate, and chooses as it chooses the rate."""
    sweep_tokens: int = 200_000
    """Activations that each arm is trained on at each of these rates."""
    sweep_held_out_tokens: int = 10_000
    """Held-out tokens that these are chosen on; they follow those that arms are compared on."""
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
    output: str = "runs/compare"
    """Folder for SAEs, tables and results."""

    def __post_init__(self) -> None:
        """Refuse what cannot work; model and row length are the defaults unless given, or left to the cache."""
        if self.activations is None:
            for name in ("model", "context_size"):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, SizeOptions.__dataclass_fields__[name].default)
        super().__post_init__()
        if self.sweeps:
            check_positive(self, "sweep_tokens", "sweep_held_out_tokens")
            require_a_batch(self, "sweep_tokens")
        for name in ("arms", "seeds", "k", "learning_rates", "rescaling"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {list(values)}; give at least one value, each once")
        for name in ("k", "learning_rates"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be > 0, got {list(getattr(self, name))}")
        if (self.sweeps and self.sweep_seed in self.seeds) or min(*self.seeds, self.sweep_seed) < 0:
            raise ValueError(
                f"seeds are {list(self.seeds)} and sweep_seed is {self.sweep_seed}; give seeds from 0, the sweep's not among them"
            )
        if not 0 < self.nfm_top_fraction <= 1:
            raise ValueError(f"nfm_top_fraction must be in (0, 1], got {self.nfm_top_fraction}")
        if not self.shuffle and len(self.seeds) > 1:
            raise ValueError(
                f"without shuffle all seeds would have one order of the data; give one, got {list(self.seeds)}"
            )
        for value in self.rescaling:
            check_choice("rescaling", value, ("on", "off"))
        refuse_unknown_arms(self.chosen_arms)
        check_numbers(self)
        staged = [name for name in self.chosen_arms if name in STAGED]
        if staged and self.selection_stages > min(self.k):
            raise ValueError(
                f"selection_stages must be at most the smallest k = {min(self.k)}, at least one feature a stage, got "
                f"{self.selection_stages}; give fewer, or leave out {', '.join(staged)}"
            )
        candidates = self.selection_candidates
        if staged and candidates is not None and not max(self.k) <= candidates <= self.d_sae:
            raise ValueError(
                f"selection_candidates must be from the largest k = {max(self.k)} to d_sae = {self.d_sae}, or None for all, got "
                f"{candidates}"
            )

    @property
    def chosen_arms(self) -> tuple[str, ...]:
        """The arms by name."""
        return ALL_ARMS if self.arms == ("all",) else self.arms

    @property
    def rescaled(self) -> tuple[bool, ...]:
        """Whether activations are rescaled, for each candidate."""
        return tuple(value == "on" for value in self.rescaling)

    @property
    def sweeps(self) -> bool:
        """Whether there are learning rates, or rescaling, to choose from."""
        return len(self.learning_rates) > 1 or len(self.rescaling) > 1


@dataclass(frozen=True, kw_only=True)
class DemoConfig(SizeOptions):
    """What to train, on what, and where the results go."""

    k: int = 32
    """Active features per token."""
    nfm_top_fraction: float = 0.5
    """Share of the k active features that the linear and the interaction path read; 1 gives the model a canonical gauge."""
    selection_stages: int = 8
    """Stages in which staged_topk chooses its k features, each among what is left to explain; k at most."""
    refinement_steps: int = 5
    """Refinements with which every SAE is evaluated once more: the activations of its features are fitted to the input through
    its decoder. 0 for none."""
    lr: float = 5e-3
    """Adam's learning rate, the same for every SAE; warmed up over the first twentieth of the steps, decayed over the
    last fifth. The default is where the same-width TopK SAE did best on real text, of 1e-3, 2e-3, 3e-3, 5e-3 (7e-3 was
    level, 1e-2 worse)."""
    seed: int = 0
    """Seed of initialisation and data order. The caller's random state is left as it was."""
    output: str = "runs/demo"
    """Folder for the SAEs, the training record, results.json and report.html."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        check_positive(self, "k", "selection_stages")
        check_numbers(self)
        self.comparison()  # refuses the others

    def comparison(self) -> CompareConfig:
        """The comparison that this is: one seed, one learning rate, four SAEs, the data in its own order."""
        return CompareConfig(
            **self.sizes(),
            arms=DEMO_ARMS,
            seeds=(self.seed,),
            k=(self.k,),
            nfm_top_fraction=self.nfm_top_fraction,
            selection_stages=min(self.selection_stages, self.k),
            refinement_steps=self.refinement_steps,
            shuffle=False,
            learning_rates=(self.lr,),
            output=self.output,
        )


def require_a_batch(config: Any, name: str) -> None:
    """Raise a ValueError where so many tokens do not fill one batch."""
    if getattr(config, name) < config.batch_size:
        raise ValueError(f"{name} must be at least a batch of {config.batch_size}, got {getattr(config, name)}")


def refuse_unknown_arms(names: Sequence[str]) -> None:
    """Raise a ValueError that names every arm which does not exist."""
    unknown = [name for name in names if name not in ALL_ARMS]
    if unknown:
        raise ValueError(
            f"no arm {', '.join(map(repr, unknown))}; give names from {', '.join(map(repr, ALL_ARMS))}, in quotes where "
            "they have spaces"
        )
