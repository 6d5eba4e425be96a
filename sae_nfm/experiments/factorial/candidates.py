"""What the features of an SAE do on stimuli: activations, contributions of pairs, secondary features; candidates and controls.

    feature      f_i                                                   as hooked at hook_sae_acts_post
    pair         ||f_i f_j ((v_i * v_j) W_1 D) W_2||                   what it writes, gates as they are (`attribution`)
    secondary    a feature of the secondary SAE                        as hooked at hook_secondary_acts_post

Each is averaged over the counted tokens of a stimulus (not special, not in position 0), or taken at its last token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import NFMPaths, PathWeights, attach_secondary
from sae_nfm.attribution import TokenPairs, norms, reading, reads_of
from sae_nfm.experiments.factorial.results import Kind
from sae_nfm.experiments.factorial.word_scores import Ids
from sae_nfm.interventions import Intervention, counted_tokens
from sae_nfm.kernels import top_n
from sae_nfm.models import LanguageModel, device_of, keeping, splice
from sae_nfm.stats import SIGNS, Cells, Floats, Half, effect_t

Pool = Literal["mean", "last"]
STRONGEST = 32
"""Features of a token whose pairs are looked at: the strongest that the interaction path reads."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Features, or pairs of them, on stimuli."""

    kind: Kind
    indices: tuple[tuple[int, ...], ...]
    """[candidates], a feature or two."""
    values: Floats
    """[items, candidates], activation or contribution."""
    typical: Floats
    """[candidates], mean activation where active; of a pair the mean of f_i f_j where both are."""
    frequency: Floats
    """[candidates], share of the counted tokens where active."""

    def firing_in(self, half: Half, min_stimuli: int) -> "Candidates":
        """Those that are active in at least so many stimuli of a half."""
        return self.chosen(np.flatnonzero((self.values[half] != 0).sum(0) >= min_stimuli))

    def chosen(self, columns: Any) -> "Candidates":
        """Some of them."""
        return Candidates(
            kind=self.kind,
            indices=tuple(self.indices[int(column)] for column in columns),
            values=self.values[:, columns],
            typical=self.typical[columns],
            frequency=self.frequency[columns],
        )

    def matched(self, column: int, taken: set[int]) -> int | None:
        """The candidate closest in typical activation and frequency (logarithms, in standard deviations), sharing no feature."""
        features = np.log(np.stack([self.typical, self.frequency], axis=1))
        features /= np.where(features.std(0) > 0, features.std(0), 1.0)
        distance = np.square(features - features[column]).sum(1)
        own = set(self.indices[column])
        free = (
            i for i in np.argsort(distance, kind="stable") if int(i) not in taken and not own & set(self.indices[i])
        )
        found = next(free, None)
        return None if found is None else int(found)

    def insensitive(self, half: Half, cells: Cells, taken: set[int]) -> int | None:
        """Of the more frequent half of them the one whose largest |t| of the three effects is smallest on a half."""
        largest = np.max([np.abs(effect_t(self.values[half], cells[half], effect)) for effect in SIGNS], axis=0)
        frequent = self.frequency >= np.median(self.frequency)
        free = (int(i) for i in np.argsort(largest, kind="stable") if frequent[i] and int(i) not in taken)
        return next(free, None)


@torch.no_grad()
def feature_candidates(model: LanguageModel, sae: SAE[Any], prompts: Sequence[Ids], pool: Pool) -> Candidates:
    """All features of an SAE."""
    return _dense(model, sae, prompts, pool, "feature", "hook_sae_acts_post")


@torch.no_grad()
def secondary_candidates(
    model: LanguageModel, sae: SAE[Any], secondary: SAE[Any], prompts: Sequence[Ids], pool: Pool
) -> Candidates:
    """All features of a secondary SAE."""
    with attach_secondary(sae, secondary, error_term=True):
        return _dense(model, sae, prompts, pool, "secondary", "hook_secondary_acts_post")


@torch.no_grad()
def pair_candidates(
    model: LanguageModel, sae: SAE[Any], prompts: Sequence[Ids], pool: Pool, max_pairs: int = 2_000
) -> Candidates | None:
    """The pairs that are active in most stimuli; None for an SAE whose interaction path is no sum over pairs.

    Of each token the pairs of its `STRONGEST` features are looked at, so nothing is d_sae^2.

    Args:
        pool: over the tokens of a stimulus.
        max_pairs: pairs kept; among equally frequent ones those of lower feature numbers.
    """
    if not isinstance(sae, NFMPaths) or sae.cfg.head != "fm":
        return None
    weights, parts, counts = PathWeights.of(sae), list[np.ndarray](), np.zeros(len(prompts))
    for items, tokens, counted in _batches(model, prompts):
        seen = dict[str, Any]()
        with splice(model, sae) as found, found.hooks(reading(sae, seen)):
            model(tokens)
        counts[items] = counted.sum(1).cpu().numpy()
        flat = counted.flatten()
        reads = reads_of(seen).of(flat)
        pairs = TokenPairs.of(top_n(reads.read, min(STRONGEST, reads.read.indices.shape[-1])))
        wrote = norms(pairs, reads.gates, weights)
        row, position = counted.nonzero(as_tuple=True)
        last = position == tokens.shape[1] - 1
        low, high = torch.minimum(pairs.first, pairs.second), torch.maximum(pairs.first, pairs.second)
        item = torch.tensor(items)[row.cpu()].to(low)
        columns = [low * sae.cfg.d_sae + high, item[:, None], wrote, pairs.product, last[:, None]]
        parts.append(torch.stack([c.double().expand_as(wrote)[pairs.fires].cpu() for c in columns]).numpy())
    return _pairs(np.concatenate(parts, axis=1), counts, sae.cfg.d_sae, pool, max_pairs)


def _pairs(columns: np.ndarray, counts: Floats, d_sae: int, pool: Pool, max_pairs: int) -> Candidates:
    """Candidates from rows of (pair, item, norm, product, whether in the last position), one for each token and pair."""
    names, pair = np.unique(columns[0].astype(np.int64), return_inverse=True)
    item, n_items = columns[1].astype(np.int64), len(counts)
    in_items = np.bincount(np.unique(pair * n_items + item) // n_items, minlength=len(names))
    kept = np.sort(np.argsort(-in_items, kind="stable")[:max_pairs])
    position = np.full(len(names), -1)
    position[kept] = np.arange(len(kept))
    mine = position[pair] >= 0
    pair, item, norm, product, last = position[pair][mine], item[mine], *columns[2:, mine]
    weight = norm * last if pool == "last" else norm / counts[item]
    sums: Floats = np.bincount(item * len(kept) + pair, weight, minlength=n_items * len(kept)).astype(np.float64)
    fired = np.bincount(pair, minlength=len(kept))
    return Candidates(
        kind="pair",
        indices=tuple((int(name // d_sae), int(name % d_sae)) for name in names[kept]),
        values=sums.reshape(n_items, len(kept)),
        typical=np.bincount(pair, product, minlength=len(kept)) / fired,
        frequency=fired / counts.sum(),
    )


@torch.no_grad()
def secondary_activations(
    model: LanguageModel, sae: NFMPaths, intervention: Intervention, prompts: Sequence[Ids]
) -> Floats:
    """Mean activation of every secondary feature over the counted tokens of each stimulus, under an intervention.

    Args:
        sae: the primary of the intervention, which attaches the secondary SAE.
        intervention: of which no part clamps secondary features.
    """
    seen, found = dict[str, Tensor](), dict[int, np.ndarray]()
    hook_point: Any = sae.hook_secondary_acts_post  # pyright: ignore[reportAttributeAccessIssue] (made by name)

    def keep(module: Any, args: Any, value: Tensor) -> None:  # noqa: ARG001
        seen["acts"] = value

    handle = hook_point.register_forward_hook(keep)
    try:
        with intervention.on(model):
            for items, tokens, counted in _batches(model, prompts):
                model(tokens)
                found |= dict(zip(items, _pooled(seen["acts"], counted, "mean"), strict=True))
    finally:
        handle.remove()
    return np.stack([found[item] for item in range(len(prompts))])


def _dense(
    model: LanguageModel, sae: SAE[Any], prompts: Sequence[Ids], pool: Pool, kind: Kind, hook_point: str
) -> Candidates:
    values, sums = dict[int, np.ndarray](), list[tuple[Floats, Floats, int]]()
    for items, tokens, counted in _batches(model, prompts):
        seen = dict[str, Tensor]()
        with splice(model, sae) as found, found.hooks({hook_point: keeping(seen, "acts")}):
            model(tokens)
        acts = seen["acts"].to_dense()
        values |= dict(zip(items, _pooled(acts, counted, pool), strict=True))
        here = acts[counted].double()
        sums.append((here.sum(0).cpu().numpy(), (here != 0).sum(0).double().cpu().numpy(), len(here)))
    total, fired, tokens_read = (sum(part[i] for part in sums) for i in range(3))
    n = len(np.asarray(total))
    return Candidates(
        kind=kind,
        indices=tuple((i,) for i in range(n)),
        values=np.stack([values[item] for item in range(len(prompts))]),
        typical=np.divide(total, fired, out=np.zeros(n), where=np.asarray(fired) > 0),
        frequency=np.asarray(fired) / tokens_read,
    )


def _pooled(acts: Tensor, counted: Tensor, pool: Pool) -> np.ndarray:
    """[rows, width] of activations [rows, pos, width]."""
    if pool == "last":
        return acts[:, -1].double().cpu().numpy()
    mean = (acts.to_dense() * counted[..., None]).sum(1, dtype=torch.float64) / counted.sum(1, keepdim=True).clamp(
        min=1
    )
    return mean.cpu().numpy()


def _batches(
    model: LanguageModel, prompts: Sequence[Ids], rows: int = 64
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Stimuli of one length together: their numbers, tokens and which tokens count."""
    for length in sorted({len(prompt) for prompt in prompts}):
        same = [item for item, prompt in enumerate(prompts) if len(prompt) == length]
        for first in range(0, len(same), rows):
            items = same[first : first + rows]
            tokens = torch.tensor([prompts[item] for item in items], device=device_of(model))
            yield items, tokens, counted_tokens(model, tokens)
