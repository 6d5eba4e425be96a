"""Saved SAEs in a folder: a single one, or those of a demo's output with its table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from sae_nfm.common.results import REPORT_FILENAME, RESULTS_FILENAME
from sae_nfm.comparison.results import CompareResult, RowKind
from sae_nfm.hub.card import CardSAE
from sae_nfm.hub.release import ReleasedSAE, release_entry


@dataclass(frozen=True, kw_only=True)
class SavedSAE:
    """A saved SAE on disk."""

    folder: Path
    """Its folder."""
    runner: Path
    """Its runner_cfg.json, which may not exist."""
    entry: ReleasedSAE
    """Its entry in a release."""

    def card(self) -> CardSAE:
        """What its model card is made from."""
        runner = json.loads(self.runner.read_text()) if self.runner.is_file() else None
        return CardSAE(entry=self.entry, config=json.loads((self.folder / SAE_CFG_FILENAME).read_text()), runner=runner)

    def files(self) -> dict[str, Path]:
        """SAELens's files, as far as they exist, by their path in the release."""
        paths = {name: self.folder / name for name in self.entry.sha256}
        if self.runner.is_file():
            paths[RUNNER_CFG_FILENAME] = self.runner
        return {f"{self.entry.path}/{name}": path for name, path in paths.items()}


@dataclass(frozen=True, kw_only=True)
class SavedSAEs:
    """The SAEs of a folder, and what was found out about them."""

    saes: tuple[SavedSAE, ...]
    """The SAEs."""
    results: Path | None
    """The demo's results.json, which `result` reads."""
    report: Path | None
    """The demo's page."""

    def result(self) -> CompareResult | None:
        """The demo's result."""
        return None if self.results is None else CompareResult.load(self.results)


def saved_saes(source: str | Path, *, sae_id: str | None = None, names: Sequence[str] = ()) -> SavedSAEs:
    """The SAEs in a folder, each loaded once to see that it is sound.

    Args:
        source: folder of a saved SAE, or the output folder of `sae-nfm demo`.
        sae_id: id of a single SAE; its hook name unless given.
        names: which SAEs of a demo's output; all of them unless given.

    Raises:
        FileNotFoundError, ValueError: the folder is neither of the two, has no such SAE, or a damaged one.
    """
    source = Path(source)
    if (source / SAE_CFG_FILENAME).is_file():
        if names:
            raise ValueError(f"{str(source)!r} is one saved SAE: choosing {', '.join(names)} is for a demo's output")
        entry = release_entry(source, sae_id=sae_id)
        sae = SavedSAE(folder=source, runner=source / RUNNER_CFG_FILENAME, entry=replace(entry, path=entry.id))
        return SavedSAEs(saes=(sae,), results=None, report=None)
    present = sorted(path.parent.name for path in (source / "saes").glob(f"*/{SAE_CFG_FILENAME}"))
    if not present:
        raise ValueError(
            f"{str(source)!r} is neither a saved SAE (it has no {SAE_CFG_FILENAME}) nor the output of `sae-nfm demo` (it has "
            "no saes/*); give the folder of one of the two"
        )
    if missing := sorted(set(names) - set(present)):
        raise ValueError(f"{str(source)!r} has no SAE {', '.join(missing)}; it has {', '.join(present)}")
    if sae_id is not None:
        raise ValueError(f"{str(source)!r} has SAEs {', '.join(present)}, whose names are their ids; leave sae_id out")
    return _of_a_demo(source, names or present)


def _of_a_demo(source: Path, names: Sequence[str]) -> SavedSAEs:
    results, report = source / RESULTS_FILENAME, source / REPORT_FILENAME
    rows = [row for row in CompareResult.load(results).rows if row.kind is RowKind.TRAINED]
    explained = {row.arm: 1 - row.fvu for row in rows if row.fvu is not None}
    shared = source / "saes" / RUNNER_CFG_FILENAME  # of 0.1.0: one file for all
    saes = tuple(
        SavedSAE(
            folder=source / "saes" / name,
            runner=shared if shared.is_file() else source / "saes" / name / RUNNER_CFG_FILENAME,
            entry=release_entry(source / "saes" / name, sae_id=name, variance_explained=explained.get(name)),
        )
        for name in names
    )
    return SavedSAEs(saes=saes, results=results, report=report if report.is_file() else None)
