"""Tidy rows to paired arrays: by hand, whatever the order of the rows, and never two arms on different text."""

import numpy as np
import pandas as pd
import pytest

from sae_nfm.stats.estimates import paired_by_seed, paired_by_token

TOKENS = pd.DataFrame(
    {
        "document": np.array([4, 4, 7, 4, 4, 7], dtype=np.int32),
        "row": np.array([0, 0, 1, 0, 0, 1], dtype=np.int32),
        "position": np.array([1, 2, 1, 1, 2, 1], dtype=np.int16),
        "arm": pd.Categorical(["joint"] * 3 + ["topk"] * 3),
        "kl_nats": np.array([1, 2, 3, 10, 20, 30], dtype=np.float32),
        "ce_nats": np.array([1, np.nan, 3, 10, np.nan, 30], dtype=np.float32),
    }
)
CELLS = pd.DataFrame(
    {
        "seed": [0, 0, 1, 1] * 2,
        "arm": ["joint"] * 4 + ["topk"] * 4,
        "document": [4, 7] * 4,
        "kl_nats": [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0],
        "tokens": [5, 6] * 4,
    }
)


def test_tokens_by_hand_in_any_order():
    for rows in (TOKENS, TOKENS.sample(frac=1, random_state=0)):
        found = paired_by_token(rows, "kl_nats", arm="joint", against="topk")
        assert found.a.tolist() == [1, 2, 3]
        assert found.b.tolist() == [10, 20, 30]
        assert found.documents.tolist() == [4, 4, 7]


def test_tokens_without_a_next_one_are_left_out():
    found = paired_by_token(TOKENS, "ce_nats", arm="topk", against="joint")
    assert (found.a.tolist(), found.b.tolist(), found.documents.tolist()) == ([10, 30], [1, 3], [4, 7])


def test_tokens_survive_parquet(tmp_path):
    TOKENS.to_parquet(tmp_path / "rows.parquet")
    found = paired_by_token(pd.read_parquet(tmp_path / "rows.parquet"), "ce_nats", arm="topk", against="joint")
    assert (found.a.tolist(), found.b.tolist()) == ([10, 30], [1, 3])


def test_seeds_by_hand_in_any_order():
    for rows in (CELLS, CELLS.sample(frac=1, random_state=0)):
        found = paired_by_seed(rows, "kl_nats", arm="joint", against="topk", weight="tokens")
        assert found.a.tolist() == [[1, 2], [3, 4]]
        assert found.b.tolist() == [[10, 20], [30, 40]]
        assert found.weights.tolist() == [5, 6]


def test_error_messages_of_tokens():
    def pair(rows: pd.DataFrame, measure: str = "kl_nats", against: str = "topk") -> None:
        paired_by_token(rows, measure, arm="joint", against=against)

    with pytest.raises(ValueError, match=r"\bno column row, kl\b.*\bdocument, position, arm, kl_nats\b"):
        pair(TOKENS.drop(columns="row"), "kl")
    with pytest.raises(ValueError, match=r"'dense'.*'joint', 'topk'"):
        pair(TOKENS, against="dense")
    with pytest.raises(ValueError, match=r"'joint'.*\b1 token.*\bonce\b"):
        pair(pd.concat([TOKENS, TOKENS[:1]]))
    different = r"'joint'.*'topk'.*\bkl_nats\b.*\b{}\b"
    with pytest.raises(ValueError, match=different.format("2 and 3")):
        pair(TOKENS[1:])
    with pytest.raises(ValueError, match=different.format("3 and 3")):
        pair(TOKENS.assign(document=[4, 4, 7, 4, 4, 8]))
    with pytest.raises(ValueError, match=different.format("3 and 2")):
        pair(TOKENS.assign(kl_nats=[1, 2, 3, 4, np.nan, 5]))


def test_error_messages_of_seeds():
    def pair(rows: pd.DataFrame) -> None:
        paired_by_seed(rows, "kl_nats", arm="joint", against="topk", weight="tokens")

    with pytest.raises(ValueError, match=r"\bno column tokens\b.*\bseed, arm, document, kl_nats\b"):
        pair(CELLS.drop(columns="tokens"))
    with pytest.raises(ValueError, match=r"'joint'.*\btwice\b.*\bone seed\b"):
        pair(pd.concat([CELLS, CELLS[:1]]))
    with pytest.raises(ValueError, match=r"'topk'.*\bno kl_nats\b.*\b1 pair.*\bseed 1, document 7\b"):
        pair(CELLS[:-1])
    with pytest.raises(ValueError, match=r"'joint'.*\[0, 1\].*\b2 documents\b.*'topk'.*\[1\].*\b2\b"):
        pair(CELLS.drop(index=[4, 5]))
    with pytest.raises(ValueError, match=r"'tokens'.*\bdiffers\b"):
        pair(CELLS.assign(tokens=[5, 6, 5, 6, 5, 6, 5, 7]))
