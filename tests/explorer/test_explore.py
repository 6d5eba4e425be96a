"""An explorer's figures against obvious loops over tokens and features, on tiny models and SAEs of several kinds."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import D_MODEL, D_SAE, HOOK, inference_sae, random_sae, tiny_model, training_config
from pair_inputs import pair_sae, pairs_by_loop, some_tokens
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tiny_models import write_checkpoint

from sae_nfm import demo
from sae_nfm.attribution.pair_effects import run_prompt
from sae_nfm.explorer.assemble import ExplorerSizes
from sae_nfm.explorer.results import Contexts, Explorer
from sae_nfm.explorer.run import ExploreConfig, explore, run_explore
from sae_nfm.interventions.intervene import Splice
from sae_nfm.models.load import load_model

SIZES = ExplorerSizes(
    contexts=3, quantile_contexts=4, before=3, after=2, bins=6, logits=3, pairs=12, partners=2, pair_contexts=3,
    pair_logits=5, batch_rows=2,
)  # fmt: skip
KINDS = ("joint_nfm", "joint_nfm, n = k", "sequential_nfm", "topk", "standard")
UNIT = {"dtype": "float64", "d_in": D_MODEL, "d_sae": D_SAE, "metadata": SAEMetadata(model_name="tiny", hook_name=HOOK)}


def sae_of(kind: str) -> SAE[Any]:
    """Random weights in float64, in which the order of sums changes no digit that is kept."""
    if kind in ("topk", "standard"):
        sae = TopKSAE(TopKSAEConfig(k=4, **UNIT)) if kind == "topk" else StandardSAE(StandardSAEConfig(**UNIT))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return sae
    return pair_sae(kind.partition(",")[0], **({"nfm_top_k": None} if "n = k" in kind else {}))


def has_paths(sae: SAE[Any]) -> bool:
    return hasattr(sae, "decode_paths")


def tokens_of() -> torch.Tensor:
    tokens = some_tokens()
    tokens[1, 7] = 0  # a BOS within a row, which is not counted
    return tokens


class Loops:
    """What one kind of SAE does, token by token."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model, self.sae, self.tokens = kind, tiny_model(torch.float64), sae_of(kind), tokens_of()
        with torch.no_grad(), Splice(sae=self.sae).on(self.model) as trace:
            _, cache = self.model.run_with_cache(self.tokens, names_filter="ln_final.hook_scale")
        self.scale = cache["ln_final.hook_scale"]
        self.acts = trace.acts.clone()
        self.acts[:, 0] = 0
        self.acts[1, 7] = 0
        self.reads = [run_prompt(self.model, self.sae, row).reads for row in self.tokens] if has_paths(self.sae) else []
        self.pairs = {
            (row, at): pairs_by_loop(self.sae, self.reads[row], at) for row, at in self.counted() if self.reads
        }
        self.explorer = explore(
            self.model, self.sae, self.tokens, name=kind, sizes=SIZES, settings={}, show_progress=False
        )

    def firings(self, feature: int) -> list[tuple[float, int, int]]:
        """(activation, row, position), descending; equal ones in the order of the text."""
        found = [
            (float(self.acts[row, at, feature]), row, at)
            for row, at in self.counted()
            if self.acts[row, at, feature] > 0
        ]
        return sorted(found, key=lambda one: -one[0])

    def counted(self) -> Iterator[tuple[int, int]]:
        for row, at in itertools.product(range(len(self.tokens)), range(1, self.tokens.shape[1])):
            if (row, at) != (1, 7):
                yield row, at

    def written(self, acts: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the paths write because of some features, without pairs of them."""
        if not has_paths(self.sae):
            return {"direct": self.sae.decode(acts) - self.sae.decode(0 * acts)}
        parts, nothing = (self.sae.decode_paths(one) for one in (acts, 0 * acts))
        return {path: getattr(parts, path) - getattr(nothing, path) for path in ("direct", "linear", "square")}

    def context(self, row: int, at: int, feature: int) -> tuple[tuple[str, ...], int, dict[int, int]]:
        """Texts of the window, where its token stands in it, and the marks."""
        window = range(max(0, at - SIZES.before), min(self.tokens.shape[1], at + SIZES.after + 1))
        texts = tuple(self.model.tokenizer.decode([int(self.tokens[row, one])]) for one in window)
        largest = float(self.acts[:, :, feature].max())
        fires = {one - at: float(self.acts[row, one, feature]) / largest for one in window}
        return texts, at - window.start, {at: max(1, round(255 * part)) for at, part in fires.items() if part > 0}


@pytest.fixture(scope="module", params=KINDS)
def loops(request) -> Loops:
    return Loops(request.param)


def window_of(explorer: Explorer, position: int) -> tuple[tuple[str, ...], int]:
    """A window as the page shows it."""
    starts = explorer.stream.row_starts.tolist()
    start, stop = next((a, b) for a, b in itertools.pairwise(starts) if a <= position < b)
    window = range(max(start, position - explorer.window[0]), min(stop, position + explorer.window[1] + 1))
    return tuple(explorer.vocab[explorer.stream.ids[place]] for place in window), position - window.start


def shown(explorer: Explorer, contexts: Contexts, feature: int) -> list[Any]:
    return [
        (*window_of(explorer, int(contexts.position[one])), dict(contexts.marks(one))) for one in contexts.of(feature)
    ]


def test_the_strongest_contexts_lie_apart_and_have_every_mark(loops):
    for feature in range(D_SAE):
        taken: list[tuple[int, int]] = []
        for _, row, at in loops.firings(feature):
            near = any(row == one and -SIZES.before <= at - other <= SIZES.after for one, other in taken)
            if not near and len(taken) < SIZES.contexts:
                taken.append((row, at))
        expected = [loops.context(row, at, feature) for row, at in taken]
        assert shown(loops.explorer, loops.explorer.contexts, feature) == expected


def test_quantile_contexts_are_the_middles_of_equal_parts_of_all_firings(loops):
    for feature in range(D_SAE):
        firings = loops.firings(feature)
        ranks = sorted({int((part + 0.5) * len(firings) / 4) for part in range(4)}) if firings else []
        expected = [loops.context(*firings[rank][1:], feature) for rank in ranks]
        assert shown(loops.explorer, loops.explorer.quantile_contexts, feature) == expected


def test_counts_maxima_means_and_histograms(loops):
    figures = loops.explorer.features
    for feature in range(D_SAE):
        values = [value for value, _, _ in loops.firings(feature)]
        assert figures.tokens[feature] == len(values)
        assert figures.max[feature] == pytest.approx(max(values, default=0), rel=1e-6)  # kept in float32
        assert figures.mean[feature] == pytest.approx(sum(values) / max(1, len(values)), rel=1e-6)
        bins = [sum(b < 6 * (value / max(values)) <= b + 1 for value in values) for b in range(6)]
        assert figures.histogram[feature].tolist() == bins
    assert loops.explorer.tokens == len(list(loops.counted()))
    assert loops.explorer.documents == len(loops.tokens)


def energies(loops: Loops) -> dict[str, np.ndarray]:
    """Sum over tokens of the squared norm of each feature's contribution to each path; "both": direct and linear as one."""
    found = {path: np.zeros(D_SAE) for path in ("direct", "linear", "square", "interaction", "both")}
    present = has_paths(loops.sae)
    for row, at in loops.counted():
        acts = loops.acts[row, at]
        n = getattr(loops.sae.cfg, "nfm_top_k", None) or D_SAE
        read = set(acts.topk(n).indices.tolist())
        features = acts.nonzero()[:, 0]
        alone = torch.zeros(len(features), D_SAE, dtype=acts.dtype)
        alone[range(len(features)), features] = acts[features]
        parts = loops.written(alone)
        if present:
            is_read = torch.tensor([float(feature in read) for feature in features.tolist()])
            parts["linear"] = parts["linear"] * is_read[:, None]
            parts["both"] = parts["direct"] + parts["linear"]
        for path, part in parts.items():
            found[path][features.numpy()] += part.square().sum(-1).detach().numpy()
        if present:
            for feature, part in half_pairs(loops.pairs[row, at]).items():
                found["interaction"][feature] += float(part.square().sum())
    return found


def half_pairs(pairs: dict[tuple[int, int], torch.Tensor]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for pair, vector in pairs.items():
        for feature in pair:
            found[feature] = found.get(feature, 0) + vector / 2
    return found


def test_shares_are_of_the_root_mean_square_contributions(loops):
    shares, sums = loops.explorer.features.shares, energies(loops)
    expected = {"as trained": ["direct"]}
    if has_paths(loops.sae):
        expected = {"as trained": ["direct", "linear", "square", "interaction"]}
    if loops.kind == "joint_nfm, n = k":
        expected["canonical"] = ["both", "square", "interaction"]
    assert list(shares) == list(expected)
    for gauge, paths in expected.items():
        sizes = {path: np.sqrt(sums[path]) for path in paths}
        total = sum(sizes.values())
        for path, size in sizes.items():
            share = shares[gauge]["direct" if path == "both" else path]
            np.testing.assert_allclose(share, np.divide(size, total, out=0 * size, where=total > 0), atol=1e-12)
    if "canonical" in shares:
        assert not shares["canonical"]["linear"].any()


def test_logits_are_the_mean_of_what_a_unit_adds_through_the_unembedding(loops):
    explorer, one_decoder = loops.explorer, loops.kind == "joint_nfm, n = k"
    assert explorer.logit_direction == ("W_dec + W_lin" if one_decoder else "W_dec")
    for feature in range(D_SAE):
        here = slice(explorer.logits.starts[feature], explorer.logits.starts[feature + 1])
        texts = [explorer.vocab[token] for token in explorer.logits.token[here]]
        if not loops.firings(feature):
            assert texts == []
            continue
        unit = torch.eye(D_SAE, dtype=torch.float64)[feature]
        parts = loops.written(unit)
        assert_logits(
            loops, parts["direct"] + (parts["linear"] if one_decoder else 0), texts, explorer.logits.value[here]
        )


def assert_logits(loops: Loops, vector: torch.Tensor, texts: list[str], values: np.ndarray) -> None:
    """The model's final normalisation has weights folded to 1: (v - mean v) / scale, through W_U."""
    added = [(vector - vector.mean()) / loops.scale[row, at] @ loops.model.W_U for row, at in loops.counted()]
    logits = torch.stack(added).mean(0)
    logits = logits - logits.mean()
    order = logits.argsort(descending=True).tolist()
    chosen = [*order[:3], *reversed(order[-3:])]
    assert texts == [loops.model.tokenizer.decode([token]) for token in chosen]
    np.testing.assert_allclose(values, logits[chosen].detach().numpy(), rtol=1e-5, atol=1e-7)  # kept in float32


def test_pairs_are_those_of_most_energy_and_of_each_feature_the_strongest(loops):
    pairs = loops.explorer.pairs
    if not has_paths(loops.sae):
        assert (len(pairs.first), pairs.fired, pairs.firings) == (0, 0, 0)
        return
    found: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
    for row, at in loops.counted():
        for pair, vector in loops.pairs[row, at].items():
            found.setdefault(pair, []).append((float(vector.norm()), row, at))
    energy = {pair: sum(norm**2 for norm, _, _ in firings) for pair, firings in found.items()}
    ranked = sorted(energy, key=energy.__getitem__, reverse=True)
    chosen = set(ranked[:12])
    for feature in range(D_SAE):
        chosen |= set([pair for pair in ranked if feature in pair][:2])
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [p for p in ranked if p in chosen]
    assert (pairs.fired, pairs.firings) == (len(found), sum(map(len, found.values())))
    assert 12 < len(chosen) < len(found)
    for place, pair in enumerate(one for one in ranked if one in chosen):
        firings = sorted(found[pair], key=lambda one: -one[0])
        norms = [norm for norm, _, _ in firings]
        assert pairs.tokens[place] == len(firings)
        assert pairs.share[place] == pytest.approx(energy[pair] / sum(energy.values()))
        assert pairs.norm[place] == pytest.approx(sum(norms) / len(norms))
        assert pairs.max_norm[place] == pytest.approx(norms[0])
        here = range(pairs.context_starts[place], pairs.context_starts[place + 1])
        assert [pairs.context_norm[one] for one in here] == pytest.approx(norms[:3])
        expected = [loops.context(row, at, 0)[:2] for _, row, at in firings[:3]]
        assert [window_of(loops.explorer, int(pairs.position[one])) for one in here] == expected


def test_logits_of_a_pair_are_of_its_mean_product_with_mean_gates(loops):
    pairs, sae = loops.explorer.pairs, loops.sae
    if not len(pairs.first):
        return
    reads = loops.reads
    gates = torch.stack([reads[row].gates[at].double() for row, at in loops.counted()]).mean(0)
    assert np.diff(pairs.logits.starts).tolist() == [6] * 5 + [0] * (len(pairs.first) - 5)
    for place in range(5):
        i, j = int(pairs.first[place]), int(pairs.second[place])
        products = []
        for row, at in loops.counted():
            f = dict(zip(*(part[at].tolist() for part in reads[row].read), strict=True))
            products += [f[i] * f[j]] if f.get(i, 0) * f.get(j, 0) != 0 else []
        assert len(products) == pairs.tokens[place]
        vector = ((sum(products) / len(products) * sae.V[i] * sae.V[j]) @ sae.W_1 * gates) @ sae.W_2
        here = slice(pairs.logits.starts[place], pairs.logits.starts[place + 1])
        texts = [loops.explorer.vocab[token] for token in pairs.logits.token[here]]
        assert_logits(loops, vector, texts, pairs.logits.value[here])


def test_a_model_without_the_unembedding_has_no_logits_and_says_so(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "gpt2")
    model = load_model(str(folder), "cpu", model_class_name="AutoModelForCausalLM")
    sae = inference_sae(training_config("joint_nfm", "transformer.h.0"))
    explorer = explore(model, sae, tokens_of(), name="proxy", sizes=SIZES, show_progress=False)
    assert explorer.logits_note.startswith("there is no direct path from 'transformer.h.0' to the logits")
    assert (explorer.logit_count, len(explorer.logits.token), len(explorer.pairs.logits.token)) == (0, 0, 0)
    assert len(explorer.alive) > 0
    assert len(explorer.pairs.first) > 0


def test_two_runs_of_the_command_write_the_same_bytes(tmp_path):
    assert (
        ExploreConfig().sae == "sae-nfm-demo:blocks.2.hook_resid_post"
    )  # the folder of that name, without SAELens's list
    packaged = Path(demo.__file__).parent / "data" / "sae" / "blocks.2.hook_resid_post"
    config = ExploreConfig(
        sae=str(packaged),
        n_tokens=64,
        context_size=64,
        pairs=50,
        partners=1,
        pair_logits=5,
        contexts=4,
        output=str(tmp_path / "a"),
    )
    result = run_explore(config)
    again = run_explore(replace(config, output=str(tmp_path / "b")), command="sae-nfm explore")
    one, other = ((tmp_path / name / "explorer.json.gz").read_bytes() for name in "ab")
    assert one == other
    assert (result.size, again.size) == (len(one), len(one))
    explorer = Explorer.load(tmp_path / "a")
    # 1 row; each counted token has 32 active features
    assert explorer.features.tokens.sum() == 32 * explorer.tokens
    assert result.alive == len(explorer.alive) == int((explorer.features.tokens > 0).sum())
    words = result.words()
    assert f"{result.alive:,} of 2,048 features fire, {2048 - result.alive:,} never do; 32.0 on a token" in words
    assert "no evidence about real text" in words
    assert f"strongest: {explorer.pairs.first[0]} x {explorer.pairs.second[0]} (" in words
    assert str(tmp_path / "a" / "explorer.json.gz") in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": -1}, r"\bcontexts\b.*-1\b"),
        ({"bins": 0}, r"\bbins\b.*\b0\b"),
        ({"n_tokens": 0}, r"\bn_tokens\b.*\b0\b"),
        ({"context_size": 1}, r"\bcontext_size\b.*\b1\b.*\b2\b"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ExploreConfig(**options)


def test_what_cannot_be_explored_is_said(tmp_path):
    model, tokens = tiny_model(torch.float64), tokens_of()
    with pytest.raises(ValueError, match=r"\btraining\b.*\bsave_inference_model\b"):
        explore(model, random_sae(training_config("joint_nfm")), tokens, name="training", show_progress=False)
    with pytest.raises(ValueError, match=r"no tokens.*\b5\b.*\bposition 0\b"):
        explore(model, sae_of("topk"), tokens[:, :1], name="topk", show_progress=False)
    with pytest.raises(ValueError, match=r"\blogits\b.*\b30\b.*\b50 tokens\b"):
        explore(model, sae_of("topk"), tokens, name="topk", sizes=replace(SIZES, logits=30), show_progress=False)
    with pytest.raises(ValueError, match=r"\bembedded\b.*\bheld-out text\b"):
        sae_of("topk").save_model(tmp_path / "sae")
        write_checkpoint(tmp_path / "gpt2", "gpt2")
        run_explore(ExploreConfig(sae=str(tmp_path / "sae"), model=str(tmp_path / "gpt2")))
