"""Tidy rows of a measurement on disk: one row for a counted token and an arm, in parquet, a file for each part of the text.

    manifest.json           what was measured; a measurement goes on only where it is the same
    part-00000.parquet      the rows
    part-00000.safetensors  for each document in them, sums of the activations: the variance that errors are compared with

Rows hold the energy of the error, |x - x_hat|^2. The fraction of variance unexplained of any set of documents is

    FVU = sum of error_energy / sum of variance_energy,      variance_energy = |x - mean|^2

with the mean over all measured tokens, which is known only when the last of them is: so `document_sums` derives the variance
energy of each document from sums of x and |x|^2, float64. Over all documents it is the `fvu` of `behaviour.evaluate`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from sae_nfm.common import ShortRepr, checked, reading, whole, write_json
from sae_nfm.common.results import with_kind, without_kind

MANIFEST_KIND = "measurement/1"
SCHEMA = pa.schema(
    [
        ("document", pa.int32()),  # number of the document in its data set
        ("row", pa.int32()),  # row of tokens
        ("position", pa.int16()),  # place in the row
        ("arm", pa.dictionary(pa.int32(), pa.string())),
        ("kl_nats", pa.float32()),  # KL(original || changed) of the next-token distributions
        ("ce_nats", pa.float32()),  # cross-entropy of the changed model; null where there is no next token
        ("ce_delta_nats", pa.float32()),  # its increase over the original model; null likewise
        ("error_norm", pa.float32()),  # |x_hat - x|
        ("error_energy", pa.float32()),  # |x_hat - x|^2
        ("cosine", pa.float32()),  # of x_hat and x; 0 where one of them is 0
        ("x_norm", pa.float32()),  # |x|
    ]
)
VALUES = tuple(name for name in SCHEMA.names if SCHEMA.field(name).type == pa.float32())
LONGEST = np.iinfo(np.int16).max + 1
"""Positions that fit into a row's column."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was measured, in a folder of rows."""

    model: str
    """Kind and digest of the language model."""
    tokens: str
    """Digests of the tokens and of the documents' numbers."""
    documents: str
    arms: dict[str, str]
    """What identifies each arm, by its name."""
    hook_names: dict[str, str]
    seed: int
    batch_rows: int
    batches_per_part: int
    parts: int

    def changes(self, other: "Manifest") -> list[str]:
        """In words, what differs in another."""
        names = [name for name in self.arms | other.arms if self.arms.get(name) != other.arms.get(name)]
        changed = [f"the arms ({', '.join(names)})"] if names else []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ("arms", "hook_names", "parts") and mine != theirs:
                changed.append(f"{field.name} ({mine!r} there, {theirs!r} now)")
        return changed


@dataclass(frozen=True, kw_only=True, repr=False)
class Activations(ShortRepr):
    """Sums over counted tokens of one document each, at one hook point; a document may have several entries."""

    documents: np.ndarray
    tokens: np.ndarray
    sums: np.ndarray
    """Sum of x, [entries, d], float64."""
    energies: np.ndarray
    """Sum of |x|^2, [entries], float64."""

    @classmethod
    def of(cls, documents: np.ndarray, x: np.ndarray) -> "Activations":
        """From the document [tokens] and the activation [tokens, d] of each token."""
        order = np.argsort(documents, kind="stable")
        found, starts, tokens = np.unique(documents[order], return_index=True, return_counts=True)
        x = x[order].astype(np.float64)
        energies = np.add.reduceat(np.square(x).sum(1), starts)
        return cls(documents=found, tokens=tokens, sums=np.add.reduceat(x, starts), energies=energies)

    def energies_about(self, mean: np.ndarray) -> np.ndarray:
        """Sum of |x - mean|^2, [entries]."""
        return self.energies - 2 * self.sums @ mean + self.tokens * (mean @ mean)

    @classmethod
    def joined(cls, several: Sequence["Activations"]) -> "Activations":
        """All entries of several."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(one, name) for one in several]) for name in names})


def begin(folder: str | Path, manifest: Manifest) -> Path:
    """Make a folder for a measurement, or find the one that was begun; a ValueError that says what differs for another one."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if path.exists():
        changed = read_manifest(folder).changes(manifest)
        if changed:
            raise ValueError(
                f"{str(folder)!r} has other settings: {'; '.join(changed)}; give a new folder, or the old settings"
            )
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} holds other things and no manifest.json; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, with_kind(MANIFEST_KIND, asdict(manifest)))
    return folder


def is_finished(folder: Path, part: int) -> bool:
    """Whether a part is there, whole."""
    return _part(folder, part).exists()


def write_part(folder: Path, part: int, tables: Iterable[pa.Table], activations: Mapping[str, Activations]) -> None:
    """Write a part: the rows of each arm as one group, the sums by hook point. It appears whole or not at all."""
    tensors = {f"{at}/{name}": values for at, sums in activations.items() for name, values in vars(sums).items()}
    path = _part(folder, part)
    with whole(path.with_suffix(".safetensors")) as partial:
        save_file(tensors, partial)
    options: Any = {"compression": "zstd", "write_page_checksum": True}
    # last: a part is finished when its rows are there
    with whole(path) as partial, pq.ParquetWriter(partial, SCHEMA, **options) as writer:
        for rows in tables:
            writer.write_table(rows)


def table(arm: str, arms: Sequence[str], columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Rows of one arm from its columns; NaN becomes null."""
    n = len(columns["row"])
    names = pa.DictionaryArray.from_arrays(pa.array(np.full(n, arms.index(arm), np.int32)), pa.array(list(arms)))
    arrays = [
        names
        if field.name == "arm"
        else pa.array(columns[field.name].astype(field.type.to_pandas_dtype()), field.type, from_pandas=True)
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def read_rows(
    folder: str | Path, columns: Sequence[str] | None = None, arms: Sequence[str] | None = None
) -> pd.DataFrame:
    """The rows of a finished measurement, or some columns and arms of them.

    Raises:
        FileNotFoundError: when nothing was measured there.
        ValueError: when the measurement is not finished, or for an unknown column or arm.
    """
    manifest, paths = _finished(Path(folder))
    for what, given, known in (("column", columns, SCHEMA.names), ("arm", arms, list(manifest.arms))):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise ValueError(f"there is no {what} {unknown[0]!r}; there are {', '.join(known)}")
    chosen = None if arms is None else ds.field("arm").cast(pa.string()).isin(list(arms))
    verified = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    source = ds.dataset([str(checked(path)) for path in paths], schema=SCHEMA, format=verified)
    with reading(folder, "a measurement"):
        return source.to_table(columns=None if columns is None else list(columns), filter=chosen).to_pandas()


def document_sums(folder: str | Path) -> pd.DataFrame:
    """Sums over the tokens of each document in each arm: all that means, ratios and bootstraps over documents need.

    Columns:
        arm, document
        tokens: counted tokens; predictions: those of them that have a next token
        kl_nats, error_norm, error_energy, cosine, x_norm: sums over tokens
        ce_nats, ce_delta_nats: sums over predictions
        variance_energy: sum over tokens of |x - mean|^2, see the head of this module

    The rows are read a part at a time. Raises as `read_rows`.
    """
    manifest, paths = _finished(Path(folder))
    by = ["arm", "document"]
    found: list[Any] = []
    for path in paths:
        with reading(checked(path), "rows of a measurement"):
            table = pq.read_table(path, schema=SCHEMA, page_checksum_verification=True)
        rows: Any = table.to_pandas().astype(dict.fromkeys(VALUES, np.float64))
        rows = rows.assign(tokens=1, predictions=rows["ce_nats"].notna().astype(int))
        found.append(rows.groupby(by, observed=True)[["tokens", "predictions", *VALUES]].sum().reset_index())
    sums: Any = pd.concat(found).astype({"arm": str}).groupby(by, as_index=False).sum()
    sums = sums.assign(hook_name=sums["arm"].map(manifest.hook_names))
    energies = pd.concat([_variance_energies(paths, at) for at in sorted(set(manifest.hook_names.values()))])
    sums = sums.merge(energies, on=["hook_name", "document"]).drop(columns="hook_name")
    return sums.astype({"arm": pd.CategoricalDtype(list(manifest.arms))}).sort_values(by, ignore_index=True)


def _variance_energies(paths: Sequence[Path], hook_name: str) -> pd.DataFrame:
    """Sum over each document's tokens of |x - mean|^2, with the hook point and the document."""
    total, n = np.zeros(()), 0
    for part in _activations(paths, hook_name):
        total, n = total + part.sums.sum(0), n + int(part.tokens.sum())
    mean = total / n
    energies = [
        pd.DataFrame({"document": part.documents, "variance_energy": part.energies_about(mean)})
        for part in _activations(paths, hook_name)
    ]
    summed: Any = pd.concat(energies).groupby("document", as_index=False).sum()
    return summed.assign(hook_name=hook_name)


def _activations(paths: Sequence[Path], hook_name: str) -> Iterator[Activations]:
    for path in paths:
        sums = checked(path.with_suffix(".safetensors"))
        with reading(sums, "sums of a measurement"):
            tensors: dict[str, Any] = load_file(sums)
        if f"{hook_name}/documents" in tensors:  # not where all tokens of the part are special
            yield Activations(**{field.name: tensors[f"{hook_name}/{field.name}"] for field in fields(Activations)})


def _part(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.parquet"


def read_manifest(folder: Path) -> Manifest:
    """What was measured in a folder, finished or not.

    Raises:
        FileNotFoundError: when nothing was measured there.
        ValueError: when its manifest is something else.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no manifest.json, so nothing was measured there; run `measure`")
    checked(path)
    try:
        return Manifest(**without_kind(MANIFEST_KIND, json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a measurement ({error}); give another folder") from error


def _finished(folder: Path) -> tuple[Manifest, list[Path]]:
    manifest = read_manifest(folder)
    paths = [_part(folder, part) for part in range(manifest.parts)]
    there = sum(path.exists() for path in paths)
    if there < len(paths):
        raise ValueError(
            f"the measurement in {str(folder)!r} is not finished: {there} of {len(paths)} parts are there; run `measure` "
            "again with the same settings, and it goes on"
        )
    return manifest, paths
