"""Results of evaluations: fidelity, KL by arm of a measurement, and SAELens's metrics of one SAE."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from typing_extensions import override

from sae_nfm.common import listed, printable, read_json
from sae_nfm.common.results import SavedResult
from sae_nfm.interventions.results import EQUAL_DISTANCE, UNDER_TEST, Role
from sae_nfm.stats import Estimate

MANIFEST_FILENAME, SUMMARY_FILENAME = "manifest.json", "summary.json"


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How faithful a spliced model is to the original, averaged over held-out tokens."""

    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the held-out mean."""
    l0: float
    """Active features per token."""
    kl_nats: float
    """KL(original || spliced) of the next-token distributions, nats per token."""
    ce_nats: float
    """Cross-entropy of the spliced model, nats per token."""
    ce_delta_nats: float
    """Increase of cross-entropy over the original model, nats per token."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class FidelityTable(SavedResult):
    """What `evaluate` returns of several SAEs on the same tokens, to be saved: `FidelityTable(saes=found).save(path)`."""

    kind: ClassVar[str] = "fidelity/1"

    saes: Mapping[str, Fidelity]
    """By the names that the SAEs were given."""
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the one who saves it wants to say of model, tokens and versions."""

    @classmethod
    def of_plain(cls, content: Mapping[str, Any]) -> Self | None:
        """The same from JSON that has nothing but the fields of a `Fidelity` by name; None from any other."""
        wanted = {one.name for one in fields(Fidelity)}
        if not content or any(not isinstance(own, dict) or own.keys() != wanted for own in content.values()):
            return None
        return cls(saes={name: Fidelity(**own) for name, own in content.items()})


@dataclass(frozen=True, kw_only=True)
class ArmKL:
    """One arm of a measurement."""

    arm: str
    of: str
    """The SAE that it is, or is a part or a control of; its own name for others."""
    name: str
    """Its name without that of the SAE."""
    role: Role
    scale: float | None
    """What its error is multiplied with: 1 for the arm under test, -1 for the flipped error; None for the others."""
    kl: Estimate
    """Mean KL, nats per token."""


@dataclass(frozen=True, kw_only=True)
class MeasuredKL(SavedResult):
    """All arms of a measurement, and the ratios of errors; `summary.json` beside its rows."""

    kind: ClassVar[str] = "measure/1"

    arms: tuple[ArmKL, ...]
    """In the order of the measurement."""
    ratios: Mapping[str, Mapping[str, Estimate]]
    """By SAE, then by control: mean KL of the SAE over that of the control (`error_ratios`)."""

    def of(self, sae: str) -> tuple[ArmKL, ...]:
        """The arms of one SAE."""
        return tuple(arm for arm in self.arms if arm.of == sae)


def lacks_summary(folder: Path) -> bool:
    """Whether the measurement in a folder is one of an SAE beside its controls and `summary.json` is missing."""
    arms = read_json(folder / MANIFEST_FILENAME).get("arms", {})
    return {UNDER_TEST, EQUAL_DISTANCE[0]} <= set(arms) and not (folder / SUMMARY_FILENAME).is_file()


@dataclass(frozen=True, kw_only=True)
class Evaluation(SavedResult):
    """What SAELens measured of one SAE."""

    kind: ClassVar[str] = "evaluate/1"

    sae: str
    """Folder, or release:sae_id."""
    architecture: str
    model_name: str
    hook_name: str
    """Where the SAE was spliced in, by the model's name of it."""
    data: str
    """Which text, and whether it is held out as far as is known."""
    context_size: int
    """Tokens in a row."""
    passes: int
    """How often the data were begun; above 1 there were fewer rows than asked for, and some counted twice."""
    metrics: Mapping[str, Mapping[str, float | None]]
    """SAELens's metrics in SAELens's groups: nats for KL and cross-entropy, features per token for l0 (None: over nothing)."""
    feature_metrics: Mapping[str, Sequence[float | None]]
    """SAELens's metrics for each feature, [d_sae] each."""
    notes: tuple[str, ...] = ()
    """What has to be known to read a score: of what it is a small part, or why it is not defined."""
    special_tokens: str = ""
    """Which special tokens were left out, in words; empty in older files."""
    provenance: dict[str, Any]
    """Configuration, the SAE's own configuration, versions, sha256 of the tokens, command."""

    def words(self) -> str:
        """The metrics by group, aligned."""
        width = max(len(name) for group in self.metrics.values() for name in group)
        about = f"{self.sae}: {self.architecture} at {self.hook_name} of {self.model_name}"
        lines = [printable(about), printable(f"Data: {self.data}")]  # an SAE's metadata says them
        lines += [f"{self.special_tokens[0].upper()}{self.special_tokens[1:]}."] if self.special_tokens else []
        if self.passes > 1:
            lines.append(f"The data were read {self.passes} times: there are fewer rows than asked for.")
        for group, values in self.metrics.items():
            lines += ["", group.replace("_", " ")]
            lines += listed({name: math.nan if value is None else value for name, value in values.items()}, width)
        return "\n".join([*lines, *([""] if self.notes else []), *(f"* {note}." for note in self.notes)])

    @override
    def content(self) -> dict[str, Any]:
        """What is no number (a mean over nothing) is null."""
        return _finite(json.loads(json.dumps(asdict(self), default=str)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
