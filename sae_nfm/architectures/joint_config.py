"""Configurations of the architectures `joint_nfm` and `staged_topk`, which is the same without NFM: its inference alone.

Everything decoding needs is a field of the inference config; what only training needs (dropout, initial scales) is not.
All refuse unknown keys: SAELens would drop a misspelt one in silence and decode with the default instead.
"""

from dataclasses import dataclass
from typing import Any, get_args

from sae_lens import TopKSAEConfig, TopKTrainingSAEConfig
from typing_extensions import override

from sae_nfm.architectures.nfm_config import (
    InferenceFields,
    Kernel,
    NFMFields,
    NFMTrainingFields,
    TrainingInferenceFields,
    as_saved,
    check_inference,
    refuse_unknown_keys,
    with_requirement,
)
from sae_nfm.common import check_choice, check_positive

ARCHITECTURE, STAGED = "joint_nfm", "staged_topk"


@dataclass
class JointNFMSAEConfig(InferenceFields, NFMFields, TopKSAEConfig):
    """Configuration of an inference-only joint NFM-SAE.

    The fields of the NFM: `NFMFields`, of inference: `InferenceFields`, the others: `TopKSAEConfig`.

    Args:
        rescale_acts_by_decoder_norm (bool): Whether feature activations are multiplied by their decoder norm before the
            selection. The NFM reads the activations as hooked at hook_sae_acts_post, that is after this rescaling.
            Inherited from TopKSAEConfig.
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
    def from_dict(cls, config_dict: dict[str, Any]) -> "JointNFMSAEConfig":
        # the config of a training checkpoint is welcome: what only training reads is left out
        refuse_unknown_keys(cls, config_dict, JointNFMTrainingSAEConfig)
        return super().from_dict(as_saved(config_dict))


@dataclass(kw_only=True)
class JointNFMTrainingSAEConfig(TrainingInferenceFields, NFMTrainingFields, TopKTrainingSAEConfig):
    """Configuration for training a joint NFM-SAE: encoder, decoder and NFM together, on one reconstruction loss.

    The fields of the NFM: `NFMTrainingFields`, of inference: `TrainingInferenceFields`, the others: `TopKTrainingSAEConfig`.

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
        k (int): Number of active features per token. Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Whether feature activations are multiplied by their decoder norm before the
            selection. The NFM reads the activations as hooked at hook_sae_acts_post, that is after this rescaling.
            Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm of the initial decoder rows; None keeps the random ones. Inherited from
            TrainingSAEConfig.
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
        self.check_training_fields()

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


class WithoutNFM:
    """What the fields of an NFM say where there is none."""

    nfm_dim = 0
    nfm_top_k = None
    head = "none"
    use_linear_path = False
    use_square_path = False
    square_scale = 1.0


@dataclass
class StagedTopKSAEConfig(InferenceFields, WithoutNFM, TopKSAEConfig):
    """Configuration of an inference-only TopK SAE whose features are chosen in stages and refined.

    The control of a joint_nfm SAE with the same inference. The fields of inference: `InferenceFields`, the others:
    `TopKSAEConfig`.

    Args:
        kernel (Literal["auto", "dense", "sparse"]): Whether a training step in one stage without refinement, and a decode that
            needs no gradient, work on the matrix of all features or on the active ones alone; "auto" takes the faster.
    """

    kernel: Kernel = "auto"

    @override
    @classmethod
    def architecture(cls) -> str:
        return STAGED

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)
        check_choice("kernel", self.kernel, get_args(Kernel))
        self.metadata = with_requirement(self.metadata)

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "StagedTopKSAEConfig":
        refuse_unknown_keys(cls, config_dict, StagedTopKTrainingSAEConfig)
        return super().from_dict(as_saved(config_dict))


@dataclass(kw_only=True)
class StagedTopKTrainingSAEConfig(TrainingInferenceFields, WithoutNFM, TopKTrainingSAEConfig):
    """Configuration for training a TopK SAE whose features are chosen in stages and refined.

    The control of a joint_nfm SAE with the same inference. The fields of inference: `TrainingInferenceFields`, the others:
    `TopKTrainingSAEConfig`.

    Args:
        kernel (Literal["auto", "dense", "sparse"]): Whether a training step in one stage without refinement, and a decode that
            needs no gradient, work on the matrix of all features or on the active ones alone; "auto" takes the faster.
    """

    kernel: Kernel = "auto"
    nfm_dropout = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return STAGED

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)
        check_choice("kernel", self.kernel, get_args(Kernel))
        self.metadata = with_requirement(self.metadata)

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "StagedTopKTrainingSAEConfig":
        refuse_unknown_keys(cls, config_dict)
        return super().from_dict(config_dict)


JointNFMConfig = JointNFMSAEConfig | JointNFMTrainingSAEConfig | StagedTopKSAEConfig | StagedTopKTrainingSAEConfig


def parameter_count(cfg: JointNFMConfig) -> int:
    """Trainable numbers: encoder, decoder and biases, and the paths that are switched on."""
    d_in, d_sae, m = cfg.d_in, cfg.d_sae, cfg.nfm_dim
    count = 2 * d_in * d_sae + d_sae + d_in
    if cfg.use_linear_path:
        count += d_sae * d_in + d_in
    if cfg.head != "none":
        count += d_sae * m + m * m + m + m * d_in + d_in
    if cfg.use_square_path:
        count += d_sae * d_in
    return count


def check_sizes(cfg: TopKSAEConfig | TopKTrainingSAEConfig) -> None:
    """Raise a ValueError for sizes that cannot work, or stages or refinements."""
    check_positive(cfg, "d_in", "d_sae", "k")
    if cfg.k > cfg.d_sae:
        raise ValueError(f"k must be at most d_sae = {cfg.d_sae}, got {cfg.k}; lower k or raise d_sae")
    check_inference(cfg)


def _validate(cfg: JointNFMSAEConfig | JointNFMTrainingSAEConfig) -> None:
    check_sizes(cfg)
    if cfg.nfm_top_k is not None and not 1 <= cfg.nfm_top_k <= cfg.k:
        raise ValueError(f"nfm_top_k must be from 1 to k = {cfg.k}, or None for all active ones, got {cfg.nfm_top_k}")
    cfg.check_nfm_fields()
