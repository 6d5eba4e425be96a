"""What a run has left in a folder: the results of any of the commands, found by the kind that their files say."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from sae_nfm.analysis.results import NormsResult
from sae_nfm.attribution.results import Attribution
from sae_nfm.common.results import KIND, RESULTS_FILENAME, SavedResult, as_result, kind_by_keys
from sae_nfm.comparison.results import CompareResult
from sae_nfm.evaluation.results import MANIFEST_FILENAME, MeasuredKL
from sae_nfm.experiments.dynamics.results import DynamicsResult
from sae_nfm.experiments.factorial.results import FactorialResult
from sae_nfm.experiments.reproduce.results import ReproduceResult
from sae_nfm.experiments.secondary.results import SecondaryResult
from sae_nfm.explorer.results import FILENAME as EXPLORER_FILENAME
from sae_nfm.profiling.results import SpeedResult
from sae_nfm.training.results import RECORD_FILENAME

RESULTS: tuple[type[SavedResult], ...] = (
    CompareResult,
    ReproduceResult,
    FactorialResult,
    DynamicsResult,
    SecondaryResult,
    Attribution,
    SpeedResult,
    MeasuredKL,
    NormsResult,
)
"""Results that a chapter draws."""
KINDS: Mapping[str, type[SavedResult]] = {result.kind: result for result in RESULTS}
SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME = "cfg.json", "sae_weights.safetensors"
"""SAELens's, which is not imported here."""
NAMES = (RECORD_FILENAME, MANIFEST_FILENAME, SAE_CFG_FILENAME, EXPLORER_FILENAME)
LARGEST = 64 * 2**20
"""Bytes of the largest JSON file that is looked into."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Found(Generic[T]):
    """A result and where it was."""

    result: T
    path: Path
    label: str
    """Its folder inside the run, "." for the run itself; its file where that is not called results.json."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything found in a folder."""

    folder: Path
    results: tuple[Found[Any], ...]
    """One for each file, by path."""
    records: tuple[Path, ...]
    """Training records: losses and metrics by step."""
    measurements: tuple[Path, ...]
    """Folders with rows by token and arm, of `behaviour.measure`."""
    saes: tuple[Path, ...]
    explorers: tuple[Path, ...]
    """Files of `sae-nfm explore`."""

    def of(self, result: type[T]) -> list[Found[T]]:
        """The results of one class."""
        return [found for found in self.results if isinstance(found.result, result)]

    def label(self, path: Path) -> str:
        """A path as it is called in this run."""
        return path.relative_to(self.folder).as_posix()


def read_run(folder: str | Path) -> Run:
    """Find and read every result in a folder and the folders inside.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when nothing is found, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}; give the output folder of a run, such as runs/demo"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    named = {name: tuple(path for path in files if path.name == name) for name in NAMES}
    run = Run(
        folder=folder,
        results=tuple(_results(folder, files)),
        records=named[RECORD_FILENAME],
        measurements=tuple(path.parent for path in named[MANIFEST_FILENAME]),
        saes=tuple(p.parent for p in named[SAE_CFG_FILENAME] if (p.parent / SAE_WEIGHTS_FILENAME).is_file()),
        explorers=named[EXPLORER_FILENAME],
    )
    if not any(getattr(run, field.name) for field in fields(run)[1:]):
        raise ValueError(
            f"there is nothing to report in {str(folder)!r}: no result, training record, SAE or explorer; give the output folder "
            "of a run, such as that of `sae-nfm demo`"
        )
    return run


def _results(folder: Path, files: Sequence[Path]) -> Iterator[Found[Any]]:
    for path in files:
        if path.suffix != ".json" or path.stat().st_size > LARGEST:
            continue
        try:
            content = json.loads(path.read_text())
            result = _result(content)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); regenerate it, or take it out of the folder") from error
        if result is not None:
            named = path.parent if path.name == RESULTS_FILENAME else path
            yield Found(result=result, path=path, label=named.relative_to(folder).as_posix())


def _result(content: Any) -> SavedResult | None:
    """The result in a file; None where no chapter draws it. Another version, or other fields, are a ValueError."""
    if not isinstance(content, dict):
        return None
    kind: Any = content[KIND] if KIND in content else kind_by_keys(content, RESULTS)
    if kind in KINDS:
        return as_result(KINDS[kind], content)
    command = str(kind).partition("/")[0]
    known = next((one for one in KINDS if one.partition("/")[0] == command), None)
    if known is not None:
        raise ValueError(f"its kind is {kind!r}, this version of sae-nfm reads {known!r}")
    return None
