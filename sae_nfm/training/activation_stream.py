"""The activations a run trains on, as a stream whose position can be saved and found again.

SAELens mixes activations in a generator, whose buffer and random state no checkpoint holds, and counts rows of the data
set, of which one may give many sequences. `ActivationStream` serves the same batches as SAELens's store, bit for bit, and
knows after each of them where it stands: buffer, random state, sequences drawn.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.data import check_ids, vocabulary_size

Batch = Tensor | dict[str, Tensor]


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


class ActivationStream(Iterator[Batch]):
    """SAELens's mixed activations, with a state.

    A batch is what the store would give: [train_batch_size_tokens, d_in], or a dict of these by hook name where the store
    reads several hooks.

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
        self._widths: list[int] = []
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
        if self._hook_names is not None:
            served = dict(zip(self._hook_names, batch.split(self._widths, dim=1), strict=True))
        self._recent.append((served, self.state()))
        return served

    def _refill(self) -> None:
        """One round of SAELens's `mixing_buffer`: take in until full, shuffle, serve all but the share kept for mixing."""
        new = self._take_in()
        self._waiting = new if self._waiting is None else torch.cat([self._waiting, new])
        if len(self._waiting) < self._buffer_size:
            return
        fraction = self._store.activations_mixing_fraction
        if fraction > 0:
            self._waiting = self._waiting[torch.randperm(len(self._waiting), generator=self._generator)]
        spare = len(self._waiting) - int(self._buffer_size * fraction)
        cut = max(1, spare // self._batch_size) * self._batch_size
        self._serving, self._waiting = self._waiting[:cut], self._waiting[cut:]

    def _take_in(self) -> Tensor:
        """Activations of the next batch of prompts; those of several hooks side by side."""
        new = next(self._incoming)
        if self._hook_names is None:
            return new
        self._widths = [new[name].shape[1] for name in self._hook_names]
        return torch.cat([new[name] for name in self._hook_names], dim=1)

    def _count_sequences(self) -> None:
        """Count what is drawn from the data set, by training and by evaluation alike."""
        begin_anew = self._store._iterate_tokenized_sequences

        def next_epoch() -> Generator[Tensor]:
            self._epoch, self._sequences = self._epoch + 1, 0
            return self._counted(begin_anew())

        self._store._iterate_tokenized_sequences = next_epoch
        self._store.iterable_sequences = self._counted(self._store.iterable_sequences)

    def _counted(self, sequences: Iterator[Tensor]) -> Generator[Tensor]:
        size, context_size = vocabulary_size(self._store.model), self._store.context_size
        for sequence in sequences:
            check_ids(sequence.cpu(), self._sequences, size, context_size)  # before the model sees them
            self._sequences, self._last_sequence = self._sequences + 1, sequence
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
        if state.sequences and not (last and torch.equal(last[0].cpu(), state.last_sequence.cpu())):
            raise ValueError(
                f"sequence {state.sequences} of the data set is not the one the checkpoint was made after; resume with the "
                "data set the checkpoint was made with, in the same order"
            )
        self._epoch = state.epoch
        self._store.n_dataset_processed = state.rows
        if self._store.cached_activation_dataset is not None:
            self._store.current_row_idx = state.cached_row
