"""The active entries ordered by feature."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Routing(NamedTuple):
    """The active entries ordered by feature, for sums over the tokens of a feature; made by `route`."""

    entries: Int[Tensor, " n_entries"]
    """Positions in the flattened [n_tokens, k] activations; those of one feature are adjacent, in the order of tokens."""
    tokens: Int[Tensor, " n_entries"]
    """The token of each entry."""
    starts: Int[Tensor, " d_sae_plus_1"]
    """Where each feature's entries begin; the last number is n_entries."""


def route(indices: Int[Tensor, "*batch k"], d_sae: int) -> Routing:
    """Order the active entries by feature: once for all kernels that read features at the same indices."""
    flat = indices.flatten()
    entries = flat.int().argsort(stable=True)  # int32 sorts faster
    counts = flat.new_zeros(d_sae + 1).index_add_(0, flat + 1, torch.ones_like(flat))  # bincount waits for a GPU
    return Routing(entries, entries // indices.shape[-1], counts.cumsum(0))
