"""The `sequential_nfm` architecture: a pretrained SAE, frozen, with a Neural Factorization Machine on its residual.

    x_hat = sae + lin + sq + inter
    sae   = what the base decodes from its own features f, in the space of its input: the direct path
    lin, sq, inter as in joint_nfm, read from f as hooked at `hook_sae_acts_post`

The base is a submodule with its own code, so that its features are its own bit for bit, whatever its architecture and
normalisation. Its hook points are those of the SAE around it: SAELens switches hooks off by attribute and does not reach into
submodules.

Source: arXiv 2507.00269 (sequential training).
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE, TopKSAE
from torch import Tensor, nn
from typing_extensions import override

from sae_nfm.architectures.joint_config import StagedTopKSAEConfig
from sae_nfm.architectures.joint_sae import NFMDecoder, StagedTopKSAE
from sae_nfm.architectures.nfm_config import check_inference
from sae_nfm.architectures.nfm_paths import FEW_FEATURES, NFMPaths, Paths, column_squares, own_normalisation
from sae_nfm.architectures.sequential_config import (
    SequentialNFMConfig,
    SequentialNFMSAEConfig,
    as_base,
    base_config,
    check_base,
    check_refinement,
    for_inference,
    load_base,
)
from sae_nfm.kernels import dispatch, reference, sees_numbers, wide
from sae_nfm.loading import sha256_of

BASE_HOOKS = ("hook_sae_input", "hook_sae_acts_pre")
"""Hook points within the base's encoder; the others are passed through around the base."""
NORMALISATION_STATE = ("x_norm_coeff", "ln_mu", "ln_std")
"""What SAELens's encode leaves for decode, which deletes it."""
FROZEN = "the base's features are not to change; fold it before it is wrapped"
"""Why folds are a NotImplementedError, as they are for SAELens's matching pursuit."""


class _PassedOn(nn.Module):
    """In place of a hook point of the base: the hook point of the SAE around it, whatever stands there now."""

    def __init__(self, owner: "SequentialNFM", name: str) -> None:
        super().__init__()
        self._owner, self._name = (owner,), name  # in a tuple, so that it is not a submodule

    @override
    def forward(self, value: Tensor) -> Tensor:
        passed = getattr(self._owner[0], self._name)(value)
        if self._name == "hook_sae_input" and self._owner[0].base_input is not None:
            self._owner[0].base_input = passed
        return passed


class SequentialNFM(NFMPaths):
    """Encode and decode that the inference and the training class share; hook points: `NFMPaths`."""

    cfg: SequentialNFMConfig
    base: SAE[Any]
    base_input: Tensor | None = None
    """While activations to be refined are encoded: what the base encodes, the input as it leaves `hook_sae_input`."""

    @override
    def initialize_weights(self) -> None:
        if not self.cfg.base_config:
            raise ValueError("no base: name one in the field `base`, or wrap an SAE with SequentialNFMTrainingSAE.wrap")
        self.base = self._make_base()
        own_normalisation(self.base)
        for name in [name for name, _ in self.base.named_children()]:
            if name.startswith("hook_"):
                setattr(self.base, name, _PassedOn(self, name) if name in BASE_HOOKS else nn.Identity())
        self._initialize_nfm_weights()

    def _make_base(self) -> SAE[Any]:
        """The base without its weights, which are loaded with the NFM's."""
        return SAE.from_dict(self.cfg.base_config | {"device": str(self.device), "dtype": self.cfg.dtype})

    @property
    def W_enc(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base's encoder [d_in, d_sae]."""
        return self.base.W_enc

    @property
    def W_dec(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base's decoder [d_sae, d_in]."""
        return self.base.W_dec

    @property
    def b_dec(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base's decoder bias [d_in]."""
        return self.base.b_dec

    @property
    def b_enc(self) -> nn.Parameter:
        """The base's encoder bias [d_sae]; an AttributeError where it has none of this name (gated, matching pursuit)."""
        return cast(nn.Parameter, self.base.b_enc)

    @override
    def to(self, *args: Any, **kwargs: Any) -> Any:
        moved = super().to(*args, **kwargs)
        self.base.device, self.base.cfg.device = self.device, self.cfg.device
        return moved

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        applied = super()._apply(fn, recurse)
        self.base.device, self.base.dtype = self.device, self.dtype
        self.base.cfg.device, self.base.cfg.dtype = self.cfg.device, self.cfg.dtype
        return applied

    @override
    def encode(self, x: Tensor) -> Tensor:
        """The base's features [*batch, d_sae] as hooked at `hook_sae_acts_post`, bit for bit unless they are refined."""
        self._check_width(x)
        x = self.reshape_fn_in(x)
        if not self.cfg.refinement_steps:
            return self.hook_sae_acts_post(self.base.encode(x))
        self.base_input = x
        try:
            acts = self.base.encode(x)
            return self.hook_sae_acts_post(self._refined(self.base_input, acts))
        finally:
            self.base_input = None

    def _refined(self, x: Tensor, acts: Tensor) -> Tensor:
        """The base's features with the activations that `kernels.inference` makes of them, in the space of the input."""
        check_refinement(self.cfg)
        rescaled = getattr(self.base.cfg, "rescale_acts_by_decoder_norm", False)
        squares = column_squares(self, wide(self.W_dec).norm(dim=-1) if rescaled else None, self._base_scale())
        return self._refined_on_support(x, acts, squares)

    def _base_scale(self) -> Tensor | None:
        """Length in the input's space of a unit in the base's, after it has encoded; None where it is 1."""
        normalised = self.base.cfg.normalize_activations
        if normalised == "constant_norm_rescale":
            return 1 / cast(Tensor, self.base.x_norm_coeff)
        return cast(Tensor, self.base.ln_std) if normalised == "layer_norm" else None

    @override
    def decode_paths(self, feature_acts: Tensor) -> Paths:
        """What each path writes, in the space of the input; pure in `feature_acts` and the last encode's normalisation."""
        return self._paths_of(feature_acts.to_dense() if feature_acts.is_sparse else feature_acts)

    @override
    def _paths_of(self, acts: reference.Acts) -> Paths:
        acts = dispatch.to_dense(acts, self.cfg.d_sae) if isinstance(acts, reference.SparseActs) else acts
        with _kept(self.base):
            direct = self.base.decode(acts)
        read = strongest = self._read(self._active(acts))
        if self.cfg.nfm_top_k is not None:
            strongest = reference.top_n(read, self.cfg.nfm_top_k)
        return Paths(direct, self._linear(strongest), self._square(read), self._interaction(strongest))

    def _active(self, acts: Tensor) -> reference.Acts:
        """The active features alone, where that is faster, asked for, and loses no gradient."""
        cfg = self.cfg
        wants_gradient = torch.is_grad_enabled() and acts.requires_grad
        if cfg.kernel == "dense" or wants_gradient or not acts.numel() or not sees_numbers(acts, *self.parameters()):
            return acts
        k = max(1, int(acts.count_nonzero(dim=-1).amax()))
        few = cfg.d_sae < FEW_FEATURES or dispatch.choose(cfg.d_sae, k, self.device) == "dense"
        if cfg.kernel == "auto" and few:
            return acts
        active = reference.sparse_acts_from_dense(acts, k)
        return acts if active is None else active

    def _read(self, acts: reference.Acts) -> reference.Acts:
        """What the NFM reads, in its own units."""
        return acts

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        if self.cfg.base and not any(name.startswith("base.") for name in state_dict):  # an adapter
            state_dict.update({f"base.{name}": tensor for name, tensor in self._named_base().state_dict().items()})
        super().process_state_dict_for_loading(state_dict)
        self._check_base(state_dict)

    def _named_base(self) -> SAE[Any]:
        cfg = self.cfg
        try:
            return load_base(cfg.base, cfg.base_norm_scaling_factor, cfg.dtype, cfg.device)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"this SAE was saved without its base {cfg.base!r}, which is not found ({error}); restore it, or say where it "
                "is: sae_nfm.convert.adapter.load_adapter(folder, base=...)"
            ) from error

    def _check_base(self, state_dict: dict[str, Any]) -> None:
        tensors = {name[5:]: tensor for name, tensor in state_dict.items() if name.startswith("base.")}
        if self.cfg.base_config["dtype"] == self.cfg.dtype:  # else they were converted on the way here
            check_base(tensors, self.cfg.base_sha256, self.cfg.base)

    def _describe_base(self) -> None:
        """Give the config what is verified on loading: the base's sha256 as it is now, fine-tuned or in another data type."""
        self.cfg.base_config["dtype"] = self.cfg.dtype
        self.cfg.base_sha256 = sha256_of(self.base.state_dict())

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        self._describe_base()
        return super().save_model(path)

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise NotImplementedError(f"a norm scaling factor cannot be folded into a sequential NFM: {FROZEN}")

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        raise NotImplementedError(f"a whitening cannot be folded into a sequential NFM: {FROZEN}")

    @override
    def fold_and_get_W_dec_norm(self) -> Tensor:
        raise NotImplementedError(f"decoder norms cannot be folded in a sequential NFM: {FROZEN}")


class SequentialNFMSAE(SequentialNFM, SAE[SequentialNFMSAEConfig]):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Inference-only sequential NFM-SAE; trained by `SequentialNFMTrainingSAE`."""

    cfg: SequentialNFMSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        fold_scale(state_dict)
        super().process_state_dict_for_loading(state_dict)


def refined(sae: SAE[Any], steps: int) -> SAE[Any]:
    """A copy of an SAE of any architecture that refines its activations (`kernels.inference`): the features are those that its
    own encoder chooses, R = `steps`, its weights the same.

    joint_nfm, staged_topk and sequential_nfm have an option for it, topk becomes a staged_topk of one stage, any other the base
    of a sequential NFM without paths.

    Raises a ValueError for steps < 0, activations that can be negative (abstopk), an architecture that cannot be a base, or a
    whitening that is not folded. Of one that is, nothing tells: what falls then is the error of raw activations, not of whitened.
    """
    if isinstance(sae, (NFMDecoder, SequentialNFM)):
        made = for_inference(sae)
        made.cfg.refinement_steps = steps
        check_refinement(made.cfg) if isinstance(made, SequentialNFM) else check_inference(made.cfg)
        return made.train(sae.training)
    base, same = as_base(sae), ("d_in", "d_sae", "dtype", "reshape_activations", "metadata")
    tensors = base.state_dict()
    # on "meta" nothing is drawn at random
    given: dict[str, Any] = {name: getattr(sae.cfg, name) for name in same} | {
        "device": "meta",
        "refinement_steps": steps,
    }
    if type(base) is TopKSAE:  # faster: its active features alone are refined
        encoder = ("k", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input", "normalize_activations")
        made = StagedTopKSAE(StagedTopKSAEConfig(**given, **{name: getattr(base.cfg, name) for name in encoder}))
        tensors["folded_W_dec_norm"] = torch.ones_like(base.b_enc)
    else:
        given |= {"base_config": base_config(base), "base_sha256": sha256_of(tensors)}
        made = SequentialNFMSAE(SequentialNFMSAEConfig(**given, head="none", use_linear_path=False))
        tensors = {f"base.{name}": tensor for name, tensor in tensors.items()}
    made.load_state_dict(tensors, assign=True)
    return made.to(device=sae.cfg.device).train(sae.training)


def fold_scale(state_dict: dict[str, Any]) -> None:
    """Fold the scale s of a training SAE into its NFM: `s * nfm(f / s)` becomes `nfm(f)`. Without one nothing happens.

    The linear path is the same in both units; products of two activations shrink by s^2, what is added to the output grows by s.
    """
    scale = state_dict.pop("nfm_scale", None)
    if scale is None or not scale > 0:
        return
    for name, power in (("V", -1), ("U", -1), ("b_lin", 1), ("W_2", 1), ("b_2", 1)):
        if name in state_dict:
            state_dict[name] = state_dict[name] * scale.to(state_dict[name]) ** power


@contextmanager
def _kept(base: SAE[Any]) -> Generator[None]:
    """What encode has left for decode is there after it, too, so that decode can be called again."""
    state = {name: getattr(base, name) for name in NORMALISATION_STATE if hasattr(base, name)}
    yield
    for name, value in state.items():
        setattr(base, name, value)
