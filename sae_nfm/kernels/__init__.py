"""The products of a training step, sparse and dense, on CPU and GPU."""

from sae_nfm.kernels.device import product_dtype, without_triton
from sae_nfm.kernels.dispatch import Kernel
from sae_nfm.kernels.heads import POOLS, check_head, interaction_head
from sae_nfm.kernels.reference import (
    Acts,
    SparseActs,
    bi_interaction,
    hidden_pre,
    powers,
    sparse_acts_from_dense,
    top_n,
    weighted_rows,
)
from sae_nfm.kernels.topk import TOKENS_AT_ONCE

__all__ = [
    "POOLS",
    "TOKENS_AT_ONCE",
    "Acts",
    "Kernel",
    "SparseActs",
    "bi_interaction",
    "check_head",
    "hidden_pre",
    "interaction_head",
    "powers",
    "product_dtype",
    "sparse_acts_from_dense",
    "top_n",
    "weighted_rows",
    "without_triton",
]
