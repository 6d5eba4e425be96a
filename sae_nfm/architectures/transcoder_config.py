"""Configurations of `joint_nfm_transcoder` and, with a linear map from input to output beside it, `joint_nfm_skip_transcoder`.

Both read one hook point and write another (`metadata.hook_name`, `metadata.hook_name_out`); names and W_skip as in SAELens's
transcoders, which it does not train.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from sae_lens import SAE
from typing_extensions import override

from sae_nfm.architectures.joint_config import JointNFMSAEConfig, JointNFMTrainingSAEConfig
from sae_nfm.common import check_positive

TRANSCODER, SKIP_TRANSCODER = "joint_nfm_transcoder", "joint_nfm_skip_transcoder"


@dataclass
class JointNFMTranscoderConfig(JointNFMSAEConfig):
    """Configuration of an inference-only joint NFM transcoder; the other fields: `JointNFMSAEConfig`.

    Args:
        d_out (int): Width of what is written.
        apply_b_dec_to_input (bool): False: b_dec is of the output. Inherited from SAEConfig.
    """

    d_out: int = 0
    apply_b_dec_to_input: bool = False
    SKIP: ClassVar[bool] = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return TRANSCODER

    @override
    def __post_init__(self) -> None:
        check_positive(self, "d_out")
        super().__post_init__()
        _validate(self)


@dataclass
class JointNFMSkipTranscoderConfig(JointNFMTranscoderConfig):
    """Configuration of an inference-only joint NFM transcoder with W_skip, see `JointNFMTranscoderConfig`."""

    SKIP: ClassVar[bool] = True

    @override
    @classmethod
    def architecture(cls) -> str:
        return SKIP_TRANSCODER


@dataclass(kw_only=True)
class JointNFMTranscoderTrainingConfig(JointNFMTrainingSAEConfig):
    """Configuration for training a joint NFM transcoder on what an MLP reads and writes; the others: `JointNFMTrainingSAEConfig`.

    Input and output are divided by their mean norm in the first step, over the root of their width, and the two numbers folded
    into the weights of the SAE that is saved.

    Args:
        hook_name_out (str | None): Hook point of the output, that of the MLP whose input is at hook_name; found unless given.
        d_out (int): Width of the output. It is measured; give it only as a check.
        apply_b_dec_to_input (bool): False: b_dec is of the output. Inherited from SAEConfig.
        normalize_activations (Literal["none"]): Input and output are scaled by themselves. Inherited from SAEConfig.
    """

    hook_name_out: str | None = None
    d_out: int = 0
    apply_b_dec_to_input: bool = False
    SKIP: ClassVar[bool] = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return TRANSCODER

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _validate(self)
        if self.d_out:
            check_positive(self, "d_out")
        if self.hook_name_out is not None:
            self.metadata.hook_name_out = self.hook_name_out
            self.metadata.hook_head_index_out = None


@dataclass(kw_only=True)
class JointNFMSkipTranscoderTrainingConfig(JointNFMTranscoderTrainingConfig):
    """Configuration for training a joint NFM transcoder with W_skip, see `JointNFMTranscoderTrainingConfig`.

    Args:
        hook_name_out (str | None): Hook point of the output, that of the MLP whose input is at hook_name; found unless given.
        d_out (int): Width of the output. It is measured; give it only as a check.
    """

    SKIP: ClassVar[bool] = True

    @override
    @classmethod
    def architecture(cls) -> str:
        return SKIP_TRANSCODER


TranscoderConfig = JointNFMTranscoderConfig | JointNFMTranscoderTrainingConfig
_UNKNOWN = "the output is not known where features are chosen"
REFUSED: dict[str, tuple[Any, str]] = {
    "encoder": ("topk", "transcoders are trained with TopK alone"),
    "selection_stages": (
        1,
        f"a later stage encodes what the earlier ones leave unexplained of the output, and {_UNKNOWN}",
    ),
    "selection_candidates": (None, "there are no later stages"),
    "refinement_steps": (0, f"refinements fit activations to the output, and {_UNKNOWN}"),
    "inference_selection_stages": (None, f"{_UNKNOWN}, which later stages would need"),
    "inference_refinement_steps": (None, f"{_UNKNOWN}, which refinements would need"),
    "apply_b_dec_to_input": (False, "b_dec is of the output"),
    "normalize_activations": ("none", "input and output are each scaled by their mean norm in the first training step"),
    "reshape_activations": ("none", "an MLP has no heads"),
}
"""What a transcoder cannot have: the value of each field that it has, and why no other."""


def _validate(cfg: TranscoderConfig) -> None:
    for name, (only, why) in REFUSED.items():
        if (given := getattr(cfg, name, only)) != only:
            raise ValueError(f"{name} is {given!r}, and a transcoder has {only!r}: {why}; leave it out")


def refuse_transcoder(sae: SAE[Any], what: str) -> None:
    """Raise a ValueError for a transcoder, of SAELens too, where `what` needs an SAE, which writes what it reads."""
    if hasattr(sae.cfg, "d_out"):
        metadata = sae.cfg.metadata
        raise ValueError(
            f"the SAE is a transcoder (architecture {sae.cfg.architecture()!r}, from {metadata.hook_name!r} to "
            f"{metadata.hook_name_out!r}), and {what} is for SAEs, which reconstruct what they read; give one (transcoders: "
            "`sae-nfm evaluate`, `sae-nfm attribute`)"
        )
