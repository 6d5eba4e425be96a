"""Activations that no language model made, read by every command as a language model's.

A folder of samples (`data.write_samples`) has a cache of activations and, in `samples.json`, how many rows there are. A
`HookedSAETransformer` stands in for the model:

    tokens of a row                 its number in base 256, in positions 0 to 3; behind them what a hash of the number draws
    blocks.0.hook_resid_pre         the samples of the row that has these tokens, [pos, d_in]
    everything behind it            x W_U, a fixed random map to 256 logits

The last makes KL and CE defined. They say how far an error of x is seen through random directions, and nothing more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import HookedSAETransformer
from torch import Tensor, nn
from transformer_lens import HookedTransformerConfig
from typing_extensions import override

from sae_nfm.common.results import SavedResult

SAMPLES_FILENAME, HELD_OUT_FILENAME = "samples.json", "held_out.npy"
SAMPLES_HOOK = "blocks.0.hook_resid_pre"
"""The hook point at which samples are read."""
VOCABULARY, NUMBER_TOKENS = 256, 4
"""Token ids, and tokens at the start of a row that are its number."""


@dataclass(frozen=True, kw_only=True)
class SamplesShape(SavedResult):
    """How many samples a folder has."""

    kind: ClassVar[str] = "samples/1"

    d_in: int
    rows: int
    """To train on: those of the cache."""
    held_out_rows: int
    """Their numbers follow those of the others."""
    context_size: int
    """Samples in a row."""
    mean_square: float
    """Mean squared norm of a held-out sample, by which logits are scaled."""
    source_sha256: str
    """Of what the samples were made from."""

    def __post_init__(self) -> None:
        """Refuse rows that cannot be numbered."""
        total = self.rows + self.held_out_rows
        if self.context_size < NUMBER_TOKENS or not 0 < total <= VOCABULARY**NUMBER_TOKENS or self.mean_square <= 0:
            raise ValueError(
                f"context_size must be at least {NUMBER_TOKENS}, rows from 1 to {VOCABULARY**NUMBER_TOKENS} and the mean square "
                f"> 0, got {self.context_size}, {total} and {self.mean_square}"
            )


def is_samples(folder: str | Path) -> bool:
    """Whether a model's name is a folder of samples."""
    return (Path(folder) / SAMPLES_FILENAME).is_file()


def numbered_rows(first: int, last: int, context_size: int) -> Int[Tensor, "rows pos"]:
    """The tokens of rows number `first` to `last` - 1."""
    numbers = np.arange(first, last, dtype=np.uint64)[:, None]
    digits = numbers >> np.arange(8 * (NUMBER_TOKENS - 1), -1, -8, dtype=np.uint64)
    # SplitMix64, so that no passage of tokens is in two rows
    state = (numbers << np.uint64(32)) + np.arange(context_size - NUMBER_TOKENS, dtype=np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        state = state * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn = state >> np.uint64(56)
    return torch.from_numpy(np.concatenate([digits % VOCABULARY, drawn], axis=1).astype(np.int64))


def samples_model(shape: SamplesShape, read: Callable[[int], NDArray[np.floating]]) -> HookedSAETransformer:
    """The stand-in, on the CPU, in eval mode; `read` gives the samples [pos, d_in] of the row of a number."""
    cfg = HookedTransformerConfig(
        model_name="samples",
        n_layers=1,
        d_model=shape.d_in,
        n_ctx=shape.context_size,
        n_heads=1,
        d_head=1,
        d_vocab=VOCABULARY,
        attn_only=True,
        normalization_type=None,
        init_weights=False,
        default_prepend_bos=False,
        device="cpu",
    )
    model = HookedSAETransformer(cfg)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(shape.d_in, VOCABULARY, generator=generator) / shape.mean_square**0.5
    model.embed = _SampleEmbed(shape, read)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for parameter in model.parameters():  # the block writes nothing
            parameter.zero_()
        model.unembed.W_U.copy_(directions)
    return model.eval()


def load_samples(folder: str | Path, device: str = "cpu") -> HookedSAETransformer:
    """The stand-in for the model of a folder of samples, which are memory-mapped.

    Raises a FileNotFoundError or ValueError for a folder that is incomplete or of another form.
    """
    folder = Path(folder)
    shape = SamplesShape.load(folder / SAMPLES_FILENAME)
    held_out, trained_on = np.load(folder / HELD_OUT_FILENAME, mmap_mode="r"), _memory_mapped(folder / SAMPLES_HOOK)
    size, per_chunk = shape.context_size * shape.d_in, [len(chunk) for chunk in trained_on]
    expected = (shape.held_out_rows, shape.context_size, shape.d_in)
    if held_out.shape != expected or sum(per_chunk) != shape.rows * size:
        raise ValueError(
            f"{folder} has {sum(per_chunk) / size:g} rows to train on and held-out samples of shape {held_out.shape}; "
            f"{SAMPLES_FILENAME} says {shape.rows} and {expected}. Write it again"
        )
    ends = np.cumsum(per_chunk) // size

    def read(number: int) -> NDArray[np.floating]:
        if number >= shape.rows:
            return held_out[number - shape.rows]
        chunk = int(np.searchsorted(ends, number, side="right"))
        start = (number - (int(ends[chunk - 1]) if chunk else 0)) * size
        return trained_on[chunk][start : start + size].reshape(expected[1:])

    return samples_model(shape, read).to(device)


def _memory_mapped(folder: Path) -> list[NDArray[np.floating]]:
    """The values of every shard that `data.activation_cache` wrote, in their order."""
    tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in sorted(folder.glob("*.arrow"))]
    return [chunk.storage.values.values.to_numpy() for table in tables for chunk in table.column(SAMPLES_HOOK).chunks]


class _SampleEmbed(nn.Module):
    """Tokens [batch, pos] to the samples of the rows that begin with them."""

    def __init__(self, shape: SamplesShape, read: Callable[[int], NDArray[np.floating]]) -> None:
        super().__init__()
        self._shape, self._read = shape, read
        self.W_E = nn.Parameter(torch.zeros(VOCABULARY, shape.d_in))
        """Says where tokens go and which type activations have, and is not read."""
        source = torch.tensor(list(bytes.fromhex(shape.source_sha256)), dtype=torch.uint8)
        self.source = nn.Buffer(source)  # other samples are another model

    @override
    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_in"]:
        pos, shape = tokens.shape[-1], self._shape
        if pos < NUMBER_TOKENS:  # what asks for no more than the shape
            return self.W_E.new_zeros(*tokens.shape, shape.d_in)
        numbers = [int.from_bytes(bytes(row), "big") for row in tokens[:, :NUMBER_TOKENS].tolist()]
        total = shape.rows + shape.held_out_rows
        if pos > shape.context_size or max(numbers, default=0) >= total:
            raise ValueError(
                f"rows of {pos} tokens, of which the largest has number {max(numbers)}; these samples are {total} rows of "
                f"{shape.context_size}, each by its own tokens (`models.samples.numbered_rows`)"
            )
        found = np.stack([self._read(number)[:pos] for number in numbers])
        return torch.from_numpy(found).to(self.W_E)
