"""The paths that a Neural Factorization Machine adds to an SAE's output: parameters, hook points and checks.

    lin   = f_n W_lin + b_lin                 linear integration path
    sq    = (f^2 / c) U                       square path
    inter = ReLU(z W_1 + b_1) W_2 + b_2       interaction path, z = sum_{i<j} f_i f_j v_i*v_j over f_n, or as another of `heads`;
            z W_2 + b_2                       with head "bilinear"

An architecture derives from `NFMPaths` and an SAE class of SAELens, and says in `decode_paths` what the direct path is and
which activations the others read. Parameters and hook points are direct attributes of the SAE (SAELens switches hooks off by
attribute); the maths is in `kernels.reference`.
"""

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.util import dtype_to_str
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_nfm.common import ShortRepr, short_repr
from sae_nfm.kernels import (
    BILINEAR,
    PAIRED,
    POOLS,
    SparseActs,
    dispatch,
    embedding_width,
    inference,
    reference,
    uncompiled,
    wide,
)
from sae_nfm.kernels.device import autocast_off
from sae_nfm.loading import check_state_dict, refuse_not_finite, write_note

FEW_FEATURES = 1024
"""With fewer, either form of a step is mostly overhead, and the dense one is SAELens's own."""
BINS = 512
"""wandb's histograms have at most so many."""
HIDDEN_CODE_HOOKS: list[str] = []
"""Hook points for what replaces the hidden code (`NFMPaths.hidden_code`). Every SAE with an interaction path has them from the
start, so that a model with the SAE in it knows them before anything is attached."""


class Paths(NamedTuple):
    """What each path writes, [*batch, d_in] before the run-time normalisation is undone; None where it is switched off."""

    __repr__ = short_repr

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


class NFMPaths(_Host):
    """Parameters, hook points and checks of the added paths, for training and inference classes.

    Hook points exist for the paths that are switched on:

        hook_nfm_linear_in, hook_nfm_square_in, hook_nfm_interaction_in    [*batch, d_sae]     what each path reads
        hook_nfm_linear, hook_nfm_square, hook_nfm_interaction             [*batch, d_in]      what each path adds
        hook_nfm_pooled, hook_nfm_hidden_pre                               [*batch, nfm_dim]   z and h

    and with an interaction path `HIDDEN_CODE_HOOKS`. Where a path works on the active features alone, what it reads passes its
    hook point as a matrix while a hook is attached, and only then; outputs are the same bits with and without a hook that
    changes nothing.
    """

    W_lin: nn.Parameter
    b_lin: nn.Parameter
    V: nn.Parameter
    W_1: nn.Parameter
    b_1: nn.Parameter
    W_2: nn.Parameter
    b_2: nn.Parameter
    U: nn.Parameter
    hidden_code: "Callable[[NFMPaths, Tensor], Tensor] | None" = None
    """What replaces the hidden code [*batch, nfm_dim], given this SAE and the code; None leaves the code as it is. Being given
    the SAE, it need not refer to it, and so works on in a `deepcopy`."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        if cfg.use_linear_path:
            self.hook_nfm_linear_in, self.hook_nfm_linear = HookPoint(), HookPoint()
        if cfg.use_square_path:
            self.hook_nfm_square_in, self.hook_nfm_square = HookPoint(), HookPoint()
        if cfg.head != "none":
            self.hook_nfm_interaction_in, self.hook_nfm_pooled = HookPoint(), HookPoint()
            self.hook_nfm_hidden_pre, self.hook_nfm_interaction = HookPoint(), HookPoint()
            for name in HIDDEN_CODE_HOOKS:
                setattr(self, name, HookPoint())
        own_normalisation(self)
        self.setup()

    def _initialize_nfm_weights(self) -> None:
        cfg, d_sae, m = self.cfg, self.cfg.d_sae, self.cfg.nfm_dim
        d_out = getattr(cfg, "d_out", cfg.d_in)
        weight_std = getattr(cfg, "nfm_weight_init_std", 0.0)  # an inference SAE is filled by loading
        if cfg.use_linear_path:
            self.W_lin = self._normal(weight_std, d_sae, d_out)
            self.b_lin = self._normal(0.0, d_out)
        if cfg.head != "none":
            self.V = self._normal(getattr(cfg, "nfm_embedding_init_std", 0.0), d_sae, embedding_width(cfg.head, m))
            if cfg.head != BILINEAR:
                self.W_1, self.b_1 = self._normal(weight_std, m, m), self._normal(0.0, m)
            self.W_2, self.b_2 = self._normal(weight_std, m, d_out), self._normal(0.0, d_out)
        if cfg.use_square_path:
            self.U = self._normal(weight_std, d_sae, d_out)

    def _normal(self, std: float, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=std))

    def _nfm_weights(self, names: list[str]) -> list[nn.Parameter]:
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def _check_width(self, sae_in: Tensor) -> None:
        """Raise a ValueError for activations of another width than the SAE's."""
        heads = self.cfg.reshape_activations == "hook_z" and self.hook_z_reshaping_mode
        width = sae_in.shape[-2:].numel() if heads else sae_in.shape[-1]
        if width != self.cfg.d_in:
            raise ValueError(
                f"activations of shape {tuple(sae_in.shape)} have {width} dimensions a token, this SAE has d_in = "
                f"{self.cfg.d_in}; check the hook name ({self.cfg.metadata.hook_name!r}) and d_in"
            )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `half()`, `cuda()` or a `to` of the model around the SAE call: type and device of the parameters are the SAE's."""
        applied = super()._apply(fn, recurse)
        self.dtype, self.cfg.dtype = self.b_dec.dtype, dtype_to_str(self.b_dec.dtype)
        if self.device.type != self.b_dec.device.type:
            self.device, self.cfg.device = self.b_dec.device, str(self.b_dec.device)
        return applied

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        self._check_width(sae_in)
        return super().process_sae_in(sae_in)

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruct activations from features through all paths.

        From [*batch, d_sae] as hooked at `hook_sae_acts_post`, dense or COO, to [*batch, d_in] (or [*batch, n_heads, d_head]
        for hook_z) in the space of the input.
        """
        sae_out_pre = self.hook_sae_recons(self._recons(self.decode_paths(feature_acts).total()))
        sae_out_pre = self.run_time_activation_norm_fn_out(sae_out_pre)
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    def _recons(self, written: Tensor) -> Tensor:
        """The output, before the run-time normalisation is undone, of what all paths write."""
        return written

    @abstractmethod
    def decode_paths(self, feature_acts: Tensor) -> Paths:
        """What each path writes before the run-time normalisation is undone; pure in `feature_acts`."""

    def _paths_of(self, acts: reference.Acts) -> Paths:
        """`decode_paths` of activations in either form."""
        return self.decode_paths(dispatch.to_dense(acts, self.cfg.d_sae) if isinstance(acts, SparseActs) else acts)

    @contextmanager
    def _weights_alone(self) -> Generator[Callable[[reference.Acts], Tensor]]:
        """A function from activations to what all paths write, by the weights alone, in at least float32.

        Within it no hook fires, nothing replaces the hidden code, and autocast is off.
        """
        hooked = {name: hook for name in self.hook_dict if is_hooked(hook := getattr(self, name))}
        replaced, self.hidden_code = self.hidden_code, None
        for name in hooked:
            setattr(self, name, nn.Identity())
        try:
            with autocast_off(self.device):
                yield partial(_all_written, self, differentiable=torch.is_grad_enabled())
        finally:
            self.hidden_code = replaced
            for name, hook in hooked.items():
                setattr(self, name, hook)

    @uncompiled
    def _refined_on_support(self, x: Tensor, acts: Tensor, column_squares: Tensor) -> Tensor:
        """What `kernels.inference.refine` makes of activations [*batch, d_sae], whose zeros stay, so that all paths write x."""
        with self._weights_alone() as written:
            dense = wide(acts.to_dense() if acts.is_sparse else acts)
            support = dense > 0
            # an active feature that reaches 0 stays before all others in what is read with nfm_top_k
            first = support.to(dense.dtype) * torch.finfo(dense.dtype).tiny
            steps = self.cfg.refinement_steps
            found = inference.refine(dense, lambda f: written(f + first), wide(x), column_squares, steps, support)
        return found.to(acts.dtype)

    def _linear(self, read: reference.Acts) -> Tensor | None:
        if not self.cfg.use_linear_path:
            return None
        read = _hooked(self.hook_nfm_linear_in, read, self.cfg.d_sae)
        return self.hook_nfm_linear(self._written(reference.weighted_rows(read, self.W_lin) + self.b_lin))

    def _square(self, acts: reference.Acts) -> Tensor | None:
        if not self.cfg.use_square_path:
            return None
        acts = _hooked(self.hook_nfm_square_in, acts, self.cfg.d_sae)
        return self.hook_nfm_square(self._written(reference.square_output(acts, self.U, self.cfg.square_scale)))

    def _interaction(self, read: reference.Acts) -> Tensor | None:
        if self.cfg.head == "none":
            return None
        read = _hooked(self.hook_nfm_interaction_in, read, self.cfg.d_sae)
        hidden = self.hook_nfm_hidden_pre(self._hidden(self._pool(read)))
        if self.hidden_code is not None:
            hidden = self.hidden_code(self, hidden)
        return self.hook_nfm_interaction(self._written(self._read_out(hidden)))

    def _pool(self, read: reference.Acts) -> Tensor:
        return self._dropout(self.hook_nfm_pooled(POOLS[self.cfg.head](read, self.V)))

    def _hidden(self, pooled: Tensor) -> Tensor:
        """The hidden code h."""
        return pooled if self.cfg.head == BILINEAR else reference.hidden_pre(pooled, self.W_1, self.b_1)

    def _read_out(self, hidden: Tensor) -> Tensor:
        return reference.interaction_output(hidden, self.W_2, self.b_2, gated=self.cfg.head != BILINEAR)

    @torch.no_grad()
    def balance_projections(self) -> None:
        """Give each column of A and that of B one norm: with head "bilinear" s times the one and 1 / s times the other write the
        same for every s, so that norms mean nothing before it is fixed. Without that head nothing happens.
        """
        if self.cfg.head == BILINEAR:
            a, b = wide(self.V).norm(dim=0).chunk(2)
            s = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
            self.V.data = (wide(self.V) * torch.cat([s, 1 / s])).to(self.V.dtype)

    def _written(self, path: Tensor) -> Tensor:
        """What a path adds to the output, given what its weights make."""
        return path

    def _dropout(self, pooled: Tensor) -> Tensor:
        return pooled

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        check_state_dict(state_dict, expected=self.state_dict())

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save as SAELens does, with a README.md that says what loads it; a ValueError for weights that are not finite."""
        refuse_not_finite(self.state_dict(), "the SAE to save")
        saved = super().save_model(path)
        write_note(path)
        return saved


def _all_written(sae: NFMPaths, acts: reference.Acts, *, differentiable: bool) -> Tensor:
    whole = _Whole(sae)
    weights = dict(whole.named_parameters())
    if differentiable:
        weights = {name: wide(weight) for name, weight in weights.items() if wide(weight) is not weight}
    else:
        weights = {name: wide(weight.detach()) for name, weight in weights.items()}
    return functional_call(whole, weights, (acts,)) if weights else whole(acts)


class _Whole(nn.Module):
    """All paths of an SAE as what `functional_call` calls."""

    def __init__(self, sae: NFMPaths) -> None:
        super().__init__()
        self.sae = sae

    @override
    def forward(self, acts: reference.Acts) -> Tensor:
        own = type(self.sae)
        ours = own.decode_paths.__module__.startswith("sae_nfm.")
        return (own if ours else NFMPaths)._paths_of(self.sae, acts).total()  # pyright: ignore[reportPrivateUsage]


def column_squares(
    sae: NFMPaths, norms: Float[Tensor, " d_sae"] | None, token_scale: Float[Tensor, "*batch 1"] | None = None
) -> Float[Tensor, "*batch d_sae"]:
    """Squared norm of what a feature writes per unit through the direct and the linear path, in at least float32.

    `norms` are those that the direct path divides by; `token_scale` is the length there of a unit of the decoder.
    """
    direct = wide(sae.W_dec)
    if norms is not None:
        direct = direct / reference.divisor(norms)[:, None]
    linear = wide(sae.W_lin) if sae.cfg.use_linear_path else None
    if token_scale is None:
        return (direct if linear is None else direct + linear).square().sum(dim=-1)
    squares = wide(token_scale).square() * direct.square().sum(dim=-1)
    if linear is None:
        return squares
    return squares + 2 * wide(token_scale) * (direct * linear).sum(dim=-1) + linear.square().sum(dim=-1)


def own_normalisation(sae: SAE[Any]) -> None:
    """Give an SAE its per-token normalisation as methods: the same numbers as SAELens's, whose closures stay with the original.

    In a `deepcopy` those read and write the state of the SAE that was copied. A token of norm 0 stays 0 (SAELens: NaN), and
    norms are taken in float32, since one of activations in float16 can exceed the type's range.
    """
    made = {"constant_norm_rescale": (_to_one_norm, _from_one_norm), "layer_norm": (_to_one_spread, _from_one_spread)}
    if sae.cfg.normalize_activations in made:
        to, back = made[sae.cfg.normalize_activations]
        sae.run_time_activation_norm_fn_in, sae.run_time_activation_norm_fn_out = (
            MethodType(to, sae),
            MethodType(back, sae),
        )


def _to_one_norm(sae: Any, x: Tensor) -> Tensor:
    norms = x.norm(dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    sae.x_norm_coeff = sae.cfg.d_in**0.5 / norms.clamp(min=1e-12)
    return (x * sae.x_norm_coeff).to(x.dtype)


def _from_one_norm(sae: Any, x: Tensor) -> Tensor:
    found = (x / sae.x_norm_coeff).to(x.dtype)
    del sae.x_norm_coeff
    return found


def _to_one_spread(sae: Any, x: Tensor) -> Tensor:
    sae.ln_mu = x.mean(dim=-1, keepdim=True)
    x = x - sae.ln_mu
    sae.ln_std = x.std(dim=-1, keepdim=True)
    return x / (sae.ln_std + 1e-5)


def _from_one_spread(sae: Any, x: Tensor) -> Tensor:
    found = x * sae.ln_std + sae.ln_mu
    del sae.ln_mu, sae.ln_std
    return found


def is_hooked(hook: Any) -> bool:
    """Whether a hook is attached to a hook point, forward or backward."""
    return bool(hook._forward_hooks or hook._backward_hooks)


def _hooked(hook: nn.Module, read: reference.Acts, d_sae: int) -> reference.Acts:
    """What a path reads, let through its hook point: as a matrix, and in the sparse form only where a hook is attached.

    The sparse form goes on with the values that come back, as long as these are zero outside of the active features.
    """
    if isinstance(read, Tensor):
        return hook(read)
    if not is_hooked(hook):
        return read
    passed: Tensor = hook(dispatch.to_dense(read, d_sae))
    values = passed.gather(-1, read.indices)
    same_features = torch.equal(passed.count_nonzero(dim=-1), values.count_nonzero(dim=-1))
    return SparseActs(read.indices, values) if same_features else passed


def attributable(sae: SAE[Any]) -> NFMPaths:
    """The SAE, when its interaction path is a sum over pairs with the gates held.

    Raises a ValueError without an NFM, for another head than "fm" and "bilinear", with dropout or with a secondary SAE in the
    hidden code.
    """
    if not isinstance(sae, NFMPaths):
        raise ValueError(
            f"an SAE of the architecture {sae.cfg.architecture()!r} has no interaction path to attribute; give a joint_nfm or "
            "sequential_nfm SAE"
        )
    if sae.cfg.head not in PAIRED:
        reason = "has no interaction path" if sae.cfg.head == "none" else "pools features, not products of pairs"
        raise ValueError(
            f'an SAE with head {sae.cfg.head!r} {reason}; pairs are attributed with head "fm" or "bilinear"'
        )
    if getattr(sae.cfg, "nfm_dropout", 0.0) > 0:
        raise ValueError(
            f"this SAE is in training with nfm_dropout {sae.cfg.nfm_dropout}, under which its pairs are not what it will "
            "use; save it for inference (save_inference_model) and load that"
        )
    if sae.hidden_code is not None:
        raise ValueError("a secondary SAE replaces the hidden code, which is then no sum over pairs; detach it first")
    return sae


@dataclass(frozen=True, kw_only=True, repr=False)
class PathWeights(ShortRepr):
    """Weights of the interaction and the linear path in at least float32, for what reaches the SAE's output (before its
    normalisation is undone).
    """

    V: Float[Tensor, "d_sae nfm_dim"]
    """With head "bilinear" the first projection, A."""
    B: Float[Tensor, "d_sae nfm_dim"] | None = None
    """The second one; None with head "fm"."""
    W_1: Float[Tensor, "nfm_dim nfm_dim"]
    """With head "bilinear", which has none, the identity, and b_1 zero: all gates are open."""
    b_1: Float[Tensor, " nfm_dim"]
    W_2: Float[Tensor, "nfm_dim d_in"]
    b_2: Float[Tensor, " d_in"]
    W_lin: Float[Tensor, "d_sae d_in"] | None
    """None where the linear path is off, as `b_lin`."""
    b_lin: Float[Tensor, " d_in"] | None

    @classmethod
    def of(cls, sae: SAE[Any]) -> "PathWeights":
        """Those of an SAE. Raises a ValueError when its interaction path is no sum over pairs, see `attributable`."""
        sae = attributable(sae)
        written = sae._written  # pyright: ignore[reportPrivateUsage] (linear: what a path's weights make, as it is added)
        linear = sae.cfg.use_linear_path
        V, B = wide(sae.V.detach()), None
        if sae.cfg.head == BILINEAR:
            (V, B), m = V.chunk(2, dim=-1), sae.cfg.nfm_dim
            weights: dict[str, Tensor] = {"W_1": torch.eye(m).to(V), "b_1": V.new_zeros(m)}
        else:
            weights = {name: wide(getattr(sae, name).detach()) for name in ("W_1", "b_1")}
        weights |= {name: written(wide(getattr(sae, name).detach())) for name in ("W_2", "b_2")}
        W_lin, b_lin = (written(wide(getattr(sae, name).detach())) if linear else None for name in ("W_lin", "b_lin"))
        return cls(V=V, B=B, **weights, W_lin=W_lin, b_lin=b_lin)

    @property
    def selves(self) -> bool:
        """Whether squares f_i^2 are part of the sum, beside pairs."""
        return self.B is not None

    def products(self, first: Tensor, second: Tensor) -> Float[Tensor, "*batch nfm_dim"]:
        """What a pair, or with i = j a square, adds to the pooled vector for each unit of f_i f_j: v_i*v_j, or
        a_i*b_j + a_j*b_i, of a square a_i*b_i.
        """
        if self.B is None:
            return self.V[first] * self.V[second]
        both = self.V[first] * self.B[second] + self.V[second] * self.B[first]
        return torch.where((first == second)[..., None], 0.5 * both, both)

    def permuted(self, order: Tensor) -> "PathWeights":
        """The embeddings of feature `order[i]` given to feature i."""
        return replace(self, V=self.V[order], B=None if self.B is None else self.B[order])

    def reduced(self) -> Float[Tensor, "nfm_dim rank"]:
        """A matrix R of at most nfm_dim columns with ||y R|| = ||y W_2|| for every y: norms cost less with it."""
        return torch.linalg.qr(self.W_2.T, mode="r").R.T


_Host = TrainingSAE[Any] if TYPE_CHECKING else object


class TrainedPaths(NFMPaths, _Host):
    """What training SAEs with added paths share: dropout within a training step alone, histograms, the metrics of each path.

    `TrainStepOutput.metrics` has each path's error, magnitude and share in steps that SAELens logs, computed only when read.
    """

    keep_paths = False
    """Whether the metrics are there also in steps that SAELens does not log."""
    _in_training_step = False
    _step_paths: Paths | None = None

    @contextmanager
    def _training_step(self) -> Generator[None]:
        """Within it dropout acts, and the paths of the last `decode_paths` are kept."""
        self._in_training_step = True
        try:
            yield
        finally:
            self._in_training_step = False

    def _taken_paths(self) -> Paths | None:
        """What the paths wrote in this step, None where a subclass decodes without them; they are not kept beyond it."""
        paths, self._step_paths = self._step_paths, None
        return paths

    @override
    @contextmanager
    def _weights_alone(self) -> Generator[Callable[[reference.Acts], Tensor]]:
        in_step, self._in_training_step = self._in_training_step, False
        try:
            with super()._weights_alone() as written:
                yield written
        finally:
            self._in_training_step = in_step

    @override
    def _dropout(self, pooled: Tensor) -> Tensor:
        return F.dropout(pooled, self.cfg.nfm_dropout, training=self._in_training_step)

    @override
    def decode_paths(self, feature_acts: Tensor) -> Paths:
        paths = super().decode_paths(feature_acts)
        if self._in_training_step:
            self._step_paths = paths
        return paths

    def _shows_paths(self, step_input: TrainStepInput) -> bool:
        return self.keep_paths or step_input.is_logging_step

    def _add_metrics(self, output: TrainStepOutput, step_input: TrainStepInput, paths: Paths | None) -> None:
        scale, shown = self._token_scale(step_input.sae_in), self._shows_paths(step_input)
        detached = (
            {name: path.detach() for name, path in paths.present().items()} if shown and paths is not None else {}
        )
        output.metrics.update(path_metrics(step_input.sae_in, output.sae_out.detach(), detached, scale))

    def _token_scale(self, sae_in: Tensor) -> Tensor | float:  # noqa: ARG002
        return 1.0

    @override
    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """Row norms of W_dec, as every SAE of SAELens logs them, and of the NFM's weights that read features: [d_sae] each."""
        rows = {name: getattr(self, name) for name in ("W_lin", "V", "U") if hasattr(self, name)}
        norms = {f"weights/{name}_norms": weight.float().norm(dim=1).cpu().numpy() for name, weight in rows.items()}
        return {name: _at_one_value(found) for name, found in (super().log_histograms() | norms).items()}


def _at_one_value(values: NDArray[Any]) -> NDArray[Any]:
    """Values that differ by rounding alone as one value: numpy makes no bins between neighbouring numbers, and raises."""
    apart = np.ptp(values) > BINS * np.spacing(np.abs(values).max(initial=0))
    return values if apart else np.full_like(values, np.median(values))


Metric = Callable[[], Tensor]


def path_metrics(
    sae_in: Tensor, sae_out: Tensor, paths: Mapping[str, Tensor], token_scale: Tensor | float
) -> dict[str, Metric]:
    """Metrics of one batch, by name, each a callable that returns a 0-d tensor.

    - `fvu_all`, `fvu_direct`, `fvu_direct+linear`, ...: fraction of the batch's variance left unexplained by the direct
      path alone, by it and one further path, and by all.
    - `magnitude_<path>`: mean absolute value of what the path writes.
    - `share_<path>`: that magnitude over the sum of the integration paths' (the paper's "94 % linear, 6 % nonlinear").

    `paths` are in the SAE's normalised space, where a unit has the length `token_scale` of the input's space: [batch, 1], or one
    number for all.

    Source: arXiv 2507.00269, component analysis.
    """
    integration = [name for name in paths if name != "direct"]

    def fvu(kept: list[str]) -> Metric:
        left_out = [paths[name] for name in paths if name not in kept]

        def compute() -> Tensor:
            error = sae_in.float() - sae_out.float()
            for path in left_out:
                error = error + path.float() * token_scale
            return error.square().sum() / (sae_in.float() - sae_in.float().mean(0)).square().sum()

        return compute

    def magnitude(name: str) -> Metric:
        return lambda: (paths[name].float() * token_scale).abs().mean()

    def share(name: str) -> Metric:
        return lambda: magnitude(name)() / torch.stack([magnitude(other)() for other in integration]).sum()

    metrics = {"fvu_all": fvu(list(paths))}
    if integration:
        metrics["fvu_direct"] = fvu(["direct"])
    if len(integration) > 1:
        metrics |= {f"fvu_direct+{name}": fvu(["direct", name]) for name in integration}
    metrics |= {f"magnitude_{name}": magnitude(name) for name in paths}
    metrics |= {f"share_{name}": share(name) for name in integration}
    return metrics
