"""Train a language model of the embedded model's shape, and its tokenizer, on any text.

    python docs/embedded_model/train_lm.py --text FILE --output FOLDER

A byte-level BPE tokenizer is trained first. The text becomes one stream with BOS before each document, and a
step reads `batch_size` windows at uniformly random places of it. AdamW, linear warm-up, cosine to a fraction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim import AdamW
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup
from verbatim import BOS_ID, token_stream
from whole_folder import written_whole

from sae_nfm.data import read_documents

BOS = "<|endoftext|>"
"""BOS, EOS and padding in one, id 0."""

N_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Text, shape and training of a language model; the defaults are those of the embedded model."""

    text: Path
    """Corpus: a .parquet or .jsonl with `text`, one document a row, or a .txt, one document."""
    output: Path
    """Hugging Face folder to write."""
    n_layers: int = 4
    """Transformer blocks."""
    d_model: int = 256
    """Width of the residual stream; the MLP is four times as wide."""
    n_heads: int = 4
    """Attention heads; d_model has to be a multiple of it."""
    n_ctx: int = 256
    """Positions: tokens in a training window."""
    d_vocab: int = 4096
    """Tokens in the vocabulary at most: 256 bytes, BOS, and merges as far as the text has any."""
    n_steps: int = 3300
    """Optimiser steps."""
    batch_size: int = 16
    """Windows a step."""
    learning_rate: float = 1.5e-3
    """Highest learning rate."""
    final_learning_rate_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of the highest."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices only."""
    gradient_clip: float = 1.0
    """Largest norm of a step's gradient."""
    seed: int = 0
    """Seed of the initial weights and of the windows."""
    device: str = "cpu"
    """Device to train on."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "n_ctx", "n_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive whole number")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model is {self.d_model}; give a multiple of n_heads = {self.n_heads}")
        if self.d_vocab <= N_BYTES:
            raise ValueError(f"d_vocab is {self.d_vocab}; give at least {N_BYTES + 1}: the bytes and BOS")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training run did."""

    loss_nats: tuple[float, ...]
    """Cross-entropy of each step's batch, in nats per token, before the step."""
    n_corpus_tokens: int
    """Tokens in the training stream, BOS included."""


def train_lm(config: TrainConfig) -> TrainingResult:
    """Train tokenizer and model on a text file and write them as a Hugging Face folder, whole or not at all.

    Raises:
        FileNotFoundError: there is no such text file.
        ValueError: it has no text, or less than one window of it.
    """
    documents = read_documents(config.text)
    tokenizer = train_tokenizer(documents, config.d_vocab)
    stream = torch.from_numpy(token_stream(documents, tokenizer))
    if len(stream) < config.n_ctx:
        raise ValueError(
            f"{config.text} has {len(stream)} tokens; expected n_ctx = {config.n_ctx} or more: add text or lower n_ctx"
        )
    model = new_model(config, d_vocab=tokenizer.get_vocab_size())
    losses = tuple(training_steps(model, stream, config))
    with written_whole(config.output) as folder:
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=BOS,
            pad_token=BOS,
            unk_token=BOS,
            model_max_length=config.n_ctx,
        ).save_pretrained(folder)
    return TrainingResult(loss_nats=losses, n_corpus_tokens=len(stream))


def train_tokenizer(documents: Sequence[str], d_vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `d_vocab` tokens: BOS is id 0, and any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def new_model(config: TrainConfig, d_vocab: int) -> GPT2LMHeadModel:
    """An untrained model without dropout, its weights drawn from `config.seed`."""
    shape = GPT2Config(
        vocab_size=d_vocab,
        n_positions=config.n_ctx,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from torch's global generator: restore it
        torch.manual_seed(config.seed)
        model = GPT2LMHeadModel(shape)
    return model.to(config.device)  # pyright: ignore[reportArgumentType] (transformers' wrapper loses its type)


def training_steps(model: GPT2LMHeadModel, stream: Int[Tensor, " token"], config: TrainConfig) -> Iterator[float]:
    """Train in place; yields each step's cross-entropy in nats per token."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup_steps, config.n_steps, min_lr_rate=config.final_learning_rate_fraction
    )
    generator = torch.Generator().manual_seed(config.seed)
    windows = stream.unfold(0, config.n_ctx, 1)
    model.train()
    for _ in (progress := tqdm(range(config.n_steps), desc="training", unit="step")):
        chosen = torch.randint(len(windows), (config.batch_size,), generator=generator)
        batch = windows[chosen].to(config.device)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        schedule.step()
        progress.set_postfix(nats_per_token=f"{loss.item():.3f}")
        yield loss.item()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(TrainConfig, args=argv)
    result = train_lm(config)
    print(f"{result.loss_nats[0]:.3f} -> {result.loss_nats[-1]:.3f} nats per token; wrote {config.output}")


if __name__ == "__main__":
    main()
