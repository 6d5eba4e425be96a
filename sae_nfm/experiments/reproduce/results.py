"""The table of `sae-nfm reproduce`: as words for the terminal and as JSON."""

from dataclasses import dataclass
from typing import Any, ClassVar

from sae_nfm.analysis import Figure
from sae_nfm.common.results import SavedResult
from sae_nfm.experiments.reproduce.rows import ReproducedRow
from sae_nfm.stats import Estimate


@dataclass(frozen=True, kw_only=True)
class ReproduceResult(SavedResult):
    """The table, and what is needed to repeat it."""

    kind: ClassVar[str] = "reproduce/1"

    rows: tuple[ReproducedRow, ...]
    """Every published figure, once for each control."""
    provenance: dict[str, Any]
    """Configuration, and the provenance of the comparison."""

    def words(self) -> str:
        """Section by section; figures that the paper does not have are in the file only."""
        lines: list[str] = []
        shown = [row for row in self.rows if row.published != "-"]
        for section in dict.fromkeys(row.section for row in shown):
            lines += [section, "-" * len(section)]
            own = [row for row in shown if row.section == section]
            for name in dict.fromkeys(row.name for row in own):
                same = [row for row in own if row.name == name]
                lines.append(f"{name}: published {same[0].published}; here {written(same[0].here, same[0].form)}")
                lines += [f"    {written(row.controlled, row.form)}  {row.control} ({row.verdict})" for row in same]
            lines.append("")
        return "\n".join([*lines, *(f"* {caveat}" for caveat in self.caveats())])

    def caveats(self) -> list[str]:
        """What limits these figures."""
        config = self.provenance["comparison"]["config"]
        told = [
            "Intervals are 95 %, over documents: they say nothing about other seeds. Verdicts are over seeds and documents.",
            f"One SAE of {config['d_sae']:,} features and {config['training_tokens']:,} training tokens; the paper's has "
            "50,000 and 5M, on OpenLLaMA-3B, and reads the strongest half of its features where this one reads all.",
        ]
        if config["dataset"] is None:
            told.append("The tokens were sampled from the embedded model itself: no evidence about real text.")
        return told


def written(figure: Figure, form: str) -> str:
    """A figure with its interval, where it has one."""
    if figure is None:
        return "none"
    if not isinstance(figure, Estimate):
        return f"{figure:{form}}"
    return f"{figure.estimate:{form}} [{figure.low:{form}}, {figure.high:{form}}]"
