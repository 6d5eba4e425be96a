"""What a run has left in a folder: the results of any of the commands, found by the kind that their files say.

One file that cannot be read, or that another version wrote, is left out and named, with the reason.
"""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from sae_nfm.analysis.results import NormsResult
from sae_nfm.attribution.results import Attribution
from sae_nfm.common import checked, differences, final_path, is_finished
from sae_nfm.common.file_errors import DamagedFileError, cause_of, printable, reading
from sae_nfm.common.files import DIGESTS_FILENAME
from sae_nfm.common.results import KIND, RESULTS_FILENAME, SavedResult, as_result, kind_by_keys
from sae_nfm.comparison.results import CompareResult
from sae_nfm.evaluation.results import MANIFEST_FILENAME, Evaluation, FidelityTable, MeasuredKL
from sae_nfm.experiments.dynamics.results import DynamicsResult
from sae_nfm.experiments.factorial.results import FactorialResult
from sae_nfm.experiments.reproduce.results import ReproduceResult
from sae_nfm.experiments.secondary.results import SecondaryResult
from sae_nfm.experiments.synthetic.results import RecoveryResult
from sae_nfm.explorer.results import FILENAME as EXPLORER_FILENAME
from sae_nfm.profiling.results import SpeedResult
from sae_nfm.training.results import RECORD_FILENAME

RESULTS: tuple[type[SavedResult], ...] = (
    CompareResult,
    ReproduceResult,
    FactorialResult,
    DynamicsResult,
    SecondaryResult,
    RecoveryResult,
    Attribution,
    SpeedResult,
    MeasuredKL,
    NormsResult,
    Evaluation,
    FidelityTable,
)
"""Results that a chapter draws."""
KINDS: Mapping[str, type[SavedResult]] = {result.kind: result for result in RESULTS}
SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME = "cfg.json", "sae_weights.safetensors"
"""SAELens's, which is not imported here."""
NAMES = (RECORD_FILENAME, MANIFEST_FILENAME, SAE_CFG_FILENAME, EXPLORER_FILENAME)
VERSION = importlib.metadata.version("sae-nfm")
UNFINISHED = ".partial"
"""In the names of what a run has not finished, or was killed in."""
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

    left_out: tuple[tuple[str, str], ...] = ()
    """Files and folders that are not shown, by their path in the folder, each with the reason."""

    def of(self, result: type[T]) -> list[Found[T]]:
        """The results of one class."""
        return [found for found in self.results if isinstance(found.result, result)]

    def label(self, path: Path) -> str:
        """A path as it is called in this run."""
        return printable(path.relative_to(self.folder).as_posix())

    def without(self, path: Path, reason: str) -> "Run":
        """The same less one file, or what is in a folder, which is left out for this reason."""
        kept: dict[str, Any] = {
            field.name: tuple(
                item for item in getattr(self, field.name) if path not in (_path(item), *_path(item).parents)
            )
            for field in fields(self)[1:-1]
        }
        return replace(self, **kept, left_out=(*self.left_out, (self.label(path), reason)))

    def alone(self, path: Path) -> "Run":
        """Nothing but one file or folder."""
        kept: dict[str, Any] = {
            field.name: tuple(item for item in getattr(self, field.name) if _path(item) == path)
            for field in fields(self)[1:-1]
        }
        return replace(self, **kept)

    def paths(self) -> list[Path]:
        """Every file or folder that something is from."""
        return [_path(item) for field in fields(self)[1:-1] for item in getattr(self, field.name)]


def _path(item: Any) -> Path:
    return item.path if isinstance(item, Found) else item


def read_run(folder: str | Path) -> Run:
    """Find and read every result in a folder and the folders inside.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when nothing is found that can be read, or the folder is that of an unfinished run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}; give the output folder of a run, such as runs/demo"
        )
    being_made = final_path(folder) != folder
    if UNFINISHED in str(folder.resolve()) and not being_made:
        raise ValueError(
            f"{str(folder)!r} is the folder of an unfinished run; run its command again, which goes on from it"
        )
    paths = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
    left_out = [
        (path, "unfinished: run its command again")
        for path in paths
        if UNFINISHED in path.name and UNFINISHED not in str(path.parent.relative_to(folder))
    ]
    files = [path for path in paths if path.is_file() and UNFINISHED not in str(path.relative_to(folder))]
    named = {name: tuple(path for path in files if path.name == name) for name in NAMES}
    results, damaged = _results(folder, files)
    others = [] if being_made else list(_not_of_their_run(files))
    run = Run(
        folder=folder,
        results=tuple(results),
        records=named[RECORD_FILENAME],
        measurements=tuple(path.parent for path in named[MANIFEST_FILENAME] if _is_measurement(path)),
        saes=tuple(p.parent for p in named[SAE_CFG_FILENAME] if is_saved_sae(p.parent, folder)),
        explorers=named[EXPLORER_FILENAME],
    )
    for path, why in others:
        if path not in dict(damaged):
            run = run.without(path, why)
    left_out = [(run.label(path), why) for path, why in (*left_out, *damaged)]
    return replace(run, left_out=(*left_out, *run.left_out))


def _not_of_their_run(files: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Files and SAEs that are not as the run wrote them in whose folder they are, with the reason."""
    seen: set[Path] = set()
    roots = sorted((path.parent for path in files if path.name == DIGESTS_FILENAME), key=lambda root: len(root.parts))
    for root in roots:
        if seen.isdisjoint(root.parents):
            seen.add(root)
            try:
                yield from ((root / name, why) for name, why in differences(root))
                if not is_finished(root):
                    yield root / DIGESTS_FILENAME, "what was begun since the last results is not finished: run it again"
            except DamagedFileError as error:
                yield root / DIGESTS_FILENAME, cause_of(error)


def is_saved_sae(folder: Path, run: Path) -> bool:
    """Whether a folder inside that of a run has a saved SAE that is finished."""
    return UNFINISHED not in str(folder.relative_to(run)) and (folder / SAE_WEIGHTS_FILENAME).is_file()


def check_not_empty(run: Run) -> None:
    """Raise a ValueError when there is nothing to show, with what was left out."""
    if not run.paths():
        why = "".join(f"; {path} is left out: {reason}" for path, reason in run.left_out)
        raise ValueError(
            f"there is nothing to report in {str(run.folder)!r}: no result, training record, SAE or explorer{why}; give the "
            "output folder of a run, such as that of `sae-nfm demo`"
        )


def _results(folder: Path, files: Sequence[Path]) -> tuple[list[Found[Any]], list[tuple[Path, str]]]:
    """The results in files, and the files that are damaged or of another version, with the reason."""
    found: list[Found[Any]] = []
    damaged: list[tuple[Path, str]] = []
    for path in files:
        if path.suffix != ".json":
            continue
        try:
            with reading(checked(path)):
                result = _read(path)
        except (DamagedFileError, OSError) as error:
            damaged.append((path, cause_of(error.__cause__ or error)))
            continue
        if result is not None:
            named = path.parent if path.name == RESULTS_FILENAME else path
            found.append(Found(result=result, path=path, label=printable(named.relative_to(folder).as_posix())))
    return found, damaged


def _read(path: Path) -> SavedResult | None:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    return _result(json.loads(path.read_text(encoding="utf-8")))


def _result(content: Any) -> SavedResult | None:
    """The result in a file; None where no chapter draws it. Another version, or other fields, are a ValueError."""
    if not isinstance(content, dict):
        return None
    kind: Any = content[KIND] if KIND in content else kind_by_keys(content, RESULTS)
    if kind is None:
        return FidelityTable.of_plain(content)
    if kind in KINDS:
        return as_result(KINDS[kind], content)
    command = str(kind).partition("/")[0]
    known = next((one for one in KINDS if one.partition("/")[0] == command), None)
    if known is not None:
        raise ValueError(f"its kind is {kind!r}{_writer(content)}, this version of sae-nfm, {VERSION}, reads {known!r}")
    return None


def _writer(content: dict[str, Any]) -> str:
    """Which version of the package wrote it, where it says so."""
    versions = content.get("provenance", {}).get("versions", {})
    return f", written by sae-nfm {versions['sae-nfm']}" if "sae-nfm" in versions else ""


def _is_measurement(path: Path) -> bool:
    """Whether a manifest is one of `measure`, and not of another program."""
    try:
        with reading(path):
            return "arms" in json.loads(path.read_text(encoding="utf-8"))
    except (DamagedFileError, OSError):  # named among the JSON files that are damaged
        return False
