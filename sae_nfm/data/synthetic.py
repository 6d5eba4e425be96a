"""Activations whose features are known: sparse sums of unit directions, with a hierarchy, and products of planted pairs.

    x = sum_i f_i d_i + sum_(i,j) g(f_i, f_j) d_ij         f_i = 0, or max(0, 1 + spread z) with z normal where feature i fires

    rates        P(feature of rank r fires) = c / r^zipf_exponent, c from the mean number of active features a sample
    children     the rarest features; each fires only where its parent does, another feature at least twice as frequent
    pairs        both features of a pair are made to fire together, besides what they do by themselves, at `pair_rate`;
                 the d_ij are random directions as long as the products' share of the variance asks for
    decoys       pairs that fire together as often and write nothing: what finds pairs by how often they fire finds these too
    g            product f_i f_j, gate f_i [f_j > 0], saturating tanh(f_i f_j); of "square" i = j, and it is f_i^2

Dictionary, sampling and hierarchy are SAELens's (`sae_lens.synthetic`). Everything is set by seeds: `config.seed` makes the
features, the seed of a sample draws it.

Source: SynthSAEBench (SAELens), whose settings are linear; the planted products are this package's.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, HierarchyNode, hierarchy_modifier
from sae_lens.util import temporary_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_nfm.common import ShortRepr, check_choice, check_numbers, quoted, reading, whole

TRUTH_FILENAME = "truth.safetensors"
CALIBRATION_ROWS = 2**15
"""Samples that the length of the planted directions is read from: their share of the variance is right to about 2 %."""
TRUTH, CALIBRATION, SAMPLES = range(3)
PairKind = Literal["product", "gate", "saturating", "square"]
PAIR_FUNCTIONS: Mapping[PairKind, Callable[[Tensor, Tensor], Tensor]] = {
    "product": torch.mul,
    "gate": lambda first, second: first * (second > 0),
    "saturating": lambda first, second: (first * second).tanh(),
    "square": torch.mul,
}
"""g(f_i, f_j), by its name."""


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
    """Planted pairs; no feature is in two, none is a child."""
    pair_rate: float = 0.0
    """Rate at which the two features of a pair are made to fire together."""
    pair_share: float = 0.0
    """Products' share of the variance, fraction."""
    pair_kind: PairKind = "product"
    """What a pair writes; of "square" each has one feature, and its rate is made higher."""
    decoys: int = 0
    """Pairs of other features that fire together at the same rate and write nothing."""
    seed: int = 0
    """Of directions, parents and pairs."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        check_numbers(self)
        check_choice("pair_kind", self.pair_kind, get_args(PairKind))
        free, paired = self.features - self.n_children, 2 * (self.pairs + self.decoys)
        if (self.pairs > 0) != (self.pair_share > 0) or paired > free:
            raise ValueError(
                f"pairs is {self.pairs}, decoys {self.decoys} and pair_share {self.pair_share}; give pairs and a share or "
                f"neither, and two features without a parent, of which there are {free}, for each pair and decoy"
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
    """Of "square" a feature and itself."""
    decoys: Int[Tensor, "decoys 2"]
    pair_directions: Float[Tensor, "pairs d_in"]
    """What one unit of g writes."""
    generator: ActivationGenerator

    @classmethod
    def of(cls, config: SyntheticConfig) -> "SyntheticData":
        """The truth that a configuration describes.

        Raises:
            ValueError: when features would have to fire more often than always, or a child has no parent to choose.
        """
        draw = np.random.default_rng([TRUTH, config.seed])
        own = np.arange(1, config.features + 1) ** -float(config.zipf_exponent)
        pairs = draw.permutation(config.features - config.n_children)[: 2 * (config.pairs + config.decoys)]
        pairs = pairs.reshape(-1, 2)
        if config.pair_kind == "square":
            pairs[: config.pairs, 1] = pairs[: config.pairs, 0]
        paired = np.unique(pairs)
        left = config.mean_l0 - config.pair_rate * len(paired)
        own *= left / (own.sum() - config.pair_rate * own[paired].sum())
        if not 0 < own[0] <= 1:
            raise ValueError(
                f"features of mean_l0 {config.mean_l0} would fire at rates of up to {own[0]:.3g}, not from 0 to 1; change "
                "mean_l0, features, zipf_exponent, or pairs and pair_rate"
            )
        rates = own.copy()
        rates[paired] += config.pair_rate * (1 - own[paired])
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
            pairs=torch.from_numpy(pairs[: config.pairs]),
            decoys=torch.from_numpy(pairs[config.pairs :]),
            pair_directions=directions / directions.norm(dim=-1, keepdim=True),
            generator=ActivationGenerator(
                config.features,
                torch.from_numpy(given_parent).float(),
                std_firing_magnitudes=config.spread,
                modify_activations=[
                    _fire_together(config, torch.from_numpy(pairs)),
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
        """What features, and what pairs write."""
        first, second = acts[:, self.pairs].unbind(-1)
        return self.dictionary(acts), PAIR_FUNCTIONS[self.config.pair_kind](first, second) @ self.pair_directions

    def batch(self, rows: int, seed: int, number: int) -> Samples:
        """The batch of a number in `batches`."""
        acts = self._acts(rows, _seed(SAMPLES, self.config.seed, seed, number))
        return Samples(sum(self.parts(acts)), acts)  # pyright: ignore[reportArgumentType]

    def batches(self, rows: int, seed: int) -> Iterator[Samples]:
        """Samples without end, `rows` at a time; another seed draws others of the same truth."""
        return (self.batch(rows, seed, number) for number in itertools.count())

    def sample(self, rows: int, seed: int) -> Samples:
        """The first batch of that seed."""
        return self.batch(rows, seed, 0)

    def _acts(self, rows: int, seed: int) -> Tensor:
        with temporary_seed(seed):
            return self.generator.sample(rows)


@dataclass(frozen=True, kw_only=True, repr=False)
class Truth(ShortRepr):
    """What is known about a folder of samples: `truth.safetensors` in it."""

    directions: Float[Tensor, "features d_in"]
    """What one unit of each feature writes."""
    pairs: Int[Tensor, "pairs 2"]
    """Features of each planted pair; a feature and itself where what it writes is not linear in it."""
    pair_directions: Float[Tensor, "pairs d_in"]
    decoys: Int[Tensor, "decoys 2"]
    """Pairs that fire together as those do and write nothing."""
    held_out_features: Int[Tensor, "samples most"]
    """Features that are active in each held-out sample; -1 behind the last."""
    held_out_acts: Float[Tensor, "samples most"]
    """Their activations."""

    def __post_init__(self) -> None:
        """Refuse what does not belong together."""
        n, d_in = self.directions.shape
        shapes = (self.pair_directions.shape, self.held_out_acts.shape)
        expected = ((len(self.pairs), d_in), self.held_out_features.shape)
        named = torch.cat([self.pairs.flatten(), self.decoys.flatten(), self.held_out_features.flatten()])
        if shapes != expected or (len(named) and (int(named.min()) < -1 or int(named.max()) >= n)):
            raise ValueError(
                f"pair directions and held-out activations have shapes {shapes}, expected {expected}, and features are numbered "
                f"from {int(named.min())} to {int(named.max())}, of {n}"
            )

    @classmethod
    def of(cls, data: SyntheticData, acts: Float[Tensor, "samples features"]) -> "Truth":
        """That of synthetic data, with the activations of held-out samples."""
        most = int((acts > 0).sum(-1).max())
        values, features = acts.topk(most, dim=-1)
        return cls(
            directions=data.directions,
            pairs=data.pairs,
            pair_directions=data.pair_directions,
            decoys=data.decoys,
            held_out_features=torch.where(values > 0, features, -1).int(),
            held_out_acts=values,
        )

    def of_two_features(self) -> "Truth":
        """The same without pairs of a feature and itself."""
        two = self.pairs[:, 0] != self.pairs[:, 1]
        return replace(self, pairs=self.pairs[two], pair_directions=self.pair_directions[two])

    def acts(self) -> Float[Tensor, "samples features"]:
        """Activations of the held-out samples."""
        dense = torch.zeros(len(self.held_out_acts), len(self.directions) + 1)
        dense.scatter_(1, self.held_out_features.long() % (len(self.directions) + 1), self.held_out_acts)
        return dense[:, :-1]

    def save(self, folder: Path) -> None:
        """Write `truth.safetensors`."""
        tensors = {field.name: getattr(self, field.name).detach().contiguous() for field in fields(self)}
        with whole(folder / TRUTH_FILENAME) as partial:
            save_file(tensors, partial)

    @classmethod
    def load(cls, folder: Path) -> "Truth":
        """Read it.

        Raises a FileNotFoundError where there is none, a ValueError for other tensors.
        """
        path = folder / TRUTH_FILENAME
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {quoted(path)}; give a folder that `sae-nfm synthetic` wrote, or save a `data.Truth` there"
            )
        with reading(path):
            tensors = load_file(path)
        if set(tensors) != (names := {field.name for field in fields(cls)}):
            raise ValueError(f"{quoted(path)} has the tensors {sorted(tensors)}; expected {sorted(names)}")
        return cls(**tensors)


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _fire_together(config: SyntheticConfig, pairs: Tensor):
    """Make both features of a pair fire, each as strong as it happens to be, at the pair's rate."""

    def modifier(acts: Tensor) -> Tensor:
        rows, which = (torch.rand(len(acts), len(pairs)) < config.pair_rate).nonzero(as_tuple=True)
        strength = (1 + config.spread * torch.randn(len(rows), 2)).relu()
        members = pairs[which]
        strength[:, 1] = torch.where(members[:, 0] == members[:, 1], strength[:, 0], strength[:, 1])
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
