"""The activations a run trains on, as a stream whose position can be saved and found again.

SAELens mixes activations in a generator, whose buffer and random state no checkpoint holds, and counts rows of the data
set, of which one may give many sequences. `ActivationStream` serves the same batches as SAELens's store, bit for bit, and
knows after each of them where it stands: buffer, random state, sequences drawn.
"""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm import data, models  # what they import themselves is loaded with the first stream

Batch = Tensor | dict[str, Tensor]
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a data set that broke off is asked again."""
OF_NETWORKS = ("aiohttp", "fsspec", "http", "httpcore", "httpx", "huggingface_hub", "requests", "ssl", "urllib3")
"""Packages whose errors mean that a connection failed, besides those of the operating system."""
ROWS_COMPARED = 256
"""Rows of a data set by which it is known again, beside the sequences that were drawn."""


class NotFiniteError(FloatingPointError):
    """An activation of the language model is not finite."""

    exit_status = 1


class DataLostError(ConnectionError):
    """A data set broke off before its end, and could not be had again."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where a stream stands after a batch. Tensors are never changed in place, so that holding them is a snapshot."""

    waiting: Tensor
    """Activations kept for mixing with the next ones, [tokens, width]."""
    serving: Tensor
    """Activations shuffled and not served yet, [tokens, width]."""
    generator: Tensor | None
    """State of the stream's own generator; None where it shuffles with torch's global one."""
    epoch: int
    """How often the data set has been begun anew."""
    sequences: int
    """Sequences of `context_size` tokens drawn in this epoch."""
    last_sequence: Tensor
    """The last of them, [context_size], by which the data set is known again; empty where none was drawn."""
    rows: int
    """SAELens's `n_dataset_processed`."""
    cached_row: int
    """Next row of cached activations; 0 where there are none."""
    sequences_digest: Tensor | int | None = None
    """A digest of the sequences drawn in this epoch; None in a checkpoint of 0.1.0."""
    data_digest: str | None = None
    """`digest_of_data` of the data set; None where it is streamed."""
    epoch_rows: int | None = None
    """Rows in an epoch; None before the end of the first."""


class ActivationStream(Iterator[Batch]):
    """SAELens's mixed activations, with a state.

    A batch is what the store would give: [train_batch_size_tokens, d_in], or a dict of these by hook name where the store
    reads several hooks; of a transcoder's two (`models.pair_hooks`) one tensor with both side by side.

    Args:
        store: the store of a runner, fresh.
        generator: shuffles; None is torch's global generator, as in SAELens.
        keep: for how many batches back `state_after` can answer.
    """

    def __init__(self, store: ActivationsStore, *, generator: torch.Generator | None = None, keep: int = 1) -> None:
        self._store: Any = store
        self._generator = generator
        self._epoch, self._sequences, self._last_sequence = 0, 0, torch.zeros(0, dtype=torch.long)
        self._hook_names: list[str] | None = self._store._hook_names
        self._side_by_side: bool = getattr(store, "serves_side_by_side", False)
        self._widths: list[int] = []
        rows_of_their_own = getattr(store, "is_dataset_tokenized", True) or store.disable_concat_sequences
        joined = getattr(store, "rows_joined", not rows_of_their_own)  # cached rows were cut before
        self.text = data.SketchCollector(models.special_token_ids(self._store.model), joined=joined)
        self._sequences_digest: Tensor | int = 0
        self._data_digest = digest_of_data(self._store)
        self._epoch_rows: int | None = None
        self._first_row = 0  # of this epoch, among all rows that were read
        ask_again(store)
        self._drawn: deque[tuple[Tensor, int, int]] = deque(maxlen=store.store_batch_size_prompts)
        self._count_sequences()
        self._incoming = (
            self._store._iterate_filtered_activations()
            if self._hook_names is None
            else self._store._iterate_filtered_multi_hook_activations()
        )
        self._batch_size: int = store.train_batch_size_tokens
        self._buffer_size: int = store.n_batches_in_buffer * store.training_context_size
        if self._buffer_size < self._batch_size:
            raise ValueError(
                f"the buffer holds n_batches_in_buffer x context = {self._buffer_size} tokens, fewer than a batch of "
                f"{self._batch_size}; raise n_batches_in_buffer or lower train_batch_size_tokens"
            )
        self._waiting: Tensor | None = None
        self._serving: Tensor | None = None
        self._recent: deque[tuple[Batch, StreamState]] = deque(maxlen=keep)

    @torch.no_grad()
    def __next__(self) -> Batch:
        while self._serving is None or len(self._serving) < self._batch_size:
            self._refill()
        batch = self._serving[: self._batch_size]
        self._serving = self._serving[self._batch_size :]
        served = batch
        if self._hook_names is not None and not self._side_by_side:
            served = dict(zip(self._hook_names, batch.split(self._widths, dim=1), strict=True))
        self._recent.append((served, self.state()))
        return served

    def _refill(self) -> None:
        """One round of SAELens's `mixing_buffer`: take in until full, shuffle, serve all but the share kept for mixing."""
        new = self._take_in()
        self._waiting = new if self._waiting is None else torch.cat([self._waiting, new])
        if len(self._waiting) < self._buffer_size:
            return
        if self._serving is None:
            self._refuse_zeros(self._waiting)
        fraction = self._store.activations_mixing_fraction
        if fraction > 0:
            self._waiting = self._waiting[torch.randperm(len(self._waiting), generator=self._generator)]
        spare = len(self._waiting) - int(self._buffer_size * fraction)
        cut = max(1, spare // self._batch_size) * self._batch_size
        self._serving, self._waiting = self._waiting[:cut], self._waiting[cut:]

    def _take_in(self) -> Tensor:
        """Activations of the next batch of prompts; those of several hooks side by side. A NotFiniteError names their row."""
        new = next(self._incoming)
        if self._hook_names is not None:
            self._widths = [new[name].shape[1] for name in self._hook_names]
            new = torch.cat([new[name] for name in self._hook_names], dim=1)
        finite = new.isfinite()
        if not finite.all():
            self._raise_not_finite(new, (~finite).nonzero()[0])
        return new

    def _hook_at(self, column: int) -> str:
        """The hook point that a column of the activations is of."""
        if self._hook_names is None:
            return self._store.hook_name
        ends = itertools.accumulate(self._widths)
        return next(name for name, end in zip(self._hook_names, ends, strict=True) if column < end)

    def _raise_not_finite(self, new: Tensor, at: Tensor) -> None:
        index, column = at.tolist()
        what = f"an activation at {self._hook_at(column)!r} is {float(new[index, column])}"
        store = self._store
        if store.cached_activation_dataset is not None:
            rows = range(store.current_row_idx - store.store_batch_size_prompts, store.current_row_idx)
            row = next(r for r in rows if not store.cached_activation_dataset[r][store.hook_name].isfinite().all())
            raise NotFiniteError(
                f"{what} in row {row} (counted from 0) of {store.cached_activations_path}; remove that row"
            )
        tokens = torch.stack([sequence for sequence, _, _ in self._drawn]).cpu()[:, slice(*store.seqpos_slice)]
        excluded = store.exclude_special_tokens
        kept = torch.ones_like(tokens, dtype=torch.bool) if excluded is None else ~torch.isin(tokens, excluded.cpu())
        _, first, last = self._drawn[int(kept.nonzero()[index, 0])]
        rows = f"row {last}" if first == last else f"rows {first} to {last}"
        raise NotFiniteError(
            f"{what}, in a sequence of {store.context_size} tokens from {rows} of the data set (counted from 0"
            f"{self._before_shuffling(last)}); remove what is there, or load the language model in float32"
        )

    def _before_shuffling(self, row: int) -> str:
        """Where a row was before `Dataset.shuffle`."""
        order = getattr(self._store.dataset, "_indices", None)
        return (
            ""
            if order is None
            else f" in the order it is read in; row {order.column(0)[row].as_py()} before it was shuffled"
        )

    def _refuse_zeros(self, activations: Tensor) -> None:
        """Raise a ValueError for a hook point whose activations are all zero: there is nothing to learn, and no norm."""
        widths = self._widths or [activations.shape[1]]
        for part, end in zip(activations.split(widths, dim=1), itertools.accumulate(widths), strict=True):
            if not part.any():
                raise ValueError(
                    f"all activations at {self._hook_at(end - 1)!r} are zero, in the first {len(part):,} tokens; choose another "
                    "hook point"
                )

    def _count_sequences(self) -> None:
        """Count what is drawn from the data set, by training and by evaluation alike."""
        begin_anew = self._store._iterate_tokenized_sequences

        def next_epoch() -> Generator[Tensor]:
            self._epoch, self._sequences, self._sequences_digest = self._epoch + 1, 0, 0
            self._end_epoch()
            return self._counted(begin_anew())

        self._store._iterate_tokenized_sequences = next_epoch
        self._store.iterable_sequences = self._counted(self._store.iterable_sequences)

    def _end_epoch(self) -> None:
        """Compare its rows with those of an earlier one: a stream that ends early does so without an error."""
        rows, self._first_row = self._store.n_dataset_processed - self._first_row, self._store.n_dataset_processed
        if self._epoch_rows not in (None, rows):
            raise DataLostError(
                f"the data set ended after {rows:,} rows, and after {self._epoch_rows:,} when it was read before"
            )
        self._epoch_rows = rows

    def _counted(self, sequences: Iterator[Tensor]) -> Generator[Tensor]:
        size, context_size = data.vocabulary_size(self._store.model), self._store.context_size
        store, first = self._store, 0
        multipliers: Tensor | None = None
        for sequence in sequences:
            ids = sequence.cpu()
            data.check_ids(ids, self._sequences, size, context_size)  # before the model sees them
            self.text.add(ids.numpy())
            if multipliers is None:
                multipliers = (2 * torch.arange(len(ids)) + 1) * MIX
            self._sequences, self._last_sequence = self._sequences + 1, sequence
            # a polynomial in MIX, modulo 2^64
            self._sequences_digest = self._sequences_digest * MIX + (ids * multipliers).sum()
            last = store.n_dataset_processed - self._first_row
            self._drawn.append((sequence, last if store.is_dataset_tokenized else first, last))
            first = last
            yield sequence

    def state(self) -> StreamState:
        """Where the stream stands now."""
        nothing = torch.zeros(0, 0)
        return StreamState(
            waiting=nothing if self._waiting is None else self._waiting,
            serving=nothing if self._serving is None else self._serving,
            generator=None if self._generator is None else self._generator.get_state(),
            epoch=self._epoch,
            sequences=self._sequences,
            last_sequence=self._last_sequence,
            rows=self._store.n_dataset_processed,
            cached_row=getattr(self._store, "current_row_idx", 0),
            sequences_digest=self._sequences_digest,
            data_digest=self._data_digest,
            epoch_rows=self._epoch_rows,
        )

    def state_after(self, batch: Tensor) -> StreamState:
        """Where the stream stood when it had served `batch`, that very tensor, among the last `keep` ones.

        A thread that prefetches is ahead of the trainer: what counts is the batch the trainer has.
        """
        for served, state in tuple(self._recent):  # a copy: the thread that prefetches appends
            parts = served.values() if isinstance(served, dict) else [served]
            if any(part is batch for part in parts):
                return state
        raise AssertionError("the batch is none of the last ones served")

    def restore(self, state: StreamState) -> None:
        """Stand where `state` was taken; sequences are drawn again to get there, without the language model.

        A ValueError when the activations have another width, or the data set is another one.
        """
        width = sum(self._store._hook_d_ins.values()) if self._hook_names else self._store.d_in
        if state.waiting.numel() and state.waiting.shape[1] != width:
            raise ValueError(
                f"the checkpoint has activations of width {state.waiting.shape[1]}, this run of width {width}; "
                "resume with the model and hook point the checkpoint was made with"
            )
        self._skip_to(state)
        if state.data_digest not in (None, self._data_digest):
            raise ValueError(
                f"after sequence {state.sequences} of the data set there are other rows than when the checkpoint was made; "
                f"{SAME_DATA}"
            )
        self._waiting, self._serving = (
            part.to(self._store.device) if part.numel() else None for part in (state.waiting, state.serving)
        )
        if self._hook_names:
            self._widths = [self._store._hook_d_ins[name] for name in self._hook_names]
        if self._generator is not None and state.generator is not None:
            self._generator.set_state(state.generator)

    def _skip_to(self, state: StreamState) -> None:
        if state.epoch:
            self._store.iterable_sequences = self._store._iterate_tokenized_sequences()
        drawn = itertools.islice(self._store.iterable_sequences, state.sequences)
        progress = tqdm(drawn, desc="Finding the place in the data", total=state.sequences, leave=False)
        last = deque(progress, maxlen=1)
        # an epoch that has not begun has no last sequence of its own
        same = not state.sequences or (last and torch.equal(last[0].cpu(), state.last_sequence.cpu()))
        if not same or state.sequences_digest not in (None, int(self._sequences_digest)):
            where = (
                f"sequence {state.sequences} of the data set is"
                if not same
                else f"those before sequence {state.sequences} of the data set are"
            )
            raise ValueError(f"{where} not what the checkpoint was made after; {SAME_DATA}")
        self._epoch, self._epoch_rows = state.epoch, state.epoch_rows
        self._first_row = state.rows - (self._store.n_dataset_processed - self._first_row)
        self._store.n_dataset_processed = state.rows
        if self._store.cached_activation_dataset is not None:
            self._store.current_row_idx = state.cached_row


SAME_DATA = "resume with the data set the checkpoint was made with, in the same order"
MIX = 0x5851F42D4C957F2D
"""An odd number (Knuth's multiplier) for the digest of sequences."""


def digest_of_data(store: Any) -> str | None:
    """By what a data set in memory or on disk is known again: how many rows it has, and what is in some of them."""
    cached = store.cached_activation_dataset
    dataset, column = (store.dataset, store.tokens_column) if cached is None else (cached, store.hook_name)
    if not isinstance(dataset, Dataset):
        return None
    found, n_rows = hashlib.sha256(f"{len(dataset)} {column}".encode()), len(dataset)
    for place in range(min(n_rows, ROWS_COMPARED)):
        row = dataset[place * (n_rows - 1) // max(1, min(n_rows, ROWS_COMPARED) - 1)][column]
        value = row.tolist() if isinstance(row, Tensor) else row
        found.update(f"{value!r}\n".encode())
    return found.hexdigest()


def ask_again(store: ActivationsStore) -> None:
    """Let a store that has drawn nothing yet go on where its data set, if it is streamed, breaks off."""
    fresh: Any = store
    if fresh.dataset is not None and not isinstance(fresh.dataset, Dataset):
        fresh.dataset = PersistentRows(fresh.dataset)
        fresh.iterable_sequences = fresh._iterate_tokenized_sequences()


class PersistentRows:
    """A streamed data set that is asked again where it breaks off, from the row that it had come to.

    A DataLostError after `PAUSES`, and where it ends before the number of rows that it says it has.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __iter__(self) -> Generator[Any]:
        given, pauses = 0, list(PAUSES)
        while True:
            try:
                for row in itertools.islice(iter(self._dataset), given, None):
                    given, pauses = given + 1, list(PAUSES)
                    yield row
                break
            except Exception as error:  # each library that fetches has its own; others are raised again
                if not _of_a_connection(error):
                    raise
                if not pauses:
                    said = " ".join(str(error).split())[:200]
                    raise DataLostError(
                        f"the data set broke off after {given:,} rows ({type(error).__name__}: {said}), {len(PAUSES) + 1} times"
                    ) from error
                time.sleep(pauses.pop(0))
        promised = _promised_rows(self._dataset)
        if promised is not None and given < promised:
            raise DataLostError(f"the data set ended after {given:,} rows, and says that it has {promised:,}")


def _of_a_connection(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    return isinstance(error, (OSError, EOFError)) or type(error).__module__.partition(".")[0] in OF_NETWORKS


def _promised_rows(dataset: Any) -> int | None:
    """How many rows a streamed data set says it has; None where it does not, or some were left out of it on purpose."""
    examples = getattr(dataset, "_ex_iterable", None)
    while examples is not None:
        if type(examples).__name__.startswith(
            ("Take", "Skip", "Filter", "Mapped", "Shard", "Cycling", "Random", "Vertically")
        ):
            return None
        examples = getattr(examples, "ex_iterable", None)
    if hasattr(dataset, "__len__"):
        return len(dataset)
    splits = getattr(getattr(dataset, "info", None), "splits", None) or {}
    split = splits.get(str(getattr(dataset, "split", None)))
    return None if split is None else split.num_examples
