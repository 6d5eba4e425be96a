"""Sums over a corpus against a loop over tokens and pairs; what is exact where pairs are dropped; contexts."""

from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from builders import D_SAE, D_VOCAB, tiny_model
from pair_inputs import pair_sae, pairs_by_loop, some_tokens

from sae_nfm.attribution import pair_table as corpus_module
from sae_nfm.attribution.direct_logits import DirectPath, Target
from sae_nfm.attribution.pair_effects import run_prompt
from sae_nfm.attribution.pair_table import Corpus, PairTable, first_reads, pair_sums, top_contexts

TARGET = Target.logit(7, D_VOCAB, "t7")


@pytest.fixture(scope="module", params=["fm", "bilinear"])
def corpus(request) -> Corpus:
    """With a BOS within a row, whose token is left out, and batches that do not divide the rows."""
    tokens = some_tokens()
    tokens[1, 7] = 0
    sae = pair_sae(nfm_top_k=None, head=request.param)
    return Corpus(tiny_model(torch.float64), sae, tokens, target=TARGET, batch_rows=2, show_progress=False)


@pytest.fixture(scope="module")
def by_loop(corpus) -> dict[int, list[tuple[int, int, float, float, float]]]:
    """(row, position, norm, effect, product) of every firing, by pair: each row by itself, each pair by itself."""
    model, found = tiny_model(torch.float64), defaultdict(list)
    for row, tokens in enumerate(corpus.tokens):
        run = run_prompt(model, corpus.sae, tokens)
        directions = DirectPath(model, corpus.sae).directions([TARGET], run.scale, run.reads.interaction)
        for position in range(1, len(tokens)):
            if not run.in_place[position]:
                continue
            f = dict(zip(*(part[position].tolist() for part in run.reads.read), strict=True))
            for (i, j), vector in pairs_by_loop(corpus.sae, run.reads, position).items():
                effect = float(vector @ directions[position])
                found[i * D_SAE + j].append((row, position, float(vector.norm()), effect, f[i] * f[j]))
    return dict(found)


def assert_sums(table: pd.DataFrame, by_loop) -> None:
    for key, row in table.iterrows():
        norms, effects, products = (np.array([one[n] for one in by_loop[key]]) for n in (2, 3, 4))
        expected = [len(norms), norms.sum(), (norms**2).sum(), products.sum(), effects.sum(), norms.max()]
        assert row[["tokens", "norm", "energy", "product", "effect", "norm_max"]].tolist() == pytest.approx(expected)


def test_sums_are_those_of_a_loop(corpus, by_loop):
    sums = pair_sums(corpus)
    assert set(sums.table.index) == set(by_loop)
    assert_sums(sums.table, by_loop)
    assert (sums.complete, sums.tokens, sums.firings) == (True, 5 * 15 - 1, sum(map(len, by_loop.values())))
    assert sums.energy == pytest.approx(sums.table["energy"].sum())
    assert sums.table["energy"].is_monotonic_decreasing
    reads = first_reads(corpus.batches(""), 10**6)
    dense = torch.zeros(sums.tokens, D_SAE, dtype=torch.float64).scatter_add(1, *reads.read)
    torch.testing.assert_close(sums.feature_sum, dense.sum(0))
    torch.testing.assert_close(sums.feature_squares, dense.square().sum(0))
    torch.testing.assert_close(sums.feature_tokens, (dense != 0).double().sum(0))
    torch.testing.assert_close(sums.gates, reads.gates.double().mean(0))
    first, second = sums.features()
    assert (first <= second).all()
    assert (first == second).any() == (corpus.sae.cfg.head == "bilinear")


@pytest.mark.parametrize("room", [0, 1, 10**9], ids=["none", "one batch", "all"])
def test_the_language_model_runs_once_for_what_is_remembered(corpus, monkeypatch, room):
    """Rows in threes of 2, 2 and 1: what does not fit runs again in the second pass, with the same sums."""
    size = next(corpus.batches("")).size
    monkeypatch.setattr(corpus_module, "REMEMBERED", room * size)
    model, runs = tiny_model(torch.float64), []
    model.add_hook("hook_embed", lambda value, hook: runs.append(len(value)), is_permanent=True)
    again = Corpus(model, corpus.sae, corpus.tokens, target=TARGET, batch_rows=2, show_progress=False)
    first, second = pair_sums(again), pair_sums(again)
    assert runs == [2, 2, 1] + {0: [2, 2, 1], 1: [2, 1], 10**9: []}[room]
    pd.testing.assert_frame_equal(first.table, second.table)  # the same activations, to the last bit


@pytest.mark.parametrize("capacity", [1, 10, 60])
def test_with_a_bounded_table_what_is_kept_is_exact_and_what_is_dropped_is_small(corpus, by_loop, capacity):
    sums = pair_sums(corpus, capacity=capacity)
    energies = {key: sum(norm**2 for _, _, norm, *_ in found) for key, found in by_loop.items()}
    assert 0 < len(sums.table) <= capacity < len(by_loop)
    assert_sums(sums.table, by_loop)
    dropped = max(energy for key, energy in energies.items() if key not in sums.table.index)
    rounding = 1 + 1e-12  # the same sums of float64 in another order, where a bound is reached
    assert dropped <= sums.slack * rounding
    assert sums.slack <= sum(energies.values()) / (capacity + 1) * rounding
    assert (sums.complete, sums.firings) == (False, sum(map(len, by_loop.values())))
    assert sums.energy == pytest.approx(sum(energies.values()))


def test_a_table_by_hand():
    """3 pairs, room for 2: the lightest weight (2) is taken off all three and its pair goes; the sums of the others stay."""

    def rows(keys: list[int], weights: list[float]) -> pd.DataFrame:
        columns = dict.fromkeys(("tokens", "norm", "energy", "product", "effect", "norm_max", "weight"), weights)
        return pd.DataFrame(columns, index=keys)

    table = PairTable(2)
    table.add(rows([5, 3, 5, 9], [1.0, 4.0, 2.0, 2.0]))
    kept = table.table()
    assert (kept.index.tolist(), kept["energy"].tolist(), kept["weight"].tolist()) == ([3, 5], [4.0, 3.0], [2.0, 1.0])
    assert (kept["norm_max"].tolist(), table.slack) == ([4.0, 2.0], 2.0)
    table.add(rows([9], [2.0]))
    assert (table.table().index.tolist(), table.slack) == ([3, 9], 3.0)
    with pytest.raises(ValueError, match=r"\bcapacity\b.*\b0\b"):
        PairTable(0)


def test_contexts_are_the_tokens_where_the_pair_writes_most(corpus, by_loop):
    keys = np.array(sorted(by_loop, key=lambda key: -len(by_loop[key]))[:4])
    for key, contexts in top_contexts(corpus, keys, n=3).items():
        expected = sorted(by_loop[key], key=lambda one: -one[2])[:3]
        assert [(one.row, one.position) for one in contexts] == [one[:2] for one in expected]
        assert [one.norm for one in contexts] == pytest.approx([one[2] for one in expected])
        assert [one.effect for one in contexts] == pytest.approx([one[3] for one in expected])
        assert f"[[t{int(corpus.tokens[contexts[0].row, contexts[0].position])}]]" in contexts[0].text


def test_pairs_that_fire_nowhere_have_no_contexts(corpus, by_loop):
    key = next(key for key in range(1, D_SAE) if key not in by_loop)
    assert top_contexts(corpus, np.array([key])) == {key: ()}


def test_a_fixed_direction_needs_no_direct_path(corpus, by_loop):
    """Along what the strongest pair writes where it writes most, its effect there is its norm."""
    model, sae, tokens = tiny_model(torch.float64), corpus.sae, some_tokens()
    elsewhere = [
        (key, *one) for key, found in by_loop.items() for one in found if one[0] != 1
    ]  # row 1 has a BOS within
    key, row, position, norm, *_ = max(elsewhere, key=lambda one: one[3])
    vector = pairs_by_loop(sae, run_prompt(model, sae, tokens[row]).reads, position)[divmod(key, D_SAE)]
    corpus = Corpus(model, sae, tokens, target=vector / vector.norm(), show_progress=False)
    (found,) = (
        one for one in top_contexts(corpus, np.array([key]), n=99)[key] if (one.row, one.position) == (row, position)
    )
    assert found.effect == pytest.approx(norm)


def test_a_corpus_without_a_token_is_refused():
    with pytest.raises(ValueError, match=r"no tokens.*\b16\b"):
        Corpus(tiny_model(torch.float64), pair_sae(), torch.zeros(1, 16, dtype=torch.long))
