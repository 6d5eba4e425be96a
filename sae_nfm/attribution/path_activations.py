"""What the paths of an SAE read and write on tokens: features as the interaction path reads them, gates, outputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F

from sae_nfm.architectures import attributable
from sae_nfm.kernels import SparseActs
from sae_nfm.models import HookFunction, keeping, reconstruction

READ, INTERACTION, LINEAR, HIDDEN = (
    f"hook_nfm_{name}" for name in ("interaction_in", "interaction", "linear", "hidden_pre")
)


@dataclass(frozen=True, kw_only=True)
class TokenReads:
    """What the paths read and wrote on some tokens."""

    read: SparseActs
    """Features as the interaction path reads them, [tokens, n], in the order of their numbers; value 0: not active."""
    gates: Bool[Tensor, "tokens nfm_dim"]
    """h > 0."""
    interaction: Float[Tensor, "tokens d_in"]
    """What passed hook_nfm_interaction."""
    linear: Float[Tensor, "tokens d_in"] | None
    """What passed hook_nfm_linear; None where that path is off."""

    def of(self, tokens: Tensor) -> "TokenReads":
        """Some of the tokens: a mask, or indices."""
        return TokenReads(
            read=SparseActs(self.read.indices[tokens], self.read.values[tokens]),
            gates=self.gates[tokens],
            interaction=self.interaction[tokens],
            linear=None if self.linear is None else self.linear[tokens],
        )

    @classmethod
    def joined(cls, parts: Sequence["TokenReads"]) -> "TokenReads":
        """All tokens of several; where a part reads fewer features, the columns left over have value 0."""
        n = max(part.read.indices.shape[-1] for part in parts)

        def filled(columns: Tensor) -> Tensor:
            return F.pad(columns, (0, n - columns.shape[-1]))

        linear = [part.linear for part in parts if part.linear is not None]
        return cls(
            read=SparseActs(*(torch.cat([filled(part.read[i]) for part in parts]) for i in range(2))),
            gates=torch.cat([part.gates for part in parts]),
            interaction=torch.cat([part.interaction for part in parts]),
            linear=torch.cat(linear) if linear else None,
        )

    def split(self, size: int) -> Iterator["TokenReads"]:
        """In pieces of at most `size` tokens."""
        for start in range(0, len(self.gates), size):
            yield self.of(torch.arange(start, min(start + size, len(self.gates)), device=self.gates.device))


def reading(sae: SAE[Any], seen: dict[str, Any]) -> dict[str, HookFunction]:
    """Hook functions for an SAE (see `attributable`) that put into `seen`, by hook point, what the interaction path reads, the
    hidden code and what each path writes.
    """
    names = [READ, INTERACTION, HIDDEN, *([LINEAR] if attributable(sae).cfg.use_linear_path else [])]
    return {name: keeping(seen, name) for name in names}


def reads_of(seen: dict[str, Any]) -> TokenReads:
    """What `reading` has seen, all tokens in one dimension."""
    linear = seen.get(LINEAR)
    return TokenReads(
        read=_in_order(seen[READ]),
        gates=seen[HIDDEN].flatten(0, -2) > 0,
        interaction=seen[INTERACTION].flatten(0, -2),
        linear=None if linear is None else linear.flatten(0, -2),
    )


@torch.no_grad()
def token_reads(sae: SAE[Any], x: Float[Tensor, "tokens d_in"]) -> TokenReads:
    """Run an SAE by itself on activations, heads flattened.

    Raises:
        ValueError: see `attributable`.
    """
    seen = dict[str, Any]()
    reconstruction(sae, x, reading(sae, seen))
    return reads_of(seen)


def _in_order(read: Float[Tensor, "*batch d_sae"]) -> SparseActs:
    """As many columns as the token with most active features has, features in the order of their numbers."""
    flat = read.flatten(0, -2)
    most = int((flat != 0).sum(-1).amax()) if flat.numel() else 0
    strongest = flat.abs().topk(most, dim=-1, sorted=False).indices  # some architectures have negative ones
    indices = strongest.sort(dim=-1).values
    return SparseActs(indices, flat.gather(-1, indices))
