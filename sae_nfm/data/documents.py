"""Held-out rows that know their documents: what is needed to count documents, not tokens, as independent.

SAELens cuts documents into rows of `context_size` tokens, with BOS at the start of a row and between documents, and forgets
which token was whose. Here its own cutting runs a second time, over numbers of documents in place of tokens.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from sae_lens import SAE, ActivationsStore
from torch import Tensor
from typing_extensions import override

from sae_nfm.common import ShortRepr, remark
from sae_nfm.data.datasets import check_data, first_rows, open_dataset, own_text
from sae_nfm.models import LanguageModel, check_context, device_of, special_token_ids

NO_DOCUMENT = -1


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenRows(ShortRepr):
    """Rows of tokens and the document that each token is from. Raises a ValueError when the two differ in shape."""

    tokens: Int[Tensor, "rows pos"]
    """Token ids, on the model's device."""
    documents: Int[Tensor, "rows pos"]
    """Number of the document in its data set, from 0; -1 at special tokens (BOS, separators, EOS, padding). On the CPU."""
    attention_mask: Bool[Tensor, "rows pos"] | None = None
    """False at padding; None where there is none, or where it is to be inferred from the ids (`models.real_tokens`)."""

    def __post_init__(self) -> None:
        """Refuse rows of which it cannot be said whose tokens they are."""
        if self.tokens.ndim != 2 or self.tokens.shape != self.documents.shape:
            raise ValueError(
                f"tokens have shape {tuple(self.tokens.shape)}, documents {tuple(self.documents.shape)}; give one number of a "
                "document for each token, both [rows pos]"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "TokenRows":
        """Some of the rows."""
        mask = self.attention_mask
        return TokenRows(
            tokens=self.tokens[rows],
            documents=self.documents[rows],
            attention_mask=None if mask is None else mask[rows],
        )

    def check_documents(self, fewest: int = 2) -> None:
        """Raise a ValueError where the tokens are from fewer documents than intervals over documents need."""
        if (n := len(self.documents[self.documents >= 0].unique())) < fewest:
            raise ValueError(
                f"the {self.tokens.numel()} held-out tokens are from {n} document{'s' * (n != 1)}, and intervals need at least "
                f"{fewest}, better 20; raise --held-out-tokens, or give other --held-out text"
            )


def held_out_rows(
    model: LanguageModel, dataset: Any, context_size: int, n_tokens: int, skip_tokens: int = 0
) -> TokenRows:
    """Rows of a data set as `data.held_out_tokens` cuts them, with document identity.

    A document of a text data set is one of its rows, and keeps its number where it runs over several rows of tokens. A data
    set of token ids cannot say more than its rows do, so that each row is a document of its own: right for rows sampled
    independently, as the embedded tokens are; text that was cut into rows before loses what held its rows together.

    Args:
        dataset: with a column `text`, or one of token ids.
        context_size: tokens in a row, BOS included.
        n_tokens: how many tokens to take, at most (at least one row).
        skip_tokens: the first rows to leave out: those that `n_tokens` of this value takes. No token is then in both sets;
            a document that runs over the boundary is, under one number.

    Raises a ValueError when the text does not fill one row after those left out, or as `check_data`.
    """
    check_data(model, dataset, context_size)
    skipped = max(1, skip_tokens // context_size) if skip_tokens > 0 else 0
    wanted = skipped + max(1, n_tokens // context_size)
    tokens, documents = (
        first_rows(store, model, dataset, context_size, wanted)[skipped:]
        for store in (ActivationsStore, _DocumentStore)
    )
    if not tokens:
        after = f" after the {skipped} rows that skip_tokens={skip_tokens} leaves out" if skipped else ""
        raise ValueError(f"the held-out text does not fill one row of {context_size} tokens{after}; give more")
    cut = torch.stack(documents)
    numbers = torch.where(cut >= 0, NO_DOCUMENT, _other(cut))
    return TokenRows(tokens=torch.stack(tokens).to(device_of(model)), documents=numbers)


def rows_and_others(
    model: LanguageModel, dataset: Any, context_size: int, n_tokens: int, n_other: int
) -> tuple[TokenRows, TokenRows]:
    """`held_out_rows` to measure on, and the rows after them, of at most n_other tokens, for what is fitted or chosen first.

    A text that is too short for both is divided: its last quarter at most are the others. stderr says so.

    Raises a ValueError as `held_out_rows`, or for text of a single row.
    """
    first, others = (max(1, n // context_size) for n in (n_tokens, n_other))
    both = held_out_rows(model, dataset, context_size, (first + others) * context_size)
    if len(both) == 1:
        raise ValueError(
            f"the held-out text fills one row of {context_size} tokens, and one is needed to measure on and another for what is "
            "fitted or chosen first; give more"
        )
    cut = min(first, len(both) - min(others, max(1, len(both) // 4)))
    if len(both) < first + others:
        remark(
            f"the held-out text fills {len(both)} of {first + others} rows of {context_size} tokens: {cut} to measure on, "
            f"{len(both) - cut} for what is fitted or chosen first"
        )
    return both[:cut], both[cut:]


class _DocumentStore(ActivationsStore):
    """SAELens's store, for numbers of documents. Special tokens stay, because SAELens looks for them where it cuts."""

    @override
    def _iterate_raw_dataset_tokens(self) -> Generator[Tensor, None, None]:
        return self._numbered(super()._iterate_raw_dataset_tokens())

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        sequences = super()._iterate_tokenized_sequences()
        return self._numbered(sequences) if self.is_dataset_tokenized else sequences

    def _numbered(self, documents: Generator[Tensor, None, None]) -> Generator[Tensor, None, None]:
        special = torch.tensor(special_token_ids(cast(Any, self.model)), dtype=torch.long, device=self.device)
        for number, tokens in enumerate(documents):
            yield torch.where(torch.isin(tokens, special), tokens, _other(number))


def _other(number: Any) -> Any:
    """Numbers of documents as negative ones, which no token id is; its own inverse."""
    return -1 - number


def held_out_corpus(
    model: LanguageModel,
    sae: SAE[Any],
    *,
    model_name: str | None,
    dataset_path: str | None,
    split: str,
    context_size: int | None,
    n_tokens: int,
) -> TokenRows:
    """Rows of held-out text with their documents, of at most n_tokens (at least one row).

    The SAE's metadata name the model and the length of a row, unless `model_name` and `context_size` do; without a dataset_path
    (a file, a folder, or a data set on disk or the hub) it is the model's own held-out text.
    """
    metadata = sae.cfg.metadata
    if dataset_path is not None:
        dataset = open_dataset(dataset_path, split=split)
    else:
        dataset = own_text(model_name or metadata.model_name, "validation")
    size = context_size or metadata.context_size
    if size is None:
        raise ValueError("the SAE's metadata has no context_size; give --context-size")
    check_context(model, size)
    return held_out_rows(model, dataset, size, n_tokens)
