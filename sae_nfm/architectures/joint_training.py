"""`joint_nfm` in training: SAELens's TopK losses on the output of all paths, in one of two forms of the same step.

    dense     SAELens's: features as a matrix [batch, d_sae], hooks on every hook point
    sparse    `kernels`: the k active features of each token alone, forward and backward, dead-feature loss included

They give the same losses and gradients up to rounding; `cfg.kernel` chooses. With "auto" each product of a step has the form
that is faster, and a step whose products are all dense is SAELens's. Where both decoders read the same features they are one
operation (`dispatch.both_decoders`), and the dense step multiplies with their sum. The sparse step stands for SAELens's methods
(`STANDS_FOR`); where a subclass or an instance has another one, the step is dense. It keeps no pre-activations: features and
pre-activations of its `TrainStepOutput` are made when they are read, and SAELens's trainer reads features as a COO tensor.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from sae_lens import BatchTopKTrainingSAE, JumpReLUTrainingSAE, TopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLU
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, calculate_topk_aux_acts
from torch import Tensor
from typing_extensions import override

from sae_nfm.architectures.joint_config import JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig
from sae_nfm.architectures.joint_sae import JointNFMSAE, NFMDecoder, Thresholded, VaryingDecoder, of_encoder
from sae_nfm.architectures.nfm_paths import Paths, TrainedPaths, is_hooked
from sae_nfm.architectures.staged_step import StagedPaths
from sae_nfm.kernels import Acts, Kernel, SparseActs, dispatch, inference, reference, sees_numbers, sums, wide
from sae_nfm.kernels.device import autocast_as_now, autocast_off
from sae_nfm.kernels.inference import Encoder
from sae_nfm.kernels.topk import hidden_pre
from sae_nfm.loading import refuse_not_finite, write_note


class Forms(NamedTuple):
    """The form of the products of each path in a step; None for a path that is switched off."""

    direct: Kernel
    """Of the encoder's gradient, the direct and the square path."""
    linear: Kernel | None
    pooled: Kernel | None


class SparseStepOutput(TrainStepOutput):
    """What a sparse step returns: `feature_acts` and `hidden_pre`, with their gradients, are made when they are first read."""

    @classmethod
    def of(cls, make: Mapping[str, Callable[[], Tensor]], **made: Any) -> "SparseStepOutput":
        """One with values made already, and functions that make the others."""
        output = cls.__new__(cls)
        output.__dict__ |= made | {"_make": make, "metrics": {}}
        return output

    def __getattr__(self, name: str) -> Any:
        make = self.__dict__.get("_make", {}).get(name)
        if make is None:
            raise AttributeError(name)
        value = make()
        if not value.is_sparse:
            self.__dict__[name] = value
        return value


class JointNFMTrainingSAE(TrainedPaths, NFMDecoder, TopKTrainingSAE):
    """Joint NFM-SAE in training: SAELens's TopK losses on the output of all paths."""

    cfg: JointNFMTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _sums_decoders = False
    _counts = False

    def __new__(cls, cfg: Any = None, use_error_term: bool = False) -> "JointNFMTrainingSAE":  # noqa: ARG004 # pyright: ignore[reportInconsistentConstructor] (a copy is made without a config)
        """One for the encoder of the config."""
        classes = (JointNFMTrainingSAE, BatchTopKJointNFMTrainingSAE, JumpReLUJointNFMTrainingSAE)
        return super().__new__(of_encoder(cls, cfg, {one.ENCODER: one for one in classes}))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and pre-activations, with several stages those of the first."""
        return self._encoded(x) if self.inferring() else super().encode_with_hidden_pre(x)

    @contextmanager
    def counted(self) -> Generator[None]:
        """Within it, as within a step of SAELens's trainer, `feature_acts` of a sparse step are COO: cheaper to count."""
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    @override
    def _direct_and_linear(self, acts: Acts, read: Acts) -> tuple[Tensor, Tensor | None]:
        if not self._sums_decoders:
            return super()._direct_and_linear(acts, read)
        W_dec = self.W_dec
        if self.cfg.rescale_acts_by_decoder_norm:
            W_dec = W_dec / reference.divisor(W_dec.norm(dim=-1))[:, None]
        return reference.weighted_rows(acts, W_dec + self.W_lin) + (self.b_dec + self.b_lin), None

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with self._training_step():
            if self._steps_sparsely(step_input.sae_in):
                return self._sparse_step(step_input)
            summed = self._sums_decoders = self._reads_all() and not self._needs_matrices()
            try:
                output = super().training_forward_pass(step_input)
            finally:
                self._sums_decoders = False
            paths = self._taken_paths()
        if summed and paths is not None and self._shows_paths(step_input):
            paths = self._divided(paths, output.feature_acts.to_dense(), "dense")
        self._add_metrics(output, step_input, paths)
        return output

    @torch.no_grad()
    def _divided(self, paths: Paths, acts: Acts, kernel: Kernel) -> Paths:
        """The direct and the linear path of a step that made their sum: a look at them does not change the step by a bit."""
        linear = dispatch.weighted_rows(acts, self.W_lin, kernel=kernel) + self.b_lin
        return paths._replace(direct=paths.direct - linear, linear=linear)

    def _needs_matrices(self) -> bool:
        """Hooks want the dense tensors, and torch.compile does better with them."""
        return torch.compiler.is_compiling() or any(map(is_hooked, self.hook_dict.values()))

    def _steps_sparsely(self, sae_in: Tensor) -> bool:
        if (
            self.cfg.refinement_steps > 0
            or self._needs_matrices()
            or not sees_numbers(sae_in, *self.parameters())
            or not self._is_saelens()
        ):
            return False
        return "sparse" in self._forms()

    def _is_saelens(self) -> bool:
        """Whether nothing that the sparse step stands for is another method or function here."""
        own, active = self.__dict__, self.activation_fn
        return (
            not any(
                name in own or getattr(type(self), name) is not method for name, method in self._stands_for().items()
            )
            and (type(active), getattr(active, "k", None)) == (TopK, self.cfg.k)
            and self.hidden_code is None
            and not self.hook_z_reshaping_mode
        )

    def _stands_for(self) -> Mapping[str, Any]:
        return STANDS_FOR

    def _forms(self) -> Forms:
        cfg, read = self.cfg, self.cfg.k if self.cfg.nfm_top_k is None else min(self.cfg.nfm_top_k, self.cfg.k)
        return Forms(
            direct=self.form_of(cfg.k),
            linear=self.form_of(read) if cfg.use_linear_path else None,
            pooled=self.form_of(read, torch.promote_types(self.dtype, torch.float32)) if cfg.head != "none" else None,
        )

    def _reads_all(self) -> bool:
        """Whether both decoders read the same features."""
        cfg = self.cfg
        return cfg.use_linear_path and (cfg.nfm_top_k is None or (cfg.encoder == "topk" and cfg.nfm_top_k == cfg.k))

    def _sparse_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        cfg, forms, (sae_in, b_enc) = self.cfg, self._forms(), self._encoder_input(step_input.sae_in)
        norms, W_dec = dispatch.row_norms(self.W_dec) if cfg.rescale_acts_by_decoder_norm else (None, self.W_dec)
        encoder = (sae_in, self.W_enc, b_enc, norms)
        if self.inferring():
            acts, paths = self._staged(encoder, W_dec)
        else:
            acts = dispatch.encode(*encoder, cfg.k, gradient=forms.direct)
            paths = self._sparse_decode(acts, norms, W_dec, forms)
        sae_out = self.run_time_activation_norm_fn_out(self._recons(paths.total()))
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        dead_loss = self._sparse_dead_loss(step_input, sae_out, encoder, W_dec)
        if self._reads_all() and self._shows_paths(step_input):
            paths = self._divided(paths, acts, forms.direct)
        output = SparseStepOutput.of(
            {"feature_acts": lambda: self._feature_acts(acts), "hidden_pre": self._hidden_pre(encoder)},
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            loss=mse_loss + dead_loss,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": dead_loss},
        )
        self._add_metrics(output, step_input, paths)
        return output

    def _feature_acts(self, acts: SparseActs) -> Tensor:
        """The features of a step as SAELens's step returns them, or as its trainer counts them."""
        own = self.__dict__.get("training_forward_pass", type(self).training_forward_pass)
        counted = self._counts and own is JointNFMTrainingSAE.training_forward_pass
        sparse = counted or self.cfg.use_sparse_activations
        return dispatch.to_coo(acts, self.cfg.d_sae) if sparse else dispatch.to_dense(acts, self.cfg.d_sae)

    def _hidden_pre(self, encoder: Encoder) -> Callable[[], Tensor]:
        """What makes the pre-activations of a step; a RuntimeError once the weights are others."""
        given = [tensor for tensor in encoder if tensor is not None]
        versions, as_now = [tensor._version for tensor in given], autocast_as_now(self.device)

        def make() -> Tensor:
            if versions != [tensor._version for tensor in given]:
                raise RuntimeError(
                    "hidden_pre of a sparse training step is made when it is read, and the weights have changed since; read it "
                    'before the optimizer steps, or train with kernel="dense"'
                )
            with as_now:
                return hidden_pre(*encoder)

        return make

    def _encoder_input(self, sae_in: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's input and bias. The gradient that b_dec has through the input, one number a feature suffices for."""
        encoder_in = self.process_sae_in(sae_in)
        if sae_in.requires_grad or not self.cfg.apply_b_dec_to_input:
            return encoder_in, self.b_enc
        with autocast_off(sae_in.device):  # a gradient summed over the batch
            no_change = (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()
        return encoder_in.detach(), self.b_enc + no_change

    def _staged(self, encoder: Encoder, W_dec: Tensor) -> tuple[SparseActs, Paths]:
        """Activations chosen in stages, and what each path writes of them."""
        cfg, (sae_in, W_enc, b_enc, norms) = self.cfg, encoder
        batch = sae_in.shape[:-1]
        with autocast_off(self.device):
            given = (
                wide(sae_in).reshape(-1, cfg.d_in),
                wide(W_enc),
                wide(b_enc),
                None if norms is None else wide(norms),
            )
            writing = StagedPaths(self, W_dec, norms, reads_all=self._reads_all())
            sizes = inference.stage_sizes(cfg.k, cfg.selection_stages)
            acts = inference.select_sparsely(given, sizes, writing, cfg.selection_candidates)
            paths = writing.written(acts, self._dropout)
        acts = SparseActs(acts.indices.reshape(*batch, cfg.k), acts.values.to(self.dtype).reshape(*batch, cfg.k))
        return acts, Paths(*(path if path is None else path.reshape(*batch, cfg.d_in) for path in paths))  # pyright: ignore[reportArgumentType]

    def _sparse_decode(self, acts: SparseActs, norms: Tensor | None, W_dec: Tensor, forms: Forms) -> Paths:
        """What each path writes, from the active features alone; the direct path with the linear one where both read the same."""
        cfg, routing = self.cfg, sums.route(acts.indices, self.cfg.d_sae)
        unscaled = acts
        if norms is not None and not self._reads_all():
            unscaled = SparseActs(
                acts.indices, acts.values / dispatch.of_active(reference.divisor(norms), acts, routing)
            )
        read, read_routing = acts, routing
        if cfg.nfm_top_k is not None and cfg.nfm_top_k < cfg.k:
            read = reference.top_n(acts, cfg.nfm_top_k)
            read_routing = sums.route(read.indices, cfg.d_sae)
        linear = square = interacting = None
        if forms.linear is not None and not self._reads_all():
            linear = dispatch.weighted_rows(read, self.W_lin, read_routing, kernel=forms.linear) + self.b_lin
        if cfg.use_square_path:
            square = dispatch.square_output(acts, self.U, cfg.square_scale, routing, kernel=forms.direct)
        if forms.pooled is not None:
            pooled = self._dropout(dispatch.pooled(cfg.head, read, self.V, read_routing, kernel=forms.pooled))
            interacting = self._read_out(self._hidden(pooled))
        if self._reads_all():
            both = dispatch.both_decoders(acts, W_dec, norms, self.W_lin, routing, kernel=forms.direct)
            direct = both + (self.b_dec + self.b_lin)
        else:
            direct = dispatch.weighted_rows(unscaled, W_dec, routing, kernel=forms.direct) + self.b_dec
        return Paths(direct, linear, square, interacting)

    def _sparse_dead_loss(self, step_input: TrainStepInput, sae_out: Tensor, encoder: Encoder, W_dec: Tensor) -> Tensor:
        mask, norms = step_input.dead_neuron_mask, encoder[-1]
        if mask is None or (num_dead := int(mask.sum())) == 0:
            return sae_out.new_tensor(0.0)
        features, acts = dispatch.top_dead(*encoder, mask, self._k_aux())
        rows = W_dec[features] if norms is None else W_dec[features] / reference.divisor(norms)[features, None]
        return self._dead_loss(step_input.sae_in, sae_out, dispatch.weighted_rows(acts, rows), num_dead)

    @override
    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        """SAELens's dead-feature loss, also under per-token normalisation, which SAELens refuses."""
        if dead_neuron_mask is None or (num_dead := int(dead_neuron_mask.sum())) == 0:
            return sae_out.new_tensor(0.0)
        acts = calculate_topk_aux_acts(min(self._k_aux(), num_dead), hidden_pre, dead_neuron_mask)
        acts = reference.per_norm(acts, self.W_dec) if self.cfg.rescale_acts_by_decoder_norm else acts
        return self._dead_loss(sae_in, sae_out, self.reshape_fn_out(acts @ self.W_dec, self.d_head), num_dead)

    def _k_aux(self) -> int:
        return self.cfg.d_in // 2  # the heuristic of Gao et al. 2024, appendix B.1, as in SAELens

    def _dead_loss(self, sae_in: Tensor, sae_out: Tensor, recons: Tensor, num_dead: int) -> Tensor:
        """How far the dead features' reconstruction, in the normalised space, is from the residual in the input's units."""
        residual = (sae_in - sae_out).detach()
        error = (recons * self._token_scale(sae_in) - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(num_dead / self._k_aux(), 1.0) * error

    def _token_scale(self, sae_in: Tensor) -> Tensor | float:
        """Length in the input's space of a unit vector in the normalised space, [*batch, 1] where it varies by token."""
        normalize = cast(str, self.cfg.normalize_activations)  # SAELens's annotation leaves out one value it accepts
        if normalize == "constant_norm_rescale":
            wide = torch.promote_types(sae_in.dtype, torch.float32)
            return sae_in.norm(dim=-1, keepdim=True, dtype=wide) / self.cfg.d_in**0.5
        if normalize == "layer_norm":
            return sae_in.std(dim=-1, keepdim=True)
        return 1.0

    @override
    def save_inference_model(self, path: str | Path, *, folded: bool = False) -> tuple[Path, Path]:
        """Save the inference SAE as SAELens does, with a README.md that says what loads it.

        With `folded` the linear path is folded into the decoder and left out (`JointNFMSAE.folded`); where it cannot be, a
        ValueError is raised and nothing written.
        """
        if folded:
            self._refuse_inexact_fold()
        refuse_not_finite(self.state_dict(), "the SAE to save")
        saved = super().save_inference_model(path)
        write_note(path)
        return JointNFMSAE.load_from_disk(path).folded().save_model(path) if folded else saved

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.rescale_acts_by_decoder_norm:
            state_dict["folded_W_dec_norm"] = self.folded_W_dec_norm * self.get_W_dec_norm()


class BatchTopKJointNFMTrainingSAE(VaryingDecoder, JointNFMTrainingSAE, BatchTopKTrainingSAE):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Joint NFM-SAE in training with SAELens's BatchTopK: k active features a token on average over a batch.

    Saved for inference it has the threshold that followed the smallest activation of each batch, before any refinement.
    """

    ENCODER = "batchtopk"

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoded(x)

    @override
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        super().update_topk_threshold(self._chosen(acts_topk))


class JumpReLUJointNFMTrainingSAE(Thresholded, JointNFMTrainingSAE, JumpReLUTrainingSAE):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Joint NFM-SAE in training with SAELens's JumpReLU: its thresholds, their gradient and its losses."""

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoded(x)

    @override
    def activated(self, hidden_pre: Tensor) -> Tensor:
        threshold = self.threshold.to(hidden_pre.dtype)
        return cast(Tensor, JumpReLU.apply(hidden_pre, threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input))

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens's losses, on what the encoder chose before any refinement.

        Those that read decoder norms read what a feature writes through the direct and the linear path: the two decoders can
        trade what they write, and the linear one would be free of the penalty.
        """
        written = self.W_dec + self.W_lin if self.cfg.use_linear_path else self.W_dec
        read: Any = SimpleNamespace(cfg=self.cfg, threshold=self.threshold, bandwidth=self.bandwidth, W_dec=written)
        acts = self._chosen(feature_acts)
        return JumpReLUTrainingSAE.calculate_aux_loss(read, step_input, acts, hidden_pre, sae_out)

    @override
    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        return JumpReLUTrainingSAE.get_coefficients(self)


class StagedTopKTrainingSAE(JointNFMTrainingSAE):
    """TopK SAE in training whose features are chosen in stages and refined: joint_nfm without its NFM."""

    cfg: StagedTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]


STANDS_FOR: dict[str, Any] = {
    name: getattr(JointNFMTrainingSAE, name)
    for name in (
        *("encode", "encode_with_hidden_pre", "process_sae_in", "get_activation_fn", "decode", "decode_paths"),
        *("calculate_aux_loss", "calculate_topk_aux_loss"),
        *("_direct_and_linear", "_linear", "_square", "_interaction", "_pool", "_written", "_recons"),
        *("_hidden", "_read_out"),
    )
}
"""The methods that a sparse step stands for."""
