"""What a run has left in a folder: the results of any of the commands, found by what is in the files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_nfm.attribution import Attribution
from sae_nfm.common.results import as_result
from sae_nfm.comparison import BenchmarkResult
from sae_nfm.comparison.results import CompareResult
from sae_nfm.experiments.dynamics.results import DynamicsResult
from sae_nfm.experiments.factorial.results import FactorialResult
from sae_nfm.experiments.reproduce.results import ReproduceResult
from sae_nfm.experiments.secondary.results import SecondaryResult
from sae_nfm.hub import RESULTS_FILENAME
from sae_nfm.profiling.results import SpeedResult

RESULTS = (
    BenchmarkResult,
    CompareResult,
    ReproduceResult,
    FactorialResult,
    DynamicsResult,
    SecondaryResult,
    Attribution,
    SpeedResult,
)
"""Results that a page has a section for. A file is of the first whose fields it has."""
EXPLORER_FILENAME, RECORD_FILENAME, MANIFEST_FILENAME = "explorer.json.gz", "training.jsonl", "manifest.json"
LARGEST = 64 * 2**20
"""Bytes of the largest JSON file that is looked into."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Found(Generic[T]):
    """A result and where it was."""

    result: T
    """The result."""
    path: Path
    """Its file."""
    label: str
    """Its folder inside the run, "." for the run itself; its file where that is not called results.json."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything found in a folder."""

    folder: Path
    """The folder."""
    results: tuple[Found[Any], ...]
    """One for each file, by path."""
    records: tuple[Path, ...]
    """Training records: losses and metrics by step."""
    measurements: tuple[Path, ...]
    """Folders with rows by token and arm, of `behaviour.measure`."""
    saes: tuple[Path, ...]
    """Folders of saved SAEs."""
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
    run = Run(
        folder=folder,
        results=tuple(_results(folder, files)),
        records=tuple(path for path in files if path.name == RECORD_FILENAME),
        measurements=tuple(path.parent for path in files if path.name == MANIFEST_FILENAME),
        saes=tuple(
            path.parent
            for path in files
            if path.name == SAE_CFG_FILENAME and (path.parent / SAE_WEIGHTS_FILENAME).is_file()
        ),
        explorers=tuple(path for path in files if path.name == EXPLORER_FILENAME),
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
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); make it anew, or take it out of the folder") from error
        result = _of_some_class(content)
        if result is not None:
            named = path.parent if path.name == RESULTS_FILENAME else path
            yield Found(result=result, path=path, label=named.relative_to(folder).as_posix())


def _of_some_class(content: Any) -> Any:
    keys = set(content) if isinstance(content, dict) else set[str]()
    for result in RESULTS:
        if keys == {field.name for field in fields(result)}:
            try:
                return as_result(result, content)
            except ValueError:  # the fields of another class are called the same
                continue
    return None
