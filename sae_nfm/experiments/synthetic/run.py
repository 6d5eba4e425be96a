"""The jobs of `sae-nfm synthetic` and `sae-nfm recovery`: activations whose features are known, and what SAEs find of them.

    synthetic   SyntheticConfig -> a folder of samples with the truth beside it; or samples from a file, without
    recovery    the SAEs below a folder, each on the held-out samples of a folder with a truth -> results.json

`train` and `compare` train on such a folder with --activations, as on any cache.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from numpy.typing import NDArray
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from tqdm.auto import tqdm

from sae_nfm.common import check_numbers, check_output, provenance, publishing, quoted, reading, remark, write_json
from sae_nfm.common.files import sha256_of_file
from sae_nfm.common.results import RESULTS_FILENAME
from sae_nfm.data import SyntheticConfig, SyntheticData, Truth, write_array, write_samples
from sae_nfm.data.activation_cache import CHECKSUM, TOKENS, StoredDtype, WrittenCache
from sae_nfm.data.samples import CONTEXT_SIZE
from sae_nfm.data.synthetic import PAIR_FUNCTIONS, TRUTH_FILENAME
from sae_nfm.experiments.synthetic.measure import floor, oracle, recovery, square_oracle
from sae_nfm.experiments.synthetic.results import LeftOut, RecoveryResult, RecoveryRow
from sae_nfm.loading import load_sae
from sae_nfm.models import is_samples
from sae_nfm.models.samples import HELD_OUT_FILENAME

SETTINGS_FILENAME = "synthetic.json"
"""What the truth was made from, beside it."""
BLOCK_ROWS = 16
"""Rows that are drawn together."""
SAMPLE_SEED = 0
"""Of the samples; `SyntheticConfig.seed` makes the truth."""


@dataclass(frozen=True, kw_only=True)
class SyntheticRunConfig(SyntheticConfig):
    """What to plant, how many samples to draw, and where they go."""

    d_in: int = 256
    """Dimensions of an activation."""
    mean_l0: float = 12.0
    """Mean number of active features a sample."""
    pairs: int = 64
    """Planted pairs; no feature is in two, none is a child. 0, with pair_share 0, for linear data."""
    pair_rate: float = 0.01
    """Rate at which the two features of a pair, or of a decoy, are made to fire together."""
    pair_share: float = 0.05
    """What pairs write, as a share of the variance."""
    decoys: int = 64
    """Pairs of other features that fire together at the same rate and write nothing."""
    samples: int = 1_000_000
    """Samples to train on."""
    held_out_samples: int = 20_000
    """Samples beside these, whose true activations are kept."""
    samples_file: str | None = None
    """A .npy file [samples, d_in], or a folder of activations of SAELens's CacheActivationsRunner, whose samples are taken in
    place of drawn ones, the last held out; nothing is then known about them."""
    dtype: StoredDtype = "float32"
    """How the samples to train on are stored; float16 takes half the space and rounds to 11 bits."""
    output: str = "runs/synthetic"
    """Folder for samples and truth."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        super().__post_init__()
        for name in ("samples", "held_out_samples"):
            if getattr(self, name) < CONTEXT_SIZE:
                raise ValueError(f"{name} must be at least a row of {CONTEXT_SIZE}, got {getattr(self, name)}")

    def truth(self) -> SyntheticConfig:
        """What is planted alone."""
        return SyntheticConfig(**{field.name: getattr(self, field.name) for field in fields(SyntheticConfig)})


def run_synthetic(cfg: SyntheticRunConfig, *, command: str | None = None) -> WrittenCache:
    """Draw samples and write them with their truth; an interrupted call goes on when it is made again.

    Raises:
        ValueError: for a truth that cannot be made, or as `data.write_samples`.
    """
    check_output(cfg.output)
    if cfg.samples_file is not None:
        x, kept = _array(cfg.samples_file), cfg.held_out_samples
        return write_array(x, cfg.output, held_out_samples=kept, dtype=cfg.dtype, command=command)
    data = SyntheticData.of(cfg.truth())
    draw = _Drawn(data)
    rows, held_out_rows = cfg.samples // CONTEXT_SIZE, cfg.held_out_samples // CONTEXT_SIZE

    def beside(folder: Path) -> None:
        acts = [draw.acts(number) for number in range(rows, rows + held_out_rows)]
        Truth.of(data, torch.cat(acts)).save(folder)
        write_json(folder / SETTINGS_FILENAME, {"kind": "synthetic/1", **asdict(cfg.truth())})

    return write_samples(
        draw.x,
        cfg.output,
        rows=rows,
        held_out_rows=held_out_rows,
        dtype=cfg.dtype,
        command=command,
        beside=beside,
        made_with=asdict(cfg.truth()) | {name: getattr(cfg, name) for name in ("samples", "held_out_samples")},
    )


class _Drawn:
    """The rows of a truth by their numbers; those of a block are drawn together."""

    def __init__(self, data: SyntheticData) -> None:
        self._data, self._number = data, -1

    def _part(self, number: int) -> tuple[int, int]:
        if number // BLOCK_ROWS != self._number:
            self._number = number // BLOCK_ROWS
            self._block = self._data.batch(BLOCK_ROWS * CONTEXT_SIZE, SAMPLE_SEED, self._number)
        start = number % BLOCK_ROWS * CONTEXT_SIZE
        return start, start + CONTEXT_SIZE

    def x(self, number: int) -> NDArray[np.floating]:
        """The samples of a row, [pos, d_in]."""
        part = self._part(number)
        return self._block.x[slice(*part)].detach().numpy()

    def acts(self, number: int) -> torch.Tensor:
        """The activations of its features, [pos, features]."""
        part = self._part(number)
        return self._block.acts[slice(*part)]


def _array(path: str) -> NDArray[np.floating]:
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"there is no {quoted(place)}; give a .npy file of samples [samples, d_in] or a folder of cached activations"
        )
    with reading(place):
        if place.is_file():
            return np.load(place, mmap_mode="r", allow_pickle=False)
        data = cast(Dataset, load_from_disk(path))
        column, *more = (name for name in data.column_names if name not in (TOKENS, CHECKSUM))
        if more:
            raise ValueError(f"it has the columns {', '.join(data.column_names)}; expected those of one hook point")
        rows = data.with_format("numpy")[:][column]
        return rows.reshape(-1, rows.shape[-1])


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """Which SAEs, on which samples, and where the results go."""

    saes: str
    """A folder with saved SAEs anywhere in it, such as the output of `sae-nfm compare`."""
    samples: str = "runs/synthetic"
    """The folder of `sae-nfm synthetic` that they were trained on, or another of the same truth."""
    refinement_steps: tuple[int, ...] = (0, 5)
    """Refinements with which each SAE that has them is measured."""
    output: str = "runs/recovery"
    """Folder for results.json."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_numbers(self)
        if not self.refinement_steps:
            raise ValueError("refinement_steps are none; give at least one number, 0 for the code as it is")


def run_recovery(cfg: RecoveryConfig, *, command: str | None = None) -> RecoveryResult:
    """Measure every SAE below a folder on the held-out samples.

    Raises:
        FileNotFoundError, ValueError: for a folder without samples, truth or SAEs, or where no SAE can be measured; one that
            cannot beside others that can is named with the reason.
    """
    check_output(cfg.output)
    folder, saes = Path(cfg.samples), Path(cfg.saes)
    if not is_samples(folder):
        raise FileNotFoundError(f"{quoted(folder)} has no samples; give a folder that `sae-nfm synthetic` wrote")
    truth = Truth.load(folder)
    x = torch.from_numpy(np.load(folder / HELD_OUT_FILENAME)).flatten(0, 1)
    acts, kind = truth.acts(), PAIR_FUNCTIONS[_kind_of(folder)]
    weights = saes.rglob(SAE_WEIGHTS_FILENAME)
    found = sorted(path.parent for path in weights if ".partial" not in str(path.relative_to(saes)))
    if not found:
        raise FileNotFoundError(f"there is no saved SAE in {quoted(saes)}; give the folder of a training")
    rows, left_out, budgets = list[RecoveryRow](), list[LeftOut](), set[int]()
    for path in tqdm(found, desc="Measuring", unit="SAE"):
        sae, name = load_sae(str(path)).eval(), path.relative_to(saes).as_posix()
        name = path.name if name == "." else name
        try:
            if sae.cfg.d_in != x.shape[1]:
                raise ValueError(
                    f"it has d_in {sae.cfg.d_in}, and the samples in {quoted(folder)} {x.shape[1]} dimensions; give SAEs that "
                    "were trained on them"
                )
            for steps in cfg.refinement_steps if hasattr(sae.cfg, "refinement_steps") else (0,):
                if hasattr(sae.cfg, "refinement_steps"):
                    sae.cfg.refinement_steps = steps
                rows.append(recovery(sae, x, truth, name, acts))
        except ValueError as error:
            left_out.append(LeftOut(sae=name, reason=str(error)))
            continue
        if (k := getattr(sae.cfg, "k", None)) is not None:
            budgets.add(int(k))
    if not rows:
        raise ValueError(f"no SAE in {quoted(saes)} can be measured: {left_out[0].sae}: {left_out[0].reason}")
    products = kind(*acts[:, truth.pairs].unbind(-1)) @ truth.pair_directions
    variance = (x - x.mean(0)).square().sum()
    result = RecoveryResult(
        features=len(truth.directions),
        fired=int((acts > 0).any(0).sum()),
        pairs=(n_pairs := len(truth.of_two_features().pairs)),
        squares=len(truth.pairs) - n_pairs,
        decoys=len(truth.decoys),
        samples=len(x),
        pair_share=float((products - products.mean(0)).square().sum() / variance),
        oracle=oracle(x, acts, truth),
        oracle_squares=square_oracle(x, acts, truth),
        floors=tuple(floor(x, acts, truth, k, kind) for k in sorted(budgets)),
        rows=tuple(rows),
        left_out=tuple(left_out),
        provenance=provenance(
            asdict(cfg),
            command=command,
            saes={path.relative_to(saes).as_posix(): sha256_of_file(path / SAE_WEIGHTS_FILENAME) for path in found},
            truth_sha256=sha256_of_file(folder / TRUTH_FILENAME),
        ),
    )
    with publishing(cfg.output, "recovery", command=command) as made:
        result.save(made.folder / RESULTS_FILENAME)
    return result


def _kind_of(folder: Path) -> Any:
    path = folder / SETTINGS_FILENAME
    if not path.is_file():
        remark(f"there is no {quoted(path)}: pairs are taken for products")
        return "product"
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))["pair_kind"]
