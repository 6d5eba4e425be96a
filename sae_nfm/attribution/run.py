"""The job of `sae-nfm attribute`: which features interact on a token, what that writes, where else, and what without it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_nfm.architectures import PathWeights, attributable
from sae_nfm.attribution.direct_logits import Target
from sae_nfm.attribution.graph import graph_layout, interaction_graph
from sae_nfm.attribution.pair_effects import PromptRun, RankBy, attribute_token, run_prompt
from sae_nfm.attribution.pair_table import CAPACITY, Corpus, first_reads, pair_controls, pair_sums, top_contexts
from sae_nfm.attribution.results import DRAWN, Attribution, CorpusAttribution, TokenAttribution
from sae_nfm.common import check_numbers, check_positive, check_writable, provenance
from sae_nfm.common.options import PACKAGED_SAE, HeldOutOptions, SavedSAEOptions
from sae_nfm.data import held_out_corpus, told_of_text
from sae_nfm.loading import load_sae
from sae_nfm.models import LanguageModel, check_context, check_device, device_of, model_of, token_text


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(SavedSAEOptions, HeldOutOptions):
    """Which SAE, on what, effects on what."""

    prompt: str | None = None
    """Text whose tokens are looked at; leave it out with --corpus."""
    sae: str = PACKAGED_SAE
    """Folder of a saved SAE with pairs (joint_nfm or sequential_nfm, head fm), or release:sae_id of a released one."""
    token: tuple[str, ...] = ("-1",)
    """Tokens of the prompt: positions (BOS is 0, the last one -1), texts such as " good" (wherever they stand), or all."""
    logit: str | None = None
    """Token on whose logit effects are measured, less the mean of all logits, such as " good". Without it: the one the model
    thinks most likely next; with --corpus no effects."""
    against: str | None = None
    """Measure the difference to this token's logit in place of the mean."""
    rank_by: RankBy = "norm"
    """Which pairs of a token to show: by norm of what they write, or by absolute direct or gradient effect."""
    top: int = 8
    """Pairs to show, and features of the linear path."""
    corpus: bool = False
    """Look at pairs over held-out text instead of a prompt."""
    n_tokens: int = 20_000
    """With --corpus: tokens to look at."""
    batch_rows: int = 16
    """Rows in a forward pass."""
    capacity: int = CAPACITY
    """With --corpus: pairs kept in memory. Where more fire, those of most energy are kept and counted in a second pass."""
    control_tokens: int = 10_000
    """With --corpus: tokens on which pair strength is compared with weights and with co-occurrence."""
    n_permutations: int = 2
    """With --corpus: how often the rows of V are permuted for the null distribution."""
    graph: str | None = None
    """With --corpus: .graphml or .json file for the graph of features and pairs."""
    graph_pairs: int = 500
    """Pairs in it, those of most energy."""
    seed: int = 0
    """Of the permutations."""
    save: str | None = None
    """JSON file for every number, with configuration and versions."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded."""
        check_positive(self, "top", "n_tokens", "batch_rows", "capacity", "control_tokens", "graph_pairs")
        check_numbers(self)
        if self.n_permutations < 0:
            raise ValueError(f"n_permutations is {self.n_permutations}; give 0 or more")
        if (self.prompt is None) != self.corpus:
            raise ValueError("give a prompt, or --corpus for held-out text; one of the two")
        if self.against is not None and self.logit is None:
            raise ValueError(f"against is {self.against!r}, but there is no --logit to compare with it; give both")
        if self.graph is not None and not self.corpus:
            raise ValueError("a graph is made of a corpus; give --corpus, or leave --graph out")
        if self.graph is not None and not self.graph.endswith((".graphml", ".json")):
            raise ValueError(f"the graph {self.graph!r} is neither .graphml nor .json; give a name that ends in one")


def attribute(config: AttributeConfig, *, command: str | None = None) -> Attribution:
    """Attribute a prompt or a corpus; writes `config.save` and `config.graph` where those are given.

    Raises:
        ValueError, FileNotFoundError: for an SAE, model, token or data set that does not work; nothing is written.
    """
    check_device(config.device)
    check_writable(config.save)
    check_writable(config.graph)
    sae = load_sae(config.sae, device=config.device).eval()
    attributable(sae)
    model, _ = model_of(sae, config.device, model_name=config.model)
    tokens = _corpus_tokens(model, sae, config) if config.prompt is None else _prompt_tokens(model, config.prompt)
    found = Attribution(
        sae=config.sae,
        hook_name=str(sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name),
        tokens=() if config.corpus else _prompt(model, sae, tokens[0], config),
        corpus=_corpus(model, sae, tokens, config) if config.corpus else None,
        provenance=provenance(
            config,
            command=command,
            model_name=config.model or sae.cfg.metadata.model_name,
            tokens_sha256=hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
            text=told_of_text(model, tokens, metadata=sae.cfg.metadata, folder=config.sae, source=config.held_out),
        ),
    )
    if config.graph is not None and found.corpus is not None:
        found.corpus.graph.save(config.graph)
    if config.save is not None:
        found.save(config.save)
    return found


def attribution_table(
    sae: SAE[Any],
    model: LanguageModel,
    text: str,
    *,
    token: str | Sequence[str] = "-1",
    logit: str | None = None,
    against: str | None = None,
    rank_by: RankBy = "norm",
    top: int = 8,
) -> pd.DataFrame:
    """What `sae-nfm attribute` prints of a text, as a data frame: a row for each term of each token. Also `sae_nfm.attribute`.

    Columns:
        position, token, target: which token, and what effects are on
        kind, term: "path" (all pairs, biases), "pair" or "feature" (of the linear path), and which
        norm, direct, gradient, frozen, free, flipped: as in the table; frozen, free and flipped of pairs only
        promotes, suppresses: tokens, strongest first

    Args:
        token: positions (BOS is 0, the last one -1) or texts, or "all". The others are the command's options.

    Raises a ValueError as the command.
    """
    attributable(sae)
    tokens = (token,) if isinstance(token, str) else tuple(token)
    config = AttributeConfig(prompt=text, token=tokens, logit=logit, against=against, rank_by=rank_by, top=top)
    found = _prompt(model, sae, _prompt_tokens(model, text)[0], config)
    return pd.DataFrame([row for one in found for row in one.rows()])


def _prompt(
    model: LanguageModel, sae: SAE[Any], tokens: torch.Tensor, config: AttributeConfig
) -> tuple[TokenAttribution, ...]:
    run = run_prompt(model, sae, tokens)
    positions = _positions(model, run, config.token)
    return tuple(
        attribute_token(model, sae, run, p, _target(model, config, run, p), top=config.top, rank_by=config.rank_by)
        for p in tqdm(positions, desc="Tokens", disable=len(positions) < 2)
    )


def _corpus(model: LanguageModel, sae: SAE[Any], tokens: torch.Tensor, config: AttributeConfig) -> CorpusAttribution:
    target = None if config.logit is None else _target(model, config, None, 0)
    corpus = Corpus(model, sae, tokens, target=target, batch_rows=config.batch_rows)
    same = ("top", "graph_pairs", "capacity", "control_tokens", "n_permutations", "seed")
    settings = {name: getattr(config, name) for name in same}
    return attribute_corpus(corpus, target=None if target is None else target.name, **settings)


def _target(model: LanguageModel, config: AttributeConfig, run: PromptRun | None, position: int) -> Target:
    """The chosen token's logit, or the likeliest next one's."""
    if run is not None:
        d_vocab = run.logits.shape[-1]
    elif (cfg := getattr(model, "cfg", None)) is not None:
        d_vocab = cfg.d_vocab
    else:
        raise ValueError(
            "effects over a corpus take the direct path, which this kind of model does not have; leave --logit out"
        )
    if config.logit is not None:
        token = _single(model, config.logit)
    else:
        assert run is not None
        token = int(run.logits[position].argmax())
    text = repr(token_text(model, token))
    if config.against is None:
        return Target.logit(token, d_vocab, f"the logit of {text} less the mean logit")
    other = _single(model, config.against)
    return Target.logit(token, d_vocab, f"the logit of {text} less that of {config.against!r}", against=other)


def _positions(model: LanguageModel, run: PromptRun, wanted: Sequence[str]) -> list[int]:
    """Positions by number, text, or all."""
    n, found = len(run.tokens), list[int]()
    texts = [token_text(model, token) for token in run.tokens.tolist()]
    for one in wanted:
        if one == "all":
            found += run.in_place.nonzero()[:, 0].tolist()
        elif one.removeprefix("-").isdigit():
            if not -n <= int(one) < n:
                raise ValueError(f"there is no token {one}: the prompt has {n} tokens; give one from 0 to {n - 1}")
            found.append(int(one) % n)
        elif one in texts:
            found += [place for place, text in enumerate(texts) if text == one]
        else:
            raise ValueError(f"there is no token {one!r} in the prompt; its tokens are {', '.join(map(repr, texts))}")
    return list(dict.fromkeys(found))


def _single(model: LanguageModel, text: str) -> int:
    """The id of a text that is one token."""
    ids = _tokenizer(model).encode(_decoded(text), add_special_tokens=False)
    if len(ids) != 1:
        parts = ", ".join(repr(token_text(model, one)) for one in ids)
        raise ValueError(f"{text!r} is {len(ids)} tokens ({parts}); give a text that is one, mind the space before it")
    return ids[0]


def _prompt_tokens(model: LanguageModel, prompt: str) -> torch.Tensor:
    """[1, pos], with BOS where the tokenizer has one."""
    tokenizer = _tokenizer(model)
    ids = tokenizer.encode(_decoded(prompt), add_special_tokens=False)
    if not ids:
        raise ValueError("the prompt is empty; give a text")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    check_context(model, len(bos) + len(ids))
    return torch.tensor([bos + ids], device=device_of(model))


def _decoded(typed: str) -> str:
    """Text of a command line, which Python cannot read where the locale is ASCII, as UTF-8."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _corpus_tokens(model: LanguageModel, sae: SAE[Any], config: AttributeConfig) -> torch.Tensor:
    return held_out_corpus(
        model,
        sae,
        model_name=config.model,
        dataset_path=config.held_out,
        split=config.split,
        context_size=config.context_size,
        n_tokens=config.n_tokens,
    ).tokens


def _tokenizer(model: LanguageModel) -> Any:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so prompts and tokens cannot be given as text; load it with one")
    return model.tokenizer


def attribute_corpus(
    corpus: Corpus,
    *,
    target: str | None = None,
    top: int = 10,
    graph_pairs: int = 500,
    n_contexts: int = 3,
    capacity: int | None = None,
    control_tokens: int = 10_000,
    n_permutations: int = 2,
    seed: int = 0,
) -> CorpusAttribution:
    """Sums, contexts and controls of a corpus.

    Args:
        target: name of the corpus's target or direction, where it has one.
        top: pairs with contexts.
        n_contexts: tokens for each of the top pairs.
        capacity: see `pair_sums`.
        control_tokens: tokens that the controls hold in memory, with every pair that fires on them.
        n_permutations: permutations of the rows of V for the controls.
    """
    weights, sums = PathWeights.of(corpus.sae), pair_sums(corpus, capacity=capacity)
    keys = np.asarray(sums.table.index[:top], dtype=np.int64)
    contexts = top_contexts(corpus, keys, n=n_contexts)
    reads = first_reads(corpus.batches("Control tokens"), control_tokens)
    graph = interaction_graph(sums, weights, n=max(top, graph_pairs), directed=target is not None)
    return CorpusAttribution(
        tokens=sums.tokens,
        pairs=len(sums.table),
        firings=sums.firings,
        complete=sums.complete,
        slack_share=sums.slack / sums.energy if sums.energy else 0.0,
        target=target,
        graph=graph,
        contexts=tuple(contexts[int(key)] for key in keys),
        controls=pair_controls(reads, weights, seed=seed, n_permutations=n_permutations),
        places=graph_layout(graph.edges[:DRAWN]) if graph.edges else {},
    )
