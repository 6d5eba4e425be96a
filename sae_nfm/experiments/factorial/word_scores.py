"""Scores of target words after stimuli, under any intervention: logits, log-probabilities, probabilities.

    log_prob(w | s) = sum_k log p(w_k | s w_1 ... w_{k-1})        over the tokens of the word; logits likewise are summed

Words share prefixes, and a sequence scores all its own beginnings, so that one pass is needed for each prefix that no other
begins with. Sequences of one length go together: nothing is padded. An intervention acts at the stimulus and, where a word has
several tokens, at those before its last.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sae_nfm.experiments.factorial.stimuli import StimulusSet
from sae_nfm.interventions import Intervention
from sae_nfm.models import LanguageModel, device_of
from sae_nfm.stats import Floats

Scale = Literal["log_prob", "prob", "logit"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TokenizedStimuli:
    """A stimulus set in a model's tokens."""

    prompts: tuple[Ids, ...]
    """Token ids of each stimulus, BOS first where the model wants one."""
    words: tuple[Ids, ...]
    """Token ids of each target word, as it follows a space."""


@dataclass(frozen=True, kw_only=True)
class Scores:
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
    """Stimuli and words as token ids.

    Args:
        model: whose tokenizer, and context.
        prepend_bos: whether a prompt begins with BOS.

    Raises:
        ValueError: without a tokenizer, for two words of the same tokens, a word that is not tokenized by itself, or a stimulus
            that does not fit.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, and stimuli are text; load the model with one")

    def ids(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    start = (tokenizer.bos_token_id,) if prepend_bos else ()
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
        leaves = _leaves(words)
        self._entries = _entries(words, leaves)
        by_length = defaultdict[int, list[tuple[int, int]]](list)
        for item, prompt in enumerate(prompts):
            for leaf, prefix in enumerate(leaves):
                by_length[len(prompt) + len(prefix)].append((item, leaf))
        self._batches: list[tuple[list[tuple[int, int]], Tensor]] = []
        for jobs in by_length.values():
            for first in range(0, len(jobs), batch_rows):
                some = jobs[first : first + batch_rows]
                tokens = torch.tensor([prompts[item] + leaves[leaf] for item, leaf in some], device=device_of(model))
                self._batches.append((some, tokens))
        self._ends = [len(prompt) - 1 for prompt in prompts]

    @torch.no_grad()
    def scores(self, intervention: Intervention) -> Scores:
        """The scores with an intervention at work.

        Raises:
            ValueError: when the logits are not finite.
        """
        log_prob, logit = (np.zeros(self._shape) for _ in range(2))
        with intervention.on(self._model):
            for jobs, tokens in self._batches:
                logits: Tensor = self._model(tokens)
                for (item, leaf), row in zip(jobs, logits, strict=True):
                    depth, token, word = self._entries[leaf]
                    ahead = row[self._ends[item] :][: int(depth.max()) + 1].float()
                    if not ahead.isfinite().all():
                        raise ValueError("the model's logits are not finite under this intervention; clamp at less")
                    for out, values in ((logit, ahead), (log_prob, ahead.log_softmax(-1))):
                        found = values[depth, token].double().cpu().numpy()
                        out[item] += np.bincount(word, found, minlength=self._shape[1])
        return Scores(log_prob=log_prob, prob=np.exp(log_prob), logit=logit)


def _leaves(words: Sequence[Ids]) -> list[Ids]:
    """What precedes a token of a word, without those that another begins with."""
    prefixes = {word[:k] for word in words for k in range(len(word))}
    begun = {prefix[:k] for prefix in prefixes for k in range(len(prefix))}
    return sorted(prefixes - begun)


def _entries(words: Sequence[Ids], leaves: list[Ids]) -> list[tuple[Tensor, Tensor, np.ndarray]]:
    """For each leaf the tokens that are scored on it: how many of the word's come before, which token, of which word."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in leaves]
    for number, word in enumerate(words):
        for depth, token in enumerate(word):
            leaf = next(i for i, prefix in enumerate(leaves) if prefix[:depth] == word[:depth])
            found[leaf].append((depth, token, number))
    columns = [np.array(entries, dtype=np.int64).reshape(-1, 3).T for entries in found]
    return [(torch.from_numpy(depth.copy()), torch.from_numpy(token.copy()), word) for depth, token, word in columns]
