"""The fields that say what a Neural Factorization Machine adds to an SAE, shared by every architecture that has one."""

from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

import torch
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override

from sae_nfm.common import check_choice, check_positive
from sae_nfm.kernels import check_head

Kernel = Literal["auto", "dense", "sparse"]
REQUIRES = "pip install sae-nfm; then `import sae_nfm` before SAELens loads this SAE"
"""`metadata.requires` of every cfg.json, for whoever meets a saved SAE without this package."""


@dataclass(kw_only=True)
class RefinementFields:
    """How activations are fitted to the input, once their features are chosen (`kernels.inference`).

    Args:
        refinement_steps (int): Refinements R of the activations of a token's features after these are chosen: gradient steps
            through the decoder, all paths included, none of which raises the token's squared error. 0 leaves the encoder's.
    """

    refinement_steps: int = 0


@dataclass(kw_only=True)
class InferenceFields(RefinementFields):
    """How a token's features are chosen, and their activations fitted to the input (`kernels.inference`).

    Args:
        selection_stages (int): Stages T in which the k features are chosen. Each stage encodes what the features chosen before
            it leave unexplained. 1 is TopK, k chooses one feature after the other (matching pursuit).
        selection_candidates (int | None): Of how many features, those that the first stage ranks highest, later stages
            choose: cheaper than of all d_sae, which None stands for.
    """

    selection_stages: int = 1
    selection_candidates: int | None = None


def check_inference(cfg: Any) -> None:
    """Raise a ValueError for stages or refinements that cannot work, of a config that has either."""
    encoder = getattr(cfg, "encoder", "topk")
    for name in ("selection_stages", "inference_selection_stages"):
        if encoder != "topk" and getattr(cfg, name, None) not in (None, 1):
            raise ValueError(
                f"{name} is {getattr(cfg, name)}, and features are chosen in stages with encoder 'topk' alone, not with "
                f"{encoder!r}, whose threshold is one for all; leave it out (refinement_steps can be given)"
            )
    for name in ("selection_stages", "inference_selection_stages"):
        stages = getattr(cfg, name, None)
        if encoder == "topk" and stages is not None and not 1 <= stages <= cfg.k:
            raise ValueError(f"{name} must be from 1 to k = {cfg.k}, at least one feature a stage, got {stages}")
    candidates = getattr(cfg, "selection_candidates", None)
    if encoder != "topk" and candidates is not None:
        raise ValueError(
            f"selection_candidates is {candidates}, and features are chosen in stages with encoder 'topk' alone, not with "
            f"{encoder!r}; leave it out"
        )
    if candidates is not None and not cfg.k <= candidates <= cfg.d_sae:
        raise ValueError(
            f"selection_candidates must be from k = {cfg.k} to d_sae = {cfg.d_sae}, or None for all, got {candidates}"
        )
    for name in ("refinement_steps", "inference_refinement_steps"):
        steps = getattr(cfg, name, None)
        if steps is not None and steps < 0:
            raise ValueError(f"{name} must be >= 0, got {steps}")
        if steps and cfg.normalize_activations == "covariance_whitening":
            raise ValueError(
                f"{name} is {steps} and normalize_activations 'covariance_whitening': refinements lower the error of whitened "
                "activations, and once the whitening is folded into the weights that of raw ones, so that features would differ "
                f"after training; give {name}=0 or another normalisation"
            )


@dataclass(kw_only=True)
class NFMFields:
    """What is added to an SAE's output, and how it is computed.

    Args:
        nfm_dim (int): Interaction dimensions m: the width of the hidden code h and of V (of "bilinear" twice, A and B).
        nfm_top_k (int | None): How many of a token's active features the linear and the interaction path read, the
            strongest first (the paper's n); None means all.
        head (str): The nonlinear path. "fm" pools products of feature pairs, "mlp" is the same head on f_n V without the
            product (a capacity control), "bilinear" multiplies two projections, (f_n A) * (f_n B), squares of features
            included, and writes the product without a gate, "none" leaves the path out; or a head of your own
            (`heads.register_head`).
        use_linear_path (bool): Whether the output has the linear integration path f_n W_lin + b_lin.
        use_square_path (bool): Whether the output has the square path (f^2 / square_scale) U, the diagonal that the
            pooling leaves out.
        square_scale (float): The fixed scale c of the square path, in units of feature activation; sqrt(d_in / k) is the
            size of an activation where inputs are normalised to norm sqrt(d_in).
        kernel (Literal["auto", "dense", "sparse"]): Whether a training step, and a decode that needs no gradient, work on
            the matrix of all features or on the active ones alone; "auto" takes the faster by the cost model of
            `dispatch.choose`, the matrix with fewer than 1,024 features. Same output, losses and gradients up to rounding.
            Steps with hooks on the SAE, of a subclass that overrides what a step is made of, compiled or under transforms
            (torch.func, forward-mode differentiation) are dense.
    """

    nfm_dim: int = 64
    nfm_top_k: int | None = None
    head: str = "fm"
    use_linear_path: bool = True
    use_square_path: bool = False
    square_scale: float = 3.0
    kernel: Kernel = "auto"
    LATER = ("selection_stages", "selection_candidates", "refinement_steps")
    """Fields that older saved SAEs lack, whose features are chosen at once and not refined."""

    def check_nfm_fields(self) -> None:
        """Raise a ValueError for values that cannot work."""
        check_positive(self, "nfm_dim", "nfm_top_k")
        check_head(self.head)
        check_choice("kernel", self.kernel, get_args(Kernel))
        if not 0 < self.square_scale < float("inf"):
            raise ValueError(f"square_scale must be > 0 and finite, about a usual activation, got {self.square_scale}")


@dataclass(kw_only=True)
class NFMTrainingFields(NFMFields):
    """`NFMFields` with those that only training reads.

    Args:
        nfm_dropout (float): Dropout probability on the pooled vector z, in training steps only: every other forward
            pass, evaluation of a model still in training included, is deterministic.
        nfm_embedding_init_std (float): Standard deviation of the initial V (the paper's 0.05).
        nfm_weight_init_std (float): Standard deviation of the initial W_lin, W_1, W_2 and U (the paper's 0.01).
    """

    nfm_dropout: float = 0.0
    nfm_embedding_init_std: float = 0.05
    nfm_weight_init_std: float = 0.01

    def check_training_fields(self) -> None:
        """Raise a ValueError for values that cannot work."""
        if not 0 <= self.nfm_dropout < 1:
            raise ValueError(f"nfm_dropout must be a probability in [0, 1), got {self.nfm_dropout}")
        for name in ("nfm_embedding_init_std", "nfm_weight_init_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be a standard deviation >= 0, got {getattr(self, name)}")


APART = ("selection_stages", "refinement_steps")
"""Fields of inference configs that a training config has twice: for training, and with `inference_` before it for the SAE that
it saves."""


@dataclass(kw_only=True)
class TrainingRefinementFields(RefinementFields, TrainingSAEConfig):
    """`RefinementFields` in training, and those of the SAE that is saved for inference.

    Args:
        refinement_steps (int): Refinements R of a token's activations in training steps, after its features are chosen:
            gradient steps through the decoder, all paths included, none of which raises the token's squared error.
        inference_refinement_steps (int | None): Refinements of the SAE that is saved for inference; unless given, as many as
            in training.
    """

    inference_refinement_steps: int | None = None

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return as_saved(super().get_inference_sae_cfg_dict() | self._apart("inference_"))

    @override
    def get_training_architecture_details(self) -> dict[str, Any]:
        return super().get_training_architecture_details() | self._apart("")

    def _apart(self, prefix: str) -> dict[str, Any]:
        return {prefix + name: getattr(self, prefix + name) for name in APART if hasattr(self, prefix + name)}


@dataclass(kw_only=True)
class TrainingInferenceFields(InferenceFields, TrainingRefinementFields):
    """`InferenceFields` in training, and those of the SAE that is saved for inference.

    Args:
        selection_stages (int): Stages T in which training steps choose the k features. Each encodes what the features chosen
            before it leave unexplained. 1 is TopK, k chooses one feature after the other (matching pursuit).
        inference_selection_stages (int | None): Stages of the SAE that is saved for inference; unless given, as many as in
            training.
    """

    inference_selection_stages: int | None = None


def as_saved(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A training config's settings as the SAE that it saves has them; one of batchtopk has a threshold, as in SAELens."""
    apart = {name: config_dict.get(f"inference_{name}") for name in APART}
    rest = {name: value for name, value in config_dict.items() if name not in {f"inference_{name}" for name in APART}}
    if rest.get("encoder") == "batchtopk":
        rest |= {"encoder": "jumprelu", "k": None}
    return rest | {name: value for name, value in apart.items() if value is not None}


def refuse_unknown_keys(config_class: Any, config_dict: dict[str, Any], training_class: Any = None) -> None:
    """Raise a ValueError that names every key which is a field neither of `config_class` nor of `training_class`."""
    known = {field.name for field in fields(config_class)} | {"architecture"}
    ignored = {field.name for field in fields(training_class)} if training_class else set()
    if config_dict.get("finetuning_scaling_factor") is False:  # SAELens adds it
        ignored.add("finetuning_scaling_factor")
    unknown = sorted(set(config_dict) - known - ignored)
    if unknown:
        raise ValueError(
            f"unknown key {', '.join(map(repr, unknown))} in a {config_class.architecture()} config; {config_class.__name__} has "
            f"{', '.join(sorted(known))}. Correct the spelling or remove the key"
        )


def refuse_missing_keys(config_class: type, config_dict: dict[str, Any], source: str) -> None:
    """Raise a ValueError that names every key decoding needs and a saved config lacks; a default could be wrong."""
    optional = {"metadata", "dtype", "device", "kernel", *getattr(config_class, "LATER", ())}
    needed = {field.name for field in fields(config_class)} - optional
    missing = sorted(needed - set(config_dict))
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(map(repr, missing))}, which a saved {config_dict['architecture']} config always has; "
            "restore the file"
        )


def with_requirement(metadata: Any) -> Any:
    """A copy that says what loads the SAE; SAELens passes a dict first when it reads a file, where it stands already."""
    if not isinstance(metadata, SAEMetadata):
        return metadata
    return SAEMetadata(**(metadata.to_dict() | {"requires": REQUIRES}))


def random_initialisation(cfg: TrainingSAEConfig, seed: int) -> TrainingSAE[Any]:
    """An SAE as it is before its first step: the reference for every statistic of weights. No global seed changes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_sae_training_class(cfg.architecture())[0](deepcopy(cfg))


def training_config(sae: SAE[Any]) -> TrainingSAEConfig:
    """The config an SAE was trained with, as far as initialisation reads it; from its metadata for an inference SAE."""
    if isinstance(sae, TrainingSAE):
        return cast(TrainingSAEConfig, sae.cfg)
    metadata = sae.cfg.metadata
    details, architecture = metadata.training_architecture_details, metadata.training_architecture
    if details is None or architecture is None:
        raise ValueError(
            "the SAE's metadata does not say how it was trained (training_architecture, training_architecture_details); "
            "give the training config to random_initialisation yourself"
        )
    return get_sae_training_class(architecture)[1].from_dict(sae.cfg.to_dict() | details)
