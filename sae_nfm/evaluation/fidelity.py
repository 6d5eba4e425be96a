"""What interventions do to a language model's activations and to its predictions.

One loop over held-out tokens serves every arm: the model runs once as it is and once per arm with the arm's intervention at
work, from there on (`models.SharedPrefix`). `evaluate` averages, `measure` writes a row for every token. Special tokens (BOS,
EOS, padding) keep their activations, as in SAELens's splice, and are left out of both; so is position 0, whose norm would
dominate the variance.

`held_out_sums` has, for each arm and document, the sums that any mean, fraction of variance or test over documents is made of:

    tokens              counted tokens (not special, not in position 0)
    predictions         those of them that have a next token in their row
    active              active features
    error_energy        |x_hat - x|^2
    variance_energy     |x - mean|^2, the mean over all counted tokens of the text
    kl_nats             KL(original || spliced) of the next-token distributions
    ce_nats             cross-entropy of the spliced model, over predictions
    ce_delta_nats       its increase over the original model, over predictions
"""

import zlib
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from sae_nfm.common import ShortRepr
from sae_nfm.data import TokenRows, held_out_corpus, told_of_text
from sae_nfm.evaluation import token_table
from sae_nfm.evaluation.error_controls import summarise
from sae_nfm.evaluation.results import Fidelity
from sae_nfm.evaluation.token_table import Activations
from sae_nfm.interventions import Intervention, Splice, counted_tokens, digest
from sae_nfm.loading import load_sae
from sae_nfm.models import (
    LanguageModel,
    SharedPrefix,
    check_finite,
    model_of,
    places_of,
    real_batches,
    real_tokens,
    run_rows,
)

__all__ = [
    "Arm",
    "Fidelity",
    "Outcome",
    "counted_tokens",
    "evaluate",
    "evaluation_table",
    "held_out_sums",
    "measure",
    "outcomes",
    "spliced",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class Outcome(ShortRepr):
    """What an intervention did at the counted tokens of a batch, in order: x became x_hat."""

    x: Float[Tensor, "tokens d"]
    x_hat: Float[Tensor, "tokens d"]
    acts: Float[Tensor, "tokens d_sae"] | None
    """Feature activations, where an SAE was at work and they were asked for."""
    has_next: Bool[Tensor, " tokens"]
    """Whether there is a next token: not in the last position."""
    kl_nats: Float[Tensor, " tokens"]
    """KL(original || changed) of the next-token distributions."""
    ce_nats: Float[Tensor, " tokens"]
    """Cross-entropy of the changed model; NaN where there is no next token."""
    ce_delta_nats: Float[Tensor, " tokens"]
    """Its increase over the original model; NaN likewise."""

    def columns(self) -> dict[str, Float[Tensor, " tokens"]]:
        """The metrics of each token, by the names of `token_table.SCHEMA`."""
        error = self.x_hat - self.x
        return {
            "kl_nats": self.kl_nats,
            "ce_nats": self.ce_nats,
            "ce_delta_nats": self.ce_delta_nats,
            "error_norm": error.norm(dim=-1),
            "error_energy": error.square().sum(-1),
            "cosine": F.cosine_similarity(self.x_hat, self.x, dim=-1),
            "x_norm": self.x.norm(dim=-1),
        }


def outcomes(
    model: LanguageModel,
    batch: Int[Tensor, "rows pos"],
    arms: Mapping[str, Intervention],
    generators: Mapping[str, torch.Generator] | None = None,
    *,
    with_acts: bool = True,
    attention_mask: Bool[Tensor, "rows pos"] | None = None,
    first_row: int = 0,
) -> Iterator[tuple[str, Outcome]]:
    """What each arm does to a batch: the loop behind `evaluate`, `measure` and `held_out_sums`.

    KL and cross-entropy are computed in float32 from log-probabilities, a row at a time, whatever the model's type. A KL can be
    a rounding error below zero; of unchanged logits it is 0 exactly. `generators` are for arms that draw at random, by name;
    feature activations need [tokens, d_sae] numbers, and are left out without `with_acts`. Padding (of an attention mask, else
    inferred from the ids) is neither attended to nor counted.

    Raises:
        ValueError: where logits or a reconstruction are not finite; it names the arm and the token, whose row is counted from
            `first_row`.
    """
    real = real_tokens(model, batch, attention_mask)
    mask = counted_tokens(model, batch, real)
    following, next_is_real = batch.roll(-1, dims=1), real.roll(-1, dims=1)
    next_is_real[:, -1] = False
    prefix = SharedPrefix(model, [arm.hook_name for arm in arms.values()])
    with prefix.shared():
        clean = run_rows(model, batch, real)
    has_next = next_is_real[mask]
    original = [logits[counted].float().log_softmax(-1) for logits, counted in zip(clean, mask, strict=True)]
    original_ce = [_nll(p, following[row][mask[row]]) for row, p in enumerate(original)]
    check_finite(torch.cat(original), mask, "the model's own logits", first_row)
    for name, arm in arms.items():
        with arm.on(model, (generators or {}).get(name)) as trace, prefix.shared(arm.hook_name):
            logits = run_rows(model, batch, real)
        kl, ce = list[Tensor](), list[Tensor]()
        for row, p in enumerate(original):
            q = logits[row][mask[row]].float().log_softmax(-1)
            kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
            ce.append(_nll(q, following[row][mask[row]]))
        outcome = Outcome(
            x=trace.x[mask].float(),
            x_hat=trace.x_hat[mask].float(),
            acts=trace.acts.to_dense()[mask] if with_acts and trace.acts is not None else None,
            has_next=has_next,
            kl_nats=torch.cat(kl),
            ce_nats=torch.cat(ce).masked_fill(~has_next, torch.nan),
            ce_delta_nats=(torch.cat(ce) - torch.cat(original_ce)).masked_fill(~has_next, torch.nan),
        )
        check_finite(outcome.x_hat, mask, f"under {name!r} the activations put in place", first_row)
        check_finite(outcome.kl_nats, mask, f"under {name!r} the model's logits", first_row)
        yield name, outcome


def _nll(log_probs: Float[Tensor, "tokens d_vocab"], following: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return -log_probs.gather(-1, following[:, None]).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An SAE spliced in at its own hook point, some of its paths written as zero."""

    name: str
    sae: SAE[Any]
    """The SAE; `cfg.metadata.hook_name` says where it goes."""
    off: tuple[str, ...] = ()
    """Hook points of the SAE, such as "hook_nfm_linear", whose value is replaced by zero."""

    @property
    def intervention(self) -> Splice:
        """The arm as an intervention; a ValueError when the SAE has no such path."""
        unknown = [name for name in self.off if name not in self.sae.hook_dict]
        if unknown:
            known = ", ".join(self.sae.hook_dict)
            raise ValueError(f"the SAE of {self.name!r} has no {', '.join(unknown)}; it has {known}")
        return Splice(sae=self.sae, ablated=dict.fromkeys(self.off))


class _Sums:
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
    attention_mask: Bool[Tensor, "rows pos"] | None = None,
) -> dict[str, Fidelity]:
    """Fidelity of every arm on the same tokens, held-out rows that begin with BOS where the model wants one.

    Rows may be padded at either end; without an attention mask, padding is inferred from the ids (`models.real_tokens`).
    A ValueError for two arms of one name, when no token is left to average over, or where logits are not finite.
    """
    if len({arm.name for arm in arms}) != len(arms):
        raise ValueError(f"arm names {[arm.name for arm in arms]} repeat; give every arm a name of its own")
    interventions = {arm.name: arm.intervention for arm in arms}
    real = real_tokens(model, tokens, attention_mask)
    _refuse_uncounted(model, tokens, real)
    sums, batches = {arm.name: _Sums() for arm in arms}, list(real_batches(model, tokens, batch_rows, real))
    for number, (batch, part) in enumerate(tqdm(batches, desc="Evaluating", disable=not show_progress)):
        if counted_tokens(model, batch, part).any():
            settings: Any = {"attention_mask": part, "first_row": number * batch_rows}
            for name, outcome in outcomes(model, batch, interventions, **settings):
                sums[name].add(outcome)
    return {name: s.fidelity() for name, s in sums.items()}


def evaluation_table(
    saes: Sequence[str | Path],
    *,
    held_out: str | None = None,
    split: str = "validation",
    model: str | None = None,
    n_tokens: int = 20_000,
    context_size: int | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Several saved SAEs spliced into one language model, on the same held-out tokens: a row each, by name.

    Columns are architecture, hook_name, d_sae, those of `Fidelity`, and `text`: whether that SAE was trained on it.

    Args:
        saes: folders, or release:sae_id, each once; of any architectures and hook points of one model.
        held_out, split, model, context_size: as the options of `sae-nfm evaluate`.
        n_tokens: held-out tokens, at most.

    Raises a ValueError or FileNotFoundError for an SAE, model or text that does not work, or SAEs of several models.
    """
    loaded = {str(name): load_sae(str(name), device=device).eval() for name in saes}
    if not loaded or len(loaded) < len(saes):
        raise ValueError(f"the SAEs are {list(map(str, saes))}; give at least one, each once")
    first = next(iter(loaded.values()))
    names = {str(sae.cfg.metadata.model_name) for sae in loaded.values()}
    if model is None and len(names) > 1:
        raise ValueError(f"the SAEs are of the models {', '.join(sorted(names))}; give those of one, or --model")
    language_model, _ = model_of(first, device, model_name=model)
    where: dict[str, Any] = {"model_name": model, "dataset_path": held_out, "split": split, "n_tokens": n_tokens}
    rows = held_out_corpus(language_model, first, context_size=context_size, **where)
    found = evaluate(language_model, rows.tokens, [Arm(name=name, sae=sae) for name, sae in loaded.items()])
    lines = [
        {"architecture": sae.cfg.architecture(), "hook_name": sae.cfg.metadata.hook_name, "d_sae": sae.cfg.d_sae}
        | vars(found[name])
        | {"text": told_of_text(language_model, rows.tokens, metadata=sae.cfg.metadata, folder=name, source=held_out)}
        for name, sae in loaded.items()
    ]
    return pd.DataFrame(lines, index=pd.Index(loaded, name="sae"))


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
        rows: held-out rows with their documents, from `documents.held_out_rows`.
        arms: interventions by the name that the column `arm` gets.
        folder: for the rows; new, or that of the same measurement. It is returned.
        seed: of the arms that draw at random; 0 or more.
        batch_rows: rows per forward pass. Errors are shuffled within a batch.
        batches_per_part: forward passes of an arm between two files.

    Raises:
        ValueError: when the folder has another measurement (the message says what differs), when there is no arm or no token
            to measure, a row is longer than the column `position` can hold, or an arm's logits are not finite.
    """
    if not arms:
        raise ValueError("there are no arms to measure; give at least one intervention with a name")
    if rows.tokens.shape[1] > token_table.LONGEST:
        raise ValueError(f"rows have {rows.tokens.shape[1]} tokens; give at most {token_table.LONGEST}")
    real = real_tokens(model, rows.tokens, rows.attention_mask)
    _refuse_uncounted(model, rows.tokens, real)
    starts = range(0, len(rows), batch_rows * batches_per_part)
    sizes = {"batch_rows": batch_rows, "batches_per_part": batches_per_part, "parts": len(starts)}
    folder = token_table.begin(folder, _manifest(model, rows, arms, seed=seed, **sizes))
    with tqdm(total=len(rows), desc="Measuring", unit="row", disable=not show_progress) as progress:
        for part, start in enumerate(starts):
            batches = range(start, min(start + batch_rows * batches_per_part, len(rows)), batch_rows)
            if token_table.is_finished(folder, part):
                progress.update(min(batch_rows * batches_per_part, len(rows) - start))
                continue
            recorder = _Part(model, arms, real, {name: _generator(seed, name, part) for name in arms})
            for first in batches:
                recorder.add(rows, first, batch_rows)
                progress.update(min(batch_rows, len(rows) - first))
            recorder.write(folder, part)
    summarise(folder, {name: arm.role for name, arm in arms.items()})
    return folder


@contextmanager
def spliced(model: LanguageModel, arm: Arm) -> Generator[LanguageModel]:
    """The model with the arm's SAE in place of its hook point; removed again on exit, including on exceptions."""
    with arm.intervention.on(model):
        yield model


class _Part:
    def __init__(
        self,
        model: LanguageModel,
        arms: Mapping[str, Intervention],
        real: Bool[Tensor, "rows pos"],
        generators: Mapping[str, torch.Generator],
    ) -> None:
        self._model, self._arms, self._real, self._generators = model, arms, real, generators
        self._columns: dict[str, dict[str, list[np.ndarray]]] = {name: defaultdict(list) for name in arms}
        self._activations: dict[str, list[Activations]] = defaultdict(list)

    def add(self, rows: TokenRows, first: int, n_rows: int) -> None:
        batch, real = rows.tokens[first : first + n_rows], self._real[first : first + n_rows]
        mask = counted_tokens(self._model, batch, real).cpu()
        row = mask.nonzero(as_tuple=True)[0] + first
        document, position = rows.documents[first : first + n_rows][mask], places_of(real).cpu()[mask]
        where, seen = {"document": document, "row": row, "position": position}, dict[str, Tensor]()
        settings: Any = {"with_acts": False, "attention_mask": real, "first_row": first}
        found = outcomes(self._model, batch, self._arms, self._generators, **settings)
        for name, outcome in found if mask.any() else ():
            for column, values in (where | outcome.columns()).items():
                self._columns[name][column].append(values.cpu().numpy())
            seen.setdefault(self._arms[name].hook_name, outcome.x)
        for at, x in seen.items():
            self._activations[at].append(Activations.of(where["document"].numpy(), x.cpu().numpy()))

    def write(self, folder: Path, part: int) -> None:
        whole = {
            name: {c: np.concatenate(v) for c, v in found.items()} for name, found in self._columns.items() if found
        }
        tables = (token_table.table(name, list(self._arms), columns) for name, columns in whole.items())
        activations = {at: Activations.joined(several) for at, several in self._activations.items()}
        token_table.write_part(folder, part, tables, activations)


def _manifest(
    model: LanguageModel, rows: TokenRows, arms: Mapping[str, Intervention], **settings: int
) -> token_table.Manifest:
    return token_table.Manifest(
        model=f"{type(model).__name__} {digest(model.state_dict())}",
        tokens=digest({"tokens": rows.tokens} | ({} if rows.attention_mask is None else {"mask": rows.attention_mask})),
        documents=digest({"documents": rows.documents}),
        arms={name: arm.identity for name, arm in arms.items()},
        hook_names={name: arm.hook_name for name, arm in arms.items()},
        **settings,
    )


def _generator(seed: int, arm: str, part: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, zlib.crc32(arm.encode()), part]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _refuse_uncounted(model: LanguageModel, tokens: Int[Tensor, "rows pos"], real: Bool[Tensor, "rows pos"]) -> None:
    if not counted_tokens(model, tokens, real).any():
        raise ValueError(f"no token to evaluate on: {tokens.numel()} tokens, special or in position 0; give more text")


SUMS = ["tokens", "predictions", "active", "error_energy", "variance_energy", "kl_nats", "ce_nats", "ce_delta_nats"]


def fidelity_of(sums: pd.DataFrame) -> Fidelity:
    """The averages over all documents of one arm."""
    total: dict[str, float] = {name: float(np.asarray(sums[name]).sum()) for name in SUMS}
    return Fidelity(
        l0=total["active"] / total["tokens"],
        fvu=total["error_energy"] / total["variance_energy"],
        kl_nats=total["kl_nats"] / total["tokens"],
        ce_nats=total["ce_nats"] / total["predictions"],
        ce_delta_nats=total["ce_delta_nats"] / total["predictions"],
        tokens=int(total["tokens"]),
    )


class _DocumentSums:
    def __init__(self, documents: np.ndarray) -> None:
        self.documents = documents
        self.columns = {name: np.zeros(len(documents)) for name in SUMS}

    def add(self, outcome: Outcome, documents: np.ndarray) -> None:
        assert outcome.acts is not None
        has_next = outcome.has_next
        values = {
            "tokens": torch.ones_like(outcome.kl_nats),
            "predictions": has_next,
            "active": (outcome.acts != 0).sum(-1),
            "error_energy": (outcome.x_hat - outcome.x).square().sum(-1),
            "kl_nats": outcome.kl_nats,
            "ce_nats": outcome.ce_nats.where(has_next, 0),
            "ce_delta_nats": outcome.ce_delta_nats.where(has_next, 0),
        }
        places = np.searchsorted(self.documents, documents)
        for name, value in values.items():
            np.add.at(self.columns[name], places, value.double().cpu().numpy())

    def table(self, arm: str) -> pd.DataFrame:
        counted = self.columns["tokens"] > 0  # of a document, position 0 may be all that is there
        columns = {name: values[counted] for name, values in self.columns.items()}
        return pd.DataFrame({"arm": arm, "document": self.documents[counted]} | columns)


@torch.no_grad()
def held_out_sums(
    model: LanguageModel, rows: TokenRows, arms: Mapping[str, Splice], *, batch_rows: int = 16
) -> pd.DataFrame:
    """Sums by arm and document, of SAEs at one hook point; a ValueError when no token is left to average over."""
    real = real_tokens(model, rows.tokens, rows.attention_mask)
    _refuse_uncounted(model, rows.tokens, real)
    numbers = np.unique(rows.documents[rows.documents >= 0].numpy())
    sums, activations = {name: _DocumentSums(numbers) for name in arms}, list[Activations]()
    for start in tqdm(range(0, len(rows), batch_rows), desc="Evaluating", leave=False):
        here = slice(start, start + batch_rows)
        batch, part = rows.tokens[here], real[here]
        mask = counted_tokens(model, batch, part).cpu()
        documents = rows.documents[here][mask].numpy()
        found = outcomes(model, batch, arms, attention_mask=part, first_row=start) if mask.any() else ()
        for number, (name, outcome) in enumerate(found):
            sums[name].add(outcome, documents)
            if number == 0:
                activations.append(Activations.of(documents, outcome.x.cpu().numpy()))
    mean = np.stack([part.sums.sum(0) for part in activations]).sum(0)
    mean = mean / sum(int(part.tokens.sum()) for part in activations)
    energy = np.zeros(len(numbers))
    for part in activations:
        np.add.at(energy, np.searchsorted(numbers, part.documents), part.energies_about(mean))
    for found in sums.values():
        found.columns["variance_energy"] = energy
    return pd.concat([found.table(name) for name, found in sums.items()], ignore_index=True)
