"""What the paper reports of sequential training: an NFM on the residual of a frozen SAE, beside the arms of a comparison.

The base is the comparison's "topk" SAE. On the same tokens in the same order, with the joint arm's NFM and learning rate, two
are trained at once (`matched_training`: interrupted, they go on; finished, they are taken as they are):

    sequential                      linear and interaction path
    sequential without nonlinear    linear path alone: is it interaction?

Source: arXiv 2507.00269 (sequential training); the controls are this package's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor

from sae_nfm.analysis import linear_part
from sae_nfm.architectures import SequentialNFMTrainingSAEConfig
from sae_nfm.comparison import ablations
from sae_nfm.comparison.results import ArmName, Paths
from sae_nfm.data import TokenRows
from sae_nfm.evaluation import error_ratios
from sae_nfm.experiments.reproduce import published
from sae_nfm.experiments.reproduce.published import Unit
from sae_nfm.experiments.reproduce.results import NoVerdict, ReproducedRow, Section, reproduced_row
from sae_nfm.experiments.reproduce.rows import Behaviour, keeping_means
from sae_nfm.interventions import UNDER_TEST, Activations, Intervention, Splice, control_arms, path_means
from sae_nfm.interventions.results import ArmRole, Role
from sae_nfm.kernels import SparseActs, sparse_acts_from_dense
from sae_nfm.models import LanguageModel, keeping, reconstruction
from sae_nfm.stats import Bootstrap, Estimate, ratio_of_means
from sae_nfm.training import StreamConfig, Trained, TrainingArm, train_arms

BASE, SEQUENTIAL, ADAPTER = "topk", "sequential", "sequential without nonlinear"
AT_EQUAL_DISTANCE = ("isotropic", "covariance", "covariance mixture")
"""Errors of the same size that the sequential one is compared with; the first is the published one."""
CUT = "the paper's SAE alone was cut to its top 250 features, this one is whole"
CHUNK = 4_096
"""Tokens at a time where features are dense."""


def train_sequential(
    folder: Path, model: HookedSAETransformer, dataset: Any, output: Path, device: str
) -> dict[str, SAE[Any]]:
    """Train both on the base of one seed of a comparison, where they are not finished, and load them.

    Args:
        folder: the comparison's, of one k and seed.
        model: the language model.
        dataset: the training data in the order of the seed.
        output: where they go.
        device: of the SAEs.

    Raises:
        ValueError: when there are others in `output`, trained otherwise.
    """
    base, joint = (Trained.load(folder / name).settings for name in (BASE, ArmName.JOINT))
    stream = StreamConfig(**{f.name: base[f.name] for f in fields(StreamConfig) if f.name in base})
    nfm: dict[str, Any] = {name: joint[name] for name in ("nfm_dim", "nfm_top_k", "nfm_dropout")}
    nfm |= {"base": str((folder / BASE).resolve()), "device": device}
    saes = {
        SEQUENTIAL: SequentialNFMTrainingSAEConfig(**nfm),
        ADAPTER: SequentialNFMTrainingSAEConfig(**nfm, head="none"),
    }
    arms = {name: TrainingArm(name=name, family=name, sae=sae) for name, sae in saes.items()}
    rates = {name: float(joint["learning_rate"]) for name in arms}
    train_arms(stream, arms, rates, model, dataset, output)
    return {name: SAE.load_from_disk(output / name, device=device).eval() for name in arms}


def sequential_arms(
    model: LanguageModel, saes: Mapping[str, SAE[Any]], fitted: TokenRows, activations: Activations
) -> dict[str, Intervention]:
    """What is measured of them: whole, paths ablated by zero and by mean, random vectors at equal distance.

    Args:
        model: the language model.
        saes: from `train_sequential`.
        fitted: text for means, not evaluated on.
        activations: mean and covariance on that text.
    """
    whole = Splice(sae=saes[SEQUENTIAL])
    random = control_arms(whole, activations, scales=(), of=SEQUENTIAL)
    arms: dict[str, Intervention] = {SEQUENTIAL: random[UNDER_TEST], ADAPTER: Splice(sae=saes[ADAPTER])}
    parts = ablations(whole.sae)
    means = path_means(model, whole.sae, fitted.tokens, parts[Paths.DIRECT])
    for paths, off in parts.items():
        name, kept = paths.of(SEQUENTIAL), keeping_means(paths)
        arms[name] = part(whole.sae, SEQUENTIAL, paths, dict.fromkeys(off))
        arms[keeping_means(name)] = part(whole.sae, SEQUENTIAL, kept, {hook: means[hook] for hook in off})
    return arms | {f"{SEQUENTIAL}: {name}": random[name] for name in AT_EQUAL_DISTANCE}


def part(sae: SAE[Any], of: str, name: str, ablated: Mapping[str, Tensor | None]) -> Splice:
    """An SAE with some of its paths ablated, and its role as a part of the SAE of that name."""
    return Splice(sae=sae, ablated=ablated, role=ArmRole(role=Role.PART, of=of, name=str(name)))


@dataclass(frozen=True, kw_only=True)
class WrittenShares:
    """Parts of the two paths in what an NFM writes, with intervals over documents."""

    magnitude: Estimate
    """Linear path: its mean absolute value over the sum of both, the published measure."""
    energy: Estimate
    """Linear path: its energy about the mean over the sum of both."""
    nonlinear_magnitude: Estimate
    """Interaction path: as `magnitude`."""
    nonlinear_energy: Estimate
    """Interaction path: as `energy`."""
    nonlinear_residual: Estimate
    """What of the interaction path is not linear in the features (held-out regression), over the energies of both."""


@torch.no_grad()
def written_shares(
    sae: SAE[Any], x: Float[Tensor, "tokens d_in"], documents: Int[Tensor, " tokens"], *, seed: int
) -> WrittenShares:
    """Shares of a sequential SAE on activations, as `functional.read_activations` returns them.

    Raises:
        ValueError: for fewer than 6 documents.
    """
    acts, linear, nonlinear = _written(sae, x)
    labels, bootstrap = documents.cpu().numpy(), Bootstrap(seed=seed)

    def share(one: Tensor, other: Tensor) -> Estimate:
        return ratio_of_means(one.cpu().numpy(), (one + other).cpu().numpy(), labels, bootstrap=bootstrap)

    sizes = [path.abs().double().mean(-1) for path in (linear, nonlinear)]
    energies = [(path - path.mean(0)).double().square().sum(-1) for path in (linear, nonlinear)]
    part = linear_part(acts, nonlinear, sae.cfg.d_sae, seed=seed, documents=documents)
    test = part.test_tokens.numpy()
    return WrittenShares(
        magnitude=share(sizes[0], sizes[1]),
        energy=share(energies[0], energies[1]),
        nonlinear_magnitude=share(sizes[1], sizes[0]),
        nonlinear_energy=share(energies[1], energies[0]),
        nonlinear_residual=ratio_of_means(
            part.squared_error.numpy(),
            (energies[0] + energies[1]).cpu().numpy()[test],
            labels[test],
            bootstrap=bootstrap,
        ),
    )


def _written(sae: SAE[Any], x: Float[Tensor, "tokens d_in"]) -> tuple[SparseActs, Tensor, Tensor]:
    """Features, and what the linear and the interaction path write, [tokens, d_in]."""
    parts: list[tuple[SparseActs, Tensor, Tensor]] = []
    k = int(sae.cfg.base_config["k"])
    for chunk in x.split(CHUNK):
        seen: dict[str, Tensor] = {}
        at = ("hook_sae_acts_post", "hook_nfm_linear", "hook_nfm_interaction")
        reconstruction(sae, chunk, {name: keeping(seen, name) for name in at})
        acts = sparse_acts_from_dense(seen[at[0]].to_dense(), k)
        assert acts is not None, "a TopK base gave a negative feature, or more than k"
        parts.append((acts, seen[at[1]].float(), seen[at[2]].float()))
    acts, linear, nonlinear = zip(*parts, strict=True)
    joined = SparseActs(torch.cat([one.indices for one in acts]), torch.cat([one.values for one in acts]))
    return joined, torch.cat(linear), torch.cat(nonlinear)


def sequential_rows(behaviour: Behaviour, shares: WrittenShares) -> list[ReproducedRow]:
    """Every published statistic of sequential training, once for each control."""
    linear, nonlinear = published.SEQUENTIAL_LINEAR, published.SEQUENTIAL_NONLINEAR
    of_both = "energy about the mean"
    residual = f"{of_both}, less what is linear in f (held out)"
    return [
        *_against_base(behaviour, published.SEQUENTIAL_ERROR, "error_energy"),
        *_against_base(behaviour, published.SEQUENTIAL_KL, "kl_nats"),
        *_parts(behaviour, published.SEQUENTIAL_KL),
        _row(linear, shares.magnitude, shares.energy, of_both),
        _row(nonlinear, shares.nonlinear_magnitude, shares.nonlinear_energy, of_both),
        _row(nonlinear, shares.nonlinear_magnitude, shares.nonlinear_residual, residual),
        *_errors(behaviour),
    ]


def rows_without_base(reason: str) -> list[ReproducedRow]:
    """The published statistics, not measured, with the reason."""
    return [_row(name, None, None, reason, verdict=NoVerdict.NOT_MEASURED) for name in published.SEQUENTIAL]


def _against_base(behaviour: Behaviour, name: str, column: str) -> Iterator[ReproducedRow]:
    here = behaviour.change(column, SEQUENTIAL, BASE)
    matched = (
        "against a TopK SAE with as many parameters, trained on its own; base and NFM saw the tokens once each, it once"
    )
    if ArmName.MATCHED not in behaviour.arms:
        matched += ": there is none here"
    direct = keeping_means(Paths.DIRECT.of(SEQUENTIAL))
    controls: dict[str, tuple[str, str]] = {
        matched: (SEQUENTIAL, ArmName.MATCHED),
        f"against the SAE and the mean of what its NFM writes; {CUT}": (SEQUENTIAL, direct),
        "an NFM of a linear path alone, trained likewise, against the SAE alone": (ADAPTER, BASE),
        "against that linear NFM: what the interaction path is worth": (SEQUENTIAL, ADAPTER),
    }
    for control, (arm, against) in controls.items():
        yield _row(name, here, behaviour.change(column, arm, against), control)


def _parts(behaviour: Behaviour, name: str) -> Iterator[ReproducedRow]:
    """Either path by itself, of which the paper says nothing for sequential training."""
    alone = Paths.DIRECT.of(SEQUENTIAL)
    for paths, word in ((Paths.LINEAR, "linear"), (Paths.NONLINEAR, "nonlinear")):
        arm = paths.of(SEQUENTIAL)
        here = behaviour.change("kl_nats", arm, alone)
        kept = behaviour.change("kl_nats", keeping_means(arm), keeping_means(alone))
        control = "ablated paths write their mean over other text, in place of zero"
        yield _row(f"{name}, {word}", here, kept, control, unit=Unit.CHANGE)


def _errors(behaviour: Behaviour) -> Iterator[ReproducedRow]:
    arms = [f"{SEQUENTIAL}: {name}" for name in AT_EQUAL_DISTANCE]
    ratios = error_ratios(behaviour.folder, SEQUENTIAL, arms, bootstrap=behaviour.bootstrap)
    for arm, control in zip(arms[1:], AT_EQUAL_DISTANCE[1:], strict=True):
        yield _row(published.SEQUENTIAL_RATIO, ratios[arms[0]], ratios[arm], f"at the same distance: {control}")


def _row(name: str, here: Estimate | None, controlled: Estimate | None, control: str, **more: Any) -> ReproducedRow:
    return reproduced_row(Section.SEQUENTIAL, name, here, controlled, control, **more)
