"""What an SAE's error is to be compared with: other changes of the same size, token by token.

On each counted token let x be the activation, x_hat what the arm under test (an SAE, spliced in) makes of it, e = x_hat - x
and r = |e|. The controls put in place of x

    isotropic              x + r u,  u uniform on the sphere
    isotropic, norm kept   the same among the points with norm |x|: x cos(t) + |x| sin(t) v, v uniform on the sphere
                           orthogonal to x, 2 |x| sin(t / 2) = r
    covariance             x + r g/|g|,  g ~ N(0, C): noise with the covariance of activations
    covariance mixture     x + r (y - x)/|y - x|,  y ~ N(mean, C): towards a random activation
    shuffled error         x + r e'/|e'|,  e' the error at another token of the batch
    flipped error          x - e
    error x s              x + s e, at s times the distance

with mean and covariance C from text other than the evaluated (`fit_activations`). An isotropic vector is nearly orthogonal to
everything the model reads, so that an SAE's error does more harm (2 to 4.5 times the KL: Gurnee 2024) without anything being
wrong with it; the others point where activations do.

A direction that does not exist (an error of zero, shuffled) is replaced by an isotropic one. For r > 2 |x| there is no point at
distance r with norm |x|: the distance is kept, and of the norms at that distance the nearest is taken, that of x - r x/|x|.

Where a token is not counted (position 0, where it is not special) every control puts x_hat, as the arm under test does, so
that arms differ at counted tokens only. The anchors, which are no matter of distance, change those positions too:

    none                   x
    zero, mean             0; the mean of activations

Source: W. Gurnee 2024, "SAE reconstruction errors are (empirically) pathological"; Lee & Heimersheim 2024 (arXiv 2410.12555)
for covariance-matched directions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_nfm.common import ShortRepr
from sae_nfm.interventions.intervene import Intervention, Splice, Substitution, TokenContext, counted_tokens, digest
from sae_nfm.interventions.results import UNDER_TEST, ArmRole, Role
from sae_nfm.models import LanguageModel, check_finite, is_transcoder, real_batches, run_rows

FLIPPED = -1.0
SCALES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class Activations(ShortRepr):
    """Mean and covariance, float64, of the activations at a hook point, over the counted tokens of some text."""

    hook_name: str
    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    tokens: int
    """Tokens they were computed from; fewer than d leave directions without variance."""
    head: int | None = None
    """The head they are of; None for all."""

    @cached_property
    def root(self) -> Float[Tensor, "d d"]:
        """A root R of the covariance, R R^T = C, by eigenvalues: also where the covariance is singular."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt()

    def noise(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Draws from N(0, C), float32, on the CPU."""
        return torch.randn(n, len(self.mean), generator=generator) @ self.root.float().T


@torch.no_grad()
def fit_activations(
    model: LanguageModel,
    tokens: Int[Tensor, "rows pos"],
    hook_name: str,
    *,
    head: int | None = None,
    batch_rows: int = 16,
) -> Activations:
    """Mean and covariance at a hook point, by a name of either kind, or of one head there, on rows other than those evaluated on.

    `held_out_rows` with `skip_tokens` gives such rows.

    Raises:
        ValueError: when there is no such hook point, or fewer than two tokens are counted.
    """
    total, products, n = torch.zeros(()), torch.zeros(()), 0
    nothing = Substitution(at=hook_name, head=head, function=_nothing, description="nothing")
    for batch, real in real_batches(model, tokens, batch_rows):
        with nothing.on(model) as trace:
            run_rows(model, batch, real)
        counted = counted_tokens(model, batch, real)
        x = trace.x[counted].double()
        check_finite(x, counted, f"activations at {hook_name!r}")
        total, products, n = total + x.sum(0).cpu(), products + (x.T @ x).cpu(), n + len(x)
    if n < 2:
        raise ValueError(f"a covariance needs two tokens, and {n} of {tokens.numel()} are counted; give more text")
    mean = total / n
    covariance = (products - n * mean.outer(mean)) / (n - 1)
    return Activations(hook_name=hook_name, mean=mean, covariance=covariance, tokens=n, head=head)


def control_arms(
    under_test: Splice, activations: Activations, scales: Sequence[float] = SCALES, *, of: str = UNDER_TEST
) -> dict[str, Intervention]:
    """The arm under test, as "sae", and every control and anchor of it, for `evaluation.measure`.

    Args:
        under_test: the SAE, some of its paths ablated or not.
        activations: mean and covariance at its hook point.
        scales: of the error, for the sweep "error x s"; 0 is the original model (in rows that begin with BOS) and 1 the arm under
            test, by another way.
        of: name of the SAE in the measurement, for the roles.

    Raises:
        ValueError: when the activations are from another hook point, or of another width.
    """
    cfg, head = under_test.sae.cfg, under_test.sae.cfg.metadata.hook_head_index
    if is_transcoder(under_test.sae):
        raise ValueError(
            f"the arm under test is a transcoder (architecture {cfg.architecture()!r}), and the controls are of an SAE's error "
            "where it reads; measure it with evaluation.evaluate beside a transcoder without a head"
        )
    found = (activations.hook_name, len(activations.mean), activations.head)
    if found != (under_test.hook_name, cfg.d_in, head):
        where = [f", head {one}" if one is not None else "" for one in (activations.head, head)]
        raise ValueError(
            f"the activations are from {activations.hook_name!r}{where[0]} with {len(activations.mean)} dimensions, the arm "
            f"under test is at {under_test.hook_name!r}{where[1]} with {cfg.d_in}; fit them at its hook point"
        )
    fitted = digest({"mean": activations.mean, "covariance": activations.covariance})
    sweep = {f"error x {scale:g}": scale for scale in map(float, scales)}
    rules: Mapping[str, tuple[Rule, str]] = {
        "isotropic": (isotropic, ""),
        "isotropic, norm kept": (norm_kept, ""),
        "covariance": (partial(covariance, activations), fitted),
        "covariance mixture": (partial(mixture, activations), fitted),
        "shuffled error": (shuffled, ""),
        "flipped error": (partial(scaled, FLIPPED), ""),
    } | {name: (partial(scaled, scale), f"{scale!r}") for name, scale in sweep.items()}
    scale_of = {"flipped error": FLIPPED} | sweep
    role = ArmRole(role=Role.SAE, of=of, name=of, scale=1.0)
    arms: dict[str, Intervention] = {UNDER_TEST: replace(under_test, role=role)}
    for name, (rule, fit) in rules.items():
        arms[name] = Substitution(
            at=under_test.hook_name,
            head=head,
            function=partial(_control, under_test, rule),
            description=f"{name} ({fit}) for {under_test.identity}",
            special_tokens=under_test.special_tokens,
            role=ArmRole(
                role=Role.SCALED if name in sweep else Role.CONTROL, of=of, name=name, scale=scale_of.get(name)
            ),
        )
    return arms | {
        name: replace(anchor, role=ArmRole(role=Role.ANCHOR, of=of, name=name))
        for name, anchor in anchors(activations).items()
    }


def anchors(activations: Activations) -> dict[str, Substitution]:
    """No, zero and mean ablation of a hook point. Special tokens are kept; with "changed" the zero is SAELens's."""
    at, head, mean = activations.hook_name, activations.head, activations.mean
    return {
        "none": Substitution(at=at, head=head, function=_nothing, description="nothing"),
        "zero": Substitution(
            at=at,
            head=head,
            function=lambda x, context: torch.zeros_like(x),  # noqa: ARG005
            description="zero",
        ),
        "mean": Substitution(
            at=at,
            head=head,
            function=lambda x, context: mean.to(x).expand_as(x),  # noqa: ARG005
            description=f"mean {digest({'mean': mean})}",
        ),
    }


Rule = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
"""What goes in place of x, in float32, given the error e = x_hat - x of the arm under test; draws at random on the CPU."""


def _control(under_test: Splice, rule: Rule, x: Tensor, context: TokenContext) -> Tensor:
    """A rule at the counted tokens, the arm under test at the others."""
    x_hat, counted = under_test.reconstruct(x), context.counted
    chosen = x[counted].float()
    replaced = rule(chosen, x_hat[counted].float() - chosen, context.generator)
    x_hat = x_hat.clone()
    x_hat[counted] = replaced.to(x_hat.dtype)
    return x_hat


def isotropic(x: Tensor, error: Tensor, generator: torch.Generator | None) -> Tensor:
    """Put x + r u, u uniform on the sphere."""
    return x + _length(error) * _sphere(x, generator)


def norm_kept(x: Tensor, error: Tensor, generator: torch.Generator | None) -> Tensor:
    """At distance r with norm |x|; for r > 2 |x| at distance r with the norm nearest to |x|."""
    r, norm, along = _length(error), _length(x), _unit(x, generator)
    across = _sphere(x, generator)
    across = _unit(across - (across * along).sum(-1, keepdim=True) * along, generator)
    half = r / (2 * norm)  # sin(t / 2)
    # x' - x = 2 |x| sin(t/2) (cos(t/2) v - sin(t/2) x/|x|): exact for small r too, where cos(t) would round to 1
    on_sphere = r * ((1 - half.square()).clamp(min=0).sqrt() * across - half * along)
    return x + torch.where(r <= 2 * norm, on_sphere, -r * along)


def covariance(activations: Activations, x: Tensor, error: Tensor, generator: torch.Generator | None) -> Tensor:
    """Put x + r g/|g|, g ~ N(0, C)."""
    noise = activations.noise(len(x), _given(generator)).to(x)
    return x + _length(error) * _unit(noise, generator)


def mixture(activations: Activations, x: Tensor, error: Tensor, generator: torch.Generator | None) -> Tensor:
    """Put x + r (y - x)/|y - x|, y ~ N(mean, C)."""
    other = activations.mean.to(x) + activations.noise(len(x), _given(generator)).to(x)
    return x + _length(error) * _unit(other - x, generator)


def shuffled(x: Tensor, error: Tensor, generator: torch.Generator | None) -> Tensor:
    """Errors go round in a random cycle, so that no token keeps its own (but one that is alone)."""
    order = torch.randperm(len(x), generator=_given(generator)).to(x.device)
    other = torch.empty_like(error)
    other[order] = error[order.roll(1)]
    return x + _length(error) * _unit(other, generator)


def scaled(scale: float, x: Tensor, error: Tensor, generator: torch.Generator | None) -> Tensor:  # noqa: ARG001
    """Put x + s e; s = -1 flips the error."""
    return x + scale * error


def _nothing(x: Tensor, context: TokenContext) -> Tensor:  # noqa: ARG001
    return x


def _length(vectors: Tensor) -> Float[Tensor, "tokens 1"]:
    return vectors.norm(dim=-1, keepdim=True)


def _sphere(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform on the sphere: normal draws, normalised."""
    draws = torch.randn(like.shape, generator=_given(generator)).to(like)
    return draws / _length(draws)


def _unit(vectors: Tensor, generator: torch.Generator | None) -> Tensor:
    """Vectors of length 1, isotropic where there is no direction."""
    length = _length(vectors)
    if (length == 0).any():
        return torch.where(length == 0, _sphere(vectors, generator), vectors / length)
    return vectors / length


def _given(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise ValueError("this control draws at random; give a generator, as in control.on(model, torch.Generator())")
    return generator
