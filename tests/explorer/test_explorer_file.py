"""The file of an explorer: what is written is read, equal content gives equal bytes, damage is said, size stays small."""

import gzip
import json
from dataclasses import asdict, replace
from typing import Any

import invented_explorer
import numpy as np
import pytest

from sae_nfm.explorer.results import (
    FILENAME,
    Contexts,
    Explorer,
    FeatureFigures,
    PairFigures,
    TokenEffects,
    TokenTable,
    rounded,
    starts_of,
)

N_VOCAB, ROWS, WIDTH, WINDOW = 20_000, 160, 256, (14, 6)


def of_realistic_shape(d_sae: int, *, contexts: int = 20, pairs: int = 12_000) -> Explorer:
    """Random content: token frequencies by Zipf's law, 1 to 4 marks a context, 8 logits up and down, 5 contexts a pair.

    Nothing repeats as in text, so that this is harder to compress than what a model does.
    """
    rng = np.random.default_rng(0)
    quarter = contexts // 4
    letters = rng.choice(list("etaoinshrdlucm "), size=(N_VOCAB, 8))
    words = ["".join(row[:size]) for row, size in zip(letters, rng.integers(1, 9, N_VOCAB), strict=True)]

    def effects(n: int, total: int) -> TokenEffects:
        of = np.where(np.arange(total) < n, 16, 0)
        return TokenEffects(
            starts=starts_of(of), token=rng.integers(0, N_VOCAB, of.sum()), value=rng.normal(size=of.sum())
        )

    def some_contexts(each: int) -> Contexts:
        n, marks = d_sae * each, rng.integers(1, 5, d_sae * each)
        return Contexts(
            starts=np.arange(0, n + 1, each),
            position=rng.integers(0, ROWS * WIDTH, n),
            mark_starts=starts_of(marks),
            offset=rng.integers(-14, 7, marks.sum()),
            strength=rng.integers(1, 256, marks.sum()),
        )

    zipf = 1 / np.arange(1, N_VOCAB + 1)
    share = rng.random((2, 3, d_sae))
    return Explorer(
        sae="invented",
        architecture="joint_nfm",
        model_name="none",
        hook_name="blocks.0.hook_resid_post",
        d_in=256,
        d_sae=d_sae,
        k=32,
        tokens=ROWS * (WIDTH - 1),
        documents=ROWS,
        vocab=tuple(words),
        stream=TokenTable(
            row_starts=np.arange(ROWS + 1) * WIDTH, ids=rng.choice(N_VOCAB, ROWS * WIDTH, p=zipf / zipf.sum())
        ),
        features=FeatureFigures(
            tokens=rng.integers(1, 5_000, d_sae),
            max=rng.random(d_sae) * 9,
            mean=rng.random(d_sae),
            histogram=rng.poisson(40 / (1 + np.arange(20)), (d_sae, 20)),
            shares={
                gauge: dict(zip(("direct", "linear", "interaction"), one / one.sum(0), strict=True))
                for gauge, one in zip(("as trained", "canonical"), share, strict=True)
            },
        ),
        contexts=some_contexts(contexts - quarter),
        quantile_contexts=some_contexts(quarter),
        window=WINDOW,
        logits=effects(d_sae, d_sae),
        logit_count=8,
        logit_direction="W_dec + W_lin",
        logits_note="",
        pairs=PairFigures(
            first=rng.integers(0, d_sae, pairs),
            second=rng.integers(0, d_sae, pairs),
            tokens=rng.integers(1, 5_000, pairs),
            share=np.sort(rng.pareto(1, pairs))[::-1] / pairs,
            norm=rng.random(pairs),
            max_norm=rng.random(pairs),
            context_starts=np.arange(0, 5 * pairs + 1, 5),
            position=rng.integers(0, ROWS * WIDTH, 5 * pairs),
            context_norm=rng.random(5 * pairs),
            logits=effects(min(1_000, pairs), pairs),
            fired=10 * pairs,
            firings=100 * pairs,
        ),
        provenance={"config": {}, "versions": {}, "tokens_sha256": "0", "sae_sha256": "1"},
    )


def flat(of: Any, name: str = "") -> dict[str, Any]:
    if isinstance(of, dict):
        return {key: value for part, one in of.items() for key, value in flat(one, f"{name}.{part}").items()}
    return {name: of}


def test_what_is_written_is_read_to_four_digits_and_gives_the_same_bytes(tmp_path):
    explorer = of_realistic_shape(64, pairs=100)
    size = explorer.save(tmp_path / "one.json.gz")
    read = Explorer.load(tmp_path / "one.json.gz")
    given, found = flat(asdict(explorer)), flat(asdict(read))
    assert list(found) == list(given)
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            np.testing.assert_allclose(
                found[name], value, rtol=5.001e-3 if "value" in name or "context_norm" in name else 5.001e-4
            )
        else:
            assert found[name] == value
    read.save(tmp_path / "two.json.gz")
    first, second = ((tmp_path / f"{name}.json.gz").read_bytes() for name in ("one", "two"))
    assert first == second
    assert size == len(first)
    # gzip's header (RFC 1952): no flags, so no file name; time 0
    assert first[3:8] == bytes(5)
    assert sorted(path.name for path in tmp_path.glob("*.gz*")) == [
        f"{name}.json.gz{end}" for name in ("one", "two") for end in ("", ".sha256")
    ]


@pytest.mark.parametrize(
    ("d_sae", "pairs", "megabytes"), [(1_024, 3_000, 1.3), pytest.param(4_096, 12_000, 4, marks=pytest.mark.slow)]
)
def test_a_quarter_of_four_thousand_features_and_all_stay_small(tmp_path, d_sae, pairs, megabytes):
    assert of_realistic_shape(d_sae, pairs=pairs).save(tmp_path / FILENAME) < megabytes * 10**6


def test_a_file_made_by_hand_is_read(tmp_path):
    (tmp_path / FILENAME).write_bytes(invented_explorer.packed(invented_explorer.content()))
    explorer = Explorer.load(tmp_path)
    assert explorer.alive.tolist() == sorted(invented_explorer.FIRINGS)
    assert explorer.window == invented_explorer.WINDOW
    (strongest, *_) = explorer.contexts.of(0)
    assert explorer.vocab[explorer.stream.ids[explorer.contexts.position[strongest]]] == " not"


def test_numbers_are_written_short():
    assert rounded(np.array([0.123456, 1234567.0, 2.0, -1e-9])) == [0.1235, 1235000, 2, -1e-9]
    assert rounded(np.array([0.123456]), digits=3) == [0.123]
    assert rounded(np.array([123456])) == [123456]


def damaged(path: tuple[str, ...], value: Any) -> bytes:
    content = json.loads(json.dumps(invented_explorer.content()))
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return invented_explorer.packed(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", r"explorer\.json\.gz.*Not a gzipped file"),
        (gzip.compress(b"{}", mtime=0)[:-6], r"explorer\.json\.gz.*damaged"),
        (gzip.compress(b"{no json", mtime=0), r"explorer\.json\.gz.*damaged"),
        (gzip.compress(b"[]", mtime=0), r"\blist\b.*'explore/1'.*`sae-nfm explore`"),
        (damaged(("kind",), "explore/9"), r"'explore/9'.*'explore/1'"),
        (damaged(("features", "max"), [1.0]), r"\(1,\).*\b8 numbers\b.*`sae-nfm explore`"),
        (damaged(("stream", "ids"), [10**6]), r"damaged.*\bstarts\b.*\b1 entries\b"),
        (damaged(("logits", "token", 0), 999), r"\bindex outside 0\b"),
        (damaged(("contexts", "mark_starts"), [0]), r"\(1,\).*\bnumbers\b"),
        (damaged(("window",), [3]), r"\bwindow\b.*\[3\].*\btwo\b"),
    ],
)
def test_damage_is_said_with_what_to_do(tmp_path, content, message):
    (tmp_path / FILENAME).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Explorer.load(tmp_path / FILENAME)


def test_a_missing_column_and_a_missing_file_are_said(tmp_path):
    content = invented_explorer.content()
    del content["quantile_marks"]
    (tmp_path / FILENAME).write_bytes(invented_explorer.packed(content))
    with pytest.raises(ValueError, match=r"damaged.*'quantile_marks'.*`sae-nfm explore`"):
        Explorer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*explorer\.json\.gz"):
        Explorer.load(tmp_path / "nowhere")


def test_an_sae_without_pairs_is_written_too(tmp_path):
    full = of_realistic_shape(8, pairs=0)
    topk = replace(full, architecture="topk", k=None, logit_count=0, logits_note="no path")
    topk.save(tmp_path / FILENAME)
    read = Explorer.load(tmp_path)
    assert (len(read.pairs.first), read.k, read.logits_note) == (0, None, "no path")
