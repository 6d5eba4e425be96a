"""Configurations of the `sequential_nfm` architecture: an NFM on the residual of a pretrained SAE, the base.

What says how the base encodes and decodes is in `base_config`, a saved SAE's own config; the fields d_in, d_sae,
apply_b_dec_to_input and reshape_activations repeat it for those who read an SAE's config.
"""

from dataclasses import dataclass, field, fields
from typing import Any, cast

from sae_lens import SAEConfig, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override

from sae_nfm.architectures.nfm_config import NFMFields, NFMTrainingFields, refuse_unknown_keys, with_requirement
from sae_nfm.architectures.sequential_base import base_config, load_base
from sae_nfm.loading import sha256_of

ARCHITECTURE = "sequential_nfm"
SPARSE_BY_PENALTY = ("standard", "gated", "jumprelu")
"""Bases whose sparsity nothing holds once they are trained on the reconstruction alone."""


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
class SequentialNFMSAEConfig(NFMFields, BaseFields, SAEConfig):
    """Configuration of an inference-only sequential NFM-SAE; see `NFMFields` and `BaseFields`.

    Args:
        d_in (int): Input dimension, the base's. Inherited from SAEConfig.
        d_sae (int): Number of features, the base's. Inherited from SAEConfig.
        dtype (str): Data type of the parameters. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): The base's. Inherited from SAEConfig.
        normalize_activations (Literal["none"]): The base normalises for itself. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): Whether attention heads are flattened. Inherited from SAEConfig.
        metadata (SAEMetadata): Model name, hook name and the like. Inherited from SAEConfig.
    """

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
        training_only = {one.name for one in fields(SequentialNFMTrainingSAEConfig)}
        kept = {key: value for key, value in config_dict.items() if key not in training_only}
        refuse_unknown_keys(cls, kept, ARCHITECTURE)
        return cast(SequentialNFMSAEConfig, super().from_dict(config_dict))


@dataclass(kw_only=True)
class SequentialNFMTrainingSAEConfig(NFMTrainingFields, BaseFields, TrainingSAEConfig):
    """Configuration for training an NFM on the residual x - sae of a base; see `NFMTrainingFields` and `BaseFields`.

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
        refuse_unknown_keys(cls, config_dict, ARCHITECTURE)
        return cast(SequentialNFMTrainingSAEConfig, super().from_dict(config_dict))


SequentialNFMConfig = SequentialNFMSAEConfig | SequentialNFMTrainingSAEConfig


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
            raise ValueError(
                f"dtype is {cfg.dtype!r}, but the base's is {cfg.base_config['dtype']!r}; give both the same"
            )
    cfg.check_nfm_fields()
