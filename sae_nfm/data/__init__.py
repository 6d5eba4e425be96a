"""From a text file, parquet, Arrow or hub data set to rows of tokens."""

from sae_nfm.data.datasets import (
    explained_hub,
    held_out_tokens,
    load_splits,
    local_dataset,
    open_dataset,
    refuse_without_tokenizer,
)
from sae_nfm.data.documents import TokenRows, held_out_corpus, held_out_rows
from sae_nfm.data.text_files import BOS_ID, read_documents, token_stream

__all__ = [
    "BOS_ID",
    "TokenRows",
    "explained_hub",
    "held_out_corpus",
    "held_out_rows",
    "held_out_tokens",
    "load_splits",
    "local_dataset",
    "open_dataset",
    "read_documents",
    "refuse_without_tokenizer",
    "token_stream",
]
