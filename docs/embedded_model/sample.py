"""Sample the packaged tokens from the embedded model, at temperature 1, with the key-value cache.

    python docs/embedded_model/sample.py --seed 0 --corpus FILE.parquet

With a corpus, rows that share a long passage with it (see `verbatim`) are replaced by further samples from
the same generator until none is left. The tokens are a function of the seed, the batch size, the version of
torch and the machine's arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, GPT2LMHeadModel
from verbatim import BOS_ID, LIMIT, corpus_tokens, describe, longest_runs
from whole_folder import written_whole

from sae_nfm.demo.model import MODEL_DIR, load_gpt2
from sae_nfm.demo.tokens import TOKENS_DIR, write_rows


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How many tokens to sample, how, and where they go."""

    n_train: int = 3600
    """Rows of the train split."""
    n_validation: int = 400
    """Rows of the validation split."""
    seed: int = 0
    """Seed of the torch.Generator from which every token is drawn."""
    temperature: float = 1.0
    """Temperature of the softmax; 1 samples the model's own distribution."""
    batch_size: int = 100
    """Rows sampled at once."""
    corpus: Path | None = None
    """Corpus to check for verbatim passages: .parquet or .jsonl with `text`, or .txt. No check without it."""
    limit: int = LIMIT
    """Shortest run, in tokens, shared with the corpus for which a row is replaced."""
    output: Path = TOKENS_DIR
    """Folder for train.parquet and validation.parquet; the packaged one unless told otherwise."""

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation", "batch_size", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive whole number")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; give a positive number, 1 for the model's own")


@torch.no_grad()
def sample_rows(
    model: GPT2LMHeadModel, n_rows: int, generator: torch.Generator, *, temperature: float = 1.0
) -> Int[Tensor, "row pos"]:
    """Independent samples of the model's whole context, each beginning with BOS.

    The generator has to be on the model's device. The Hugging Face model serves because it does this twice as
    fast as the hooked one.
    """
    rows = torch.full((n_rows, model.config.n_positions), BOS_ID, device=model.device)
    cache = DynamicCache(config=model.config)
    for pos in range(rows.shape[1] - 1):
        logits = model(input_ids=rows[:, pos : pos + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        probabilities = (logits / temperature).softmax(dim=-1)
        rows[:, pos + 1] = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
    return rows


def sample(config: SampleConfig, model: GPT2LMHeadModel) -> None:
    """Sample both splits, check them when a corpus is given, and write them."""
    generator = torch.Generator(model.device).manual_seed(config.seed)
    draw = partial(draw_rows, config, model, generator)
    n_rows = config.n_train + config.n_validation
    rows = draw(n_rows)
    if config.corpus is not None:
        n_replaced = replace_long_passages(rows, corpus_tokens(config.corpus), draw, config.limit)
        print(f"replaced {n_replaced} samples that shared {config.limit} tokens or more with the corpus")
    with written_whole(config.output) as folder:
        for split, start, stop in (("train", 0, config.n_train), ("validation", config.n_train, n_rows)):
            write_rows(folder / f"{split}.parquet", rows[start:stop].tolist(), list(range(start, stop)))


def draw_rows(
    config: SampleConfig, model: GPT2LMHeadModel, generator: torch.Generator, n_rows: int
) -> Int[np.ndarray, "row pos"]:
    """`n_rows` further samples, in batches of `config.batch_size`, with a progress bar."""
    batches: list[Tensor] = []
    with tqdm(total=n_rows, desc="sampling", unit="row") as progress:
        for start in range(0, n_rows, config.batch_size):
            size = min(config.batch_size, n_rows - start)
            batches.append(sample_rows(model, size, generator, temperature=config.temperature))
            progress.update(size)
    return torch.cat(batches).cpu().numpy()


def replace_long_passages(
    rows: Int[np.ndarray, "row pos"],
    corpus: Int[np.ndarray, " token"],
    draw: Callable[[int], Int[np.ndarray, "new pos"]],
    limit: int,
) -> int:
    """Replace, in place, rows that share a run of `limit` tokens or more with the corpus; returns how many.

    `draw(n)` has to return n further samples; a replacement is checked as the first sample was.
    """
    suspects, n_replaced = np.arange(len(rows)), 0
    while True:
        longest, _ = longest_runs(rows[suspects], corpus)
        print(describe(f"{suspects.size} samples", longest))
        suspects = suspects[longest >= limit]
        if suspects.size == 0:
            return n_replaced
        rows[suspects] = draw(suspects.size)
        n_replaced += suspects.size


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(SampleConfig, args=argv)
    sample(config, load_gpt2(MODEL_DIR))
    for file in sorted(config.output.glob("*.parquet")):
        print(f"{file.stat().st_size:>10,} bytes  {file}")


if __name__ == "__main__":
    main()
