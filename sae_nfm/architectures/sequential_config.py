"""Configurations of the `sequential_nfm` architecture: an NFM on the residual of a pretrained SAE, the base.

What says how the base encodes and decodes is in `base_config`, a saved SAE's own config; the fields d_in, d_sae,
apply_b_dec_to_input and reshape_activations repeat it for those who read an SAE's config.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from typing_extensions import override

from sae_nfm.architectures.joint_config import JointNFMSAEConfig, StagedTopKSAEConfig
from sae_nfm.architectures.nfm_config import (
    NFMFields,
    NFMTrainingFields,
    RefinementFields,
    TrainingRefinementFields,
    as_saved,
    check_inference,
    refuse_unknown_keys,
    with_requirement,
)
from sae_nfm.architectures.transcoder_config import (
    SKIP_TRANSCODER,
    TRANSCODER,
    JointNFMSkipTranscoderConfig,
    JointNFMTranscoderConfig,
)
from sae_nfm.common import present_path
from sae_nfm.loading import load_sae, sha256_of

ARCHITECTURE = "sequential_nfm"
BASES = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "staged_topk")
"""Architectures that can be a base; SAELens saves batchtopk and matryoshka_batchtopk as jumprelu."""
_TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    TRANSCODER,
    SKIP_TRANSCODER,
)
_TWO_PLACES = "it reads one place and writes another, so there is no residual x - sae at one hook point"
_HAS_NFM = "it has an NFM already; train it further with SAELens's from_pretrained_path"
REFUSED = {
    **dict.fromkeys(_TRANSCODERS, _TWO_PLACES),
    "temporal": "its features of a token depend on the tokens before it, but SAEs are trained on tokens in random order",
    **dict.fromkeys(("joint_nfm", "sequential_nfm"), _HAS_NFM),
}
"""Architectures that cannot, and why."""
SPARSE_BY_PENALTY = ("standard", "gated", "jumprelu")
"""Bases whose sparsity nothing holds once they are trained on the reconstruction alone."""
UNFOLDED = ("expected_average_only_in", "covariance_whitening")
"""Normalisations with statistics of the data, which an SAE does not carry."""


def as_base(sae: SAE[Any], norm_scaling_factor: float | None = None) -> SAE[Any]:
    """A copy of an SAE, fit to be a base: for inference, normalisation folded, heads flattened by whoever calls it.

    The fold at the end of SAELens's training would rewrite the weights, and with them the features that the NFM was trained on.
    `norm_scaling_factor` is what its inputs were multiplied with in training, where that is not folded into it.

    Raises a ValueError for an architecture that cannot be a base, or a normalisation that is not folded.
    """
    sae = for_inference(sae)
    architecture = sae.cfg.architecture()
    if architecture not in BASES:
        reason = REFUSED.get(architecture, "its conventions are not known here")
        raise ValueError(f"an SAE of the architecture {architecture!r} cannot be a base: {reason}; give one of {BASES}")
    if norm_scaling_factor is not None:
        if sae.cfg.normalize_activations not in ("none", UNFOLDED[0]):
            raise ValueError(
                f"norm_scaling_factor is for inputs normalised by {UNFOLDED[0]!r}, this SAE has "
                f"{sae.cfg.normalize_activations!r}; leave it out"
            )
        sae.fold_activation_norm_scaling_factor(norm_scaling_factor)
    if sae.cfg.normalize_activations in UNFOLDED:
        raise ValueError(
            f"the base's normalisation {sae.cfg.normalize_activations!r} is not folded into its weights: finish its training, "
            "or give the norm_scaling_factor that its inputs were multiplied with"
        )
    sae.cfg.reshape_activations = "none"
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


def for_inference(sae: SAE[Any]) -> SAE[Any]:
    """A copy of an SAE as SAELens would save and load it for inference."""
    state_dict = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(state_dict)
        config = sae.cfg.get_inference_sae_cfg_dict()
    else:
        config = sae.cfg.to_dict()
    metadata, device = config["metadata"], config["device"]
    # without metadata, whose model_from_pretrained_kwargs SAELens warns of; on "meta" nothing is drawn at random
    copied = SAE.from_dict(config | {"metadata": {"hook_name": metadata.get("hook_name")}, "device": "meta"})
    copied.cfg.metadata = type(copied.cfg.metadata)(**metadata)
    copied.load_state_dict(state_dict, assign=True)
    return copied.to(device=device)


def load_base(source: str, norm_scaling_factor: float | None, dtype: str, device: str = "cpu") -> SAE[Any]:
    """`as_base` of a saved SAE (its folder) or a released one (release:sae_id)."""
    path = present_path(Path(source))
    sae = load_sae(str(path) if path.is_dir() else source, device=device, dtype=dtype)
    return as_base(sae, norm_scaling_factor)


def base_config(base: SAE[Any]) -> dict[str, Any]:
    """What rebuilds the base, without what belongs to the SAE around it: plain values."""
    return {name: value for name, value in base.cfg.to_dict().items() if name not in ("metadata", "device")}


def check_base(tensors: dict[str, Tensor], sha256: str, source: str) -> None:
    """Compare a base's weights with those that the NFM was trained on. Raises a ValueError when they are others."""
    found = sha256_of(tensors)
    if found != sha256:
        name = f" {source!r}" if source else ""
        raise ValueError(
            f"the base{name} is not the one that this NFM was trained on, or it is damaged: the sha256 of its weights is "
            f"{found[:16]}..., not {sha256[:16]}...; restore the base, or train a new NFM on it"
        )


@dataclass(kw_only=True)
class BaseFields:
    """Which base a sequential NFM stands on.

    Args:
        base (str): The base SAE: a saved SAE's folder, or release:sae_id of a released one. Empty for one given as an object.
        base_norm_scaling_factor (float | None): What the base's inputs were multiplied with in its training, where that is
            not folded into its weights; saved and released SAEs have it folded.
        base_config (dict): The base's own config, as saved with it. Read from the base unless given.
        base_sha256 (str): sha256 of the base's weights, verified when they are loaded. Computed unless given.
    """

    base: str = ""
    base_norm_scaling_factor: float | None = None
    base_config: dict[str, Any] = field(default_factory=dict[str, Any])
    base_sha256: str = ""


@dataclass
class SequentialNFMSAEConfig(RefinementFields, NFMFields, BaseFields, SAEConfig):
    """Configuration of an inference-only sequential NFM-SAE; see `NFMFields`, `BaseFields` and `RefinementFields`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _validate(self)
        self.metadata = with_requirement(self.metadata)

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "SequentialNFMSAEConfig":
        # the config of a training checkpoint is welcome: what only training reads is left out
        refuse_unknown_keys(cls, config_dict, SequentialNFMTrainingSAEConfig)
        return cast(SequentialNFMSAEConfig, super().from_dict(as_saved(config_dict)))


@dataclass(kw_only=True)
class SequentialNFMTrainingSAEConfig(TrainingRefinementFields, NFMTrainingFields, BaseFields, TrainingSAEConfig):
    """Configuration for training an NFM on the residual x - sae of a base.

    The fields of the NFM: `NFMTrainingFields`, of the base: `BaseFields`, of its activations: `TrainingRefinementFields`.

    With `base` the sizes are read from it, and so is the hook name unless the metadata has one.

    Args:
        train_base (bool): Whether the base is trained too, from where it is: a joint fine-tune.
        l1_coefficient (float | None): With train_base: weight of the L1 norm of the features (times their decoder norms).
            Needed for a standard, gated or jumprelu base, whose sparsity nothing else holds; 0 for none.
        decoder_init_norm (float | None): Without effect: the decoder is the base's. Inherited from TrainingSAEConfig.
        d_in (int): Input dimension; 0 takes the base's.
        d_sae (int): Number of features; 0 takes the base's.
        dtype (str): Data type of the parameters, in which the base is loaded, too. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): The base's. Inherited from SAEConfig.
        normalize_activations (Literal["none"]): The base normalises for itself. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): Whether attention heads are flattened. Inherited from SAEConfig.
        metadata (SAEMetadata): Model name, hook name and the like. Inherited from SAEConfig.
    """

    d_in: int = 0
    d_sae: int = 0
    train_base: bool = False
    l1_coefficient: float | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        if self.base and not self.base_config:
            self._read_base()
        _validate(self)
        self.check_training_fields()
        if self.train_base:
            self.check_sparsity()
        super().__post_init__()
        self.metadata = with_requirement(self.metadata)

    def _read_base(self) -> None:
        base = load_base(self.base, self.base_norm_scaling_factor, self.dtype)
        self.base_config, self.base_sha256 = base_config(base), sha256_of(base.state_dict())
        self.d_in, self.d_sae = self.d_in or base.cfg.d_in, self.d_sae or base.cfg.d_sae
        if self.metadata.hook_name is None:
            self.metadata = SAEMetadata(**(base.cfg.metadata.to_dict() | {"training_architecture": ARCHITECTURE}))

    def check_sparsity(self) -> None:
        """Raise a ValueError where nothing would hold the sparsity of a base that is trained."""
        if self.base_config.get("architecture") in SPARSE_BY_PENALTY and self.l1_coefficient is None:
            raise ValueError(
                f"nothing holds the sparsity of a {self.base_config['architecture']!r} base while it is trained: give "
                "l1_coefficient (0 for no penalty)"
            )

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "SequentialNFMTrainingSAEConfig":
        refuse_unknown_keys(cls, config_dict)
        return cast(SequentialNFMTrainingSAEConfig, super().from_dict(config_dict))


SequentialNFMConfig = SequentialNFMSAEConfig | SequentialNFMTrainingSAEConfig


def check_refinement(cfg: SequentialNFMConfig) -> None:
    """Raise a ValueError for refinements that cannot work."""
    check_inference(cfg)
    steps = cfg.refinement_steps or getattr(cfg, "inference_refinement_steps", 0)
    if steps and cfg.base_config.get("architecture") == "abstopk":
        raise ValueError(
            f"refinements ({steps} of them) keep activations >= 0, and those of the base, an abstopk SAE, can be negative; "
            "give 0 refinement steps, or another base"
        )


def _validate(cfg: SequentialNFMConfig) -> None:
    if cfg.normalize_activations != "none":
        raise ValueError(
            f"normalize_activations is {cfg.normalize_activations!r}: the base normalises its input for itself, and the NFM "
            "finds the scale of activations in its first step; give 'none'"
        )
    for name in ("d_in", "d_sae"):
        wanted, given = cfg.base_config.get(name), getattr(cfg, name)
        if wanted is not None and given != wanted:
            raise ValueError(f"{name} is {given}, but the base's is {wanted}; choose the hook point it was trained at")
    if cfg.base_config:
        cfg.apply_b_dec_to_input = cfg.base_config["apply_b_dec_to_input"]
        if cfg.base_config["dtype"] != cfg.dtype and isinstance(cfg, SequentialNFMTrainingSAEConfig):
            raise ValueError(f"dtype is {cfg.dtype!r}, the base's is {cfg.base_config['dtype']!r}; give both the same")
    cfg.check_nfm_fields()
    check_refinement(cfg)


INFERENCE_CONFIGS: dict[str, type[JointNFMSAEConfig] | type[SequentialNFMSAEConfig] | type[StagedTopKSAEConfig]] = {
    config.architecture(): config
    for config in (
        *(JointNFMSAEConfig, StagedTopKSAEConfig, SequentialNFMSAEConfig),
        *(JointNFMTranscoderConfig, JointNFMSkipTranscoderConfig),
    )
}
"""Inference config by the architecture's name."""
