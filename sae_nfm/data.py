"""Language models, hook points and text: by name, from a file, or embedded in the package."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from jaxtyping import Int
from sae_lens import ActivationsStore, HookedSAETransformer
from torch import Tensor

from sae_nfm import demo
from sae_nfm.demo.corpus import SUFFIXES, read_documents

EXPECTED_WARNINGS = (
    "The training dataset contains fewer samples",  # rows are counted as if each were one token
    "Dataset is not tokenized",
    "pretokenized dataset has context_size",
    "To copy construct from a tensor",
)
OFFLINE = "check the spelling and the connection, or stay offline with the embedded model (leave the option out)"


@contextmanager
def quiet_saelens() -> Generator[None]:
    """Hide what SAELens's activation store says about data sets that are used as intended."""
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=rf"\s*{message}")
        yield


@dataclass(frozen=True, kw_only=True)
class Site:
    """A hook point of a model, as an SAE sees it."""

    hook_name: str
    """TransformerLens name."""
    d_in: int
    """Dimensions a token, heads flattened."""
    reshape_activations: Literal["none", "hook_z"]
    """SAELens's name for whether heads have to be flattened."""


def load_model(name: str, device: str = "cpu") -> HookedSAETransformer:
    """A language model: the embedded one by its own name, any other TransformerLens name from the hub, unprocessed.

    Raises:
        ValueError: for a name TransformerLens does not know.
        FileNotFoundError: when the hub cannot be reached or does not have it.
    """
    if name == demo.MODEL_NAME:
        return demo.load_model(device)
    try:
        return HookedSAETransformer.from_pretrained_no_processing(name, device=device)
    except OSError as error:
        raise FileNotFoundError(f"model {name!r} could not be fetched from the hub; {OFFLINE}") from error
    except ValueError as error:
        raise ValueError(f"TransformerLens knows no model {name!r}; {OFFLINE}") from error


def find_site(model: HookedSAETransformer, hook_name: str) -> Site:
    """Look a hook point up and measure its width.

    Raises:
        ValueError: when the model has no such hook point; names like it are listed.
    """
    if hook_name not in model.hook_dict:
        near = get_close_matches(hook_name, model.hook_dict, n=4) or list(model.hook_dict)[:4]
        raise ValueError(f"the model has no hook point {hook_name!r}; did you mean one of {', '.join(near)}?")
    probe = torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device)
    with torch.no_grad():
        _, cache = model.run_with_cache(probe, names_filter=hook_name)
    shape = cache[hook_name].shape
    heads = hook_name.endswith("hook_z")
    if len(shape) != (4 if heads else 3):
        raise ValueError(
            f"activations at {hook_name!r} have shape {tuple(shape)}; an SAE needs [batch, pos, d_in] "
            "(or hook_z, whose heads are flattened)"
        )
    return Site(hook_name=hook_name, d_in=shape[2:].numel(), reshape_activations="hook_z" if heads else "none")


def load_splits(dataset: str | None, validation: str | None, model_name: str, seed: int = 0) -> tuple[Any, Any]:
    """Training and held-out data, as data sets with a `text` or a `tokens` column.

    Documents of a training file are shuffled with `seed`; the held-out ones are the same for every seed.

    Raises:
        ValueError, FileNotFoundError: for a source that is missing, empty or unreadable, or only half given.
    """
    if dataset is None and validation is None:
        if model_name != demo.MODEL_NAME:
            raise ValueError(
                f"the embedded tokens suit the embedded model only; give --dataset and --validation for {model_name!r}"
            )
        return demo.load_tokens("train"), demo.load_tokens("validation")
    if dataset is None:
        raise ValueError(f"--validation is {validation!r} but there is no --dataset to train on; give both")
    if validation is None and _is_file(dataset):
        raise ValueError(f"--dataset is the file {dataset!r}; give held-out text too, with --validation FILE")
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


def held_out_tokens(
    model: HookedSAETransformer, dataset: Any, context_size: int, n_tokens: int
) -> Int[Tensor, "rows pos"]:
    """The first rows of a data set, cut as SAELens cuts them for training, at most `n_tokens` (at least one row).

    Raises:
        ValueError: when the text does not fill one row.
    """
    rows: list[Tensor] = []
    with quiet_saelens(), suppress(StopIteration):
        store = ActivationsStore.from_config_multi_hook(
            model=model,
            dataset=dataset,
            hook_names=["hook_embed"],
            hook_d_ins={"hook_embed": model.cfg.d_model},
            context_size=context_size,
            total_training_tokens=1,
            device=str(model.cfg.device),
        )
        while len(rows) < max(1, n_tokens // context_size):
            rows.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
    if not rows:
        raise ValueError(f"the held-out text does not fill one row of {context_size} tokens; give more")
    return torch.cat(rows)
