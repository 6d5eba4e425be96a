"""Configurations of the `joint_nfm` architecture: `JointNFMSAEConfig` (inference), `JointNFMTrainingSAEConfig` (training).

Everything decoding needs is a field of the inference config; what only training needs (dropout, initial scales) is not.
Both refuse unknown keys: SAELens would drop a misspelt one in silence and decode with the default instead.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from sae_lens import TopKSAEConfig, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override

ARCHITECTURE = "joint_nfm"
Head = Literal["fm", "mlp", "none"]
HEADS = ("fm", "mlp", "none")
Kernel = Literal["auto", "dense", "sparse"]
KERNELS = ("auto", "dense", "sparse")
REQUIRES = "pip install sae-nfm; then `import sae_nfm` before SAELens loads this SAE"
"""`metadata.requires` of every cfg.json, for whoever meets a saved SAE without this package."""


@dataclass
class JointNFMSAEConfig(TopKSAEConfig):
    """Configuration of an inference-only joint NFM-SAE.

    Args:
        nfm_dim (int): Interaction dimensions m: the width of V and of the hidden code h.
        nfm_top_k (int | None): How many of the k active features the linear and the interaction path read, the
            strongest first (the paper's n); None means all k.
        head (Literal["fm", "mlp", "none"]): The nonlinear path. "fm" pools products of feature pairs, "mlp" is the same
            head on f_n V without the product (a capacity control), "none" leaves the path out.
        use_linear_path (bool): Whether the output has the linear integration path f_n W_lin + b_lin.
        use_square_path (bool): Whether the output has the square path (f^2 / square_scale) U, the diagonal that the
            pooling leaves out.
        square_scale (float): The fixed scale c of the square path, in units of feature activation; sqrt(d_in / k) is the
            size of an activation where inputs are normalised to norm sqrt(d_in).
        kernel (Literal["auto", "dense", "sparse"]): Whether a decode that needs no gradient multiplies the matrix of all
            features or reads the active ones alone; "auto" takes the faster by the cost model of `kernels.choose`, the
            matrix with fewer than 1,024 features. Same output up to rounding.
        k (int): Number of active features per token. Inherited from TopKSAEConfig.
        rescale_acts_by_decoder_norm (bool): Whether feature activations are multiplied by their decoder norm before the
            selection. The NFM reads the activations as hooked at hook_sae_acts_post, that is after this rescaling.
            Inherited from TopKSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): Number of features. Inherited from SAEConfig.
        dtype (str): Data type of the parameters. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether b_dec is subtracted before encoding. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]):
            Normalisation of the input. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): Whether attention heads are flattened. Inherited from SAEConfig.
        metadata (SAEMetadata): Model name, hook name and the like. Inherited from SAEConfig.
    """  # noqa: E501

    nfm_dim: int = 64
    nfm_top_k: int | None = None
    head: Head = "fm"
    use_linear_path: bool = True
    use_square_path: bool = False
    square_scale: float = 3.0
    kernel: Kernel = "auto"

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _validate(self)
        self.metadata = _with_requirement(self.metadata)

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "JointNFMSAEConfig":
        # the config of a training checkpoint is welcome: what only training reads is left out
        training_only = {field.name for field in fields(JointNFMTrainingSAEConfig)}
        refuse_unknown_keys(cls, {key: value for key, value in config_dict.items() if key not in training_only})
        return super().from_dict(config_dict)


@dataclass(kw_only=True)
class JointNFMTrainingSAEConfig(TopKTrainingSAEConfig):
    """Configuration for training a joint NFM-SAE: encoder, decoder and NFM together, on one reconstruction loss.

    The defaults `rescale_acts_by_decoder_norm=True` and `nfm_top_k=None` were chosen by measurement: embedded model,
    blocks.2.hook_resid_post, real text, 400,000 tokens, d_sae 2,048, k 32, nfm_dim 64, one seed (a second one at learning
    rate 3e-3 moved no FVU by more than 0.0012), held-out FVU / KL in nats by Adam's learning rate:

        rescaling  nfm_top_k  2e-3           3e-3           5e-3
        True       None       0.108 / 0.178  0.099 / 0.134  0.094 / 0.119
        True       16         0.112 / 0.207  0.103 / 0.165  0.100 / 0.138
        False      None       0.102 / 0.160  0.096 / 0.126  0.097 / 0.127
        False      16         0.109 / 0.201  0.104 / 0.194  0.100 / 0.146

    Reading all k features was better at each of these rates, and only it has a canonical gauge. Rescaling is SAELens's
    default for TopK and won at the best rate; without it training is faster at low rates. The square scale 3 beat 1 at 5e-3
    (0.093 / 0.122 against 0.095 / 0.124, rescaled) and 10 at 3e-3.

    Args:
        nfm_dim (int): Interaction dimensions m: the width of V and of the hidden code h.
        nfm_top_k (int | None): How many of the k active features the linear and the interaction path read, the
            strongest first (the paper's n); None means all k.
        head (Literal["fm", "mlp", "none"]): The nonlinear path. "fm" pools products of feature pairs, "mlp" is the same
            head on f_n V without the product (a capacity control), "none" leaves the path out.
        use_linear_path (bool): Whether the output has the linear integration path f_n W_lin + b_lin.
        use_square_path (bool): Whether the output has the square path (f^2 / square_scale) U, the diagonal that the
            pooling leaves out.
        square_scale (float): The fixed scale c of the square path, in units of feature activation; sqrt(d_in / k) is the
            size of an activation where inputs are normalised to norm sqrt(d_in).
        kernel (Literal["auto", "dense", "sparse"]): Whether a training step works on the matrix of all features or on
            the active ones alone; "auto" takes the faster by the cost model of `kernels.choose`, the matrix with fewer than
            1,024 features. Same losses and gradients up to rounding. Steps with hooks on the SAE, and compiled ones, are
            dense.
        nfm_dropout (float): Dropout probability on the pooled vector z, in training steps only: every other forward
            pass, evaluation of a model still in training included, is deterministic.
        nfm_embedding_init_std (float): Standard deviation of the initial V (the paper's 0.05).
        nfm_weight_init_std (float): Standard deviation of the initial W_lin, W_1, W_2 and U (the paper's 0.01).
        k (int): Number of active features per token. Inherited from TopKTrainingSAEConfig.
        use_sparse_activations (bool): Whether feature activations are COO tensors. Inherited from TopKTrainingSAEConfig.
        aux_loss_coefficient (float): Weight of the dead-feature loss. Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Whether feature activations are multiplied by their decoder norm before the
            selection. The NFM reads the activations as hooked at hook_sae_acts_post, that is after this rescaling.
            Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm of the initial decoder rows; None keeps the random ones. Inherited from
            TrainingSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): Number of features. Inherited from SAEConfig.
        dtype (str): Data type of the parameters. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether b_dec is subtracted before encoding. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]):
            Normalisation of the input. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): Whether attention heads are flattened. Inherited from SAEConfig.
        metadata (SAEMetadata): Model name, hook name and the like. Inherited from SAEConfig.
    """  # noqa: E501

    nfm_dim: int = 64
    nfm_top_k: int | None = None
    head: Head = "fm"
    use_linear_path: bool = True
    use_square_path: bool = False
    square_scale: float = 3.0
    kernel: Kernel = "auto"
    nfm_dropout: float = 0.0
    nfm_embedding_init_std: float = 0.05
    nfm_weight_init_std: float = 0.01

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _validate(self)
        self.metadata = _with_requirement(self.metadata)
        if not 0 <= self.nfm_dropout < 1:
            raise ValueError(f"nfm_dropout is {self.nfm_dropout}; give a probability in [0, 1), 0 for none")
        for name in ("nfm_embedding_init_std", "nfm_weight_init_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a standard deviation >= 0")

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "JointNFMTrainingSAEConfig":
        refuse_unknown_keys(cls, config_dict)
        return super().from_dict(config_dict)

    @classmethod
    def paper(cls, d_in: int, **overrides: Any) -> "JointNFMTrainingSAEConfig":
        """The published hyper-parameters: 50,000 features, k = 1024, n = 512, 300 interaction dimensions, dropout 0.15.

        What SAELens's trainer has no counterpart for, and this preset therefore cannot express: activations standardised
        per dimension (nearest: `normalize_activations="expected_average_only_in"`, set here); ten passes over each chunk
        of 10,000 tokens; a loss averaged, not summed, over d_in (so gradient clipping at 1.0 and the auxiliary loss mean
        something else); a decoder without bias. Learning rate 1e-4 with linear decay to 1e-5 over 80 % of the steps and
        batches of 64 belong to the runner's config.

        Args:
            d_in: width of the hook point (3,200 in the paper).
            overrides: any field, to scale the preset down.

        Source: arXiv 2507.00269, set-up.
        """
        published: dict[str, Any] = {
            "d_in": d_in,
            "d_sae": 50_000,
            "k": 1024,
            "nfm_top_k": 512,
            "nfm_dim": 300,
            "nfm_dropout": 0.15,
            "apply_b_dec_to_input": False,
            "rescale_acts_by_decoder_norm": False,
            "aux_loss_coefficient": 0.0,
            "decoder_init_norm": None,
            "normalize_activations": "expected_average_only_in",
        }
        return cls(**(published | overrides))


JointNFMConfig = JointNFMSAEConfig | JointNFMTrainingSAEConfig


def parameter_count(cfg: JointNFMConfig) -> int:
    """Trainable numbers of a joint NFM-SAE: encoder, decoder and biases, and the paths that are switched on."""
    d_in, d_sae, m = cfg.d_in, cfg.d_sae, cfg.nfm_dim
    count = 2 * d_in * d_sae + d_sae + d_in
    if cfg.use_linear_path:
        count += d_sae * d_in + d_in
    if cfg.head != "none":
        count += d_sae * m + m * m + m + m * d_in + d_in
    if cfg.use_square_path:
        count += d_sae * d_in
    return count


def refuse_unknown_keys(config_class: type, config_dict: dict[str, Any]) -> None:
    """Raise a ValueError that names every key which is not a field of `config_class`."""
    known = {field.name for field in fields(config_class)} | {"architecture"}
    added_by_saelens = {"finetuning_scaling_factor"} if config_dict.get("finetuning_scaling_factor") is False else set()
    unknown = sorted(set(config_dict) - known - added_by_saelens)
    if unknown:
        raise ValueError(
            f"unknown key {', '.join(map(repr, unknown))} in a {ARCHITECTURE} config; {config_class.__name__} has "
            f"{', '.join(sorted(known))}. Correct the spelling or remove the key"
        )


def refuse_missing_keys(config_dict: dict[str, Any], source: str) -> None:
    """Raise a ValueError that names every key decoding needs and a saved config lacks; a default could be wrong."""
    needed = {field.name for field in fields(JointNFMSAEConfig)} - {"metadata", "dtype", "device", "kernel"}
    missing = sorted(needed - set(config_dict))
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(map(repr, missing))}, which a saved {ARCHITECTURE} config always has; restore the file"
        )


def _validate(cfg: JointNFMConfig) -> None:
    for name in ("d_in", "d_sae", "k", "nfm_dim"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}; give a positive whole number")
    if cfg.k > cfg.d_sae:
        raise ValueError(f"k is {cfg.k}, more than the d_sae = {cfg.d_sae} features there are; lower k or raise d_sae")
    if cfg.nfm_top_k is not None and not 1 <= cfg.nfm_top_k <= cfg.k:
        raise ValueError(
            f"nfm_top_k is {cfg.nfm_top_k}; give a number from 1 to k = {cfg.k}, or None for all k active features"
        )
    if cfg.head not in HEADS:
        raise ValueError(f"head is {cfg.head!r}; give one of {', '.join(map(repr, HEADS))}")
    if cfg.kernel not in KERNELS:
        raise ValueError(f"kernel is {cfg.kernel!r}; give one of {', '.join(map(repr, KERNELS))}")
    if not 0 < cfg.square_scale < float("inf"):
        raise ValueError(f"square_scale is {cfg.square_scale}; give a positive number, about a typical activation")


def _with_requirement(metadata: Any) -> Any:
    """A copy that says what loads the SAE; SAELens passes a dict first when it reads a file, where it stands already."""
    return (
        SAEMetadata(**{**metadata.to_dict(), "requires": REQUIRES}) if isinstance(metadata, SAEMetadata) else metadata
    )
