"""What secondary SAEs reconstruct, and what replacing an activation by its reconstruction does, on held-out tokens.

    explained   1 - sum |h - h_hat|^2 / sum |h - mean|^2
    FVU         the same ratio of the primary's output, against its input x and against its output x_hat as it is

All replacements are within one primary at one hook point, whose input no replacement changes: the figures of reconstructions are
computed on activations read once, KL and cross-entropy are of the spliced model (`evaluation.measure`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_nfm.analysis import CELLS, read_activations
from sae_nfm.architectures import HIDDEN
from sae_nfm.common import ShortRepr
from sae_nfm.data import TokenRows
from sae_nfm.evaluation import measure, read_rows
from sae_nfm.experiments.secondary.results import MEAN, PRIMARY, ZERO, Reconstruction, SecondaryRow
from sae_nfm.experiments.secondary.training import CODES, HOOKS, TrainedSecondary, permuted
from sae_nfm.interventions import Intervention, SecondarySplice, Splice, Substitution, path_means
from sae_nfm.loading import digest
from sae_nfm.models import LanguageModel, keeping, reconstruction
from sae_nfm.stats import Bootstrap, Estimate, clustered_mean, mean_difference, paired_by_token, ratio_of_means


@dataclass(frozen=True, kw_only=True, repr=False)
class Passing(ShortRepr):
    """What passes through a primary on held-out tokens, and whose the tokens are."""

    x: Float[Tensor, "tokens d_in"]
    """What the primary reads."""
    x_hat: Float[Tensor, "tokens d_in"]
    """Its output as it is."""
    at: dict[str, Float[Tensor, "tokens width"]]
    documents: Int[Tensor, " tokens"]


def replaced(primary: SAE[Any], at: str, by: SAE[Any]) -> tuple[Substitution, Callable[[Tensor], Tensor]]:
    """A primary in which what passes through a hook point is replaced by an SAE's reconstruction: in a model, and by itself."""

    def replace_value(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return reconstruction(by, value, {}).to(value.dtype)

    def reconstruct(x: Tensor) -> Tensor:
        return reconstruction(primary, x, {at: replace_value})

    state = digest(dict(primary.state_dict()) | {f"by.{k}": v for k, v in by.state_dict().items()})
    in_model = Substitution(
        at=str(primary.cfg.metadata.hook_name),
        head=primary.cfg.metadata.hook_head_index,
        function=lambda x, context: reconstruct(x),  # noqa: ARG005
        description=f"SAE whose {at} another reconstructs, {state}",
    )
    return in_model, reconstruct


@torch.no_grad()
def secondary_rows(
    model: LanguageModel,
    primary: SAE[Any],
    trained: Sequence[TrainedSecondary],
    rows: TokenRows,
    fitted: TokenRows,
    folder: Path,
    *,
    seed: int,
) -> tuple[SecondaryRow, ...]:
    """A row for the primary as it is, its hidden code by mean (over `fitted`) and by zero, and for each SAE.

    The folder is for the rows of `evaluation.measure`; the seed is of the permutation and of intervals.
    """
    mean = path_means(model, primary, fitted.tokens, [HIDDEN])
    splices = {
        PRIMARY: Splice(sae=primary),
        MEAN: Splice(sae=primary, ablated=mean),
        ZERO: Splice(sae=primary, ablated={HIDDEN: None}),
    }
    outputs: dict[str, Callable[[Tensor], Tensor]] = {name: _reconstruct(one) for name, one in splices.items()}
    arms: dict[str, Intervention] = dict(splices)
    for one in trained:
        if one.trained_on in CODES:
            arms[one.name] = spliced = SecondarySplice(sae=primary, secondary=one.sae)
            outputs[one.name] = _reconstruct(spliced)
        else:
            arms[one.name], outputs[one.name] = replaced(primary, HOOKS[one.trained_on], one.sae)
    measure(model, rows, arms, folder, seed=seed)
    passing = read_passing(model, primary, rows, sorted({HOOKS[one.trained_on] for one in trained}))
    bootstrap, by_name, found = Bootstrap(seed=seed), {one.name: one for one in trained}, list[SecondaryRow]()

    def mean_of(arm: str, column: str) -> Estimate:
        read = read_rows(folder, ["document", column], [arm]).dropna()
        return clustered_mean(read[column].to_numpy(), read["document"].to_numpy(), bootstrap=bootstrap)

    def rise(arm: str, column: str) -> Estimate:
        columns = ["document", "row", "position", "arm", column]
        pairs = paired_by_token(read_rows(folder, columns, [arm, PRIMARY]), column, arm=arm, against=PRIMARY)
        return mean_difference(pairs.a, pairs.b, pairs.documents, bootstrap=bootstrap)

    for name, output in outputs.items():
        x_hat = _in_parts(output, passing.x, primary.cfg.d_sae)
        found.append(
            SecondaryRow(
                name=name,
                sae=_fitted(by_name[name], passing, seed) if name in by_name else None,
                fvu_x=fvu(passing.x, x_hat, passing.documents),
                fvu_x_hat=fvu(passing.x_hat, x_hat, passing.documents),
                kl_nats=mean_of(name, "kl_nats"),
                kl_rise=rise(name, "kl_nats"),
                ce_delta_nats=mean_of(name, "ce_delta_nats"),
            )
        )
    return tuple(found)


@torch.no_grad()
def read_passing(model: LanguageModel, primary: SAE[Any], rows: TokenRows, names: Sequence[str]) -> Passing:
    """What passes through hook points of a primary on the counted tokens of some rows."""
    x, documents = read_activations(model, primary, rows.tokens, rows.documents)
    assert documents is not None
    parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def output(part: Tensor) -> Tensor:
        seen = dict[str, Tensor]()
        made = reconstruction(primary, part, {name: keeping(seen, name) for name in names})
        for name in names:
            parts[name].append(seen[name])
        return made

    x_hat = _in_parts(output, x, primary.cfg.d_sae)
    return Passing(x=x, x_hat=x_hat, at={name: torch.cat(part) for name, part in parts.items()}, documents=documents)


def explained(
    target: Float[Tensor, "tokens width"], made: Float[Tensor, "tokens width"], documents: Int[Tensor, " tokens"]
) -> Estimate:
    """Fraction of variance explained, about the mean over all tokens, with an interval over documents."""
    unexplained = fvu(target, made, documents)
    return replace(unexplained.complement(), test=f"1 - FVU: {unexplained.test}")


def fvu(
    target: Float[Tensor, "tokens width"], made: Float[Tensor, "tokens width"], documents: Int[Tensor, " tokens"]
) -> Estimate:
    """Fraction of variance unexplained, about the mean over all tokens, with an interval over documents."""
    target, made = target.detach().double(), made.detach().double()
    errors, deviations = ((target - one).square().sum(-1).cpu().numpy() for one in (made, target.mean(0)))
    return ratio_of_means(errors, deviations, documents.cpu().numpy())


def _fitted(one: TrainedSecondary, passing: Passing, seed: int) -> Reconstruction:
    target = passing.at[HOOKS[one.trained_on]]
    own, true = _explained_by(one.sae, target, passing.documents), None
    if one.trained_on == "permuted hidden code":
        everyone = torch.ones(len(target), dtype=torch.bool, device=target.device)
        dealt = permuted(target, everyone, torch.Generator().manual_seed(seed))
        true, own = own, _explained_by(one.sae, dealt, torch.arange(len(target)))
    active = _in_parts(lambda part: (one.sae.encode(part) != 0).sum(-1), target, one.sae.cfg.d_sae)
    return Reconstruction(
        trained_on=one.trained_on,
        d_in=one.sae.cfg.d_in,
        d_sae=one.sae.cfg.d_sae,
        k=one.k,
        l0=float(active.double().mean()),
        dead=one.sae.cfg.metadata.num_dead_features,
        explained=own,
        explained_true=true,
    )


def _reconstruct(arm: Splice) -> Callable[[Tensor], Tensor]:
    return lambda x: arm.reconstruct(x[None])[0]


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor, d_sae: int) -> Tensor:
    return torch.cat([function(part) for part in x.split(max(1, CELLS // d_sae))])


def _explained_by(sae: SAE[Any], target: Tensor, documents: Tensor) -> Estimate:
    return explained(target, _in_parts(lambda part: reconstruction(sae, part, {}), target, sae.cfg.d_sae), documents)
