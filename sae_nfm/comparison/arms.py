"""The arms of a fair comparison for one hook point: joint NFM-SAEs, their controls, and SAEs trained on their own.

    joint_nfm                      linear and interaction path over all k active features (n = None), or the strongest n of them
    joint_nfm half                 the same over the strongest half (n = k / 2)
    joint_nfm square               square path in place of the linear one
    joint_nfm without linear       interaction path alone beside the direct one
    joint_nfm without nonlinear    linear path alone: the linear adapter. x_hat = f W_dec + f W_lin + b is a TopK SAE's function
                                   with a second, full-rank linear map of f, that is a decoder that moves about twice as fast
    joint_nfm mlp                  the head on f V without the product: is it interaction, or capacity? As many parameters
    joint_nfm bilinear             a second projection, and no gate (`kernels.heads`)
    joint_nfm bilinear matched     the same with fewer interaction dimensions: as many parameters as joint_nfm, which joint_nfm
                                   without nonlinear matched has with more features
    topk                           TopK SAE of the same width
    topk doubled decoder rate      the same, each step of W_dec doubled: what the second decoder does to the learning rate
    topk matched                   as many parameters as joint_nfm
    topk matched folded            as many as joint_nfm has once its linear decoder is added to W_dec
    topk matched flops             as many FLOPs a training token as joint_nfm, see `training_flops`
    topk matched inference         as many FLOPs at inference as staged_topk with its refinements, see `inference_flops`
    staged_topk                    topk, its features chosen in stages; joint_nfm staged, joint_nfm square staged, ... likewise
    staged_topk matched            as many parameters as joint_nfm
    batchtopk, matryoshka          SAELens's, k active features on average
    matching_pursuit               SAELens's, one decoder both ways and k iterations. One that chooses a feature again adds to it,
                                   so that fewer than k can be active
    matching_pursuit matched       as many parameters as topk, which has twice as many of the same width
    standard, gated, jumprelu      SAELens's; a coefficient sets how sparse they are, so each is trained at several and its
                                   figures are interpolated (`interpolation_weights`)

Sources: arXiv 2507.00269; Gao et al. 2024 (TopK, arXiv 2406.04093); arXiv 2412.06410 (BatchTopK), 2503.17547 (Matryoshka),
2407.14435 (JumpReLU), 2404.16014 (gated), 2506.03093 (matching pursuit).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)

from sae_nfm.architectures import JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig, parameter_count
from sae_nfm.architectures.staged_step import sums_by_feature
from sae_nfm.comparison.config import refuse_unknown_arms
from sae_nfm.comparison.results import ArmName
from sae_nfm.kernels import BILINEAR, PAIRED, inference
from sae_nfm.kernels.heads import NONE
from sae_nfm.kernels.ranking import Gram
from sae_nfm.training import TrainingArm

ENCODED_TOGETHER = 2048
"""Tokens among which what is made once is divided where FLOPs are compared: a usual batch."""


@dataclass(frozen=True, kw_only=True)
class ArmSizes:
    """What all arms have in common."""

    d_in: int
    d_sae: int
    """Features of every arm but the matched ones."""
    k: int
    """Active features a token."""
    nfm_dim: int = 64
    """Interaction dimensions m of the joint arms."""
    nfm_top_k: int | None = None
    """How many of the strongest features their linear and interaction path read; None for all k."""
    nfm_dropout: float = 0.0
    """Dropout on the pooled interactions of the joint arms."""
    selection_stages: int = 4
    """Stages of the staged arms."""
    selection_candidates: int | None = None
    """Features among which their later stages choose; None for all."""
    refinement_steps: int = 0
    """Refinements that "topk matched inference" has as many FLOPs as; arms are trained without."""
    warm_up_steps: int = 0
    """Training steps over which the coefficients of standard, gated and jumprelu rise, and the threshold of batchtopk settles."""
    device: str = "cpu"
    """Device of the SAEs."""
    reshape_activations: Literal["none", "hook_z"] = "none"
    """SAELens's name for whether heads are flattened."""


def training_arms(
    names: Sequence[str], sizes: ArmSizes, coefficients: Mapping[str, Sequence[float]]
) -> dict[str, TrainingArm]:
    """The SAEs to train for these arms, by name: one each, or one for each coefficient.

    Raises:
        ValueError: for an arm that does not exist, or one that lacks its coefficients.
    """
    refuse_unknown_arms(names)
    arms = list[TrainingArm]()
    for name in dict.fromkeys(map(str, names)):
        make = WITH_COEFFICIENT.get(name)
        if make is None:
            rate = 2.0 if name == ArmName.DOUBLED else 1.0
            arms.append(TrainingArm(name=name, family=name, sae=WITH_K[name](sizes), decoder_rate=rate))
        elif not coefficients.get(name):
            raise ValueError(f"{name} has no coefficients; give at least two, one on each side of the wanted L0")
        else:
            arms += [
                TrainingArm(name=f"{name} {value:g}", family=name, sae=make(sizes, value), coefficient=value)
                for value in coefficients[name]
            ]
    return {arm.name: arm for arm in arms}


def is_rescaled(arm: TrainingArm) -> bool | None:
    """Whether activations are multiplied by decoder norms; None for an architecture without that choice."""
    return getattr(arm.sae, "rescale_acts_by_decoder_norm", None)


def rescaled(arm: TrainingArm, rescaling: bool) -> TrainingArm:
    """The arm with or without that, where it has the choice."""
    if is_rescaled(arm) in (None, rescaling):
        return arm
    return replace(arm, sae=replace(arm.sae, rescale_acts_by_decoder_norm=rescaling))


def matched_width(parameters: int, d_in: int) -> int:
    """Width S of the TopK SAE with that many parameters: 2 d S + S + d, so it misses them by (2 d + 1) / 2 at most."""
    return round((parameters - d_in) / (2 * d_in + 1))


def folded_parameter_count(cfg: JointNFMTrainingSAEConfig) -> int:
    """Parameters of a joint NFM-SAE once its linear path is folded into the decoder; a ValueError where it cannot be."""
    if not cfg.use_linear_path or cfg.nfm_top_k is not None:
        raise ValueError(
            "only a linear path that reads all features folds into W_dec; give use_linear_path, nfm_top_k=None"
        )
    return parameter_count(cfg) - (cfg.d_sae * cfg.d_in + cfg.d_in)


def training_flops(cfg: TrainingSAEConfig, l0: float | None = None, n_tokens: int = 1) -> float:
    """FLOPs of a training step for each of `n_tokens`, forward and backward, a multiplication and an addition counting as two.

    With a features active (k, or `l0`), of which the NFM reads n:

        encoder             2 d S + 2 a d                        all features are ranked; their weights get a gradient from
                                                                 the active ones
        each stage but one  2 d C + 6 b d + 2 c d                all are ranked again, or C candidates; what the b chosen before
                                                                 write, through all paths; its gradient from the c chosen now
        or, scores kept     2 q c S + 2 m S + 6 b d + 4 c d      where that is cheaper (`Gram.pays`): of q parts that have a row
                                                                 for each feature (2 with a square path), and m hidden units;
                                                                 once for all tokens 2 q d S^2 + 2 m d S
        R refinements       3 (3 R + 1) 2 a d                    as at inference, and twice that backward; through all paths
        matching pursuit    2 k d S + 12 k d + 6 a d             in place of these: k times all are ranked and one is taken off
        direct path         6 a d                                output, gradient of f, gradient of W_dec
        linear path         6 n d if n < a, else 0               reading the same f it shares W_dec's three products
        square path         6 a d
        pooling             12 n m, 6 n m ("mlp")                f V, and for "fm" f^2 V^2; f A and f B for "bilinear"
        head                6 m^2 + 6 m d, 6 m d ("bilinear")
        gated SAEs          6 a d + 2 a d                        the gate's own reconstruction

    Assumptions: decoding and all gradients touch active features alone, which SAELens's dense TopK does not do (it takes
    6 d S for decoding); Matryoshka's levels are cumulative sums of one decoding; the pooling of a registered head (`heads`) is
    not known and taken for that of "mlp"; left out are what a batch does once (Adam, norms, gradients of biases), selection and
    everything else element-wise, and the dead-feature loss.

    Raises:
        ValueError: when the number of active features is not known: no k sets it, and no l0 is given.
    """
    d, active = cfg.d_in, _active(cfg, l0)
    decoding = 3 * (_decoding(cfg, active) + _fitting(cfg, active, getattr(cfg, "refinement_steps", 0)))
    if isinstance(cfg, MatchingPursuitTrainingSAEConfig):
        return _iterations(cfg) * (2.0 * d * cfg.d_sae + 12 * d) + decoding
    flops = 2.0 * d * cfg.d_sae + 2 * active * d + decoding + _choosing(cfg, active, n_tokens, training=True)
    return flops + 8 * active * d * isinstance(cfg, GatedTrainingSAEConfig)


def inference_flops(
    cfg: TrainingSAEConfig, l0: float | None = None, refinement_steps: int = 0, n_tokens: int = 1
) -> float:
    """FLOPs of encoding and decoding each of `n_tokens` with an SAE that was trained so, counted as in `training_flops`.

    With D(a) what all paths take to decode a active features (2 a d of the direct one, n and m as there):

        encoder             2 d S
        each stage but one  2 d C + D(b)                         all are ranked again, or C candidates; b are chosen before
        or, scores kept     2 q c S + 2 m S + D(b) + 2 c d       as there, with what is made once for all tokens
        matching pursuit    k (2 d S + 4 d)                      in place of these
        each refinement     3 D(a)                               a vector-Jacobian and a Jacobian-vector product, and a decode
        decoder             D(a)                                 twice with refinements: their first error is that of a decode

    Raises:
        ValueError: when the number of active features is not known: no k sets it, and no l0 is given.
    """
    d, active = cfg.d_in, _active(cfg, l0)
    decoding = _decoding(cfg, active) + _fitting(cfg, active, refinement_steps)
    if isinstance(cfg, MatchingPursuitTrainingSAEConfig):
        return _iterations(cfg) * (2.0 * d * cfg.d_sae + 4 * d) + decoding
    return 2.0 * d * cfg.d_sae + decoding + _choosing(cfg, active, n_tokens, training=False)


def _active(cfg: TrainingSAEConfig, l0: float | None) -> float:
    active = float(getattr(cfg, "k", None) or 0) or l0
    if not active:
        raise ValueError(f"no k sets the L0 of a {cfg.architecture()} SAE; give the measured one")
    return active


def _iterations(cfg: MatchingPursuitTrainingSAEConfig) -> int:
    return cfg.max_iterations or cfg.d_in


def _decoding(cfg: TrainingSAEConfig, active: float) -> float:
    """FLOPs of all paths for so many active features; a training step takes three times as many."""
    d, flops = cfg.d_in, 2.0 * active * cfg.d_in
    if isinstance(cfg, JointNFMTrainingSAEConfig):
        n, m = active if cfg.nfm_top_k is None else min(active, cfg.nfm_top_k), cfg.nfm_dim
        flops += 2 * n * d * (cfg.use_linear_path and n < active) + 2 * active * d * cfg.use_square_path
        if cfg.head != "none":
            flops += (4 if cfg.head in PAIRED else 2) * n * m + 2 * m * m * (cfg.head != BILINEAR) + 2 * m * d
    return flops


def _fitting(cfg: TrainingSAEConfig, active: float, steps: int) -> float:
    """FLOPs of so many refinements, and of the error that they begin with."""
    return _decoding(cfg, active) * (3 * steps + (steps > 0))


def _choosing(cfg: TrainingSAEConfig, active: float, n_tokens: int, *, training: bool) -> float:
    """FLOPs of the stages after the first."""
    stages = getattr(cfg, "selection_stages", 1)
    if stages == 1:
        return 0.0
    d, S, sizes = cfg.d_in, cfg.d_sae, inference.stage_sizes(int(active), stages)
    candidates, with_rows, m = getattr(cfg, "selection_candidates", None), 1, 0
    if isinstance(cfg, JointNFMTrainingSAEConfig):
        with_rows, m = sums_by_feature(cfg, int(active)), cfg.nfm_dim * (cfg.head != "none")
    kept = candidates is None and Gram.pays(n_tokens, S, with_rows, stages)
    flops, chosen = (2.0 * with_rows * d * S**2 + 2 * m * d * S) / n_tokens if kept else 0.0, 0
    for before, size in itertools.pairwise(sizes):
        chosen += before
        flops += 2.0 * with_rows * before * S + 2 * m * S + 2 * size * d if kept else 2.0 * d * (candidates or S)
        flops += (3 if training else 1) * _decoding(cfg, chosen) + 2 * size * d * training
    return flops


def flop_matched_width(cfg: JointNFMTrainingSAEConfig) -> int:
    """Width of the TopK SAE of the same d_in and k that takes as many FLOPs, short of d_in of them at most."""
    return round((training_flops(cfg) - 8 * cfg.k * cfg.d_in) / (2 * cfg.d_in))


def inference_matched_width(cfg: TrainingSAEConfig, refinement_steps: int) -> int:
    """Width of the TopK SAE that takes as many FLOPs at inference as this one with its refinements, likewise."""
    flops = inference_flops(cfg, refinement_steps=refinement_steps, n_tokens=ENCODED_TOGETHER)
    return round((flops - 2 * _active(cfg, None) * cfg.d_in) / (2 * cfg.d_in))


def interpolation_weights(l0s: Sequence[float], target: float) -> list[float] | None:
    """Weights of SAEs at these L0s that interpolate at `target`, linearly in log L0 between its two neighbours.

    Figures and sums over tokens are interpolated with the same weights. None where the target lies outside: not reached.
    """
    order = sorted(range(len(l0s)), key=lambda i: l0s[i])
    for low, high in itertools.pairwise(order):
        if 0 < l0s[low] <= target <= l0s[high]:
            span = math.log(l0s[high]) - math.log(l0s[low])
            share = 0.0 if span == 0 else (math.log(target) - math.log(l0s[low])) / span
            weights = [0.0] * len(l0s)
            weights[low], weights[high] = 1 - share, share
            return weights
    return None


def _shared(sizes: ArmSizes) -> dict[str, Any]:
    names = ("d_in", "d_sae", "device", "reshape_activations")
    return {name: getattr(sizes, name) for name in names} | {"normalize_activations": "expected_average_only_in"}


def _joint(sizes: ArmSizes, **changes: Any) -> JointNFMTrainingSAEConfig:
    nfm = {name: getattr(sizes, name) for name in ("k", "nfm_dim", "nfm_top_k", "nfm_dropout")}
    return JointNFMTrainingSAEConfig(**(_shared(sizes) | nfm | changes))


def _square(sizes: ArmSizes, **changes: Any) -> JointNFMTrainingSAEConfig:
    scale = (sizes.d_in / sizes.k) ** 0.5
    return _joint(sizes, use_linear_path=False, use_square_path=True, square_scale=scale, **changes)


def _bilinear(sizes: ArmSizes, **changes: Any) -> JointNFMTrainingSAEConfig:
    return _joint(sizes, head=BILINEAR, **changes)


def _bilinear_matched(sizes: ArmSizes, **changes: Any) -> JointNFMTrainingSAEConfig:
    """With as many interaction dimensions as joint_nfm's parameters suffice for, rounded: short of d_sae + d_in / 2 at most."""
    without, one = (parameter_count(_bilinear(sizes, nfm_dim=m)) for m in (1, 2))
    m = 1 + round((parameter_count(_joint(sizes)) - without) / (one - without))
    return _bilinear(sizes, nfm_dim=max(1, m), **changes)


def _linear_matched(sizes: ArmSizes, **changes: Any) -> JointNFMTrainingSAEConfig:
    """Without the interaction path, and as many features as joint_nfm's parameters suffice for: 3 d S + S + 2 d."""
    d_sae = round((parameter_count(_joint(sizes)) - 2 * sizes.d_in) / (3 * sizes.d_in + 1))
    return _joint(sizes, head=NONE, d_sae=d_sae, **changes)


def _topk(sizes: ArmSizes, d_sae: int | None = None) -> TopKTrainingSAEConfig:
    return replace(TopKTrainingSAEConfig(**_shared(sizes), k=sizes.k), d_sae=d_sae or sizes.d_sae)


def _stages(sizes: ArmSizes) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in ("selection_stages", "selection_candidates")}


def _staged(sizes: ArmSizes, d_sae: int | None = None) -> StagedTopKTrainingSAEConfig:
    same: dict[str, Any] = _shared(sizes) | _stages(sizes) | {"d_sae": d_sae or sizes.d_sae}
    return StagedTopKTrainingSAEConfig(**same, k=sizes.k)


def _as_joint(sizes: ArmSizes) -> int:
    """Width with as many parameters as joint_nfm; joint_nfm square has d_in fewer, half a feature's."""
    return matched_width(parameter_count(_joint(sizes)), sizes.d_in)


def _batch_topk(sizes: ArmSizes) -> dict[str, Any]:
    """At inference these SAEs have a threshold, a running mean that begins at 0. With SAELens's rate of 0.01 it is 14 % too low
    after 195 steps, and L0 above k; here it follows within the steps of the warm-up.
    """
    rate = max(0.01, 1 / max(1, sizes.warm_up_steps))
    return {**_shared(sizes), "k": float(sizes.k), "topk_threshold_lr": rate}


def _matryoshka(sizes: ArmSizes) -> MatryoshkaBatchTopKTrainingSAEConfig:
    widths = sorted({max(1, sizes.d_sae // part) for part in (8, 4, 2, 1)})
    return MatryoshkaBatchTopKTrainingSAEConfig(**_batch_topk(sizes), matryoshka_widths=widths)


def _matching_pursuit(sizes: ArmSizes) -> MatchingPursuitTrainingSAEConfig:
    """With the norm that SAELens asks of its initial decoder."""
    return MatchingPursuitTrainingSAEConfig(**_shared(sizes), decoder_init_norm=1.0, max_iterations=sizes.k)


def _pursuit_width(sizes: ArmSizes) -> int:
    d_in, d_sae = sizes.d_in, sizes.d_sae
    return round((2 * d_in * d_sae + d_sae) / d_in)  # both have b_dec


def _l1(sizes: ArmSizes, l1: float) -> dict[str, Any]:
    return _shared(sizes) | {"l1_coefficient": l1, "l1_warm_up_steps": sizes.warm_up_steps}


def _jumprelu(sizes: ArmSizes, l0: float) -> JumpReLUTrainingSAEConfig:
    """With SAELens's options for Anthropic's form of the loss, in which the encoder learns from the sparsity loss too.

    With SAELens's defaults the thresholds alone do, by a learning rate a step at most, and in a few hundred steps no coefficient
    set an L0: 0.3, 1 and 3 gave 70, 64 and 79 (400,000 embedded tokens, k 32, rate 5e-3); here they gave 34, 14 and 6 (200,000).
    """
    return JumpReLUTrainingSAEConfig(
        **_shared(sizes),
        jumprelu_sparsity_loss_mode="tanh",
        jumprelu_ste_to_input=True,
        jumprelu_bandwidth=2.0,
        jumprelu_init_threshold=0.1,
        pre_act_loss_coefficient=3e-6,
        l0_coefficient=l0,
        l0_warm_up_steps=sizes.warm_up_steps,
    )


WITH_K: dict[str, Callable[[ArmSizes], TrainingSAEConfig]] = {
    ArmName.JOINT: _joint,
    ArmName.HALF: lambda sizes: _joint(sizes, nfm_top_k=max(1, sizes.k // 2)),
    ArmName.SQUARE: _square,
    ArmName.WITHOUT_LINEAR: lambda sizes: _joint(sizes, use_linear_path=False),
    ArmName.WITHOUT_NONLINEAR: lambda sizes: _joint(sizes, head=NONE),
    ArmName.WITHOUT_NONLINEAR_MATCHED: _linear_matched,
    ArmName.MLP: lambda sizes: _joint(sizes, head="mlp"),
    ArmName.BILINEAR: _bilinear,
    ArmName.BILINEAR_MATCHED: _bilinear_matched,
    ArmName.JOINT_STAGED: lambda sizes: _joint(sizes, **_stages(sizes)),
    ArmName.SQUARE_STAGED: lambda sizes: _square(sizes, **_stages(sizes)),
    ArmName.WITHOUT_NONLINEAR_STAGED: lambda sizes: _joint(sizes, head=NONE, **_stages(sizes)),
    ArmName.WITHOUT_NONLINEAR_STAGED_MATCHED: lambda sizes: _linear_matched(sizes, **_stages(sizes)),
    ArmName.MLP_STAGED: lambda sizes: _joint(sizes, head="mlp", **_stages(sizes)),
    ArmName.BILINEAR_STAGED: lambda sizes: _bilinear(sizes, **_stages(sizes)),
    ArmName.BILINEAR_STAGED_MATCHED: lambda sizes: _bilinear_matched(sizes, **_stages(sizes)),
    ArmName.TOPK: _topk,
    ArmName.DOUBLED: _topk,
    ArmName.MATCHED: lambda sizes: _topk(sizes, _as_joint(sizes)),
    ArmName.MATCHED_FOLDED: lambda sizes: _topk(
        sizes, matched_width(folded_parameter_count(_joint(sizes)), sizes.d_in)
    ),
    ArmName.MATCHED_FLOPS: lambda sizes: _topk(sizes, flop_matched_width(_joint(sizes))),
    ArmName.MATCHED_INFERENCE: lambda sizes: _topk(
        sizes, inference_matched_width(_staged(sizes), sizes.refinement_steps)
    ),
    ArmName.STAGED: _staged,
    ArmName.STAGED_MATCHED: lambda sizes: _staged(sizes, _as_joint(sizes)),
    ArmName.BATCHTOPK: lambda sizes: BatchTopKTrainingSAEConfig(**_batch_topk(sizes)),
    ArmName.MATRYOSHKA: _matryoshka,
    ArmName.MATCHING_PURSUIT: _matching_pursuit,
    ArmName.MATCHING_PURSUIT_MATCHED: lambda sizes: replace(_matching_pursuit(sizes), d_sae=_pursuit_width(sizes)),
}
"""Arms whose L0 is k, on average or at most."""
WITH_COEFFICIENT: dict[str, Callable[[ArmSizes, float], TrainingSAEConfig]] = {
    ArmName.STANDARD: lambda sizes, l1: StandardTrainingSAEConfig(**_l1(sizes, l1)),
    ArmName.GATED: lambda sizes, l1: GatedTrainingSAEConfig(**_l1(sizes, l1)),
    ArmName.JUMPRELU: _jumprelu,
}
"""Arms whose L0 a coefficient sets."""
