"""The result of evaluating one SAE: SAELens's figures with what they were measured on, as text and as JSON."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_nfm.common import listed, write_json


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What SAELens measured of one SAE."""

    sae: str
    """Folder, or release:sae_id."""
    architecture: str
    """The SAE's architecture."""
    model_name: str
    """The language model."""
    hook_name: str
    """Where the SAE was spliced in, by the model's name of it."""
    data: str
    """Which text, and whether it is held out as far as is known."""
    context_size: int
    """Tokens in a row."""
    passes: int
    """How often the data were begun; above 1 there were fewer rows than asked for, and some counted twice."""
    metrics: dict[str, dict[str, float]]
    """SAELens's metrics in SAELens's groups: nats for KL and cross-entropy, features per token for l0."""
    feature_metrics: dict[str, list[float]]
    """SAELens's metrics for each feature, [d_sae] each."""
    provenance: dict[str, Any]
    """Configuration, the SAE's own configuration, versions, sha256 of the tokens, command."""

    def words(self) -> str:
        """The figures by group, aligned."""
        width = max(len(name) for group in self.metrics.values() for name in group)
        lines = [f"{self.sae}: {self.architecture} at {self.hook_name} of {self.model_name}", f"Data: {self.data}"]
        if self.passes > 1:
            lines.append(f"The data were read {self.passes} times: there are fewer rows than asked for.")
        for group, values in self.metrics.items():
            lines += ["", group.replace("_", " ")]
            lines += listed(values, width)
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write as JSON, under a temporary name first; what is no number (a mean over nothing) is null."""
        write_json(path, _finite(asdict(self)), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """The same with None for every float that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
