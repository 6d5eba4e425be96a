"""Results of a comparison as plain frozen data: rows, the sweep of learning rates, answers; to and from JSON, and in words."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, Literal

from typing_extensions import override

from sae_nfm.common import aligned, whole
from sae_nfm.common.results import SavedResult
from sae_nfm.comparison.claims import Answer
from sae_nfm.comparison.lr_sweep import SweepRow

COLUMNS = ("arm", "parameters", "MFLOP/token", "learning rate", "L0", "FVU", "KL (nats)", "CE increase", "dead")


@dataclass(frozen=True, kw_only=True)
class CompareRow:
    """One arm of one seed. Figures are averages over held-out tokens; None where an L0 was not reached."""

    k: int
    """Active features a token that the arms are compared at."""
    seed: int
    """Seed of initialisation and data order."""
    arm: str
    """Name of the arm, unique for a seed and k."""
    kind: Literal["trained", "interpolated", "ablation"]
    """"trained": an SAE as it was trained. "interpolated": between trained SAEs, at the L0 of joint_nfm. "ablation": a trained
    SAE with paths switched off."""
    family: str
    """The arm that it is a part of: its own name, that of the SAE with all its paths, or that of all its coefficients."""
    parameters: int
    """Trainable numbers of the SAE."""
    training_flops: float | None
    """FLOPs of a training step for each token, as `baselines.training_flops` counts them."""
    learning_rate: float
    """Peak of Adam's learning rate."""
    training_tokens_per_second: float | None
    """Speed of training steps, the language model not counted."""
    dead_fraction: float | None
    """Share of features that no token of the last half of the training activated."""
    l0: float | None
    """Active features per token."""
    fvu: float | None
    """Fraction of variance unexplained."""
    kl_nats: float | None
    """KL(original || spliced) of the next-token distributions, per token."""
    ce_nats: float | None
    """Cross-entropy of the spliced model, per predicted token."""
    ce_delta_nats: float | None
    """Its increase over the original model."""
    tokens: int
    """Held-out tokens."""


@dataclass(frozen=True, kw_only=True)
class CompareResult(SavedResult):
    """Everything a comparison found, and what is needed to repeat it. `documents.parquet` beside it has the sums behind it."""

    kind: ClassVar[str] = "compare/1"

    rows: tuple[CompareRow, ...]
    """The table."""
    sweep: tuple[SweepRow, ...]
    """Every SAE of the sweep of learning rates; none where there was one candidate."""
    answers: tuple[Answer, ...]
    """A verdict for each claim and measure."""
    missing: tuple[str, ...]
    """Claims without a verdict, each with its reason."""
    provenance: dict[str, Any]
    """Configuration, seeds, versions, hashes of the tokens, command."""

    def table(self) -> list[CompareRow]:
        """The rows without timings: what two runs with the same seeds must agree on."""
        return [replace(row, training_tokens_per_second=None) for row in self.rows]

    @override
    def save(self, path: str | Path) -> None:
        """Write as JSON, and the rows as CSV beside it, each under a temporary name first."""
        path = Path(path)
        with whole(path.with_name("rows.csv")) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([[field.name for field in fields(CompareRow)], *map(astuple, self.rows)])
        super().save(path)

    def words(self) -> str:
        """The table, the fair claims, the ablations, and what limits them."""
        lines: list[str] = []
        for k in self.provenance["config"]["k"]:
            own = [row for row in self.rows if row.k == k]
            lines += [f"k = {k}: mean (standard deviation) over {_seeds(own)}", "", *aligned(cells(own)), ""]
            for kind, heading in (("fair", FAIR), ("ablation", ABLATION)):
                chosen = [answer for answer in self.answers if answer.k == k and answer.claim.kind == kind]
                lines += [heading, *(f"  {answer.verdict.sentence}" for answer in chosen), ""] if chosen else []
        lines += [f"* no verdict: {reason}" for reason in self.missing]
        return "\n".join([*lines, *(f"* {caveat}" for caveat in self.caveats())])

    def caveats(self) -> list[str]:
        """What limits these figures."""
        config = self.provenance["config"]
        rates = config["learning_rates"]
        told = [f"{config['training_tokens']:,} training tokens an SAE."]
        if len(rates) > 1:
            at_edge = sorted({row.family for row in self.rows if row.learning_rate in (min(rates), max(rates))})
            told.append(f"Learning rates by a sweep of {', '.join(f'{rate:g}' for rate in rates)} for every arm.")
            told += [f"At an edge of the sweep, so perhaps not at their best: {', '.join(at_edge)}."] if at_edge else []
        else:
            told.append(f"One learning rate ({rates[0]:g}) for all arms, none was tuned by itself.")
        if config["dataset"] is None:
            told.append("The tokens were sampled from the embedded model itself: no evidence about real text.")
        return told


FAIR = "Against arms trained on their own:"
ABLATION = "Ablations, the paper's figure (against a part of the same model that was never trained to stand alone):"


def _seeds(rows: Sequence[CompareRow]) -> str:
    n = len({row.seed for row in rows})
    return f"{n} seed{'s' * (n > 1)}"


def cells(rows: Sequence[CompareRow]) -> list[tuple[str, ...]]:
    """The table of one k as text, `COLUMNS` first: mean (standard deviation) over seeds."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        flops = own[0].training_flops
        lines.append(
            (
                arm,
                f"{own[0].parameters:,}",
                "" if flops is None else f"{flops / 1e6:.2f}",
                f"{own[0].learning_rate:g}",
                _spread([row.l0 for row in own], ".1f"),
                _spread([row.fvu for row in own], ".4f"),
                _spread([row.kl_nats for row in own], ".4f"),
                _spread([row.ce_delta_nats for row in own], "+.4f"),
                "" if own[0].dead_fraction is None else _spread([row.dead_fraction for row in own], ".1%"),
            )
        )
    return lines


def _spread(values: Sequence[float | None], form: str) -> str:
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return "not reached"
    return f"{mean(there):{form}}" + (f" ({stdev(there):{form.lstrip('+')}})" if len(there) > 1 else "")
