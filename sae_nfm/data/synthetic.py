"""Activations whose features are known: sparse sums of unit directions, with a hierarchy, and products of planted pairs.

    x = sum_i f_i d_i + sum_(i,j) f_i f_j d_ij             f_i = 0, or max(0, 1 + spread z) with z normal where feature i fires

    rates        P(feature of rank r fires) = c / r^zipf_exponent, c from the mean number of active features a sample
    children     the rarest features; each fires only where its parent does, another feature at least twice as frequent
    pairs        both features of a pair are made to fire together, besides what they do by themselves, at `pair_rate`;
                 the d_ij are random directions as long as the products' share of the variance asks for

Dictionary, sampling and hierarchy are SAELens's (`sae_lens.synthetic`). Everything is set by seeds: `config.seed` makes the
features, the seed of a sample draws it.

Source: SynthSAEBench (SAELens), whose settings are linear; the planted products are this package's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, HierarchyNode, hierarchy_modifier
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_nfm.common import ShortRepr, check_numbers

CALIBRATION_ROWS = 2**15
"""Samples that the length of the planted directions is read from: their share of the variance is right to about 2 %."""
TRUTH, CALIBRATION, SAMPLES = range(3)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What there is to find."""

    d_in: int = 128
    """Dimensions of an activation."""
    features: int = 1024
    """True features."""
    mean_l0: float = 11.0
    """Mean number of active features a sample."""
    zipf_exponent: float = 0.5
    """Steepness of the firing rates: 0 makes all equal."""
    children: float = 0.5
    """Share of the features that fire only where their parent does."""
    spread: float = 0.3
    """Standard deviation of a firing feature's activation, whose mean is 1."""
    pairs: int = 0
    """Planted products; no feature is in two, none is a child."""
    pair_rate: float = 0.0
    """Rate at which the two features of a pair are made to fire together."""
    pair_share: float = 0.0
    """Products' share of the variance, fraction."""
    seed: int = 0
    """Of directions, parents and pairs."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if (self.pairs > 0) != (self.pair_share > 0) or 2 * self.pairs > self.features - self.n_children:
            raise ValueError(
                f"pairs is {self.pairs} and pair_share {self.pair_share}; give both or neither, and at most half as many pairs "
                f"as there are features without a parent, {self.features - self.n_children}"
            )

    @property
    def n_children(self) -> int:
        """Features that have a parent."""
        return round(self.children * self.features)


IDENTIFIED = SyntheticConfig()
"""Features that a TopK SAE with k = 12 finds; linear."""
NOT_IDENTIFIED = SyntheticConfig(mean_l0=15.5, pairs=128, pair_rate=0.01, pair_share=0.1)
"""Features that no SAE with k = 16 finds: a better reconstruction of them is one of noise."""
EASIER = SyntheticConfig(d_in=256, mean_l0=9.2, pairs=64, pair_rate=0.01, pair_share=0.1)
"""Twice as many dimensions, fewer active features (k = 16), products among them."""


class Samples(NamedTuple):
    """Activations and the truth about them."""

    x: Float[Tensor, "rows d_in"]
    acts: Float[Tensor, "rows features"]


@dataclass(frozen=True, kw_only=True, repr=False)
class SyntheticData(ShortRepr):
    """The truth, and samples of it."""

    config: SyntheticConfig
    dictionary: FeatureDictionary
    rates: Float[Tensor, " features"]
    """How often each feature fires, in falling order but for the features of pairs."""
    parents: Int[Tensor, " features"]
    """Each feature's parent; -1 without."""
    pairs: Int[Tensor, "pairs 2"]
    pair_directions: Float[Tensor, "pairs d_in"]
    """What one unit of a pair's product writes."""
    generator: ActivationGenerator

    @classmethod
    def of(cls, config: SyntheticConfig) -> "SyntheticData":
        """The truth that a configuration describes.

        Raises:
            ValueError: when features would have to fire more often than always, or a child has no parent to choose.
        """
        draw = np.random.default_rng([TRUTH, config.seed])
        own = np.arange(1, config.features + 1) ** -float(config.zipf_exponent)
        pairs = draw.permutation(config.features - config.n_children)[: 2 * config.pairs]
        left = config.mean_l0 - config.pair_rate * len(pairs)
        own *= left / (own.sum() - config.pair_rate * own[pairs].sum())
        if not 0 < own[0] <= 1:
            raise ValueError(
                f"features of mean_l0 {config.mean_l0} would fire at rates of up to {own[0]:.3g}, not from 0 to 1; change "
                "mean_l0, features, zipf_exponent, or pairs and pair_rate"
            )
        rates = own.copy()
        rates[pairs] += config.pair_rate * (1 - own[pairs])
        parents, given_parent = np.full(config.features, -1), own.copy()
        for child in range(config.features - config.n_children, config.features):
            possible = np.flatnonzero(rates[: config.features - config.n_children] >= 2 * rates[child])
            if not len(possible):
                raise ValueError(
                    f"no feature fires twice as often as feature {child}, which is to be a child; raise zipf_exponent = "
                    f"{config.zipf_exponent}, or lower children = {config.children}"
                )
            parents[child] = draw.choice(possible)
            given_parent[child] = own[child] / rates[parents[child]]
        dictionary = FeatureDictionary(config.features, config.d_in, initializer=None, seed=_seed(TRUTH, config.seed))
        directions = torch.from_numpy(draw.standard_normal((config.pairs, config.d_in))).float()
        data = cls(
            config=config,
            dictionary=dictionary.requires_grad_(False),
            rates=torch.from_numpy(rates).float(),
            parents=torch.from_numpy(parents),
            pairs=torch.from_numpy(pairs.reshape(-1, 2)),
            pair_directions=directions / directions.norm(dim=-1, keepdim=True),
            generator=ActivationGenerator(
                config.features,
                torch.from_numpy(given_parent).float(),
                std_firing_magnitudes=config.spread,
                modify_activations=[
                    _fire_together(config, torch.from_numpy(pairs.reshape(-1, 2))),
                    hierarchy_modifier(_forest(parents)),
                ],
            ),
        )
        if config.pairs:
            acts = data._acts(CALIBRATION_ROWS, _seed(CALIBRATION, config.seed))
            linear, products = (part.var(0).sum() for part in data.parts(acts))
            data.pair_directions.mul_((config.pair_share / (1 - config.pair_share) * linear / products).sqrt())
        return data

    @property
    def directions(self) -> Float[Tensor, "features d_in"]:
        """d_i, of length 1."""
        return self.dictionary.feature_vectors

    def parts(
        self, acts: Float[Tensor, "rows features"]
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_in"]]:
        """What features, and what the products of pairs write."""
        return self.dictionary(acts), acts[:, self.pairs].prod(-1) @ self.pair_directions

    def batches(self, rows: int, seed: int) -> Iterator[Samples]:
        """Samples without end, `rows` at a time; another seed draws others of the same truth."""
        number = 0
        while True:
            acts = self._acts(rows, _seed(SAMPLES, self.config.seed, seed, number))
            yield Samples(sum(self.parts(acts)), acts)  # pyright: ignore[reportArgumentType]
            number += 1

    def sample(self, rows: int, seed: int) -> Samples:
        """The first batch of that seed."""
        return next(self.batches(rows, seed))

    def _acts(self, rows: int, seed: int) -> Tensor:
        with temporary_seed(seed):
            return self.generator.sample(rows)


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _fire_together(config: SyntheticConfig, pairs: Tensor):
    """Make both features of a pair fire, each as strong as it happens to be, at the pair's rate."""

    def modifier(acts: Tensor) -> Tensor:
        rows, which = (torch.rand(len(acts), len(pairs)) < config.pair_rate).nonzero(as_tuple=True)
        strength = (1 + config.spread * torch.randn(len(rows), 2)).relu()
        members = pairs[which]
        acts[rows[:, None], members] = torch.where(
            acts[rows[:, None], members] > 0, acts[rows[:, None], members], strength
        )
        return acts

    return modifier


def _forest(parents: np.ndarray) -> list[HierarchyNode]:
    children = {
        parent: [HierarchyNode(int(i)) for i in np.flatnonzero(parents == parent)] for parent in set(parents) - {-1}
    }
    return [HierarchyNode(int(parent), own) for parent, own in children.items()]
