"""Activations from elsewhere as a folder that `train`, `compare` and every other command read (`models.samples`).

samples.json                how many rows there are
held_out.npy                the rows that are not trained on, float32 [rows, pos, d_in]
activations.json, blocks.0.hook_resid_pre/      the others, as `sae-nfm cache` writes them
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sae_nfm.common import whole
from sae_nfm.data.activation_cache import ITSELF, StoredDtype, WrittenCache, identity_of, write_cache
from sae_nfm.models import SAMPLES_HOOK, SamplesShape, samples_model
from sae_nfm.models.samples import HELD_OUT_FILENAME, SAMPLES_FILENAME, numbered_rows

CONTEXT_SIZE = 256
"""Samples in a row, unless given."""


def write_samples(
    read: Callable[[int], NDArray[np.floating]],
    output: str | Path,
    *,
    rows: int,
    held_out_rows: int,
    made_with: Mapping[str, Any],
    dtype: StoredDtype = "float32",
    command: str | None = None,
    beside: Callable[[Path], object] | None = None,
) -> WrittenCache:
    """Write rows of samples; an interrupted call goes on when it is made again.

    Args:
        read: the samples of the row of a number, [pos, d_in], the same whenever it is asked.
        rows: to train on; those from 0.
        held_out_rows: behind them.
        made_with: what the samples depend on, by name, as JSON has it: a folder that was begun with something else is refused, a
            finished one is written anew.
        dtype: how the rows to train on are stored.
        beside: writes more files into the folder that it is given.

    Raises:
        ValueError: for rows of another shape or that are not finite, and as `write_cache`.
    """
    held_out = np.stack([read(number) for number in range(rows, rows + held_out_rows)]).astype(np.float32)
    if held_out.ndim != 3 or not np.isfinite(held_out).all():
        raise ValueError(
            f"held-out rows have shape {held_out.shape} and finite values only: {np.isfinite(held_out).all()}; give rows "
            "[pos, d_in] of finite numbers"
        )
    shape = SamplesShape(
        d_in=held_out.shape[2],
        rows=rows,
        held_out_rows=held_out_rows,
        context_size=held_out.shape[1],
        mean_square=float(np.square(held_out, dtype=np.float64).sum(-1).mean()),
        source_sha256=hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest(),
    )
    model, tokens = samples_model(shape, read), numbered_rows(0, rows, shape.context_size)
    identity = identity_of(model, [SAMPLES_HOOK], tokens, model_name=ITSELF, dataset=ITSELF, dtype=dtype)

    def others(folder: Path) -> None:
        shape.save(folder / SAMPLES_FILENAME)
        with whole(folder / HELD_OUT_FILENAME) as partial, partial.open("wb") as file:
            np.save(file, held_out)
        if beside is not None:
            beside(folder)

    return write_cache(model, tokens, identity, output, command=command, beside=others, made_with=made_with)


def write_array(
    x: Float[Tensor, "samples d_in"] | NDArray[np.floating],
    output: str | Path,
    *,
    held_out_samples: int = 20_000,
    context_size: int = CONTEXT_SIZE,
    dtype: StoredDtype = "float32",
    command: str | None = None,
) -> WrittenCache:
    """Samples in memory, or memory-mapped by numpy, as such a folder; the last ones are held out.

    What does not fill a row at the end of either part is left out.

    Raises:
        ValueError: for samples of another shape, or too few, and as `write_samples`.
    """
    x = x.cpu().numpy() if isinstance(x, torch.Tensor) else x
    if x.ndim != 2:
        raise ValueError(f"samples have shape {x.shape}; give [samples, d_in]")
    held_out_rows = max(1, held_out_samples // context_size)
    rows = (len(x) - held_out_rows * context_size) // context_size
    if rows < 1:
        raise ValueError(
            f"{len(x)} samples do not fill a row of {context_size} beside {held_out_rows} that are held out; give more, a "
            "smaller held_out_samples, or a smaller context_size"
        )
    whole_rows = x[: (rows + held_out_rows) * context_size].reshape(-1, context_size, x.shape[1])
    digest = hashlib.sha256()
    for row in whole_rows:
        digest.update(np.ascontiguousarray(row).data)
    return write_samples(
        lambda number: whole_rows[number],
        output,
        rows=rows,
        held_out_rows=held_out_rows,
        made_with={"samples_sha256": digest.hexdigest()},
        dtype=dtype,
        command=command,
    )
