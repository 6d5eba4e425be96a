"""The part of the interaction path's output that is linear in the features, by held-out ridge regression.

    inter_t = f_t A + a + residual_t

Features are never negative, so a sum of their products has a linear and a constant part, and a path called nonlinear can do
what W_lin and a bias would. Only the residual is nonlinear. A and a are fitted on one part of the documents, the penalty is
chosen on a second, and R^2 is read on a third. `LinearPart.reconstruct` puts the prediction, or the residual, in place of the
path, to see what each is worth in squared error and KL.

Source: the control of arXiv 2507.00269's linear and nonlinear shares; ridge regression, Hoerl & Kennard 1970.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor

from sae_nfm.architectures import refuse_transcoder
from sae_nfm.common import ShortRepr, short_repr
from sae_nfm.interventions import HookFunction, Substitution, digest
from sae_nfm.kernels import SparseActs, reference
from sae_nfm.models import reconstruction

Kept = Literal["linear", "residual"]
Solver = Literal["normal equations", "conjugate gradient"]
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Penalties tried, in units of a feature's mean summed square about its mean, over the fitted tokens."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LinearPart(ShortRepr):
    """The best linear prediction of a path's output from the features, and how well it does on tokens it has not seen."""

    weight: Float[Tensor, "d_sae d_in"]
    """A: what one unit of a feature adds."""
    bias: Float[Tensor, " d_in"]
    mean: Float[Tensor, " d_in"]
    """Mean of the path's output over the fitted tokens."""
    top_n: int | None
    """How many of the features the prediction reads, the strongest; None for all."""
    penalty: float
    validation_r2: tuple[float, ...]
    """R^2 on the second part, for each penalty tried."""
    r2: float
    """Share of the variance about `mean` explained on the third part: 1 for a linear path, about 0 for none (or below)."""
    squared_error: Float[Tensor, " test"]
    """Squared residual of each token of the third part: with `deviation`, what an interval for `1 - r2` needs."""
    deviation: Float[Tensor, " test"]
    """Squared distance from `mean` of each of them."""
    test_tokens: Int[Tensor, " test"]

    def predict(self, acts: reference.Acts) -> Float[Tensor, "*batch d_in"]:
        """The prediction `f A + a`."""
        read = acts if self.top_n is None else reference.top_n(acts, self.top_n)
        values = read.values if isinstance(read, SparseActs) else read
        return reference.weighted_rows(read, self.weight.to(values)) + self.bias.to(values)

    def hooks(self, kept: Kept) -> dict[str, HookFunction]:
        """Hook functions for an SAE that put a part of its interaction path in the path's place.

        Args:
            kept: "linear", the prediction; or "residual", the output less the prediction, its mean put back.
        """
        seen: list[Tensor] = []

        def read(acts: Tensor, hook: Any) -> None:  # noqa: ARG001
            seen[:] = [acts.to_dense()]

        def replace(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            predicted = self.predict(seen[0]).to(value.dtype)
            return predicted if kept == "linear" else value - predicted + self.mean.to(value)

        return {"hook_sae_acts_post": read, "hook_nfm_interaction": replace}

    def reconstruct(self, sae: SAE[Any], kept: Kept) -> Callable[[Tensor], Tensor]:
        """The SAE as a function of activations [*batch, d_in], heads flattened, with a part of its interaction path.

        Raises:
            ValueError: without an interaction path.
        """
        refuse_transcoder(sae, "the linear part of its interaction path")
        if "hook_nfm_interaction" not in sae.hook_dict:
            raise ValueError(f"an SAE without an interaction path has no {kept} part; give a joint_nfm with head 'fm'")
        return lambda x: reconstruction(sae, x, self.hooks(kept))

    def substitution(self, sae: SAE[Any], kept: Kept) -> Substitution:
        """The same in a language model, an intervention for `behaviour`."""
        function = self.reconstruct(sae, kept)
        state = digest(dict(sae.state_dict()) | {"linear part weight": self.weight, "linear part bias": self.bias})
        return Substitution(
            at=str(sae.cfg.metadata.hook_name),
            head=sae.cfg.metadata.hook_head_index,
            function=lambda x, context: function(x),  # noqa: ARG005
            description=f"SAE with the {kept} part of its interaction path, {state}",
        )


def linear_part(
    acts: SparseActs,
    target: Float[Tensor, "tokens d_in"],
    d_sae: int,
    *,
    seed: int,
    documents: Int[Tensor, " labels"] | None = None,
    penalties: Sequence[float] = PENALTIES,
    top_n: int | None = None,
    solver: Solver = "normal equations",
) -> LinearPart:
    """Regress a path's output on the features.

    Args:
        acts: features as hooked, [tokens, k].
        target: the path's output, such as `TokenPaths.paths.interaction`.
        d_sae: number of features.
        seed: of the division into parts: about 60, 20 and 20 % of the documents.
        documents: the document of each token; None divides by token, which flatters the fit on text.
        top_n: read only the strongest features, as the linear path does with `nfm_top_k`.
        solver: "normal equations" holds d_sae^2 numbers; "conjugate gradient" is for more than about 15,000 features.

    Raises:
        ValueError: for fewer than 5 documents or tokens, shapes that do not match, or no positive penalty.
    """
    if len(target) != len(acts.values) or (documents is not None and len(documents) != len(target)):
        raise ValueError(
            f"{len(acts.values)} tokens with features, {len(target)} outputs"
            + ("" if documents is None else f", {len(documents)} documents")
            + "; give one of each for every token"
        )
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties are {tuple(penalties)}; give at least one, all positive")
    groups = np.arange(len(target)) if documents is None else documents.cpu().numpy()
    (fitted, validation, test), read = divided(groups, seed), acts if top_n is None else reference.top_n(acts, top_n)
    design, wanted = _design(read, d_sae), target.detach().double().cpu().numpy()
    fits, mean = _fits(design[fitted], wanted[fitted], penalties, solver), wanted[fitted].mean(0)

    def errors(fit: tuple[NDArray[Any], NDArray[Any]], tokens: NDArray[np.intp]) -> NDArray[np.float64]:
        return np.square(wanted[tokens] - design[tokens] @ fit[0] - fit[1]).sum(-1)

    deviations = np.square(wanted - mean).sum(-1)
    scores = [1 - errors(fit, validation).sum() / deviations[validation].sum() for fit in fits]
    best = int(np.argmax(scores))
    squared_error = errors(fits[best], test)
    weight, bias, mean = (torch.from_numpy(one).to(target.dtype) for one in (*fits[best], mean))
    return LinearPart(
        weight=weight,
        bias=bias,
        mean=mean,
        top_n=top_n,
        penalty=penalties[best],
        validation_r2=tuple(map(float, scores)),
        r2=float(1 - squared_error.sum() / deviations[test].sum()),
        squared_error=torch.from_numpy(squared_error),
        deviation=torch.from_numpy(deviations[test]),
        test_tokens=torch.from_numpy(test),
    )


class Parts(NamedTuple):
    """Indices of the tokens to fit on, to choose the penalty on and to score on."""

    __repr__ = short_repr

    fit: NDArray[np.intp]
    validation: NDArray[np.intp]
    test: NDArray[np.intp]


def divided(groups: NDArray[Any], seed: int) -> Parts:
    """About 60, 20 and 20 % of the groups; a group stays together."""
    if (n := len(np.unique(groups))) < 5:
        raise ValueError(f"{n} documents cannot be divided into three parts of 60, 20 and 20 %; give at least 5")
    split = GroupShuffleSplit(n_splits=1, test_size=0.4, random_state=seed)
    fit, rest = next(split.split(groups, groups=groups))
    half = GroupShuffleSplit(n_splits=1, test_size=0.5, random_state=seed)
    validation, test = next(half.split(rest, groups=groups[rest]))
    return Parts(fit=fit, validation=rest[validation], test=rest[test])


def _design(acts: SparseActs, d_sae: int) -> Any:
    n, k = acts.indices.shape
    indices, values = acts.indices.flatten().cpu().numpy(), acts.values.detach().double().flatten().cpu().numpy()
    return scipy.sparse.csr_array((values, indices, np.arange(0, n * k + 1, k)), shape=(n, d_sae))


def _fits(
    design: Any, wanted: NDArray[np.float64], penalties: Sequence[float], solver: Solver
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(weight [d_sae, d_in], bias [d_in]) for each penalty.

    scikit-learn has no closed solution for a sparse design with an intercept: the centred normal equations are it.
    """
    n, means = design.shape[0], np.asarray(design.mean(0)).ravel()
    spread = float(design.power(2).sum() - n * (means**2).sum()) / design.shape[1]
    if solver == "conjugate gradient":
        ridges = [
            Ridge(alpha=penalty * spread, solver="sparse_cg", tol=1e-6).fit(design, wanted) for penalty in penalties
        ]
        return [(np.atleast_2d(ridge.coef_).T, np.atleast_1d(ridge.intercept_)) for ridge in ridges]
    target_means = wanted.mean(0)
    gram = torch.from_numpy((design.T @ design).toarray() - n * np.outer(means, means))
    moment = torch.from_numpy(design.T @ wanted - n * np.outer(means, target_means))
    found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for penalty in penalties:
        factor = torch.linalg.cholesky(gram + penalty * spread * torch.eye(len(gram), dtype=gram.dtype))
        weight = torch.cholesky_solve(moment, factor).numpy()
        found.append((weight, target_means - means @ weight))
    return found
