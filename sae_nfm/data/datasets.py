"""Text and tokens: from a file, by a name on the hub, or embedded in the package."""

from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from jaxtyping import Int
from sae_lens import ActivationsStore
from torch import Tensor

from sae_nfm import demo
from sae_nfm.data.text_files import SUFFIXES, read_documents
from sae_nfm.loading import quiet_saelens
from sae_nfm.models import OFFLINE, LanguageModel, device_of

TOKEN_COLUMNS = {"input_ids", "tokens"}
"""Columns that SAELens takes for token ids."""


def load_splits(dataset: str | None, validation: str | None, model_name: str, seed: int = 0) -> tuple[Any, Any]:
    """Training and held-out data, as data sets with a `text` or a `tokens` column.

    Documents of a training file are shuffled with `seed`; the held-out ones are the same for every seed.

    Raises:
        ValueError, FileNotFoundError: for a source that is missing, empty or unreadable, or only half given.
    """
    if dataset is None and validation is None:
        if model_name != demo.MODEL_NAME:
            raise ValueError(
                f"the embedded tokens suit the embedded model only; give --dataset and --held-out for {model_name!r}"
            )
        return demo.load_tokens("train"), demo.load_tokens("validation")
    if dataset is None:
        raise ValueError(f"--held-out is {validation!r} but there is no --dataset to train on; give both")
    if validation is None and _is_file(dataset):
        raise ValueError(f"--dataset is the file {dataset!r}; give held-out text too, with --held-out FILE")
    return _load_text(dataset, "train", seed), _load_text(validation or dataset, "validation", seed=0)


def _is_file(source: str) -> bool:
    return Path(source).suffix in SUFFIXES or Path(source).exists()


def _load_text(source: str, split: str, seed: int) -> Any:
    if _is_file(source):
        documents = datasets.Dataset.from_dict({"text": read_documents(Path(source))})
        return documents.shuffle(seed=seed)  # files often go source by source
    try:
        return datasets.load_dataset(source, split=split, streaming=True)
    except OSError as error:
        raise FileNotFoundError(f"{source!r} is neither a file nor a data set the hub can give; {OFFLINE}") from error


def held_out_tokens(model: LanguageModel, dataset: Any, context_size: int, n_tokens: int) -> Int[Tensor, "rows pos"]:
    """The first rows of a data set, cut as SAELens cuts them for training, at most `n_tokens` (at least one row).

    Raises:
        ValueError: when the text does not fill one row, or the model has no tokenizer for it.
    """
    refuse_without_tokenizer(model, dataset)
    rows = first_rows(ActivationsStore, model, dataset, context_size, max(1, n_tokens // context_size))
    if not rows:
        raise ValueError(f"the held-out text does not fill one row of {context_size} tokens; give more")
    return torch.stack(rows).to(device_of(model))


def first_rows(
    store_class: type[ActivationsStore], model: LanguageModel, dataset: Any, context_size: int, n_rows: int
) -> list[Int[Tensor, " pos"]]:
    """The rows that a store of SAELens's gives first, on the CPU; fewer where the data set ends before."""
    rows: list[Tensor] = []
    with quiet_saelens(), suppress(StopIteration):
        store = store_class.from_config_multi_hook(
            model=cast(Any, model),  # SAELens takes more than it says
            dataset=dataset,
            hook_names=["tokens only"],
            hook_d_ins={"tokens only": 1},
            context_size=context_size,
            total_training_tokens=1,
            device="cpu",
        )
        while len(rows) < n_rows:
            rows.append(store.get_batch_tokens(1, raise_at_epoch_end=True, move_to_model_device=False)[0])
    return rows


def refuse_without_tokenizer(model: LanguageModel, dataset: Any) -> None:
    """Raise a ValueError when the data set is text and the model has no tokenizer; SAELens would fail an assertion."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None and not TOKEN_COLUMNS & set(columns := next(iter(dataset), {})):
        raise ValueError(
            f"the model has no tokenizer, and the data set has {', '.join(columns)}; give one of token ids, in a column "
            f"{' or '.join(sorted(TOKEN_COLUMNS))}, or load the model with a tokenizer"
        )
