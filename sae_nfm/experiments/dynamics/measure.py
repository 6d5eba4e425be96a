"""Checkpoints of one training run: their SAEs, and their statistics feature by feature and from one to another.

Weights of a checkpoint are for inputs that the trainer has normalised, by what stands in activation_scaler.json beside them;
that is folded in, so that all checkpoints of a run, and the SAE it ended with, are in one unit.

Shares: energies (`FeatureEnergies`) are sums over tokens, so those of a text are the sums of its documents'. Documents are
assigned to groups, and a statistic over all tokens is compared with those without each group:

    SE^2 = (G - 1)/G sum_g (s_(-g) - s)^2        s: over all tokens, s_(-g): without group g      (delete-a-group jackknife)

Transitions: features that pass from one third of the integration shares to another between two checkpoints. Thirds are divided
in two ways: at the same shares for all checkpoints (tertiles of all features at all checkpoints), so that a shift of all shares
shows, and at each checkpoint's own tertiles, so that only a change of order does. The null permutes the features of the later
checkpoint: how many are in each third stays, which ones does not. Tables with these margins are then all there is to draw from.

Source: the shares are those of arXiv 2507.00269, taken on tokens; Kott 2001, J. Official Statistics 17:521 (the jackknife);
Patefield 1981, Applied Statistics 30:91 (random tables with given margins, by scipy).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME
from scipy import stats
from torch import Tensor

from sae_nfm.analysis import FeatureEnergies, feature_energies, gauge, token_paths, varies
from sae_nfm.architectures import UNFOLDED
from sae_nfm.common import ShortRepr, reading
from sae_nfm.convert import FETCH_ANEW, fold_normalisation, read_json
from sae_nfm.experiments.dynamics.results import (
    CANONICAL,
    QUANTITIES,
    RAW,
    CheckpointRow,
    Counted,
    Movement,
    Transitions,
)
from sae_nfm.loading import check_folder
from sae_nfm.stats import Estimate, Floats, StudentT, interval
from sae_nfm.training import other_run

RUN, REFERENCE = "joint_nfm", "topk"
"""Architectures of a run and of its reference, by which they are named in results."""
PATHS = ("direct", "linear", "nonlinear", "square")
GROUPS = 40
"""Groups of documents, at most."""
_PER_TOKEN, _PER_ACTIVE = ("second_moment", "read_second_moment"), PATHS
FINAL = "final_"
"""Begins the name of the checkpoint that --save_final_checkpoint leaves."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a run."""

    tokens: int
    folder: Path


def checkpoints_of_run(path: str | Path) -> list[Checkpoint]:
    """The checkpoints of a run, by tokens: folders named by these (in SAELens's `<checkpoint_path>/<id>`), at any depth.

    Raises:
        FileNotFoundError: when there is no such folder, or it has fewer than two checkpoints.
        ValueError: when it has those of several runs, in folders of their own or in one.
    """
    found = [
        Checkpoint(tokens=int(tokens), folder=file.parent)
        for file in sorted(Path(path).glob(f"**/{SAE_CFG_FILENAME}"))
        if (tokens := file.parent.name.removeprefix(FINAL)).isdigit()
    ]
    runs = sorted({str(one.folder.parent) for one in found})
    if len(runs) > 1:
        raise ValueError(f"{str(path)!r} has the checkpoints of {len(runs)} runs; give one of {', '.join(runs[:4])}")
    by_tokens = {one.tokens: one for one in found}  # the final one, where another has as many tokens
    if len(by_tokens) < 2:
        raise FileNotFoundError(
            f"{str(path)!r} has {len(by_tokens)} checkpoints of an SAE, and at least 2 are needed; train with "
            "--n_checkpoints, and give the folder whose folders are named by tokens, such as checkpoints/<id>"
        )
    ordered = [by_tokens[tokens] for tokens in sorted(by_tokens)]
    for one in ordered[1:]:
        difference = other_run(ordered[0].folder, one.folder)
        if difference is not None:
            raise ValueError(
                f"{one.folder} is of another run than {ordered[0].folder}: {difference.name} is {difference.given!r} there, and "
                f"{difference.saved!r} here; give a folder with the checkpoints of one run"
            )
    return ordered


def load_checkpoint(checkpoint: Checkpoint, architecture: str = RUN, device: str = "cpu") -> SAE[Any]:
    """The SAE of a checkpoint, its normalisation folded in.

    Raises:
        ValueError, FileNotFoundError: for another architecture than the wanted one, or a damaged or missing file.
    """
    folder = checkpoint.folder
    check_folder(folder)
    found = read_json(folder / SAE_CFG_FILENAME).get("architecture")
    if found != architecture:
        raise ValueError(f"{str(folder)!r} is a checkpoint of a {found} SAE; give those of a {architecture} one")
    with reading(folder, "a checkpoint that loads", remedy=FETCH_ANEW):
        sae = SAE.load_from_disk(folder, device=device).eval()
    if sae.cfg.normalize_activations in UNFOLDED:
        fold_normalisation(sae, folder / ACTIVATION_SCALER_CFG_FILENAME)
    return sae


def tertiles(shares: Sequence[Floats]) -> tuple[float, float]:
    """The two edges between the thirds of shares, all checkpoints together; nan, of features that are not active, left out."""
    low, high = np.nanquantile(np.concatenate(shares), [1 / 3, 2 / 3])
    return float(low), float(high)


def transitions(
    before: Floats, after: Floats, edges: tuple[float, float] | None = None, *, seed: int, n_permutations: int = 1_999
) -> Transitions:
    """Count the transitions of features between two checkpoints and compare them with permuted features.

    `before` and `after` are integration shares, [features]: a ValueError for unequal lengths, nan or no feature. Edges are from
    `tertiles`; None takes each one's own.
    """
    if len(before) != len(after) or not len(before) or np.isnan([before, after]).any():
        raise ValueError(
            f"{len(before)} shares before and {len(after)} after; give one of each for every feature that is active in both"
        )
    table = np.zeros((3, 3), dtype=np.int64)
    levels = [np.searchsorted(edges or tertiles([shares]), shares) for shares in (before, after)]
    np.add.at(table, tuple(levels), 1)
    margins: Any = stats.random_table(table.sum(1), table.sum(0))
    drawn = margins.rvs(size=n_permutations, random_state=np.random.default_rng(seed))
    return Transitions(
        table=tuple(tuple(int(n) for n in row) for row in table),
        to_identity=_counted(int(table[2, 0]), drawn[:, 2, 0]),
        to_integration=_counted(int(table[0, 2]), drawn[:, 0, 2]),
        stayed=_counted(int(np.trace(table)), np.trace(drawn, axis1=1, axis2=2)),
    )


def _counted(observed: int, drawn: NDArray[Any]) -> Counted:
    tail = min((drawn <= observed).sum(), (drawn >= observed).sum())
    low, high = map(float, np.quantile(drawn, [0.025, 0.975]))
    p_value = float(min(1.0, 2 * (1 + tail) / (1 + len(drawn))))
    return Counted(observed=observed, expected=float(drawn.mean()), low=low, high=high, p_value=p_value)


@dataclass(frozen=True, kw_only=True, repr=False)
class GroupedTokens(ShortRepr):
    """Activations and the group of documents that each is from."""

    x: Float[Tensor, "tokens d_in"]
    groups: Int[Tensor, " tokens"]
    """0, 1, ..."""

    @classmethod
    def of(cls, x: Float[Tensor, "tokens d_in"], documents: Int[Tensor, " tokens"]) -> "GroupedTokens":
        """Documents assigned to groups in turn; a ValueError for fewer than 2 documents."""
        _, number = documents.unique(return_inverse=True)
        if int(number.max()) < 1:
            raise ValueError("the tokens are from one document; intervals over documents need at least 2, better 20")
        return cls(x=x, groups=number % GROUPS)


@dataclass(frozen=True, kw_only=True, repr=False)
class GroupedEnergies(ShortRepr):
    """Sums of energies by group of documents."""

    tokens: Int[Tensor, " groups"]
    active: Float[Tensor, "groups d_sae"]
    """Tokens on which each feature is active."""
    sums: Float[Tensor, "groups figures d_sae"]
    """Summed over tokens: what `FeatureEnergies` has means of, in the order of `_PER_TOKEN` and `_PER_ACTIVE`."""

    def energies(self, without: int | None = None) -> FeatureEnergies:
        """Over all tokens, or all but those of one group."""
        kept = torch.ones(len(self.tokens), dtype=torch.bool)
        if without is not None:
            kept[without] = False
        n, active, sums = int(self.tokens[kept].sum()), self.active[kept].sum(0), self.sums[kept].sum(0)
        means = dict(zip(_PER_TOKEN, sums / n, strict=False))
        means |= dict(zip(_PER_ACTIVE, sums[len(_PER_TOKEN) :] / active, strict=True))
        return FeatureEnergies(tokens=n, active=active, **means)

    def mean_shares(self, path: str, chosen: Tensor) -> "MeanShares":
        """Mean share of a path over some features (a mask): of all tokens, and without each group."""

        def mean(without: int | None) -> float:
            return float(self.energies(without).shares()[path][chosen].nanmean())  # nan: active in that group only

        return MeanShares(
            whole=mean(None),
            without=np.array([mean(group) for group in range(len(self.tokens))]),
            tokens=self.tokens.double().numpy(),
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class MeanShares(ShortRepr):
    """A mean over features on all tokens and without each group of documents."""

    whole: float
    without: Floats
    """[groups], without each."""
    tokens: Floats
    """[groups], tokens of each."""

    def complement(self) -> "MeanShares":
        """Of all other paths together."""
        return MeanShares(whole=1 - self.whole, without=1 - self.without, tokens=self.tokens)

    def estimate(self) -> Estimate:
        """With its interval; nothing is tested."""
        return self._estimate(tested=False)

    def change_to(self, later: "MeanShares") -> Estimate:
        """`later` less this one on the same tokens, tested against 0."""
        whole, without = later.whole - self.whole, later.without - self.without
        return MeanShares(whole=whole, without=without, tokens=self.tokens)._estimate(tested=True)

    def _estimate(self, *, tested: bool) -> Estimate:
        g = len(self.without)
        error = float(np.linalg.norm(self.without - self.whole)) * ((g - 1) / g) ** 0.5
        t = StudentT.over_clusters(self.tokens)
        low, high = interval(self.whole, error, t.critical(0.95))
        return Estimate(
            estimate=self.whole,
            low=low,
            high=high,
            n=int(self.tokens.sum()),
            n_clusters=g,
            test=f"mean over features, jackknife over groups of documents ({t.df:.1f} degrees of freedom)",
            p_value=t.p_value(self.whole, error) if tested else None,
        )


@torch.no_grad()
def grouped_energies(sae: SAE[Any], tokens: GroupedTokens) -> GroupedEnergies:
    """Run an SAE (joint_nfm or TopK) on each group and sum what its features add to each path."""
    counts, active, sums = list[int](), list[Tensor](), list[Tensor]()
    for group in range(int(tokens.groups.max()) + 1):
        found = feature_energies(sae, token_paths(sae, tokens.x[tokens.groups == group]))
        counts.append(found.tokens)
        active.append(found.active)
        totals = [getattr(found, name) * found.tokens for name in _PER_TOKEN]
        totals += [(getattr(found, name) * found.active).nan_to_num() for name in _PER_ACTIVE]  # nan: never active
        sums.append(torch.stack(totals))
    return GroupedEnergies(
        tokens=torch.tensor(counts), active=torch.stack(active).cpu(), sums=torch.stack(sums).double().cpu()
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Measured(ShortRepr):
    """One checkpoint, feature by feature; [d_sae] each."""

    run: str
    """`RUN` or `REFERENCE`."""
    tokens: int
    energies: Mapping[str, GroupedEnergies]
    """By gauge: raw, and canonical where there is one."""
    norms: Mapping[str, Tensor]
    """Decoder norms by gauge, in one unit (`gauge.encoder_scale`)."""

    @property
    def whole(self) -> FeatureEnergies:
        """On all tokens, raw."""
        return self.energies[RAW].energies()

    def integration(self, which: str) -> Floats:
        """Integration share by gauge: all but the direct path's; nan where a feature is never active."""
        return 1 - self.energies[which].energies().shares()["direct"].numpy()


def measured(run: str, checkpoint: Checkpoint, first: SAE[Any], tokens: GroupedTokens, device: str) -> Measured:
    """Run the SAE of a checkpoint, which has to go with that of the run's first, on the held-out tokens, the same for all.

    Raises:
        ValueError, FileNotFoundError: for another architecture, model, hook point or size, or a damaged file.
    """
    sae = load_checkpoint(checkpoint, run, device)
    _refuse_other(sae, first, checkpoint, same_size=run == RUN)
    by_gauge = {RAW: sae}
    fixed, _ = gauge.canonical_or_reason(sae)
    if run == RUN and fixed is not None:
        by_gauge[CANONICAL] = fixed
    return Measured(
        run=run,
        tokens=checkpoint.tokens,
        energies={name: grouped_energies(one, tokens) for name, one in by_gauge.items()},
        norms={
            name: gauge.as_read(one).times(gauge.encoder_scale(one)).norms().direct.cpu()
            for name, one in by_gauge.items()
        },
    )


def _refuse_other(sae: SAE[Any], first: SAE[Any], checkpoint: Checkpoint, *, same_size: bool) -> None:
    names = ["hook_name", "model_name", "d_in", *(["d_sae"] if same_size else [])]
    for name in names:
        found, expected = (
            getattr(cfg if name.startswith("d_") else cfg.metadata, name) for cfg in (sae.cfg, first.cfg)
        )
        if found != expected:
            raise ValueError(
                f"{name} is {found!r} in {str(checkpoint.folder)!r}, and {expected!r} in the first checkpoint of the run; give "
                "checkpoints of one run, and a reference at the same place"
            )


def checkpoint_row(one: Measured) -> CheckpointRow:
    """Means over the features that are active on the tokens."""
    energies = one.whole
    active = energies.active > 0
    shares: dict[str, Any] = {}
    for which, grouped in one.energies.items() if one.run == RUN else ():
        found = {path: grouped.mean_shares(path, active) for path in PATHS}
        shares[which] = {path: share.estimate() for path, share in found.items()}
        shares[which]["integration"] = found["direct"].complement().estimate()
    return CheckpointRow(
        run=one.run,
        tokens=one.tokens,
        active=int(active.sum()),
        norm=float(one.norms[RAW][active].mean()),
        canonical_norm=float(one.norms[CANONICAL][active].mean()) if CANONICAL in one.norms else None,
        frequency=float(energies.frequency[active].median()),
        shares=shares,
    )


def movement(
    before: Measured, after: Measured, edges: Mapping[str, tuple[float, float]], *, seed: int, n_permutations: int
) -> Movement:
    """From one checkpoint to another of the same run; the edges, by gauge, are those between the thirds of integration shares."""
    both = (before.whole.active > 0) & (after.whole.active > 0)
    spearman: dict[str, float | None] = {
        QUANTITIES[2]: _rank_correlation(before.norms[RAW], after.norms[RAW], both),
        QUANTITIES[3]: _rank_correlation(before.whole.frequency, after.whole.frequency, both),
    }
    draws: Any = {"seed": seed, "n_permutations": n_permutations}
    change, moved, reordered = {}, {}, {}
    for which in edges if before.run == RUN else ():
        one, other = (torch.from_numpy(measured.integration(which)) for measured in (before, after))
        spearman[f"integration share, {which}"] = _rank_correlation(one, other, both)
        direct = [measured.energies[which].mean_shares("direct", both).complement() for measured in (before, after)]
        change[which] = direct[0].change_to(direct[1])
        shares = one[both].numpy(), other[both].numpy()
        moved[which] = transitions(*shares, edges[which], **draws)
        reordered[which] = transitions(*shares, **draws)
    return Movement(
        run=before.run,
        before=before.tokens,
        after=after.tokens,
        features=int(both.sum()),
        spearman=spearman,
        change=change,
        transitions=moved,
        reordered=reordered,
    )


def _rank_correlation(one: Tensor, other: Tensor, chosen: Tensor) -> float | None:
    one, other = one[chosen], other[chosen]
    if len(one) < 3 or not (varies(one) and varies(other)):
        return None
    found: Any = stats.spearmanr(one.numpy(), other.numpy())
    return float(found.statistic)


def trajectories(found: Sequence[Measured]) -> pd.DataFrame:
    """A row for each run, checkpoint and feature: frequency, norms and shares, nan where the feature is never active."""
    frames = list[pd.DataFrame]()
    for one in found:
        energies = one.whole
        columns: dict[str, Any] = {"run": one.run, "tokens": one.tokens, "feature": np.arange(len(energies.active))}
        columns["frequency"] = energies.frequency.numpy()
        for which, grouped in one.energies.items():
            columns[f"norm_{which}"] = one.norms[which].numpy()
            for path, share in grouped.energies().shares().items() if one.run == RUN else ():
                columns[f"{path}_{which}"] = share.numpy()
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
