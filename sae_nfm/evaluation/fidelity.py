"""What interventions do to a language model's activations and to its predictions.

One loop over held-out tokens serves every arm: the model runs once as it is and once per arm with the arm's intervention at
work. `evaluate` averages, `measure` keeps a row for every token. Special tokens (BOS, EOS, padding) keep their activations, as
in SAELens's splice, and are left out of both; so is position 0, whose norm would dominate the variance.
"""

import zlib
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.data import TokenRows
from sae_nfm.evaluation import token_table
from sae_nfm.evaluation.error_controls import summarise
from sae_nfm.evaluation.intervention_loop import Outcome, outcomes
from sae_nfm.evaluation.results import Fidelity
from sae_nfm.interventions import Intervention, Splice, counted_tokens, digest
from sae_nfm.models import LanguageModel

__all__ = ["Arm", "Fidelity", "Outcome", "counted_tokens", "evaluate", "measure", "outcomes", "spliced"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An SAE spliced in at its own hook point, some of its paths written as zero."""

    name: str
    """Unique name of the arm."""
    sae: SAE[Any]
    """The SAE; `cfg.metadata.hook_name` says where it goes."""
    off: tuple[str, ...] = ()
    """Hook points of the SAE, such as "hook_nfm_linear", whose value is replaced by zero."""

    @property
    def intervention(self) -> Splice:
        """The arm as an intervention.

        Raises:
            ValueError: when the SAE has no such path.
        """
        unknown = [name for name in self.off if name not in self.sae.hook_dict]
        if unknown:
            known = ", ".join(self.sae.hook_dict)
            raise ValueError(f"the SAE of {self.name!r} has no {', '.join(unknown)}; it has {known}")
        return Splice(sae=self.sae, ablated=dict.fromkeys(self.off))


class _Sums:
    """Running sums of one arm, in float64."""

    def __init__(self) -> None:
        self.explained_variance = ExplainedVarianceCalculator()
        self.values: dict[str, float] = defaultdict(float)

    def add(self, outcome: Outcome) -> None:
        self.explained_variance.add_batch(outcome.x_hat, outcome.x)
        assert outcome.acts is not None
        terms = {"active": outcome.acts != 0, "kl": outcome.kl_nats}
        terms |= {"ce": outcome.ce_nats[outcome.has_next], "ce_delta": outcome.ce_delta_nats[outcome.has_next]}
        for name, term in (terms | {"predictions": outcome.has_next}).items():
            self.values[name] += term.cpu().double().sum().item()
        self.values["tokens"] += len(outcome.x)

    def fidelity(self) -> Fidelity:
        s = self.values
        n = s["tokens"]
        return Fidelity(
            fvu=1 - self.explained_variance.compute(),
            l0=s["active"] / n,
            kl_nats=s["kl"] / n,
            ce_nats=s["ce"] / s["predictions"],
            ce_delta_nats=s["ce_delta"] / s["predictions"],
            tokens=int(n),
        )


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Int[Tensor, "rows pos"],
    arms: Sequence[Arm],
    *,
    batch_rows: int = 16,
    show_progress: bool = True,
) -> dict[str, Fidelity]:
    """Fidelity of every arm on the same tokens.

    Args:
        model: the language model, from any of `sae_nfm.models.load.load_model`'s loaders.
        tokens: held-out rows, each beginning with BOS where the model wants one.
        arms: what to splice in; names must differ.
        batch_rows: rows per forward pass.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: for two arms of one name, or when no token is left to average over.
    """
    if len({arm.name for arm in arms}) != len(arms):
        raise ValueError(f"arm names {[arm.name for arm in arms]} repeat; give every arm a name of its own")
    interventions = {arm.name: arm.intervention for arm in arms}
    _refuse_uncounted(model, tokens)
    sums = {arm.name: _Sums() for arm in arms}
    for batch in tqdm(tokens.split(batch_rows), desc="Evaluating", disable=not show_progress):
        if counted_tokens(model, batch).any():
            for name, outcome in outcomes(model, batch, interventions):
                sums[name].add(outcome)
    return {name: s.fidelity() for name, s in sums.items()}


@torch.no_grad()
def measure(
    model: LanguageModel,
    rows: TokenRows,
    arms: Mapping[str, Intervention],
    folder: str | Path,
    *,
    seed: int = 0,
    batch_rows: int = 16,
    batches_per_part: int = 8,
    show_progress: bool = True,
) -> Path:
    """A row for every counted token and arm, in parquet; `token_table` reads them and has their columns.

    Of an SAE beside its controls (`control_arms`) `summary.json` has the mean KL of every arm.

    A part of the text is written at a time, so that memory does not grow with it. Parts that are there already are not
    computed again: an interrupted measurement goes on when it is called again as it was. What an arm draws at random
    depends on the seed, its name and the part only: not on the other arms, and not on interruptions.

    Args:
        model: the language model, from any of `sae_nfm.models.load.load_model`'s loaders.
        rows: held-out rows with their documents, from `documents.held_out_rows`.
        arms: interventions by the name that the column `arm` gets.
        folder: for the rows; new, or that of the same measurement.
        seed: of the arms that draw at random; 0 or more.
        batch_rows: rows per forward pass. Errors are shuffled within a batch.
        batches_per_part: forward passes of an arm between two files.
        show_progress: whether to show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: when the folder has another measurement (the message says what differs), when there is no arm or no token
            to measure, a row is longer than the column `position` can hold, or an arm's logits are not finite.
    """
    if not arms:
        raise ValueError("there are no arms to measure; give at least one intervention with a name")
    if rows.tokens.shape[1] > token_table.LONGEST:
        raise ValueError(f"rows have {rows.tokens.shape[1]} tokens; give at most {token_table.LONGEST}")
    _refuse_uncounted(model, rows.tokens)
    starts = range(0, len(rows), batch_rows * batches_per_part)
    sizes = {"batch_rows": batch_rows, "batches_per_part": batches_per_part, "parts": len(starts)}
    folder = token_table.begin(folder, _manifest(model, rows, arms, seed=seed, **sizes))
    with tqdm(total=len(rows), desc="Measuring", unit="row", disable=not show_progress) as progress:
        for part, start in enumerate(starts):
            batches = range(start, min(start + batch_rows * batches_per_part, len(rows)), batch_rows)
            if token_table.is_finished(folder, part):
                progress.update(min(batch_rows * batches_per_part, len(rows) - start))
                continue
            recorder = _Part(model, arms, {name: _generator(seed, name, part) for name in arms})
            for first in batches:
                recorder.add(rows, first, batch_rows)
                progress.update(min(batch_rows, len(rows) - first))
            recorder.write(folder, part)
    summarise(folder, {name: arm.role for name, arm in arms.items()})
    return folder


@contextmanager
def spliced(model: LanguageModel, arm: Arm) -> Generator[LanguageModel]:
    """The model with the arm's SAE in place of its hook point; removed again whatever happens.

    Raises:
        ValueError: when the model has no such hook point, or the SAE no such path.
    """
    with arm.intervention.on(model):
        yield model


class _Part:
    """Rows of one part, by arm, until they are written."""

    def __init__(
        self, model: LanguageModel, arms: Mapping[str, Intervention], generators: Mapping[str, torch.Generator]
    ) -> None:
        self._model, self._arms, self._generators = model, arms, generators
        self._columns: dict[str, dict[str, list[np.ndarray]]] = {name: defaultdict(list) for name in arms}
        self._activations: dict[str, list[token_table.Activations]] = defaultdict(list)

    def add(self, rows: TokenRows, first: int, n_rows: int) -> None:
        """Measure a batch."""
        batch = rows.tokens[first : first + n_rows]
        mask = counted_tokens(self._model, batch).cpu()
        row, position = mask.nonzero(as_tuple=True)
        where = {"document": rows.documents[first : first + n_rows][mask], "row": row + first, "position": position}
        seen = dict[str, Tensor]()
        found = outcomes(self._model, batch, self._arms, self._generators, with_acts=False)
        for name, outcome in found if mask.any() else ():
            if not outcome.kl_nats.isfinite().all():
                raise ValueError(
                    f"under {name!r} the model's logits are not finite numbers; take the arm out, or see to it"
                )
            for column, values in (where | outcome.columns()).items():
                self._columns[name][column].append(values.cpu().numpy())
            seen.setdefault(self._arms[name].hook_name, outcome.x)
        for at, x in seen.items():
            self._activations[at].append(token_table.Activations.of(where["document"].numpy(), x.cpu().numpy()))

    def write(self, folder: Path, part: int) -> None:
        """Write what was measured."""
        tables = (
            token_table.table(
                name, list(self._arms), {column: np.concatenate(values) for column, values in found.items()}
            )
            for name, found in self._columns.items()
            if found
        )
        activations = {at: token_table.Activations.joined(several) for at, several in self._activations.items()}
        token_table.write_part(folder, part, tables, activations)


def _manifest(
    model: LanguageModel, rows: TokenRows, arms: Mapping[str, Intervention], **settings: int
) -> token_table.Manifest:
    return token_table.Manifest(
        model=f"{type(model).__name__} {digest(model.state_dict())}",
        tokens=digest({"tokens": rows.tokens}),
        documents=digest({"documents": rows.documents}),
        arms={name: arm.identity for name, arm in arms.items()},
        hook_names={name: arm.hook_name for name, arm in arms.items()},
        **settings,
    )


def _generator(seed: int, arm: str, part: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, zlib.crc32(arm.encode()), part]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _refuse_uncounted(model: LanguageModel, tokens: Int[Tensor, "rows pos"]) -> None:
    if not counted_tokens(model, tokens).any():
        raise ValueError(
            f"no token to evaluate on: {tokens.numel()} tokens, all special or in position 0; give more held-out text"
        )
