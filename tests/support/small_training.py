"""What tests of `sae-nfm train` train: sizes, and a folder with a model, texts and tokens."""

import json
from pathlib import Path

import pytest
import torch
from builders import D_VOCAB, token_dataset
from tiny_models import write_checkpoint

SIZES = [
    *(
        "--context_size",
        "16",
        "--d_sae",
        "32",
        "--training_tokens",
        "512",
        "--train_batch_size_tokens",
        "64",
        "--lr",
        "1e-2",
    ),
    *("--n_batches_in_buffer", "8", "--store_batch_size_prompts", "8", "--n_batches_for_norm_estimate", "2"),
    *("--n_eval_batches", "1"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with a tiny language model `model`, texts `text.jsonl`, tokens `tokens.parquet`."""
    folder = tmp_path_factory.mktemp("train")
    write_checkpoint(folder / "model", "gpt2")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (150,), generator=generator)
    texts = [" ".join(f"t{i}" for i in torch.randint(1, D_VOCAB, (int(n),), generator=generator)) for n in lengths]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    token_dataset(64).to_parquet(folder / "tokens.parquet")
    return folder
