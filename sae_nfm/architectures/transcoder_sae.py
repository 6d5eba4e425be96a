"""`joint_nfm_transcoder`: from what an MLP reads to what it writes, with the paths of a Neural Factorization Machine.

    f     = TopK_k(ReLU(x W_enc + b_enc))               x: the MLP's input, [d_in]
    y_hat = sae + lin + sq + inter (+ x W_skip^T)       the paths of `joint_nfm`, [d_out]; the skip: joint_nfm_skip_transcoder

The pair path says which products of input features the MLP's output holds, exactly as in an SAE. Whoever splices a transcoder
in calls `decode(encode(x))`: SAELens's own skip transcoders lose their skip there. Here `encode` keeps its input for the one
`decode` that follows, so that the skip is there in every splice; `decode` alone is a ValueError. What features write without
it: `decode_paths`.

In training, rows are input and output side by side, [tokens, d_in + d_out], as `ActivationStream` serves them.

Source: Dunefsky et al. 2024, arXiv 2406.11944 (transcoders); Paulo et al. 2025, arXiv 2501.18823 (skip).
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_nfm.architectures.joint_sae import JointNFMSAE, NFMDecoder
from sae_nfm.architectures.joint_training import STANDS_FOR, JointNFMTrainingSAE
from sae_nfm.architectures.nfm_paths import Paths
from sae_nfm.architectures.transcoder_config import (
    JointNFMTranscoderConfig,
    JointNFMTranscoderTrainingConfig,
    TranscoderConfig,
)
from sae_nfm.kernels import wide

SKIP = "hook_skip"
"""Hook point of what the skip adds, [*batch, d_out]."""
SCALES = ("input_scale", "output_scale")
_ONE_SCALE = "a transcoder's input and output are scaled apart, by numbers that training finds and saving folds in"


class Transcoding(NFMDecoder):
    """What transcoders for inference and in training share."""

    cfg: TranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    W_skip: nn.Parameter
    """[d_out, d_in], as in SAELens."""
    _input: Tensor | None = None

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        if not cfg.d_out:
            raise ValueError("d_out is 0; give the width of the output")
        if use_error_term:
            raise ValueError(
                "use_error_term is for SAEs, whose output is to be their input; splice the transcoder in with an error term"
            )
        super().__init__(cfg)
        if cfg.SKIP:
            self.hook_skip = HookPoint()
            self.setup()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg, norm = self.cfg, getattr(self.cfg, "decoder_init_norm", None)
        made: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        W_enc, W_dec = (nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, d, **made)) for d in (cfg.d_in, cfg.d_out))
        if norm is not None:
            W_enc, W_dec = (norm * weight / weight.norm(dim=-1, keepdim=True) for weight in (W_enc, W_dec))
        self.W_enc, self.W_dec = nn.Parameter(W_enc.T.contiguous()), nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **made))
        if cfg.SKIP:
            self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **made))

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        self._check_width(sae_in)
        read = self._scaled(self.hook_sae_input(sae_in.to(self.dtype)))
        if self.cfg.SKIP:
            self._input = read
        return read

    def _scaled(self, x: Tensor) -> Tensor:
        return x

    @override
    def _recons(self, written: Tensor) -> Tensor:
        if not self.cfg.SKIP:
            return written
        x, self._input = self._input, None
        if x is None or x.shape[:-1] != written.shape[:-1]:
            raise ValueError(
                "the output of a skip transcoder is not one of its features alone: encode the input before each decode (what "
                "features write without the skip: decode_paths)"
            )
        return written + self.hook_skip(x @ self.W_skip.T)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no input waiting, which torch would not copy where it has a gradient."""
        return {**self.__dict__, "_input": None}

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.hook_sae_output(self.decode(self.encode(x)))

    @torch.no_grad()
    def fold_scales(self, input_scale: float, output_scale: float) -> None:
        """Fold the numbers that input and output were divided by, so that raw ones are read and written: the same function."""
        # the decoder's side is that of an SAE whose input was multiplied with 1 / output_scale
        super().fold_activation_norm_scaling_factor(1 / output_scale)
        self.W_enc.data *= output_scale / input_scale
        if self.cfg.SKIP:
            self.W_skip.data *= output_scale / input_scale

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise ValueError(f"one factor ({scaling_factor:g}) cannot be folded: {_ONE_SCALE}; use fold_scales")

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        raise ValueError(f"whitening cannot be folded: {_ONE_SCALE}")


class JointNFMTranscoder(Transcoding, JointNFMSAE):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Inference-only joint NFM transcoder, trained by `JointNFMTranscoderTraining`."""

    cfg: JointNFMTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        scales = [state_dict.pop(name, None) for name in SCALES]  # of a checkpoint
        super().process_state_dict_for_loading(state_dict)
        if scales[0] is not None:
            holder = deepcopy(self)
            holder.load_state_dict({name: tensor.clone() for name, tensor in state_dict.items()}, assign=True)
            holder.fold_scales(*(float(scale) or 1.0 for scale in scales))
            state_dict.update(holder.state_dict())


class JointNFMTranscoderTraining(Transcoding, JointNFMTrainingSAE):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Joint NFM transcoder in training, on rows of input and output side by side; outside of a step it reads inputs alone.

    The error of a step is that of the output over `output_scale`: its scale, and with it the learning rate's, is that of an SAE
    whose inputs are normalised.
    """

    cfg: JointNFMTranscoderTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    input_scale: Tensor
    """What the input is divided by; 0 until the first step has found it."""
    output_scale: Tensor
    _raw = False
    """Whether the weights are those of a saved transcoder, with the scales folded in."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:  # pyright: ignore[reportInconsistentConstructor]
        super().__init__(cfg, use_error_term)
        for name in SCALES:
            self.register_buffer(name, torch.zeros((), dtype=self.dtype, device=self.device))
        self.run_time_activation_norm_fn_out = MethodType(_unscaled, self)
        self.mse_loss_fn = MethodType(_scaled_error, self)

    def halves(self, rows: Float[Tensor, "tokens both"]) -> tuple[Tensor, Tensor]:
        """Input [tokens, d_in] and output [tokens, d_out] of rows that have them side by side."""
        both = self.cfg.d_in + self.cfg.d_out
        if rows.shape[-1] != both:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)} have {rows.shape[-1]} values a token, and this transcoder trains on input "
                f"and output side by side, d_in + d_out = {both}; train it with `sae-nfm train` or SAELens's runner for one SAE"
            )
        return rows[..., : self.cfg.d_in], rows[..., self.cfg.d_in :]

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return super().process_sae_in(self.halves(sae_in)[0] if self._in_training_step else sae_in)

    @override
    def _scaled(self, x: Tensor) -> Tensor:
        return x / _or_one(self.input_scale)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x, y = self.halves(step_input.sae_in)
        if not self.output_scale > 0:
            self._find_scales(x, y)
        output = super().training_forward_pass(step_input)
        output.sae_in = y
        return output

    @torch.no_grad()
    def _find_scales(self, x: Tensor, y: Tensor) -> None:
        for name, part in zip(SCALES, (x, y), strict=True):
            found = wide(part).norm(dim=-1).mean() / part.shape[-1] ** 0.5
            getattr(self, name).copy_(_or_one(found))
        if self._raw:
            self.fold_scales(1 / float(self.input_scale), 1 / float(self.output_scale))
            self._raw = False

    @override
    def _token_scale(self, sae_in: Tensor) -> Tensor:
        return _or_one(self.output_scale)

    @override
    def _dead_loss(self, sae_in: Tensor, sae_out: Tensor, recons: Tensor, num_dead: int) -> Tensor:
        loss = super()._dead_loss(self.halves(sae_in)[1], sae_out, recons, num_dead)
        return loss / _or_one(self.output_scale).square()

    @override
    def _add_metrics(self, output: TrainStepOutput, step_input: TrainStepInput, paths: Paths | None) -> None:
        super()._add_metrics(output, replace(step_input, sae_in=self.halves(step_input.sae_in)[1]), paths)

    @override
    def _stands_for(self) -> Mapping[str, Any]:
        return {name: getattr(JointNFMTranscoderTraining, name) for name in STANDS_FOR}

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        self._raw = SCALES[0] not in state_dict
        if self._raw:
            state_dict |= {name: torch.zeros((), dtype=self.dtype) for name in SCALES}
        super().process_state_dict_for_loading(state_dict)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        holder = deepcopy(self)
        holder.load_state_dict({name: tensor.clone() for name, tensor in state_dict.items()})
        if self.output_scale > 0:
            holder.fold_scales(float(self.input_scale), float(self.output_scale))
        state_dict.update({name: tensor for name, tensor in holder.state_dict().items() if name not in SCALES})
        for name in SCALES:
            state_dict.pop(name, None)
        # which folds decoder norms by those of the SAE that it is called on
        super(JointNFMTranscoderTraining, holder).process_state_dict_for_saving_inference(state_dict)


class JointNFMSkipTranscoder(JointNFMTranscoder):
    """`JointNFMTranscoder` with W_skip; SAELens knows one class by name."""


class JointNFMSkipTranscoderTraining(JointNFMTranscoderTraining):
    """`JointNFMTranscoderTraining` with W_skip."""


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _unscaled(sae: JointNFMTranscoderTraining, written: Tensor) -> Tensor:
    return written * _or_one(sae.output_scale)


def _scaled_error(sae: JointNFMTranscoderTraining, sae_out: Tensor, rows: Tensor) -> Tensor:
    return ((sae_out - sae.halves(rows)[1]) / _or_one(sae.output_scale)).square()


def read_and_written(sae: SAE[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
    """What an SAE is given of rows that are trained on, and what it is to make of it: the same, but for a transcoder."""
    return sae.halves(rows) if isinstance(sae, JointNFMTranscoderTraining) else (rows, rows)
