"""What `sae-nfm secondary` found: a row for each replacement, the table, what it says in words; to and from JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd

from sae_nfm.common.options import EMBEDDED_MODEL, sampled_text
from sae_nfm.common.results import SavedResult, not_held_out
from sae_nfm.stats import Estimate

TrainedOn = Literal["hidden code", "permuted hidden code", "linear path", "residual"]

PRIMARY, MEAN, ZERO = "primary as it is", "hidden code: its mean", "hidden code: zero"
COLUMNS = (
    "d_in",
    "d_sae",
    "k",
    "L0",
    "dead",
    "explained",
    "of true",
    "FVU x",
    "FVU x_hat",
    "KL (nats)",
    "KL rise [95 %]",
)
COLUMNS += ("CE rise",)
LEGEND = (
    "Each row: the primary spliced in, what the SAE was trained on (of a permuted code: the true one) replaced by its\n"
    "reconstruction. dead: features silent in the last quarter of the training. explained: share of the variance of\n"
    "what it was trained on; of true: of the true hidden code. FVU x, FVU x_hat: of the primary's output, against its input and\n"
    "against its own output as it is. KL rise: over the primary as it is. CE rise: over the language model without SAEs."
)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An SAE and how well it reconstructs, on held-out tokens."""

    trained_on: TrainedOn
    d_in: int
    d_sae: int
    k: int
    l0: float
    """Active features per token, on the activations that are replaced."""
    dead: int | None
    """Features that no token of about the last quarter of the training activated, as its metadata has it; None where the
    training was too short for any to count."""
    explained: Estimate
    """Fraction of variance explained of what it was trained on; the interval of a permuted code's is over tokens."""
    explained_true: Estimate | None
    """The same of the true hidden code, where it was trained on a permuted one."""


@dataclass(frozen=True, kw_only=True)
class SecondaryRow:
    """What one replacement does, on held-out tokens. Intervals are over documents."""

    name: str
    sae: Reconstruction | None
    """The SAE whose reconstruction is put in; None where none takes part."""
    fvu_x: Estimate
    """Fraction of variance unexplained of the primary's input by its output."""
    fvu_x_hat: Estimate
    """The same of the primary's output as it is, by its output with the replacement."""
    kl_nats: Estimate
    """KL(original || spliced), nats per token."""
    kl_rise: Estimate
    """kl_nats less that of the primary as it is, paired by token."""
    ce_delta_nats: Estimate
    """Increase of cross-entropy over the original model, nats per predicted token."""


@dataclass(frozen=True, kw_only=True)
class SecondaryResult(SavedResult):
    """The table, and what is needed to repeat it."""

    kind: ClassVar[str] = "secondary/1"

    rows: tuple[SecondaryRow, ...]
    """The primary as it is, its hidden code by mean and by zero, then an SAE each."""
    provenance: dict[str, Any]
    """Configuration, primary, versions, digest of the tokens, command."""

    def row(self, name: str) -> SecondaryRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def words(self) -> str:
        """The table, what it shows, and what limits it."""
        table = pd.DataFrame([cells(row) for row in self.rows], [row.name for row in self.rows], COLUMNS)
        told = [f"* {sentence}" for sentence in (*self.findings(), *self._caveats())]
        return "\n".join([table.to_string(), "", LEGEND, "", *told])

    def findings(self) -> Iterator[str]:
        """What it shows, in sentences."""
        mean = self.row(MEAN)
        yield _effect_of_mean(mean)
        for row, sae in self._saes("hidden code"):
            null = next(other for _, other in self._saes("permuted hidden code") if other.k == sae.k)
            yield _against_permuted(row.name, sae, null)
            yield _kept(row, mean)
        for row, sae in (*self._saes("linear path"), *self._saes("residual")):
            yield (
                f"{row.name.capitalize()} of {sae.d_in}: {_percent(sae.explained)} explained, KL rise {_nats(row.kl_rise)}. "
                "Shares explained do not compare across widths: the same k is a smaller part of more dimensions."
            )

    def _saes(self, trained_on: TrainedOn) -> Iterator[tuple[SecondaryRow, Reconstruction]]:
        for row in self.rows:
            if row.sae is not None and row.sae.trained_on == trained_on:
                yield row, row.sae

    def _caveats(self) -> Iterator[str]:
        config, primary = self.provenance["config"], self.provenance["primary"]
        crowded = [sae for _, sae in self._saes("hidden code") if sae.k > sae.d_in / 2]
        if crowded:
            yield (
                f"k = {crowded[-1].k} of {crowded[-1].d_in} dimensions is hardly sparse, as is the paper's 250 of 300: with k "
                "near the number of dimensions any code reconstructs, see the permuted one."
            )
        silent = [(row.name, sae.dead / sae.d_sae) for row, sae in self._saes("hidden code") if sae.dead is not None]
        if any(share > 0.5 for _, share in silent):
            told = ", ".join(f"{share:.0%} ({name})" for name, share in silent)
            yield f"Most features of a secondary SAE are dead, {told}: so few tokens train a part of the expansion only."
        yield (
            f"One seed ({config['seed']}), {config['training_tokens']:,} training tokens, one learning rate ({config['lr']:g}) "
            "for all, none was tuned by itself. Intervals are over documents: they say nothing about other seeds."
        )
        yield (
            f"The primary: {primary['d_sae']:,} features and {primary['nfm_dim']} interaction dimensions. The paper's has 50,000 "
            "and 300, on OpenLLaMA-3B, with a secondary SAE of 7,500 features, and it reports a negligible gain from the linear "
            "path's output (not measured here)."
        )
        sampled = sampled_text(self.provenance.get("model_name", EMBEDDED_MODEL), config["dataset"])
        if sampled:
            yield sampled
        yield from not_held_out(self.provenance)


def _effect_of_mean(mean: SecondaryRow) -> str:
    if mean.kl_rise.low > 0:
        verdict = "so it says something of each token that the predictions need"
    else:
        verdict = "a null result: nothing in it is shown to matter to the predictions, so neither can features of it"
    return f"Replacing the hidden code by its mean: KL rise {_nats(mean.kl_rise)}, {verdict}."


def _against_permuted(name: str, sae: Reconstruction, null: Reconstruction) -> str:
    """Whether dimensions of the hidden code do anything together, by intervals that do not meet."""
    assert null.explained_true is not None
    if sae.explained.low > null.explained.high:
        verdict = "less: the dimensions do things together that features pick up"
    elif sae.explained.high < null.explained.low:
        verdict = "more: no structure across dimensions is shown"
    else:
        verdict = "no difference shown: no structure across dimensions is shown"
    return (
        f"{name.capitalize()}: {_percent(sae.explained)} explained. An SAE of the permuted code explains "
        f"{_percent(null.explained)} of that one ({verdict}), and {_percent(null.explained_true)} of the true code."
    )


def _kept(row: SecondaryRow, mean: SecondaryRow) -> str:
    told = f"{row.name.capitalize()}: replaced by the reconstruction, KL rise {_nats(row.kl_rise)}"
    if mean.kl_rise.low <= 0:
        return f"{told}; where the mean does nothing there is no effect of which a share could be kept."
    return f"{told}, which keeps {1 - row.kl_rise.estimate / mean.kl_rise.estimate:.1%} of what the mean takes away."


def cells(row: SecondaryRow) -> Sequence[str]:
    """A row of the table, in the order of `COLUMNS`."""
    sae, own = row.sae, [""] * 7
    if sae is not None:
        true = "" if sae.explained_true is None else f"{sae.explained_true.estimate:.1%}"
        dead = "" if sae.dead is None else f"{sae.dead / sae.d_sae:.0%}"
        own = [f"{sae.d_in:,}", f"{sae.d_sae:,}", f"{sae.k}", f"{sae.l0:.1f}", dead]
        own += [f"{sae.explained.estimate:.1%}", true]
    levels = [f"{estimate.estimate:.4f}" for estimate in (row.fvu_x, row.fvu_x_hat, row.kl_nats)]
    return [*own, *levels, _nats(row.kl_rise), f"{row.ce_delta_nats.estimate:+.4f}"]


def _percent(estimate: Estimate) -> str:
    return f"{estimate.estimate:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _nats(estimate: Estimate) -> str:
    return f"{estimate.estimate:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"
