"""How much a feature's contribution to each path has of the whole, on the tokens where it fires; tokens come in batches.

The contributions are those of `functional`, and a path's share its part of the sum of the root-mean-square contributions:

    share_p(i) = rms_p(i) / sum_q rms_q(i),      rms_p(i)^2 = mean of ||contribution_p(i)||^2 over the tokens where i fires

Direct and linear shares as trained are set by initialisation where both decoders read the same f (`gauge`); in the canonical
gauge the two are one, W_dec + W_lin.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from sae_nfm.analysis.gauge import as_read, canonical, has_canonical
from sae_nfm.analysis.path_contributions import interaction_energies
from sae_nfm.analysis.weight_norms import PathRows
from sae_nfm.architectures import NFMPaths
from sae_nfm.kernels import SparseActs, reference

AS_TRAINED, CANONICAL = "as trained", "canonical"


def present_paths(sae: SAE[Any]) -> list[str]:
    """The paths that are switched on, "direct", "linear", "square", "interaction"; an SAE without an NFM has the first."""
    if not isinstance(sae, NFMPaths):
        return ["direct"]
    cfg = sae.cfg
    switched = {"linear": cfg.use_linear_path, "square": cfg.use_square_path, "interaction": cfg.head != "none"}
    return ["direct", *(name for name, on in switched.items() if on)]


@torch.no_grad()
def gauges(sae: SAE[Any]) -> dict[str, PathRows]:
    """Rows that a unit of each feature writes, in every gauge that the SAE has."""
    found = {AS_TRAINED: as_read(sae)}
    if has_canonical(sae):
        found[CANONICAL] = as_read(canonical(sae))
    return found


class PathSums:
    """Sums over tokens, [d_sae] each.

    Args:
        sae: of any architecture.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        self._sae, zeros = sae, torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
        self._active, self._second, self._fourth, self._read, self._written = (zeros.clone() for _ in range(5))

    @torch.no_grad()
    def add(self, acts: Float[Tensor, "tokens d_sae"], gates: Bool[Tensor, "tokens nfm_dim"] | None) -> None:
        """Add some tokens.

        Args:
            acts: features as hooked at `hook_sae_acts_post`.
            gates: h > 0; None without an interaction path.
        """
        active = reference.top_n(acts, max(1, int((acts > 0).sum(-1).amax())))
        squares = active.values.double().square()
        for sums, values in ((self._active, active.values > 0), (self._second, squares), (self._fourth, squares**2)):
            self._add_sparse(sums, active, values)
        if not isinstance(self._sae, NFMPaths):
            return
        n: int | None = self._sae.cfg.nfm_top_k
        read = active if n is None else reference.top_n(acts, n)
        self._add_sparse(self._read, read, read.values.double().square())
        if gates is not None:
            self._add_sparse(self._written, read, interaction_energies(self._sae, read, gates))

    @staticmethod
    def _add_sparse(sums: Tensor, acts: SparseActs, values: Tensor) -> None:
        sums.index_add_(0, acts.indices.flatten().cpu(), values.flatten().double().cpu())

    @torch.no_grad()
    def shares(self) -> dict[str, dict[str, Float[Tensor, " d_sae"]]]:
        """By gauge and path, summing to 1 over the paths; 0 for a feature that never fired."""
        sae: Any = self._sae
        found = dict[str, dict[str, Tensor]]()
        for gauge, rows in gauges(sae).items():
            norms = rows.norms()
            energies = {
                "direct": self._second * norms.direct.double().cpu().square(),
                "linear": self._read * norms.linear.double().cpu().square(),
                "interaction": self._written,
            }
            if "square" in present_paths(sae):
                energies["square"] = self._fourth * (sae.U.double().norm(dim=-1).cpu() / sae.cfg.square_scale).square()
            sizes = {path: energies[path].sqrt() for path in present_paths(sae)}
            total = torch.stack(list(sizes.values())).sum(0)
            fires = (self._active > 0) & (total > 0)
            found[gauge] = {path: torch.where(fires, size / total, 0.0) for path, size in sizes.items()}
        return found
