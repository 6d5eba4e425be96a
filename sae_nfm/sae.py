"""The `joint_nfm` architecture: a TopK SAE whose output also has the paths of a Neural Factorization Machine.

    x_hat = sae + lin + sq + inter
    sae   = f W_dec + b_dec            direct path
    lin   = f_n W_lin + b_lin          linear integration path
    sq    = (f^2 / c) U                square path
    inter = ReLU(z W_1 + b_1) W_2 + b_2, z = sum_{i<j} f_i f_j v_i*v_j over f_n     interaction path

ONE CONVENTION for what the NFM reads: `f` is the activation as hooked at `hook_sae_acts_post`. With
`rescale_acts_by_decoder_norm` that is the pre-activation times its decoder norm, and the direct path divides the norm
out again, as in SAELens's TopK. An edit at that hook therefore has one meaning for all paths, folding decoder norms
leaves the NFM untouched, and top-n is selected on the same numbers before and after every fold.

Parameters and hook points are direct attributes of the SAE (SAELens switches hooks off by attribute); the maths is in
`interaction`. Training, inference, evaluation and intervention share one `decode`.

Source: arXiv 2507.00269.
"""

from copy import deepcopy
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import SAE, TopKSAE
from sae_lens.saes.topk_sae import act_times_W_dec
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_nfm import interaction, kernels
from sae_nfm.config import JointNFMConfig, JointNFMSAEConfig
from sae_nfm.loading import check_state_dict, write_note

FEW_FEATURES = 1024
"""With fewer, either form of a step is mostly overhead, and the dense one is SAELens's own."""


class Paths(NamedTuple):
    """What each path writes, [*batch, d_in] in the SAE's normalised space; None where the path is switched off."""

    direct: Tensor
    linear: Tensor | None
    square: Tensor | None
    interaction: Tensor | None

    def present(self) -> dict[str, Tensor]:
        """The paths that are switched on, by name."""
        return {name: path for name, path in self._asdict().items() if path is not None}

    def total(self) -> Tensor:
        """The sum of all paths."""
        return reduce(torch.add, self.present().values())


_Host = SAE[Any] if TYPE_CHECKING else object


class NFMDecoder(_Host):
    """Parameters, hook points, decode and folds that the inference and the training class share.

    Hook points exist for the paths that are switched on: `hook_nfm_linear`, `hook_nfm_square`, `hook_nfm_interaction`
    [*batch, d_in] (what each path adds) and `hook_nfm_pooled`, `hook_nfm_hidden_pre` [*batch, nfm_dim].
    """

    cfg: JointNFMConfig
    W_lin: nn.Parameter
    b_lin: nn.Parameter
    V: nn.Parameter
    W_1: nn.Parameter
    b_1: nn.Parameter
    W_2: nn.Parameter
    b_2: nn.Parameter
    U: nn.Parameter
    b_enc: nn.Parameter
    folded_W_dec_norm: Tensor

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        if cfg.use_linear_path:
            self.hook_nfm_linear = HookPoint()
        if cfg.use_square_path:
            self.hook_nfm_square = HookPoint()
        if cfg.head != "none":
            self.hook_nfm_pooled = HookPoint()
            self.hook_nfm_hidden_pre = HookPoint()
            self.hook_nfm_interaction = HookPoint()
        self.setup()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg, d_in, d_sae, m = self.cfg, self.cfg.d_in, self.cfg.d_sae, self.cfg.nfm_dim
        weight_std = getattr(cfg, "nfm_weight_init_std", 0.0)  # an inference SAE is filled by loading
        if cfg.use_linear_path:
            self.W_lin = self._normal(weight_std, d_sae, d_in)
            self.b_lin = self._normal(0.0, d_in)
        if cfg.head != "none":
            self.V = self._normal(getattr(cfg, "nfm_embedding_init_std", 0.0), d_sae, m)
            self.W_1, self.b_1 = self._normal(weight_std, m, m), self._normal(0.0, m)
            self.W_2, self.b_2 = self._normal(weight_std, m, d_in), self._normal(0.0, d_in)
        if cfg.use_square_path:
            self.U = self._normal(weight_std, d_sae, d_in)
        # Row norms that folds divided out of W_dec: analyses of decoder norms multiply them back.
        self.register_buffer("folded_W_dec_norm", torch.ones(d_sae, dtype=self.dtype, device=self.device))

    def _normal(self, std: float, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=std))

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        heads = self.cfg.reshape_activations == "hook_z" and self.hook_z_reshaping_mode
        width = sae_in.shape[-2:].numel() if heads else sae_in.shape[-1]
        if width != self.cfg.d_in:
            raise ValueError(
                f"activations of shape {tuple(sae_in.shape)} have {width} dimensions a token, this SAE has d_in = "
                f"{self.cfg.d_in}; check the hook name ({self.cfg.metadata.hook_name!r}) and d_in"
            )
        return super().process_sae_in(sae_in)

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruct activations from features through all paths.

        Args:
            feature_acts: [*batch, d_sae] as hooked at `hook_sae_acts_post`, dense or COO.

        Returns:
            [*batch, d_in] (or [*batch, n_heads, d_head] for hook_z) in the space of the input.
        """
        sae_out_pre = self.hook_sae_recons(self.decode_paths(feature_acts).total())
        sae_out_pre = self.run_time_activation_norm_fn_out(sae_out_pre)
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    def decode_paths(self, feature_acts: Tensor) -> Paths:
        """What each path writes before the run-time normalisation is undone; pure in `feature_acts`."""
        cfg = self.cfg
        active = self._active(feature_acts)
        acts = feature_acts.to_dense() if active is None else active
        read = acts if cfg.nfm_top_k is None else interaction.top_n(acts, cfg.nfm_top_k)
        direct, linear = self._direct_and_linear(acts, read)
        square = interacting = None
        if cfg.use_square_path:
            square = self.hook_nfm_square(interaction.square_output(acts, self.U, cfg.square_scale))
        if cfg.head != "none":
            hidden = self.hook_nfm_hidden_pre(interaction.hidden_pre(self._pool(read), self.W_1, self.b_1))
            interacting = self.hook_nfm_interaction(interaction.interaction_output(hidden, self.W_2, self.b_2))
        return Paths(direct, linear, square, interacting)

    def _active(self, feature_acts: Tensor) -> interaction.SparseActs | None:
        """The active features alone, where reading only these is possible, asked for, and loses no gradient."""
        cfg = self.cfg
        if feature_acts.is_sparse:
            return interaction.sparse_acts_from_coo(feature_acts, cfg.k)
        wants_gradient = torch.is_grad_enabled() and feature_acts.requires_grad
        if wants_gradient or torch.compiler.is_compiling() or not self.works_sparsely():
            return None
        return interaction.sparse_acts_from_dense(feature_acts, cfg.k)

    def works_sparsely(self) -> bool:
        """Whether `cfg.kernel` chooses the active features alone: "auto" by the cost model, from `FEW_FEATURES` on."""
        cfg = self.cfg
        if cfg.kernel == "auto":
            return cfg.d_sae >= FEW_FEATURES and kernels.choose(cfg.d_sae, cfg.k, self.device.type) == "sparse"
        return cfg.kernel == "sparse"

    def _direct_and_linear(self, acts: interaction.Acts, read: interaction.Acts) -> tuple[Tensor, Tensor | None]:
        """What the two decoders write, biases included."""
        if isinstance(acts, Tensor):
            direct = act_times_W_dec(acts, self.W_dec, self.cfg.rescale_acts_by_decoder_norm)
        else:
            values = acts.values
            if self.cfg.rescale_acts_by_decoder_norm:
                values = values / kernels.of_active(self.W_dec.norm(dim=-1), acts)
            direct = interaction.weighted_rows(interaction.SparseActs(acts.indices, values), self.W_dec)
        linear = None
        if self.cfg.use_linear_path:
            linear = self.hook_nfm_linear(interaction.weighted_rows(read, self.W_lin) + self.b_lin)
        return direct + self.b_dec, linear

    def _pool(self, read: interaction.Acts) -> Tensor:
        pool = interaction.bi_interaction if self.cfg.head == "fm" else interaction.weighted_rows
        return self._dropout(self.hook_nfm_pooled(pool(read, self.V)))

    def _dropout(self, pooled: Tensor) -> Tensor:
        return pooled

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold the factor s that inputs were multiplied with, so that the SAE takes and returns raw activations.

        With rescaling the decoder norms shrink by s and with them the activations: V and U grow by s, W_lin stays. Without
        it activations keep their size and W_lin, U shrink. What is added to the output (b_lin, W_2, b_2) shrinks either way.
        """
        super().fold_activation_norm_scaling_factor(scaling_factor)
        shrink, grow = ["b_lin", "W_2", "b_2"], []
        if self.cfg.rescale_acts_by_decoder_norm:
            grow = ["V", "U"]
        else:
            shrink += ["W_lin", "U"]
        for weight in self._nfm_weights(shrink):
            weight.data /= scaling_factor
        for weight in self._nfm_weights(grow):
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

        Raises:
            ValueError: without a linear path, or with `nfm_top_k`, where the two decoders read different features.
        """
        cfg = self.cfg
        self._refuse_inexact_fold()
        if cfg.rescale_acts_by_decoder_norm:
            self.fold_W_dec_norm()
            cfg.rescale_acts_by_decoder_norm = False
        self.W_dec.data += self.W_lin.data
        self.b_dec.data += self.b_lin.data
        if cfg.apply_b_dec_to_input:
            self.b_enc.data += self.b_lin.data @ self.W_enc.data
        self.W_lin.data.zero_()
        self.b_lin.data.zero_()

    def _refuse_inexact_fold(self) -> None:
        cfg = self.cfg
        if not cfg.use_linear_path:
            raise ValueError("there is no linear path to fold (use_linear_path is False): W_dec is canonical already")
        if cfg.nfm_top_k is not None:
            raise ValueError(
                f"nfm_top_k is {cfg.nfm_top_k}: the linear path reads only the strongest features and cannot be folded into "
                "W_dec exactly; train with nfm_top_k=None for a canonical gauge"
            )

    def _nfm_weights(self, names: list[str]) -> list[nn.Parameter]:
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        check_state_dict(state_dict, expected=self.state_dict())

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save as SAELens does, with a README.md that says what loads it."""
        saved = super().save_model(path)
        write_note(path)
        return saved


class JointNFMSAE(NFMDecoder, TopKSAE):
    """Inference-only joint NFM-SAE; trained by `training_sae.JointNFMTrainingSAE`, same tensors in the saved file."""

    cfg: JointNFMSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def folded(self) -> "JointNFMSAE":
        """The same function with one decoder: the linear path folded into W_dec (`fold_linear_path`) and left out.

        Raises:
            ValueError: as `fold_linear_path`.
        """
        canonical = deepcopy(self)
        canonical.fold_linear_path()
        sae = JointNFMSAE(replace(canonical.cfg, use_linear_path=False))
        left_out = ("W_lin", "b_lin")
        sae.load_state_dict({name: value for name, value in canonical.state_dict().items() if name not in left_out})
        return sae
