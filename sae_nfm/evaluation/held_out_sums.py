"""What each SAE of a comparison does on held-out text, as sums over the tokens of each document.

A mean over all tokens, a fraction of variance, a test over documents: all are made of these sums. Columns:

    arm, document
    tokens              counted tokens (not special, not in position 0)
    predictions         those of them that have a next token in their row
    active              active features
    error_energy        |x_hat - x|^2
    variance_energy     |x - mean|^2, the mean over all counted tokens of the text
    kl_nats             KL(original || spliced) of the next-token distributions
    ce_nats             cross-entropy of the spliced model, over predictions
    ce_delta_nats       its increase over the original model, over predictions
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_nfm.data import TokenRows
from sae_nfm.evaluation.fidelity import Outcome, counted_tokens, outcomes
from sae_nfm.evaluation.results import Fidelity
from sae_nfm.evaluation.token_table import Activations
from sae_nfm.interventions import Splice
from sae_nfm.models import LanguageModel

SUMS = [
    "tokens",
    "predictions",
    "active",
    "error_energy",
    "variance_energy",
    "kl_nats",
    "ce_nats",
    "ce_delta_nats",
]


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


class _Sums:
    """Sums of one arm, in float64."""

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
    """Sums by arm and document.

    Args:
        arms: SAEs at one hook point, by name.

    Raises:
        ValueError: when no token is left to average over.
    """
    if not counted_tokens(model, rows.tokens).any():
        raise ValueError(
            f"no token to evaluate on: {rows.tokens.numel()} tokens, all special or in position 0; give more"
        )
    numbers = np.unique(rows.documents[rows.documents >= 0].numpy())
    sums, activations = {name: _Sums(numbers) for name in arms}, list[Activations]()
    for start in tqdm(range(0, len(rows), batch_rows), desc="Evaluating", leave=False):
        batch = rows.tokens[start : start + batch_rows]
        mask = counted_tokens(model, batch).cpu()
        documents = rows.documents[start : start + batch_rows][mask].numpy()
        for number, (name, outcome) in enumerate(outcomes(model, batch, arms) if mask.any() else ()):
            sums[name].add(outcome, documents)
            if number == 0:
                activations.append(Activations.of(documents, outcome.x.cpu().numpy()))
    energy = _variance_energy(activations, numbers)
    for found in sums.values():
        found.columns["variance_energy"] = energy
    return pd.concat([found.table(name) for name, found in sums.items()], ignore_index=True)


def _variance_energy(parts: Sequence[Activations], numbers: np.ndarray) -> np.ndarray:
    """Sum over each document's tokens of |x - mean|^2, [documents]."""
    mean = np.stack([part.sums.sum(0) for part in parts]).sum(0) / sum(int(part.tokens.sum()) for part in parts)
    energy = np.zeros(len(numbers))
    for part in parts:
        np.add.at(energy, np.searchsorted(numbers, part.documents), part.energies_about(mean))
    return energy
