"""The published statistics row by row, each with the same one on an SAE at hand and under a control.

Behaviour comes from the rows of a measurement (`token_table`) whose arms `run` names, norms and paths from `figure_rows`. A
published statistic has one row for each control that it needs.

Source: arXiv 2507.00269.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_nfm.analysis import FigureRow, gains_of_arms
from sae_nfm.comparison.results import Answer, ArmName, ClaimKind, Paths
from sae_nfm.evaluation import error_ratios, read_rows
from sae_nfm.experiments.reproduce import published
from sae_nfm.experiments.reproduce.published import Unit, of_part
from sae_nfm.experiments.reproduce.results import NoVerdict, ReproducedRow, Section, reproduced_row
from sae_nfm.interventions import EQUAL_DISTANCE, UNDER_TEST
from sae_nfm.stats import Bootstrap, Estimate, ratio_of_means, relative_change

PARTS = {str(Paths.LINEAR): "linear", str(Paths.NONLINEAR): "nonlinear", UNDER_TEST: "both"}


def keeping_means(arm: str) -> str:
    """Name of the same arm when its ablated paths write their mean over other text, in place of zero."""
    return f"{arm}, means kept"


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """The rows of a measurement, and the verdicts of a comparison of the same arms."""

    folder: Path
    """A finished measurement."""
    arms: Sequence[str]
    """Its arms."""
    answers: Sequence[Answer]
    """Of a comparison; those of fewer than five seeds say so."""
    bootstrap: Bootstrap
    """For intervals over documents."""

    def rows(self) -> list[ReproducedRow]:
        """Reconstruction, KL, cross-entropy, and errors beside others of their size."""
        ce = Section.CROSS_ENTROPY
        return [
            *self._wholes(Section.RECONSTRUCTION, published.ERROR_WHOLE, "error_energy", "fvu"),
            *self._paths(Section.KL, "KL", "kl_nats"),
            *self._wholes(Section.KL, published.KL_WHOLE, "kl_nats", "kl_nats"),
            self._share_of_gain(),
            *self._paths(ce, "cross-entropy", "ce_nats"),
            *self._wholes(ce, published.CE_WHOLE, "ce_nats", None),
            *self._errors(),
        ]

    def change(self, column: str, arm: str, against: str) -> Estimate | None:
        """Relative change of a column's mean from one arm to another, over documents; None where there is no such arm."""
        if against not in self.arms:
            return None
        mine, other = (read_rows(self.folder, ["document", column], [name]).dropna() for name in (arm, against))
        a, b, documents = mine[column].to_numpy(), other[column].to_numpy(), mine["document"].to_numpy()
        return relative_change(a, b, documents, bootstrap=self.bootstrap)

    def _wholes(self, section: Section, name: str, column: str, metric: str | None) -> Iterator[ReproducedRow]:
        """All paths against other things than the direct path alone."""
        controls: dict[str, str] = {
            Paths.CANONICAL: "against the direct path in the canonical gauge, which holds all that is linear",
            ArmName.MATCHED: "against a TopK SAE with as many parameters, trained on its own",
            ArmName.TOPK: "against a TopK SAE of the same width, trained on its own",
        }
        for against, control in controls.items():
            yield reproduced_row(
                section,
                name,
                self.change(column, UNDER_TEST, Paths.DIRECT),
                self.change(column, UNDER_TEST, against),
                control if against in self.arms else f"{control}: there is none here",
                verdict=self._verdict(against, metric),
            )

    def _paths(self, section: Section, what: str, column: str) -> Iterator[ReproducedRow]:
        for arm, part in PARTS.items():
            kept = arm if arm == UNDER_TEST else keeping_means(arm)
            yield reproduced_row(
                section,
                of_part(what, part),
                self.change(column, arm, Paths.DIRECT),
                self.change(column, kept, keeping_means(Paths.DIRECT)),
                "ablated paths write their mean over other text, in place of zero",
            )

    def _share_of_gain(self) -> ReproducedRow:
        """The published 16.5 % is 8.6 / 51.9."""
        roles = {"direct": str(Paths.DIRECT), "linear": str(Paths.LINEAR), "nonlinear": str(Paths.NONLINEAR)}

        def share(alone: dict[str, str]) -> Estimate:
            arms = {**alone, "both": UNDER_TEST}
            gains = gains_of_arms(
                read_rows(self.folder, ["document", "row", "position", "arm", "kl_nats"], list(arms.values())), arms
            )
            assert gains.documents is not None
            return ratio_of_means(gains.nonlinear, gains.both, gains.documents, bootstrap=self.bootstrap)

        return reproduced_row(
            Section.KL,
            published.SHARE_OF_GAIN,
            share(roles),
            share({role: keeping_means(arm) for role, arm in roles.items()}),
            "means kept; the verdict is on an SAE trained without the path",
            verdict=self._verdict(ArmName.WITHOUT_NONLINEAR, "kl_nats"),
        )

    def _errors(self) -> Iterator[ReproducedRow]:
        ratios = error_ratios(self.folder, controls=EQUAL_DISTANCE, bootstrap=self.bootstrap)
        for name in EQUAL_DISTANCE[1:]:
            control = f"at the same distance: {name}"
            yield reproduced_row(
                Section.ERRORS, published.ERROR_RATIO, ratios[EQUAL_DISTANCE[0]], ratios[name], control
            )

    def _verdict(self, against: str, metric: str | None) -> str:
        wanted = (ClaimKind.FAIR, ArmName.JOINT, against, metric)
        for answer in self.answers:
            claim = answer.claim
            if (claim.kind, claim.arm, claim.against, answer.verdict.measure) == wanted:
                return answer.verdict.words
        return NoVerdict.ONE_SEED


def gauge_rows(figures: Sequence[FigureRow]) -> list[ReproducedRow]:
    """Norms and paths; statistics that the paper does not have are here too, since its others need them."""
    rows: list[ReproducedRow] = []
    for figure in figures:
        is_path = isinstance(figure.published, Estimate) or isinstance(figure.controlled, Estimate)
        rows.append(
            reproduced_row(
                Section.PATHS if is_path else Section.NORMS,
                figure.name,
                figure.published,
                figure.controlled,
                figure.control,
                unit=Unit.OTHER,
                statistic=figure.statistic,
                path=figure.path,
                p_value=figure.p_value,
            )
        )
    return rows
