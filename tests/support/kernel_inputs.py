"""Inputs of the kernels, and the comparison of their two forms."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_nfm.kernels import dispatch
from sae_nfm.kernels.reference import SparseActs

# The same sums in another order: a few ulp of values of order 10.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
D_IN, D_SAE = 5, 37
"""37 features are no whole number of blocks for k = 1 (4 of 8, 5 left over) and k = 2 (9 of 4, 1 left over)."""


def randoms(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Seeded normal tensors that record gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def encoder(batch: tuple[int, ...] = (7,), scaled: bool = True, d_sae: int = D_SAE, **settings) -> list[Tensor | None]:
    """sae_in, W_enc, b_enc, scale."""
    x, W_enc, b_enc, scale = randoms((*batch, D_IN), (D_IN, d_sae), (d_sae,), (d_sae,), **settings)
    return [x, W_enc, b_enc, (scale.detach().abs() + 0.1).requires_grad_() if scaled else None]


def random_acts(batch: tuple[int, ...] = (6,), d_sae: int = 11, k: int = 4, dtype=torch.float64) -> SparseActs:
    scores, values = randoms((*batch, d_sae), (*batch, k), seed=3, dtype=dtype)
    return SparseActs(scores.topk(k, dim=-1, sorted=False).indices, values)


def decoded(acts: SparseActs, weight: Tensor, routing=None, *, kernel: dispatch.Kernel = "sparse") -> Tensor:
    """`dispatch.both_decoders` with decoders and norms from one matrix."""
    return dispatch.both_decoders(acts, weight, weight.norm(dim=-1), weight.flip(0), routing, kernel=kernel)


def gradients(output: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    """Gradients of a sum that weighs every number of the output differently."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    wanted = [tensor for tensor in inputs if tensor is not None]
    return list(torch.autograd.grad((output * weights).sum(), wanted, retain_graph=True))


def assert_same(function, inputs: list[Tensor | None], **tolerance) -> None:
    """`function(kernel)` has the same value, and the same gradient in every input, in both forms."""
    sparse, dense = function("sparse"), function("dense")
    torch.testing.assert_close(sparse, dense, **tolerance)
    torch.testing.assert_close(gradients(sparse, inputs), gradients(dense, inputs), **tolerance)


def assert_largest(found: tuple[Tensor, Tensor], scores: Tensor, k: int) -> None:
    """Indices and values are those of the k largest scores of each row, with the same roundings."""
    indices, values = found
    assert (indices.sort(dim=-1).values.diff() > 0).all(), "a column is found twice"
    torch.testing.assert_close(values.sort(dim=-1).values, scores.topk(k).values.sort(dim=-1).values)
    torch.testing.assert_close(scores.gather(-1, indices), values)


def relative(errors: Tensor, reference: Tensor) -> float:
    return ((errors.double() - reference.double()).norm() / reference.double().norm()).item()


class Operations(TorchDispatchMode):
    """How often torch runs each operation."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))
