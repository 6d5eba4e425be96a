"""What a model does on stimuli: scores of target words under an intervention, and what the features of an SAE do.

    log_prob(w | s) = sum_k log p(w_k | s w_1 ... w_{k-1})             over the tokens of the word; logits likewise are summed

Words share prefixes, and a sequence scores all its own beginnings, so that one pass is needed for each prefix that no other
begins with. Sequences of one length go together: nothing is padded. An intervention acts at the stimulus and, where a word has
several tokens, at those before its last.

    feature      f_i                                                   as hooked at hook_sae_acts_post
    pair         ||f_i f_j ((v_i * v_j) W_1 D) W_2||                   what it writes, gates as they are (`attribution`)
    secondary    a feature of the secondary SAE                        as hooked at hook_secondary_acts_post

Each is averaged over the counted tokens of a stimulus (not special, not in position 0), or taken at its last token.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import NFMPaths, PathWeights, attach_secondary
from sae_nfm.attribution import TokenPairs, norms, reading, reads_of
from sae_nfm.common import ShortRepr
from sae_nfm.experiments.factorial.results import Kind
from sae_nfm.experiments.factorial.stimuli import StimulusSet
from sae_nfm.interventions import Intervention, counted_tokens
from sae_nfm.kernels import PAIRED, top_n
from sae_nfm.models import LanguageModel, SharedPrefix, check_finite, device_of, keeping, splice
from sae_nfm.stats import SIGNS, Cells, Floats, Half, effect_t

Scale = Literal["log_prob", "prob", "logit"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Pool = Literal["mean", "last"]
STRONGEST = 32
"""Features of a token whose pairs are looked at: the strongest that the interaction path reads."""
Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TokenizedStimuli:
    """A stimulus set in a model's tokens."""

    prompts: tuple[Ids, ...]
    """Token ids of each stimulus, BOS first where the model wants one."""
    words: tuple[Ids, ...]
    """Token ids of each target word, as it follows a space."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Scores(ShortRepr):
    """Scores of every word after every stimulus, [items, words] each."""

    log_prob: Floats
    """Natural logarithm of the word's probability."""
    prob: Floats
    logit: Floats
    """Sum of its tokens' logits."""

    def less(self, baseline: "Scores") -> dict[Scale, Floats]:
        """The changes, by scale."""
        return {scale: getattr(self, scale) - getattr(baseline, scale) for scale in SCALES}


def tokenized(model: LanguageModel, stimuli: StimulusSet, *, prepend_bos: bool = True) -> TokenizedStimuli:
    """Stimuli and words as token ids of the model's tokenizer.

    Raises:
        ValueError: without a tokenizer, for two words of the same tokens, a word that is not tokenized by itself, or a stimulus
            that does not fit.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, and stimuli are text; load the model with one")

    def ids(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    start = (tokenizer.bos_token_id,) if prepend_bos and tokenizer.bos_token_id is not None else ()
    prompts, words = tuple(start + ids(sentence) for sentence in stimuli.sentences), list[Ids]()
    before = ids(stimuli.sentences[0])
    for word in stimuli.words:
        whole = ids(f"{stimuli.sentences[0]} {word}")
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ValueError(f"the word {word!r} is merged with what comes before it by this tokenizer; leave it out")
        words.append(whole[len(before) :])
        if words[-1] in words[:-1]:
            other = stimuli.words[words.index(words[-1])]
            raise ValueError(f"the words {other!r} and {word!r} have the same tokens; leave one out")
    shape: Any = getattr(model, "cfg", None) or getattr(model.model, "config", None)
    limit = getattr(shape, "n_ctx", None) or getattr(shape, "max_position_embeddings", None)
    longest = max(map(len, prompts)) + max(map(len, words)) - 1
    if limit is not None and longest > limit:
        raise ValueError(f"the longest stimulus has {longest} tokens, but the model reads at most {limit}; shorten it")
    return TokenizedStimuli(prompts=prompts, words=tuple(words))


class WordScorer:
    """Scores words after prompts on one model, under one intervention after another."""

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Ids], words: Sequence[Ids], batch_rows: int = 64
    ) -> None:
        self._model, self._shape = model, (len(prompts), len(words))
        prefixes = {word[:k] for word in words for k in range(len(word))}
        leaves = sorted(prefixes - {prefix[:k] for prefix in prefixes for k in range(len(prefix))})
        self._entries = _entries(words, leaves)
        by_length = defaultdict[int, list[tuple[int, int]]](list)
        for item, prompt in enumerate(prompts):
            for leaf, prefix in enumerate(leaves):
                by_length[len(prompt) + len(prefix)].append((item, leaf))
        self._batches: list[tuple[list[tuple[int, int]], Tensor]] = []
        for some in (jobs[i : i + batch_rows] for jobs in by_length.values() for i in range(0, len(jobs), batch_rows)):
            tokens = torch.tensor([prompts[item] + leaves[leaf] for item, leaf in some], device=device_of(model))
            self._batches.append((some, tokens))
        self._prefixes: dict[str, list[SharedPrefix]] = {}
        self._ends = [len(prompt) - 1 for prompt in prompts]

    @torch.no_grad()
    def scores(self, intervention: Intervention, name: str = "this intervention") -> Scores:
        """The scores under an intervention; a ValueError with its name where the logits are not finite."""
        log_prob, logit = (np.zeros(self._shape) for _ in range(2))
        at = intervention.hook_name
        prefixes = self._prefixes.setdefault(at, [SharedPrefix(self._model, [at]) for _ in self._batches])
        with intervention.on(self._model):
            for (jobs, tokens), prefix in zip(self._batches, prefixes, strict=True):
                with prefix.shared(at):
                    logits: Tensor = self._model(tokens)
                for (item, leaf), row in zip(jobs, logits, strict=True):
                    depth, token, word = self._entries[leaf]
                    ahead = row[self._ends[item] :][: int(depth.max()) + 1].float()
                    if not ahead.isfinite().all():
                        raise ValueError(
                            f"the model's logits are not finite under {name!r}, for stimulus {item} of the held-out half; clamp "
                            "at less, or load the model in a data type of wider range (bfloat16 or float32)"
                        )
                    for out, values in ((logit, ahead), (log_prob, ahead.log_softmax(-1))):
                        found = values[depth, token].double().cpu().numpy()
                        out[item] += np.bincount(word, found, minlength=self._shape[1])
        return Scores(log_prob=log_prob, prob=np.exp(log_prob), logit=logit)


def _entries(words: Sequence[Ids], leaves: list[Ids]) -> list[tuple[Tensor, Tensor, np.ndarray]]:
    """For each leaf the tokens that are scored on it: how many of the word's come before, which token, of which word."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in leaves]
    for number, word in enumerate(words):
        for depth, token in enumerate(word):
            leaf = next(i for i, prefix in enumerate(leaves) if prefix[:depth] == word[:depth])
            found[leaf].append((depth, token, number))
    columns = [np.array(entries, dtype=np.int64).reshape(-1, 3).T for entries in found]
    return [(torch.from_numpy(depth.copy()), torch.from_numpy(token.copy()), word) for depth, token, word in columns]


@dataclass(frozen=True, kw_only=True, repr=False)
class Candidates(ShortRepr):
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
        return replace(
            self,
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
        own, nearest = set(self.indices[column]), map(int, np.argsort(distance, kind="stable"))
        return next((i for i in nearest if i not in taken and not own & set(self.indices[i])), None)

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

    Of each token the pairs of its `STRONGEST` features are looked at, so nothing is d_sae^2. Of equally frequent pairs those of
    lower feature numbers are kept.
    """
    if not isinstance(sae, NFMPaths) or sae.cfg.head not in PAIRED:
        return None
    weights, parts, counts = PathWeights.of(sae), list[np.ndarray](), np.zeros(len(prompts))
    for items, tokens, counted in _batches(model, prompts):
        seen = dict[str, Any]()
        with splice(model, sae) as found, found.hooks(reading(sae, seen)):
            model(tokens)
        counts[items] = counted.sum(1).cpu().numpy()
        flat = counted.flatten()
        reads = reads_of(sae, seen).of(flat)
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
    """Mean activation of every secondary feature over the counted tokens of each stimulus, under an intervention of `sae`.

    The intervention attaches the secondary SAE, and no part of it clamps secondary features.
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
        check_finite(acts[counted], counted, "the SAE's features, nothing edited,", items[0])
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
    total = (acts.to_dense() * counted[..., None]).sum(1, dtype=torch.float64)
    return (total / counted.sum(1, keepdim=True).clamp(min=1)).cpu().numpy()


def _batches(model: LanguageModel, prompts: Sequence[Ids]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Stimuli of one length together: their numbers, tokens and which tokens count."""
    for length in sorted({len(prompt) for prompt in prompts}):
        same = [item for item, prompt in enumerate(prompts) if len(prompt) == length]
        for first in range(0, len(same), 64):
            items = same[first : first + 64]
            tokens = torch.tensor([prompts[item] for item in items], device=device_of(model))
            yield items, tokens, counted_tokens(model, tokens)
