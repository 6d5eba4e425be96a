"""The result of a 2x2 experiment: as words for the terminal and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from sae_nfm.common.results import SavedResult
from sae_nfm.stats import (
    ALPHA,
    Estimate,
    FactorialTest,
    MixedModel,
    ProcedureNull,
    Removability,
    SelectedTest,
    corrected_p_values,
)

Kind = Literal["feature", "pair", "secondary"]
PRIMARY_SCALE = "log_prob"
"""The scale that claims are made on; the others stand beside it."""
WIDTH, AUTHORS = 36, "author's F"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A feature, a pair or a secondary feature that is clamped."""

    kind: Kind
    index: tuple[int, ...]
    role: str
    """Why it is clamped: what it was selected for, or what it is a control of."""
    control: bool
    typical: float
    """Mean activation where active (of a pair of f_i f_j), over the stimuli."""
    frequency: float
    """Share of the stimuli's tokens where it is active."""

    @property
    def name(self) -> str:
        """Kind and number."""
        return f"{self.kind} {' x '.join(map(str, self.index))}"


@dataclass(frozen=True, kw_only=True)
class ClampTests:
    """What a clamp did to the target words, over the stimuli that nothing was selected on."""

    mean_absolute_change: float
    """Mean over stimuli and words of |change of log-probability|, nats."""
    items: dict[str, FactorialTest]
    """The interaction of the stimuli's cells by scale, stimuli as units, of `word_pattern`."""
    items_p_adjusted: float | None
    """Holm's p-value of the log-probability one, over clamps x units of the selected; None for controls."""
    permuted_p: float
    """Of the same with the additive model's residuals shuffled among the stimuli."""
    flipped_p: float
    """Of the same with random signs of these residuals."""
    any_bucket_p: float | None
    """Of the interaction of the stimuli's cells in any combination of the buckets (Wilks); None where it cannot be tested."""
    removability: Removability
    """Whether a monotone transform of the change of log-probability removes the interaction."""
    mixed: MixedModel
    """The same interaction from single words, stimuli as random intercepts."""
    words: FactorialTest
    """The interaction of the words' own cells, words as units, each averaged over all stimuli, whatever came before."""
    published_f: float
    """The author's statistic, a one-way F on index-paired words (logits); no valid test."""
    published_p: float
    """Its p-value."""


@dataclass(frozen=True, kw_only=True)
class SelectedUnit:
    """What was selected, and whether its own activation differs between cells on stimuli it was not selected on."""

    unit: Unit
    test: SelectedTest
    """Of its activation (of a pair: of what it writes)."""
    null: ProcedureNull
    """The whole procedure on shuffled cells."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One clamp and its tests."""

    name: str
    role: str
    """Why it is clamped."""
    units: tuple[Unit, ...]
    clamp: str
    times: float | None
    """The same in units of the typical activation; None for an absolute value."""
    control: bool
    tests: ClampTests
    cells: tuple[Estimate | float, ...] | None = None
    """Mean change of log-probability by cell, nats, with an interval where it has more stimuli; None in files of 0.1.0."""
    contrast: Estimate | float | None = None
    """m_0 - m_1 - m_2 + m_3 of these, nats: its interval leaves out 0 exactly where F is significant; None likewise."""


@dataclass(frozen=True, kw_only=True)
class SecondaryShift:
    """How far the selected secondary feature moves, among all, while primary features are clamped."""

    arm: str
    change: float
    """Mean change of its activation over the held-out stimuli."""
    above: float
    """Share of the active secondary features whose mean change is at least as large in size; small: an outlier."""
    features: int
    """Secondary features that are active, with or without the clamp."""


@dataclass(frozen=True, kw_only=True)
class FactorialResult(SavedResult):
    """The experiment, and what is needed to repeat it."""

    kind: ClassVar[str] = "factorial/1"

    design: str
    items: tuple[int, int]
    """Stimuli selected on, and tested on."""
    selected: tuple[SelectedUnit, ...]
    """Stage 1: features."""
    arms: tuple[ArmResult, ...]
    """Stage 2: interventions, controls among them."""
    secondary_shifts: tuple[SecondaryShift, ...]
    """Stage 3: secondary features under clamped primaries; none without a secondary SAE."""
    provenance: dict[str, Any]

    def words(self) -> str:
        """The three stages, each with its verdict."""
        return "\n".join([*self._stage_1(), "", *self._stage_2(), "", *self._stage_3(), "", *self._caveats()])

    def reversals(self) -> dict[str, bool]:
        """Whether the interaction (5 %) of a role has opposite signs at -m and m times typical, m the largest that has both."""
        by_role: dict[str, dict[float, FactorialTest]] = {}
        for arm in self.arms:
            if arm.times is not None:
                by_role.setdefault(arm.role, {})[arm.times] = arm.tests.items[PRIMARY_SCALE]
        found = dict[str, bool]()
        for role, tests in by_role.items():
            m = max((m for m in tests if m > 0 and -m in tests), default=None)
            if m is not None and max(tests[m].p_value, tests[-m].p_value) < ALPHA:
                found[role] = tests[m].contrast * tests[-m].contrast < 0
        return found

    def largest_clamps(self) -> list[ArmResult]:
        """One arm a role: clamped at the largest multiple of the typical activation, a positive one before a negative one."""
        found: dict[str, ArmResult] = {}
        for arm in sorted(self.arms, key=lambda arm: (abs(arm.times or 0.0), arm.times or 0.0), reverse=True):
            found.setdefault(arm.role, arm)
        return [found[role] for role in dict.fromkeys(arm.role for arm in self.arms)]

    def findings(self) -> list[str]:
        """What the stages show, in sentences."""
        return [*self._design_limits(), self._shuffled(), self._interactions(), *self._beside_controls()]

    def _design_limits(self) -> list[str]:
        """What was found out about the design, and keeps it from showing much."""
        cells = self.provenance.get("stimuli", {}).get("cells", ())
        fewest = min((len(cell["sentences"]) - len(cell["sentences"]) // 2 for cell in cells), default=FEW)
        told = [few_stimuli(fewest)] if few_stimuli(fewest) else []
        roles: dict[str, list[str]] = {}
        for one in self.selected:
            roles.setdefault(one.unit.name, []).append(one.unit.role.partition(" (")[0])
        return told + [
            f"{name[0].upper()}{name[1:]} was selected for {' and '.join(own)} alike: it tells nothing of the two apart, and its "
            "clamps are counted once."
            for name, own in roles.items()
            if len(own) > 1
        ]

    def _stage_1(self) -> list[str]:
        lines = [
            self.design,
            f"1. Activations: selected on {self.items[0]} stimuli, tested on the other {self.items[1]}",
            f"   {'':<{WIDTH}}{'of':>6}{'selected F':>11}{'null p':>8}{'held-out F':>12}{'p':>8}  {'partial eta^2':<21}"
            f"{'procedure p':>11}",
        ]
        for one in self.selected:
            chosen, held = one.test.selection, one.test.held_out
            who = f"{one.unit.role}: {_number(one.unit)}"
            lines.append(
                f"   {who:<{WIDTH}}{chosen.candidates:>6}{chosen.f:>11.1f}{p_text(chosen.p_value):>8}{held.f:>12.2f}"
                f"{p_text(held.p_value):>8}  {eta_text(held.partial_eta_squared):<21}{p_text(one.null.p_value):>11}"
            )
        return [*lines, *(f"   {told}" for told in (*self._design_limits(), self._shuffled()))]

    def _shuffled(self) -> str:
        valid, same = (
            ", ".join(f"{getattr(one.null, name):.1%}" for one in self.selected)
            for name in ("rejected", "rejected_same_half")
        )
        return (
            f"On shuffled cells select and test finds an effect at 5 % in {valid} of the draws; tested on the half that "
            f"selected, in {same}."
        )

    def _stage_2(self) -> list[str]:
        return [
            "2. Clamps: does the change of the target words interact with the stimuli's cells? (log-probability)",
            _header(),
            *(_line(arm) for arm in self.arms if not arm.control),
            f"   {self._interactions()}",
        ]

    def _interactions(self) -> str:
        chosen = [arm for arm in self.arms if not arm.control]
        found = [arm for arm in chosen if (arm.tests.items_p_adjusted or 0) < ALPHA]
        if not found:
            return f"No clamp shows an interaction: of {len(chosen)} tests none is left by Holm's correction."
        robust = [arm for arm in found if arm.tests.removability.words == "not removed"]
        return (
            f"{len(found)} of {len(chosen)} clamps show an interaction (Holm, 5 %); of these {len(robust)} left by every "
            f"monotone transform and {len(found) - len(robust)} removable. Read it beside the controls."
        )

    def _stage_3(self) -> list[str]:
        return [
            "3. Controls (p-values not adjusted)",
            _header(),
            *(_line(arm) for arm in self.arms if arm.control),
            *(f"   {sentence}" for sentence in self._beside_controls()),
        ]

    def _beside_controls(self) -> list[str]:
        selected, controls = ([arm for arm in self.arms if arm.control is control] for control in (False, True))
        (share, told), (share_of_controls, told_of_controls) = _significant(selected), _significant(controls)
        return [
            f"Significant at 5 % without adjustment: {told} clamps of the selected, {told_of_controls} of the controls"
            + (": no more than controls show." if share <= share_of_controls else "; clamps of one unit go together."),
            *(
                f"{role}: the interaction {'reverses' if reverses else 'does not reverse'} with the clamp's sign."
                for role, reverses in self.reversals().items()
            ),
            *(
                f"{shift.arm}: the selected secondary feature changes by {shift.change:+.3g}; {shift.above:.1%} of "
                f"{shift.features} active ones change as much."
                for shift in self.secondary_shifts
            ),
        ]

    def _caveats(self) -> list[str]:
        config = self.provenance["config"]
        stimuli = str(self.provenance.get("stimuli_text", ""))
        told = f"* The stimuli, to the SAE, are {stimuli}."
        return [
            *([told] if "training tokens" in stimuli else []),
            "* F and p: the change of the words' own interaction pattern, by the cells of the stimuli, which are the units: "
            "intervals (90 %) are over other sentences like these, with these words.",
            "* `any p`: the same in any combination of the four buckets. `words p`: words as units, whether the clamp moves the "
            "buckets non-additively after any stimulus.",
            f"* One SAE, one division of the stimuli (seed {config['seed']}): another seed selects and tests on other halves.",
            "* `author's F` is the published statistic, a one-way F on words paired by their place in the list: no valid test.",
            "* results.json has the rest: probabilities and logits, mixed models, permutations, sign flips, each transform.",
        ]


def with_holm(arms: Sequence[ArmResult]) -> tuple[ArmResult, ...]:
    """The arms with Holm's p-values over those that are no controls."""
    family = [arm.tests.items[PRIMARY_SCALE].p_value for arm in arms if not arm.control]
    adjusted = iter(corrected_p_values(family, "holm")) if family else iter(())
    return tuple(
        arm if arm.control else replace(arm, tests=replace(arm.tests, items_p_adjusted=float(next(adjusted))))
        for arm in arms
    )


def _significant(arms: Sequence[ArmResult]) -> tuple[float, str]:
    """Share of the arms with an interaction at 5 %, and the same in words."""
    found = sum(arm.tests.items[PRIMARY_SCALE].p_value < ALPHA for arm in arms)
    return found / max(1, len(arms)), f"{found} of {len(arms)}"


def _header() -> str:
    return (
        f"   {'':<{WIDTH}}{'clamp':<14}{'|change|':>9}{'contrast':>10}{'F':>8}{'p':>8}{'Holm':>7}  {'partial eta^2':<21}"
        f"{'on scale':<15}{'any p':>7}{'words p':>9}{AUTHORS:>12}"
    )


def _line(arm: ArmResult) -> str:
    tests, main = arm.tests, arm.tests.items[PRIMARY_SCALE]
    return (
        f"   {who(arm):<{WIDTH}}{arm.clamp:<14}{tests.mean_absolute_change:>9.4f}"
        f"{main.contrast:>+10.4f}{main.f:>8.2f}{p_text(main.p_value):>8}{p_text(tests.items_p_adjusted):>7}  "
        f"{eta_text(main.partial_eta_squared):<21}"
        f"{tests.removability.words:<15}{p_text(tests.any_bucket_p):>7}{p_text(tests.words.p_value):>9}{tests.published_f:>12.2f}"
    )


def p_text(value: float | None) -> str:
    """A p-value; none is 0."""
    return "" if value is None else "<0.001" if value < 0.0005 else f"{value:.3f}"


FEW = 8
"""Test stimuli of a cell; fewer deserve a warning."""


def few_stimuli(fewest: int) -> str:
    """A warning where a cell has few stimuli to test on; else empty."""
    if fewest >= FEW:
        return ""
    return (
        f"A cell has {fewest} stimuli to test on, fewer than {FEW}: the tests rest on their being normal, and find large effects "
        f"only; give at least {2 * FEW} sentences a cell."
    )


def _number(unit: Unit) -> str:
    return "x".join(map(str, unit.index))


def who(arm: ArmResult) -> str:
    """Role and numbers."""
    return f"{arm.role}: {' and '.join(map(_number, arm.units))}"


def eta_text(estimate: Estimate) -> str:
    """With its interval; files before 0.3 have an upper end of 0 where F is near 0, and it is none."""
    if not estimate.high:
        return f"{estimate.estimate:.3f} [not defined]"
    return f"{estimate.estimate:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
