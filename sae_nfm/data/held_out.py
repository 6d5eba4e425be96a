"""The held-out text on which a saved SAE is looked at: what the user gives, or the embedded model's own tokens."""

from typing import Any

from sae_lens import SAE

from sae_nfm import demo
from sae_nfm.data.documents import TokenRows, held_out_rows
from sae_nfm.data.sources import open_dataset
from sae_nfm.models import LanguageModel, check_context


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
    """Rows of held-out text with their documents.

    Args:
        model: whose tokenizer is used.
        sae: its metadata name the model and the length of a row.
        model_name: another name of the model.
        dataset_path: a file, a folder, or a data set on disk or the hub; None for the embedded model's held-out tokens.
        split: of the data set, where it has several.
        context_size: another length of a row.
        n_tokens: tokens to take, at most (at least one row).

    Raises:
        ValueError, FileNotFoundError: for text or a length of row that does not work.
    """
    metadata = sae.cfg.metadata
    if dataset_path is not None:
        dataset = open_dataset(dataset_path, split=split)
    elif (model_name or metadata.model_name) == demo.MODEL_NAME:
        dataset = demo.load_tokens("validation")
    else:
        raise ValueError("the embedded tokens suit the embedded model only; give held-out text with --held-out")
    size = context_size or metadata.context_size
    if size is None:
        raise ValueError("the SAE's metadata has no context_size; give --context-size")
    check_context(model, size)
    return held_out_rows(model, dataset, size, n_tokens)
