"""Figures of checkpoints, feature by feature and from one checkpoint to another: what `learning_dynamics` makes a result of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from scipy import stats
from torch import Tensor

from sae_nfm.analysis import FeatureEnergies, gauge, varies
from sae_nfm.experiments.dynamics.checkpoints import Checkpoint, load_checkpoint
from sae_nfm.experiments.dynamics.results import CANONICAL, QUANTITIES, RAW, CheckpointRow, Movement
from sae_nfm.experiments.dynamics.shares import PATHS, GroupedEnergies, GroupedTokens, grouped_energies
from sae_nfm.experiments.dynamics.transitions import transitions
from sae_nfm.stats import Floats

RUN, REFERENCE = "joint_nfm", "topk"
"""Architectures of a run and of its reference, by which they are named in results."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint, feature by feature; [d_sae] each."""

    run: str
    """`RUN` or `REFERENCE`."""
    tokens: int
    """Tokens trained on."""
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
    """Run the SAE of a checkpoint on the held-out tokens.

    Args:
        run: `RUN` or `REFERENCE`.
        checkpoint: where it is.
        first: the SAE of the run's first checkpoint, which the others have to go with.
        tokens: the same for all.
        device: of the SAE.

    Raises:
        ValueError, FileNotFoundError: for another architecture, model, hook point or size, or a damaged file.
    """
    sae = load_checkpoint(checkpoint, run, device)
    _refuse_other(sae, first, checkpoint, same_size=run == RUN)
    by_gauge = {RAW: sae}
    fixed, _ = canonical_of(sae)
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
    mine, wanted = sae.cfg, first.cfg
    compared = {
        "hook_name": (mine.metadata.hook_name, wanted.metadata.hook_name),
        "model_name": (mine.metadata.model_name, wanted.metadata.model_name),
        "d_in": (mine.d_in, wanted.d_in),
    }
    if same_size:
        compared["d_sae"] = (mine.d_sae, wanted.d_sae)
    for name, (found, expected) in compared.items():
        if found != expected:
            raise ValueError(
                f"{name} is {found!r} in {str(checkpoint.folder)!r}, and {expected!r} in the first checkpoint of the run; give "
                "checkpoints of one run, and a reference at the same place"
            )


def canonical_of(sae: SAE[Any]) -> tuple[SAE[Any] | None, str | None]:
    """The SAE in its canonical gauge, or why it has none."""
    try:
        return gauge.canonical(sae), None
    except ValueError as error:
        return None, str(error)


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
    before: Measured,
    after: Measured,
    edges: Mapping[str, tuple[float, float]],
    *,
    seed: int,
    n_permutations: int,
) -> Movement:
    """From one checkpoint to another of the same run.

    Args:
        before: the earlier one.
        after: the later one.
        edges: between the thirds of integration shares, by gauge.
        seed: of the null's draws.
        n_permutations: how many.
    """
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
    frames: list[pd.DataFrame] = []
    for one in found:
        energies = one.whole
        columns: dict[str, Any] = {
            "run": one.run,
            "tokens": one.tokens,
            "feature": np.arange(len(energies.active)),
            "frequency": energies.frequency.numpy(),
        }
        for which, grouped in one.energies.items():
            columns[f"norm_{which}"] = one.norms[which].numpy()
            for path, share in grouped.energies().shares().items() if one.run == RUN else ():
                columns[f"{path}_{which}"] = share.numpy()
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
