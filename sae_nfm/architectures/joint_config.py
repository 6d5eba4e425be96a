"""Configurations of the architectures `joint_nfm`, with one of three encoders, and `staged_topk`: its TopK and inference alone.

Everything decoding needs is a field of the inference config; what only training needs (dropout, initial scales) is not.
All refuse unknown keys: SAELens would drop a misspelt one in silence and decode with the default instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    TopKSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from sae_lens.registry import get_sae_training_class
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
from sae_nfm.kernels import BILINEAR, embedding_width

ARCHITECTURE, STAGED = "joint_nfm", "staged_topk"
Encoder = Literal["topk", "batchtopk", "jumprelu"]
if TYPE_CHECKING:
    Active = Any  # whoever reads TopK's k knows it to be an int
else:
    Active = int | float | None
ENCODERS: dict[str, type[TrainingSAEConfig]] = {
    "topk": TopKTrainingSAEConfig,
    "batchtopk": BatchTopKTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
}
"""SAELens's own config by encoder: which fields an encoder has, and what they are unless given."""
ABSENT = {"k": None, "rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": 0.0}
"""What the fields of joint_nfm whose default depends on the encoder are where the encoder lacks them."""


def encoder_defaults(encoder: str) -> dict[str, Any]:
    """The defaults that depend on the encoder: those of SAELens's class."""
    return {name: getattr(ENCODERS[encoder], name, absent) for name, absent in ABSENT.items()}


def encoders_with(name: str) -> list[str]:
    """The encoders for which a field of the training config means something."""
    if name == "use_sparse_activations":  # SAELens's batchtopk has it too, and does not read it
        return ["topk"]
    return [encoder for encoder, theirs in ENCODERS.items() if name in theirs.__dataclass_fields__] or list(ENCODERS)


@dataclass
class JointNFMSAEConfig(InferenceFields, NFMFields, TopKSAEConfig):
    """Configuration of an inference-only joint NFM-SAE.

    The fields of the NFM: `NFMFields`, of inference: `InferenceFields`, the others: `TopKSAEConfig`.

    Args:
        encoder (Literal["topk", "jumprelu"]): How a token's features are chosen: the k largest, or those above each feature's
            threshold, as SAEs trained with "batchtopk" or "jumprelu" do.
        k (int | None): Number of active features per token; None for "jumprelu", where it varies.
        rescale_acts_by_decoder_norm (bool): Whether feature activations are multiplied by their decoder norm before the
            selection. The NFM reads the activations as hooked at hook_sae_acts_post, that is after this rescaling.
            Inherited from TopKSAEConfig.
    """

    k: Active = None
    encoder: Encoder = "topk"
    LATER = (*NFMFields.LATER, "encoder")

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        check_choice("encoder of an SAE for inference", self.encoder, ("topk", "jumprelu"))
        _complete(self, ("k",))
        super().__post_init__()
        _validate(self)
        self.metadata = with_requirement(self.metadata)

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "JointNFMSAEConfig":
        # the config of a training checkpoint is welcome: what only training reads is left out
        refuse_unknown_keys(cls, config_dict, get_sae_training_class(cls.architecture())[1])
        return super().from_dict(as_saved(config_dict))


@dataclass(kw_only=True)
class EncoderFields:
    """The encoder of a joint NFM-SAE, and the options of SAELens that one encoder alone has.

    Args:
        encoder (Literal["topk", "batchtopk", "jumprelu"]): How active features are chosen: the k largest of each token (topk);
            the k largest a token on average over a batch, saved with a threshold (batchtopk); those above a threshold that each
            feature learns, with SAELens's losses (jumprelu). Options of one encoder are refused with another.
        topk_threshold_lr (float): For batchtopk: rate at which the saved threshold follows the smallest positive activation
            of each step.
        jumprelu_init_threshold (float): For jumprelu: initial threshold.
        jumprelu_bandwidth (float): For jumprelu: width of the window around the threshold in which it gets a gradient.
        jumprelu_sparsity_loss_mode (Literal["step", "tanh", "quadratic"]): For jumprelu: the sparsity loss; "step" counts
            active features (DeepMind's), "tanh" is Anthropic's, "quadratic" draws their number to target_l0 (Gemma Scope 2).
        l0_coefficient (float): For jumprelu: coefficient of the sparsity loss.
        l0_warm_up_steps (int): For jumprelu: steps over which that coefficient rises from 0.
        pre_act_loss_coefficient (float | None): For jumprelu: coefficient of the loss that revives dead features; None for
            none, 3e-6 as Anthropic's.
        jumprelu_tanh_scale (float): For jumprelu: scale in the "tanh" loss.
        jumprelu_ste_to_input (bool): For jumprelu: whether the gradient in that window reaches the encoder too (Anthropic's),
            not the threshold alone (DeepMind's).
        target_l0 (float | None): For jumprelu with the "quadratic" loss: the number of active features it aims at.
    """

    encoder: Encoder = "topk"
    topk_threshold_lr: float = BatchTopKTrainingSAEConfig.topk_threshold_lr
    jumprelu_init_threshold: float = JumpReLUTrainingSAEConfig.jumprelu_init_threshold
    jumprelu_bandwidth: float = JumpReLUTrainingSAEConfig.jumprelu_bandwidth
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = (
        JumpReLUTrainingSAEConfig.jumprelu_sparsity_loss_mode
    )
    l0_coefficient: float = JumpReLUTrainingSAEConfig.l0_coefficient
    l0_warm_up_steps: int = JumpReLUTrainingSAEConfig.l0_warm_up_steps
    pre_act_loss_coefficient: float | None = JumpReLUTrainingSAEConfig.pre_act_loss_coefficient
    jumprelu_tanh_scale: float = JumpReLUTrainingSAEConfig.jumprelu_tanh_scale
    jumprelu_ste_to_input: bool = JumpReLUTrainingSAEConfig.jumprelu_ste_to_input
    target_l0: float | None = JumpReLUTrainingSAEConfig.target_l0


@dataclass(kw_only=True)
class JointNFMTrainingSAEConfig(TrainingInferenceFields, NFMTrainingFields, EncoderFields, TopKTrainingSAEConfig):
    """Configuration for training a joint NFM-SAE: encoder, decoder and NFM together, on one reconstruction loss.

    The fields of the NFM: `NFMTrainingFields`, of the encoder: `EncoderFields`, of inference: `TrainingInferenceFields`, the
    others: `TopKTrainingSAEConfig`.

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
        k (int | float | None): Number of active features per token; for batchtopk, on average. jumprelu has none.
        rescale_acts_by_decoder_norm (bool): Whether feature activations are multiplied by their decoder norm before the
            selection. The NFM reads the activations as hooked at hook_sae_acts_post, that is after this rescaling. jumprelu has
            none.
        aux_loss_coefficient (float): Coefficient of the loss that lets dead features reconstruct what the others leave.
            jumprelu has pre_act_loss_coefficient.
        decoder_init_norm (float | None): Norm of the initial decoder rows; None keeps the random ones. Inherited from
            TrainingSAEConfig.
    """

    # None: `encoder_defaults`; a config that was made has values
    k: Active = None
    rescale_acts_by_decoder_norm: bool = cast(bool, None)
    aux_loss_coefficient: float = cast(float, None)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        check_choice("encoder", self.encoder, ENCODERS)
        _complete(self, ABSENT)
        super().__post_init__()
        _validate(self)
        self._refuse_other_encoders()
        self.metadata = with_requirement(self.metadata)
        self.check_training_fields()

    def _refuse_other_encoders(self) -> None:
        """Raise a ValueError for an option that this encoder does not read."""
        for field in fields(self):
            given, unread = getattr(self, field.name), ABSENT.get(field.name, field.default)
            if self.encoder not in (having := encoders_with(field.name)) and given != unread:
                raise ValueError(
                    f"{field.name} is {given!r}, an option of encoder {' and '.join(map(repr, having))}, and the encoder is "
                    f"{self.encoder!r}; leave it out"
                )
        mode = self.jumprelu_sparsity_loss_mode
        check_choice("jumprelu_sparsity_loss_mode", mode, ("step", "tanh", "quadratic"))
        if (mode == "quadratic") != (self.target_l0 is not None):
            raise ValueError(
                f"target_l0 is {self.target_l0} and jumprelu_sparsity_loss_mode {mode!r}: 'quadratic' needs a target_l0, and the "
                "other modes do not read it; give both or neither"
            )

    @override
    def get_training_architecture_details(self) -> dict[str, Any]:
        details = super().get_training_architecture_details()
        own = {name: value for name, value in details.items() if self.encoder in encoders_with(name)}
        return own | ({"encoder": self.encoder, "k": self.k} if self.encoder == "batchtopk" else {})

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
    encoder = "topk"


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
    d_sae, m = cfg.d_sae, cfg.nfm_dim
    d_out = getattr(cfg, "d_out", cfg.d_in)
    count = (cfg.d_in + d_out) * d_sae + d_sae + d_out
    if cfg.use_linear_path:
        count += d_sae * d_out + d_out
    if cfg.head != "none":
        count += d_sae * embedding_width(cfg.head, m) + (m * m + m) * (cfg.head != BILINEAR) + m * d_out + d_out
    if cfg.use_square_path:
        count += d_sae * d_out
    if cfg.encoder == "jumprelu":
        count += d_sae
    if getattr(cfg, "SKIP", False):
        count += d_out * cfg.d_in
    return count


def check_sizes(cfg: TopKSAEConfig | TopKTrainingSAEConfig) -> None:
    """Raise a ValueError for sizes that cannot work, or stages or refinements."""
    check_positive(cfg, "d_in", "d_sae", "k")
    if (cfg.k or 0) > cfg.d_sae:
        raise ValueError(f"k must be at most d_sae = {cfg.d_sae}, got {cfg.k}; lower k or raise d_sae")
    check_inference(cfg)


def _complete(cfg: JointNFMSAEConfig | JointNFMTrainingSAEConfig, names: Iterable[str]) -> None:
    """Give fields that were left at None what the encoder has; k is a whole number for topk, and a mean for batchtopk."""
    for name in names:
        if getattr(cfg, name) is None:
            setattr(cfg, name, encoder_defaults(cfg.encoder)[name])
    if cfg.encoder == "jumprelu" and cfg.k is not None:
        raise ValueError(
            f"k is {cfg.k}, and with encoder 'jumprelu' the number of active features is what its thresholds let through; leave "
            "k out (l0_coefficient sets how sparse a training gets)"
        )
    if cfg.encoder == "topk" and cfg.k is not None:
        if cfg.k != int(cfg.k):
            raise ValueError(
                f"k must be a whole number with encoder 'topk', got {cfg.k}; with 'batchtopk' it is a mean"
            )
        cfg.k = int(cfg.k)
    if isinstance(cfg, JointNFMTrainingSAEConfig) and cfg.encoder == "batchtopk" and cfg.k is not None:
        cfg.k = float(cfg.k)


def _validate(cfg: JointNFMSAEConfig | JointNFMTrainingSAEConfig) -> None:
    check_sizes(cfg)
    name, most = ("k", cfg.k) if cfg.encoder == "topk" else ("d_sae", cfg.d_sae)
    if cfg.nfm_top_k is not None and not 1 <= cfg.nfm_top_k <= most:
        raise ValueError(
            f"nfm_top_k must be from 1 to {name} = {most}, or None for all active ones, got {cfg.nfm_top_k}"
        )
    if cfg.encoder != "topk" and cfg.kernel == "sparse":
        raise ValueError(
            f"kernel 'sparse' works on exactly k features a token, and with encoder {cfg.encoder!r} their number varies; give "
            "kernel 'auto' or 'dense'"
        )
    cfg.check_nfm_fields()
