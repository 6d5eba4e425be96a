"""Interaction heads: how the interaction path pools the features that it reads, by the name in an SAE's config.

    z = pool(f_n, V),  h = z W_1 + b_1,  inter = ReLU(h) W_2 + b_2

    head        pool                             z
    "fm"        `reference.bi_interaction`       sum_{i<j} f_i f_j v_i*v_j
    "mlp"       `reference.summed`               sum_i f_i v_i, the same head without the product
    "bilinear"  `reference.bilinear`             (f A) * (f B) = sum_{i<j} f_i f_j (a_i*b_j + a_j*b_i) + sum_i f_i^2 a_i*b_i
    "none"      no interaction path

"bilinear" has V = [A | B], a second projection, and writes z as it is, h = z, inter = z W_2 + b_2: no gate, so that what it
writes is a sum over pairs and squares of features whatever the token (a bilinear layer: Shazeer 2020, arXiv 2002.05202; Pearce
et al. 2024, arXiv 2410.08417).

`register_head` adds to them for as long as the process runs. A saved SAE has the name of its head, not the code: the module
that registers it is imported before the SAE is built or loaded.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_nfm.kernels.reference import Pool, at_least_float32, bi_interaction, bilinear, summed, top_n

NONE = "none"
"""The head of an SAE without an interaction path."""
BILINEAR = "bilinear"
"""The head with a second projection, V = [A | B], and without W_1, b_1 and ReLU."""
POOLS: dict[str, Pool] = {"fm": bi_interaction, "mlp": summed, BILINEAR: bilinear}
"""The pooling of each head, by name."""
PAIRED = ("fm", BILINEAR)
"""Heads that sum products of two features, so that what they write can be divided among pairs."""


def embedding_width(head: str, nfm_dim: int) -> int:
    """Columns of V."""
    return 2 * nfm_dim if head == BILINEAR else nfm_dim


def open_gates(head: str, hidden: Float[Tensor, "*batch nfm_dim"]) -> Bool[Tensor, "*batch nfm_dim"]:
    """D, where what the hidden code h holds is written: h > 0, everywhere without a ReLU."""
    return torch.ones_like(hidden, dtype=torch.bool) if head == BILINEAR else hidden > 0


def register_head(name: str, pool: Pool) -> None:
    """Make an interaction head known to every config, SAE and command of this process.

    `pool` is called in at least float32, outside autocast, and differentiated by autograd. Two properties that SAEs rely on
    are tried here, on random numbers in float64:

        pool(f, V) = pool(SparseActs(indices, values), V)       a training step reads the matrix, or the active features alone
        pool(a f, V) = pool(f, a V)                             it reads f_i v_i alone: the scale of activations folds into V

    It goes from activations [*batch, d_sae], dense or sparse, and V [d_sae, nfm_dim] to z [*batch, nfm_dim].

    Raises a ValueError for a name that is taken or no identifier, or a function without these properties.
    """
    if name in (*POOLS, NONE):
        raise ValueError(f"there is a head {name!r} already; choose another name than {_known()}")
    if not name.isidentifier():
        raise ValueError(f"the head's name is {name!r}; give letters, digits and underscores, such as 'third_order'")
    pool = at_least_float32(pool)
    _check_pool(name, pool)
    POOLS[name] = pool


def interaction_head(name: str) -> Callable[[Pool], Pool]:
    """`register_head` as a decorator of the pooling function, which stays as it is."""

    def registered(pool: Pool) -> Pool:
        register_head(name, pool)
        return pool

    return registered


def check_head(name: str) -> None:
    """Raise a ValueError for a head that is not known."""
    if name not in (*POOLS, NONE):
        raise ValueError(
            f"head is {name!r}; give one of {_known()}, or first import the module that registers it "
            "(sae_nfm.kernels.heads.register_head)"
        )


def _known() -> str:
    return ", ".join(map(repr, (*POOLS, NONE)))


def _check_pool(name: str, pool: Pool) -> None:
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(8, 12, dtype=torch.float64, generator=generator)
    f = torch.rand(2, 3, 8, dtype=torch.float64, generator=generator)
    f[..., ::4], f[0, 0] = 0.0, 0.0  # at most 6 of 8 are active, and of one token none
    found = {"dense": pool(f, V), "sparse": pool(top_n(f, 6), V)}
    for form, z in found.items():
        if z.shape != (2, 3, 12):
            raise ValueError(
                f"the head {name!r} makes z of shape {tuple(z.shape)} of {form} activations [2, 3, 8] and V [8, 12]; "
                "return [2, 3, 12], that is [*batch, nfm_dim]"
            )
    if not torch.allclose(found["dense"], found["sparse"]):
        raise ValueError(
            f"the head {name!r} makes another z of `SparseActs` than of the same activations as a matrix; use indices and "
            "values alike, as reference.weighted_rows does"
        )
    if not torch.allclose(pool(2 * f, V), pool(f, 2 * V)):
        raise ValueError(
            f"the head {name!r} makes another z of 2 f and V than of f and 2 V, so that the scale of activations would not "
            "fold into the weights; let z depend on the vectors f_i v_i alone"
        )
