"""What is clamped in a 2x2 experiment: selected features and pairs, their controls, and the interventions that clamp them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens import SAE

from sae_nfm.architectures import NFMPaths
from sae_nfm.experiments.factorial.candidates import Candidates
from sae_nfm.experiments.factorial.results import Unit
from sae_nfm.interventions import Edit, PairEdit, ReadEdit, SAEEdit, SecondarySplice, Splice

HOOK_OF_KIND = {"feature": "hook_sae_acts_post", "secondary": "hook_secondary_acts_post"}


def unit_of(candidates: Candidates, column: int, role: str, *, control: bool = False) -> Unit:
    """A candidate in a role."""
    return Unit(
        kind=candidates.kind,
        index=candidates.indices[column],
        role=role,
        control=control,
        typical=float(candidates.typical[column]),
        frequency=float(candidates.frequency[column]),
    )


def clamped(unit: Unit, value: float) -> SAEEdit:
    """Clamp a unit at all tokens."""
    if unit.kind == "pair":
        return PairEdit(pair=(unit.index[0], unit.index[1]), mode="clamp", value=value)
    return Edit(at=HOOK_OF_KIND[unit.kind], index=unit.index, mode="clamp", value=value)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One clamp of one unit, or of two together."""

    units: tuple[Unit, ...]
    role: str
    control: bool
    clamp: str
    times: float | None
    """At what, in units of the typical activation; None for an absolute value."""
    edits: tuple[SAEEdit, ...]

    def intervention(self, sae: SAE[Any], secondary: SAE[Any] | None) -> Splice:
        """The SAE in place with this clamped."""
        return spliced(sae, secondary, self.edits)

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.role}: {' and '.join(unit.name for unit in self.units)} at {self.clamp}"


def spliced(sae: SAE[Any], secondary: SAE[Any] | None, edits: tuple[SAEEdit, ...] = ()) -> Splice:
    """An SAE in place, by way of a secondary SAE with its error term where there is one."""
    if secondary is None:
        return Splice(sae=sae, edits=edits)
    return SecondarySplice(sae=sae, secondary=secondary, error_term=True, edits=edits)


def arms(
    sae: SAE[Any], units: Sequence[Unit], times: Sequence[float], absolute: Sequence[float], roles: tuple[str, str]
) -> list[Arm]:
    """Every clamp of every unit; controls are clamped at multiples only.

    Args:
        units: selected ones and controls.
        times: clamps in units of each one's typical activation.
        absolute: clamps as they are.
        roles: the roles of the two primary features, which are clamped together too, and through the linear path only.
    """
    found = [
        _arm((unit,), unit.role, time, value, control=unit.control)
        for unit in units
        for time, value in _clamps(times, () if unit.control else absolute)
    ]
    both = tuple(unit for role in roles for unit in units if unit.role == role)
    if len(both) == 2 and both[0].index != both[1].index:
        found += [_arm(both, "both features", time, value, control=False) for time, value in _clamps(times, absolute)]
        if isinstance(sae, NFMPaths) and sae.cfg.use_linear_path:
            found += [
                _arm(both, "both, linear path only", time, value, control=True, path="linear")
                for time, value in _clamps(times, absolute)
            ]
    return found


def _clamps(times: Sequence[float], absolute: Sequence[float]) -> Iterator[tuple[float | None, float | None]]:
    yield from ((time, None) for time in times)
    yield from ((None, value) for value in absolute)


def _arm(
    units: tuple[Unit, ...],
    role: str,
    time: float | None,
    value: float | None,
    *,
    control: bool,
    path: str | None = None,
) -> Arm:
    edits = list[SAEEdit]()
    for unit in units:
        target = time * unit.typical if time is not None else value
        assert target is not None
        edits.append(
            ReadEdit(path="linear", index=unit.index, mode="clamp", value=target) if path else clamped(unit, target)
        )
    return Arm(
        units=units,
        role=role,
        control=control,
        clamp=f"{time:g} x typical" if time is not None else f"{value:g}",
        times=time,
        edits=tuple(edits),
    )
