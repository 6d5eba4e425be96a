"""The `joint_nfm` architecture: an SAE whose output also has the paths of a Neural Factorization Machine.

`staged_topk` is the same without them: what an SAE of either gains by its inference (`kernels.inference`) it shows alone.

    x_hat = sae + lin + sq + inter        sae = f W_dec + b_dec, the direct path; the others: `nfm_paths`

ONE CONVENTION for what the NFM reads: `f` is the activation as hooked at `hook_sae_acts_post`. With
`rescale_acts_by_decoder_norm` that is the pre-activation times its decoder norm, and the direct path divides the norm
out again, as in SAELens's TopK. An edit at that hook therefore has one meaning for all paths, folding decoder norms
leaves the NFM untouched, and top-n is selected on the same numbers before and after every fold.

`cfg.encoder` says how features are chosen. TopK's are SAELens's TopK classes; with another encoder `JointNFMSAE(cfg)` and
`JointNFMTrainingSAE(cfg)` make a subclass (`of_encoder`) that is also one of SAELens's class for it, since SAELens knows one
class by architecture. The number of active features of a token then varies: what it decodes, it decodes as matrices.

Training, inference, evaluation and intervention share one `decode`; the maths is in `kernels.reference`.

Source: arXiv 2507.00269.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens import SAE, JumpReLUSAE, TopKSAE
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn
from typing_extensions import override

from sae_nfm.architectures.joint_config import JointNFMConfig, JointNFMSAEConfig, StagedTopKSAEConfig
from sae_nfm.architectures.nfm_config import check_inference
from sae_nfm.architectures.nfm_paths import FEW_FEATURES, NFMPaths, Paths, column_squares
from sae_nfm.architectures.staged_step import parts_of
from sae_nfm.kernels import (
    dispatch,
    inference,
    is_transformed,
    product_dtype,
    reference,
    sees_numbers,
    uncompiled,
    wide,
)


class NFMDecoder(NFMPaths):
    """Decode and folds that the inference and the training class share; hook points: `NFMPaths`."""

    cfg: JointNFMConfig
    b_enc: nn.Parameter
    folded_W_dec_norm: Tensor
    ENCODER: ClassVar[str] = "topk"
    _held_norms: Tensor | None = None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._initialize_nfm_weights()
        # Row norms that folds divided out of W_dec: analyses of decoder norms multiply them back.
        self.register_buffer("folded_W_dec_norm", torch.ones(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def inferring(self) -> bool:
        """Whether activations are more than the encoder's one pass."""
        return self.cfg.selection_stages > 1 or self.cfg.refinement_steps > 0

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations, inferred through the decoder, and what the first stage ranked."""
        check_inference(self.cfg)
        if not isinstance(self.activation_fn, TopK):
            raise ValueError(
                f"the SAE's activation_fn is {type(self.activation_fn).__name__}, and features are chosen in stages, or refined, "
                "after TopK alone; give it back, or set cfg.selection_stages = 1 and cfg.refinement_steps = 0"
            )
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        indices, values = self._inferred(sae_in, hidden_pre, self.activation_fn.k)
        acts = reference.SparseActs(indices, values.to(hidden_pre.dtype))
        formed = (dispatch.to_coo if self.activation_fn.use_sparse_activations else dispatch.to_dense)(
            acts, self.cfg.d_sae
        )
        return self.hook_sae_acts_post(formed), hidden_pre

    @uncompiled
    def _inferred(self, sae_in: Tensor, hidden_pre: Tensor, k: int) -> reference.SparseActs:
        """`kernels.inference`, in at least float32."""
        cfg, d_sae = self.cfg, self.cfg.d_sae
        norms = wide(self.W_dec).norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else None
        with self._weights_alone() as written, self._holding(norms):
            W_enc, b_dec, sae_in = wide(self.W_enc), wide(self.b_dec), wide(sae_in)
            nothing = written(W_enc.new_zeros(1, d_sae))[0] if cfg.selection_stages > 1 else 0.0
            acts = inference.select(
                wide(hidden_pre),
                lambda acts: written(acts) - nothing,
                W_enc,
                norms,
                inference.stage_sizes(k, cfg.selection_stages),
                cfg.selection_candidates,
                None if cfg.selection_stages == 1 else parts_of(self, norms, k),
            )
            if not cfg.refinement_steps:
                return acts
            values = inference.refine(
                acts.values,
                lambda values: written(reference.SparseActs(acts.indices, values)),
                sae_in + b_dec if cfg.apply_b_dec_to_input else sae_in,
                column_squares(self, norms)[acts.indices],
                cfg.refinement_steps,
            )
            return reference.SparseActs(acts.indices, values)

    @override
    def decode_paths(self, feature_acts: Tensor) -> Paths:
        active = self._active(feature_acts)
        return self._paths_of(feature_acts.to_dense() if active is None else active)

    @override
    def _paths_of(self, acts: reference.Acts) -> Paths:
        cfg = self.cfg
        read = acts if cfg.nfm_top_k is None else reference.top_n(acts, cfg.nfm_top_k)
        if isinstance(acts, reference.SparseActs) and is_transformed():
            acts = reference.dense_acts(acts, cfg.d_sae)
            read = acts if cfg.nfm_top_k is None else read
        direct, linear = self._direct_and_linear(acts, read)
        return Paths(direct, linear, self._square(acts), self._interaction(read))

    def _active(self, feature_acts: Tensor) -> reference.SparseActs | None:
        """The active features alone, where reading only these is possible, asked for, and loses no gradient."""
        cfg = self.cfg
        if feature_acts.is_sparse:
            seen = sees_numbers(*self.parameters())
            return reference.sparse_acts_from_coo(feature_acts, cfg.k) if seen else None
        wants_gradient = torch.is_grad_enabled() and feature_acts.requires_grad
        if wants_gradient or not sees_numbers(feature_acts, *self.parameters()) or not self.works_sparsely():
            return None
        return reference.sparse_acts_from_dense(feature_acts, cfg.k)

    def works_sparsely(self) -> bool:
        """Whether the direct path is read from the active features alone."""
        return self.form_of(self.cfg.k) == "sparse"

    def form_of(self, n_read: int, dtype: torch.dtype | None = None) -> dispatch.Kernel:
        """The form of a product that reads so many active features a token: `cfg.kernel`, or with "auto" the cost model's choice.

        `dtype` is that of a dense product; the decoder's, under autocast too, unless given.
        """
        cfg = self.cfg
        if cfg.kernel != "auto":
            return cfg.kernel
        if cfg.d_sae < FEW_FEATURES:
            return "dense"
        return dispatch.choose(cfg.d_sae, n_read, self.device, dtype or product_dtype(self.W_dec))

    @contextmanager
    def _holding(self, norms: Tensor | None) -> Generator[None]:
        """Within it, decoding does not compute the decoder norms again."""
        self._held_norms = norms
        try:
            yield
        finally:
            self._held_norms = None

    def _direct_and_linear(self, acts: reference.Acts, read: reference.Acts) -> tuple[Tensor, Tensor | None]:
        """What the two decoders write, biases included."""
        if isinstance(acts, Tensor):
            acts = reference.per_norm(acts, self.W_dec) if self.cfg.rescale_acts_by_decoder_norm else acts
            direct = acts @ self.W_dec
        else:
            values = acts.values
            if self.cfg.rescale_acts_by_decoder_norm:
                norms = self.W_dec.norm(dim=-1) if self._held_norms is None else self._held_norms
                values = values / dispatch.of_active(reference.divisor(norms), acts)
            direct = reference.weighted_rows(reference.SparseActs(acts.indices, values), self.W_dec)
        return direct + self.b_dec, self._linear(read)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold the factor s that inputs were multiplied with, so that the SAE takes and returns raw activations.

        With rescaling the decoder norms shrink by s and with them the activations: V and U grow by s, W_lin stays. Without
        it activations keep their size and W_lin, U shrink. What is added to the output (b_lin, W_2, b_2) shrinks either way.
        """
        super().fold_activation_norm_scaling_factor(scaling_factor)
        rescaled = self.cfg.rescale_acts_by_decoder_norm
        for weight in self._nfm_weights(["b_lin", "W_2", "b_2", *([] if rescaled else ["W_lin", "U"])]):
            weight.data /= scaling_factor
        for weight in self._nfm_weights(["V", "U"] if rescaled else []):
            weight.data *= scaling_factor

    @override
    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Fold z = (x - mean) M into the weights: all that is added to the output is multiplied by M^-1 on the right."""
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        for weight in self._nfm_weights(["W_lin", "b_lin", "W_2", "b_2", "U"]):
            wide = torch.promote_types(weight.dtype, unwhitening_matrix.dtype)
            weight.data.copy_(weight.data.to(wide) @ unwhitening_matrix.to(weight.device, wide))

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Fold the decoder norms into the encoder; `folded_W_dec_norm` keeps them."""
        norms = super().fold_and_get_W_dec_norm()
        self.folded_W_dec_norm *= norms
        return norms

    @override
    @torch.no_grad()
    def get_W_dec_norm(self) -> Tensor:
        """Norms that folds divide by, at least SAELens's 1e-8, or in float16 the smallest number of full precision."""
        norms = super().get_W_dec_norm()
        return norms.clamp(min=torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def trained_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Norms of the decoder rows as if no decoder norm had been folded out of them.

        After whitening with rescaling these are the norms in the whitened space the SAE was trained in.
        """
        if self.cfg.rescale_acts_by_decoder_norm or bool((self.folded_W_dec_norm == 1).all()):
            return self.folded_W_dec_norm * self.W_dec.norm(dim=-1)
        return self.folded_W_dec_norm.clone()

    @torch.no_grad()
    def fold_linear_path(self) -> None:
        """Go to the canonical gauge: W_dec := W_dec + W_lin, W_lin := 0, same output.

        Where both decoders read the same f, (W_dec + D, W_lin - D) gives the same output for every D, so the norms of
        either and the direct path alone mean nothing before D is fixed. Decoder norms are folded first, since the
        selection must not depend on what is added to W_dec; b_lin goes into b_dec, and out of the encoder's input again.

        Raises a ValueError without a linear path, or with `nfm_top_k`, where the two decoders read different features.
        """
        self._refuse_inexact_fold()
        if self.cfg.rescale_acts_by_decoder_norm:
            self.fold_W_dec_norm()
            self.cfg.rescale_acts_by_decoder_norm = False
        self.W_dec.data += self.W_lin.data
        self.b_dec.data += self.b_lin.data
        if self.cfg.apply_b_dec_to_input:
            self.b_enc.data += self.b_lin.data @ self.W_enc.data
        self.W_lin.data.zero_()
        self.b_lin.data.zero_()

    def _refuse_inexact_fold(self) -> None:
        if not self.cfg.use_linear_path:
            raise ValueError("there is no linear path to fold (use_linear_path is False): W_dec is canonical already")
        if self.cfg.nfm_top_k is not None:
            raise ValueError(
                f"nfm_top_k is {self.cfg.nfm_top_k}: the linear path reads only the strongest features and cannot be folded into "
                "W_dec exactly; train with nfm_top_k=None for a canonical gauge"
            )


def of_encoder(cls: type, cfg: Any, classes: Mapping[str, type]) -> type:
    """The class of an SAE that is made as `cls`: the one for its encoder; a ValueError where `cls` is for another."""
    encoder = getattr(cfg, "encoder", cls.ENCODER)  # a copy is made without a config
    if encoder == cls.ENCODER:
        return cls
    if not issubclass(classes[encoder], cls):
        raise ValueError(
            f"{cls.__name__} is for encoder {cls.ENCODER!r}, and the config has {encoder!r}; derive it from "
            f"{classes[encoder].__name__}"
        )
    return classes[encoder]


class JointNFMSAE(NFMDecoder, TopKSAE):
    """Inference-only joint NFM-SAE; trained by `JointNFMTrainingSAE`, same tensors in the saved file."""

    cfg: JointNFMSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __new__(cls, cfg: Any = None, use_error_term: bool = False) -> "JointNFMSAE":  # noqa: ARG004 # pyright: ignore[reportInconsistentConstructor]
        """One for the encoder of the config."""
        return super().__new__(of_encoder(cls, cfg, {"topk": JointNFMSAE, "jumprelu": JumpReLUJointNFMSAE}))

    @override
    def encode(self, x: Tensor) -> Tensor:
        return self._encoded(x)[0] if self.inferring() else super().encode(x)

    def folded(self) -> "JointNFMSAE":
        """The same function with one decoder: the linear path folded into W_dec (`fold_linear_path`) and left out."""
        canonical = deepcopy(self)
        canonical.fold_linear_path()
        sae = type(self)(replace(canonical.cfg, use_linear_path=False))
        kept = {name: value for name, value in canonical.state_dict().items() if name not in ("W_lin", "b_lin")}
        sae.load_state_dict(kept)
        return sae


class VaryingDecoder(NFMDecoder):
    """What differs where the number of active features varies from token to token."""

    _in_training_step = False
    _unrefined: Tensor | None = None

    def activated(self, hidden_pre: Tensor) -> Tensor:
        """The encoder's activations, of pre-activations that are rescaled where the SAE does that."""
        return self.activation_fn(hidden_pre)

    @override
    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations, refined on the features that the encoder chose, and pre-activations."""
        check_inference(self.cfg)
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        acts = self.activated(hidden_pre)
        if self.cfg.refinement_steps:
            self._unrefined = acts if self._in_training_step else None
            acts = self._refined_acts(sae_in, acts)
        return self.hook_sae_acts_post(acts), hidden_pre

    def _chosen(self, acts: Tensor) -> Tensor:
        """The encoder's activations in this step: these, or where they were refined what they were before."""
        unrefined, self._unrefined = self._unrefined, None
        return acts if unrefined is None else unrefined

    def _refined_acts(self, sae_in: Tensor, acts: Tensor) -> Tensor:
        x = sae_in + self.b_dec if self.cfg.apply_b_dec_to_input else sae_in
        rescaled = self.cfg.rescale_acts_by_decoder_norm
        squares = column_squares(self, wide(self.W_dec).norm(dim=-1) if rescaled else None)
        # an estimator of the gradient of the choice reads that of the features not chosen: the encoder's
        return torch.where(acts > 0, self._refined_on_support(x, acts, squares), acts)

    @override
    def _active(self, feature_acts: Tensor) -> None:
        return None

    @override
    def works_sparsely(self) -> bool:
        return False


class Thresholded(VaryingDecoder):
    """What an SAE has for inference and in training whose features are those above a threshold each."""

    ENCODER = "jumprelu"
    threshold: nn.Parameter
    """Of pre-activations as they are compared with it, rescaled or not, [d_sae]."""

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return SAE.get_activation_fn(self)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:  # by norms that have shrunk
            self.threshold.data /= scaling_factor

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Fold the decoder norms into the encoder; the NFM reads the same features, which without rescaling grow by them.

        Raises a NotImplementedError, as SAELens does, where the strongest features (`nfm_top_k`) would be others then.
        """
        if self.cfg.rescale_acts_by_decoder_norm:
            self.fold_and_get_W_dec_norm()
            return
        if self.cfg.nfm_top_k is not None:
            raise NotImplementedError(
                f"decoder norms cannot be folded with nfm_top_k = {self.cfg.nfm_top_k}: the strongest features would be others; "
                "train with nfm_top_k=None"
            )
        norms = self.fold_and_get_W_dec_norm()
        self.threshold.data *= norms
        for names, power in ((["W_lin", "V"], 1), (["U"], 2)):
            for weight in self._nfm_weights(names):
                weight.data /= norms[:, None] ** power


class JumpReLUJointNFMSAE(Thresholded, JointNFMSAE, JumpReLUSAE):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Inference-only joint NFM-SAE whose features are those above a threshold: of encoder "batchtopk" or "jumprelu"."""

    @override
    def encode(self, x: Tensor) -> Tensor:
        return self._encoded(x)[0]

    @override
    def activated(self, hidden_pre: Tensor) -> Tensor:
        return self.activation_fn(hidden_pre) * (hidden_pre > self.threshold).to(hidden_pre.dtype)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        trained = state_dict.pop("topk_threshold", None)  # of a checkpoint
        if trained is not None:
            state_dict["threshold"] = torch.full_like(state_dict["b_enc"], trained.item())
        super().process_state_dict_for_loading(state_dict)


class StagedTopKSAE(NFMDecoder, TopKSAE):
    """Inference-only TopK SAE whose features are chosen in stages and refined: joint_nfm without its NFM."""

    cfg: StagedTopKSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def encode(self, x: Tensor) -> Tensor:
        return self._encoded(x)[0] if self.inferring() else super().encode(x)
