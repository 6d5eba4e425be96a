"""The job of `sae-nfm dynamics`: how features moved between the checkpoints of one joint_nfm run, on the same held-out tokens.

    checkpoints -> shares, norms and firing of every feature at each -> means over documents, rank stability, transitions

Do features pass from integration to identity while an SAE is trained? Beside the run stand shuffled identities of features, the
canonical gauge, and a TopK run as the reference for norms and firing. In the output folder: results.json, and features.parquet
with a row for each run, checkpoint and feature.

Source: integration and identity are those of arXiv 2507.00269, which looks at a finished SAE only.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.analysis import gauge, read_activations
from sae_nfm.architectures import refuse_transcoder
from sae_nfm.common import check_numbers, check_output, check_positive, provenance, publishing, write_parquet
from sae_nfm.common.options import SavedSAEOptions
from sae_nfm.data import ActivationCache, held_out_rows, open_dataset, own_text, told_of_text
from sae_nfm.experiments.dynamics import measure
from sae_nfm.experiments.dynamics.results import DynamicsResult
from sae_nfm.models import check_context, check_device, model_of


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig(SavedSAEOptions):
    """Which checkpoints, on what, and where the results go."""

    checkpoints: str
    """Folder of the checkpoints of one joint_nfm run, as `sae-nfm train --n_checkpoints` leaves it: folders named by tokens."""
    reference: str | None = None
    """The same of a topk run on the same data, for norms and firing."""
    held_out: str | None = None
    """Held-out text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder, a data set on
    disk or on the hub (name or name:config); by default the embedded model's held-out tokens."""
    held_out_tokens: int = 20_000
    """Held-out tokens, at most."""
    activations: str | None = None
    """Folder of `sae-nfm cache` with the activations of the held-out rows; by default the model computes them."""
    context_size: int | None = None
    """Tokens per row; the one in the checkpoints' metadata unless given."""
    n_permutations: int = 1_999
    """Draws of each null distribution."""
    seed: int = 0
    """Of these draws."""
    output: str = "runs/dynamics"
    """Folder for results.json and features.parquet."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(self, "held_out_tokens", "n_permutations")
        check_numbers(self)
        if self.context_size is not None and self.context_size < 2:
            raise ValueError(f"context_size is {self.context_size}; give at least 2: position 0 is left out")


def run_dynamics(cfg: DynamicsConfig, *, command: str | None = None) -> DynamicsResult:
    """Measure all checkpoints and write `results.json` and `features.parquet` to `cfg.output`.

    Raises:
        ValueError, FileNotFoundError: for folders without checkpoints, of another architecture or hook point, a model or text
            that does not work; nothing is written.
    """
    check_output(cfg.output)
    with publishing(cfg.output, "dynamics", command=command) as made:
        result, features = _dynamics(cfg, command)
        write_parquet(features, made.folder / "features.parquet")
        result.save(made.folder / "results.json")
    return result


def _dynamics(cfg: DynamicsConfig, command: str | None) -> tuple[DynamicsResult, pd.DataFrame]:
    """The result, and a row for each run, checkpoint and feature."""
    check_device(cfg.device)
    runs = {measure.RUN: measure.checkpoints_of_run(cfg.checkpoints)}
    if cfg.reference is not None:
        runs[measure.REFERENCE] = measure.checkpoints_of_run(cfg.reference)
    first = measure.load_checkpoint(runs[measure.RUN][0], measure.RUN, cfg.device)
    refuse_transcoder(first, "this measurement")
    x, documents, told = _activations(cfg, first, runs[measure.RUN][-1].folder)
    tokens, every = measure.GroupedTokens.of(x, documents), [(name, one) for name, own in runs.items() for one in own]
    progress = tqdm(every, desc="Measuring checkpoints", unit="checkpoint")
    found = [measure.measured(name, checkpoint, first, tokens, cfg.device) for name, checkpoint in progress]
    draws: Any = {"seed": cfg.seed, "n_permutations": cfg.n_permutations}
    mine = [one for one in found if one.run == measure.RUN]
    edges = {which: measure.tertiles([one.integration(which) for one in mine]) for which in mine[0].energies}
    runs = [[one for one in found if one.run == run] for run in dict.fromkeys(one.run for one in found)]
    pairs = [pair for run in runs for pair in itertools.pairwise(run)]
    result = DynamicsResult(
        hook_name=str(first.cfg.metadata.hook_name),
        features=first.cfg.d_sae,
        tokens=len(documents),
        documents=len(documents.unique()),
        not_canonical=gauge.canonical_or_reason(first)[1],
        checkpoints=tuple(measure.checkpoint_row(one) for one in found),
        steps=tuple(measure.movement(*pair, edges, **draws) for pair in pairs),
        overall=tuple(measure.movement(run[0], run[-1], edges, **draws) for run in runs),
        edges=edges,
        provenance=provenance(
            cfg,
            command=command,
            model_name=cfg.model or first.cfg.metadata.model_name,
            text=told,
            sae_config=first.cfg.to_dict(),
        ),
    )
    return result, measure.trajectories(found)


def _activations(cfg: DynamicsConfig, sae: SAE[Any], last: Path) -> tuple[Tensor, Tensor, str]:
    """Activations, their documents, and whether the last checkpoint was trained on them."""
    metadata = sae.cfg.metadata
    name = cfg.model or metadata.model_name
    if name is None or metadata.hook_name is None:
        raise ValueError(
            f"the metadata in {cfg.checkpoints!r} have no model_name or no hook_name; give --model, or checkpoints with both"
        )
    text = own_text(name, "validation") if cfg.held_out is None else open_dataset(cfg.held_out, split="validation")
    model, site = model_of(sae, cfg.device, model_name=cfg.model)
    context_size = cfg.context_size or metadata.context_size or 256
    check_context(model, context_size)
    rows = held_out_rows(model, text, context_size, cfg.held_out_tokens)
    rows.check_documents()
    cache = None if cfg.activations is None else ActivationCache(cfg.activations)
    if cache is not None:
        cache.check(model, [site.hook_name], context_size)
    x, documents = read_activations(model, sae, rows.tokens, rows.documents, cache=cache)
    assert documents is not None
    return x, documents, told_of_text(model, rows.tokens, metadata=metadata, folder=last, source=cfg.held_out)
