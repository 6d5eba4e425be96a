"""The published figures row by row, each with the same statistic on an SAE at hand and the statistic under a control.

Behaviour comes from the rows of a measurement (`token_rows`) whose arms `reproduce` names, norms and paths from
`gauge_report`. A published figure has one row for each control that it needs.

Source: arXiv 2507.00269.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_nfm.analysis import Figure, FigureRow, gains_of_arms
from sae_nfm.comparison import CANONICAL, DIRECT, JOINT, Answer
from sae_nfm.evaluation import error_ratios, read_rows
from sae_nfm.interventions import EQUAL_DISTANCE, UNDER_TEST
from sae_nfm.stats import Bootstrap, Estimate, ratio_of_means, relative_change

Section = Literal["reconstruction", "KL", "cross-entropy", "errors", "paths", "norms", "sequential", "2x2"]
LINEAR, NONLINEAR = "direct + linear", "direct + nonlinear"
KEPT = ", means kept"
"""Ends the names of arms whose switched-off paths write their mean over other text."""
NOT_MEASURED = "not measured"
SINGLE = "one seed: no claim"
PARTS = {LINEAR: "linear", NONLINEAR: "nonlinear", UNDER_TEST: "both"}


@dataclass(frozen=True, kw_only=True)
class ReproducedRow:
    """A published figure beside this model's, and one control."""

    section: Section
    """What it is about."""
    name: str
    """What is measured."""
    published: str
    """As arXiv 2507.00269 gives it; "-" where it has no such figure."""
    here: Figure
    """The same statistic on the SAE at hand; None where there is none."""
    controlled: Figure
    """The statistic under the control; None where there is none."""
    control: str
    """What the control is, and what it changes; why there is none."""
    verdict: str
    """What five seeds or more say of the controlled figure, "one seed: no claim", or "not measured"."""
    form: str
    """How the figures are written, a format specification."""


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
        return [
            *self._wholes("reconstruction", "squared error", "error_energy", "fvu", "-41.3 % (0.275 to 0.161)"),
            *self._paths("KL", "KL", "kl_nats", ("-50.9 %", "-8.6 %", "-51.6 % to -51.9 %")),
            *self._wholes("KL", "KL", "kl_nats", "kl_nats", "-51.6 % to -51.9 %"),
            self._share_of_gain(),
            *self._paths("cross-entropy", "cross-entropy", "ce_nats", ("-25.7 %", "-4.2 %", "-26.2 %")),
            *self._wholes("cross-entropy", "cross-entropy", "ce_nats", None, "-26.2 %"),
            *self._errors(),
        ]

    def change(self, column: str, arm: str, against: str) -> Estimate | None:
        """Relative change of a column's mean from one arm to another, over documents; None where there is no such arm."""
        if against not in self.arms:
            return None
        mine, other = (read_rows(self.folder, ["document", column], [name]).dropna() for name in (arm, against))
        a, b, documents = mine[column].to_numpy(), other[column].to_numpy(), mine["document"].to_numpy()
        return relative_change(a, b, documents, bootstrap=self.bootstrap)

    def _wholes(
        self, section: Section, what: str, column: str, measure: str | None, published: str
    ) -> Iterator[ReproducedRow]:
        """All paths against other things than the direct path alone."""
        controls = {
            CANONICAL: "against the direct path in the canonical gauge, which holds all that is linear",
            "topk matched": "against a TopK SAE with as many parameters, trained on its own",
            "topk": "against a TopK SAE of the same width, trained on its own",
        }
        for against, control in controls.items():
            yield ReproducedRow(
                section=section,
                name=f"{what}, all paths against the direct path alone",
                published=published,
                here=self.change(column, UNDER_TEST, DIRECT),
                controlled=self.change(column, UNDER_TEST, against),
                control=control if against in self.arms else f"{control}: there is none here",
                verdict=self._verdict(against, measure),
                form="+.1%",
            )

    def _paths(
        self, section: Section, what: str, column: str, published: tuple[str, str, str]
    ) -> Iterator[ReproducedRow]:
        for (arm, part), figure in zip(PARTS.items(), published, strict=True):
            kept = arm if arm == UNDER_TEST else f"{arm}{KEPT}"
            yield ReproducedRow(
                section=section,
                name=f"{what} relative to the direct path alone, {part}",
                published=figure,
                here=self.change(column, arm, DIRECT),
                controlled=self.change(column, kept, f"{DIRECT}{KEPT}"),
                control="paths that are off write their mean over other text, in place of zero",
                verdict=SINGLE,
                form="+.1%",
            )

    def _share_of_gain(self) -> ReproducedRow:
        """The published 16.5 % is 8.6 / 51.9."""

        def share(end: str) -> Estimate:
            roles = {"direct": f"{DIRECT}{end}", "linear": f"{LINEAR}{end}", "nonlinear": f"{NONLINEAR}{end}"}
            arms = {**roles, "both": UNDER_TEST}
            gains = gains_of_arms(
                read_rows(self.folder, ["document", "row", "position", "arm", "kl_nats"], list(arms.values())), arms
            )
            assert gains.documents is not None
            return ratio_of_means(gains.nonlinear, gains.both, gains.documents, bootstrap=self.bootstrap)

        return ReproducedRow(
            section="KL",
            name="share of the KL gain that the nonlinear path has by itself",
            published="16.5 % for 3 % of the parameters",
            here=share(""),
            controlled=share(KEPT),
            control="means kept; the verdict is on an SAE trained without the path",
            verdict=self._verdict("joint_nfm without nonlinear", "kl_nats"),
            form=".1%",
        )

    def _errors(self) -> Iterator[ReproducedRow]:
        ratios = error_ratios(self.folder, controls=EQUAL_DISTANCE, bootstrap=self.bootstrap)
        for name in EQUAL_DISTANCE[1:]:
            yield ReproducedRow(
                section="errors",
                name="KL of the SAE over that of an equal-distance random vector",
                published="2.99 (Gurnee 2 to 4.5)",
                here=ratios[EQUAL_DISTANCE[0]],
                controlled=ratios[name],
                control=f"at the same distance: {name}",
                verdict=SINGLE,
                form=".2f",
            )

    def _verdict(self, against: str, measure: str | None) -> str:
        for answer in self.answers:
            claim = answer.claim
            if (claim.kind, claim.arm, claim.against, answer.verdict.measure) == ("fair", JOINT, against, measure):
                return answer.verdict.words
        return SINGLE


PUBLISHED_WEIGHTS: Mapping[str, tuple[str, str]] = {
    "mean squared decoder norm": ("SAE 0.4", ".3f"),
    "modes of the squared norm: p-value of the dip test": ("bimodal, means 0.05 and 0.37, untested", ".3f"),
    "modes of the squared norm: Gaussians preferred by BIC": ("bimodal, means 0.05 and 0.37, untested", ".0f"),
    "components for 90 % of variance": ("about 860 of 3,200", ".0f"),
    "Spearman of squared norm and share, integration": ("-0.987", "+.3f"),
    "Spearman of squared norm and share, linear": ("-0.867", "+.3f"),
    "Spearman of squared norm and share, nonlinear": ("-0.922", "+.3f"),
    "Spearman of squared norm and share, direct": ("+0.987", "+.3f"),
    "share of weight norm, integration, squared norm below 0.2": ("82.8 %", ".1%"),
    "share of weight norm, linear, squared norm below 0.2": ("33.1 %", ".1%"),
    "share of weight norm, nonlinear, squared norm below 0.2": ("49.7 %", ".1%"),
    "share of weight norm, direct, squared norm below 0.2": ("17.2 %", ".1%"),
    "share of weight norm, integration, squared norm above 0.2": ("71.3 %", ".1%"),
    "share of weight norm, linear, squared norm above 0.2": ("29.0 %", ".1%"),
    "share of weight norm, nonlinear, squared norm above 0.2": ("42.3 %", ".1%"),
    "share of weight norm, direct, squared norm above 0.2": ("28.7 %", ".1%"),
    "share of what the integration paths write, linear": ("94 %", ".1%"),
    "share of what the integration paths write, interaction": ("6 %", ".1%"),
    "nonlinear share of what is written": ("6 %", ".1%"),
}
"""What the paper reports of norms and paths, by the names of `figure_rows`, and how such figures are written."""


def gauge_rows(figures: Sequence[FigureRow]) -> list[ReproducedRow]:
    """Norms and paths; figures that the paper does not have are here too, since its others need them."""
    rows: list[ReproducedRow] = []
    for figure in figures:
        published, form = PUBLISHED_WEIGHTS.get(figure.name, ("-", "+.3g"))
        is_path = isinstance(figure.published, Estimate) or isinstance(figure.controlled, Estimate)
        rows.append(
            ReproducedRow(
                section="paths" if is_path else "norms",
                name=figure.name,
                published=published,
                here=figure.published,
                controlled=figure.controlled,
                control=figure.control,
                verdict=SINGLE,
                form=form,
            )
        )
    return rows
