"""Activations of a language model, computed once and read by every training.

    sae-nfm cache:   rows of tokens, as SAELens cuts them -> one pass of the model for all hook points -> one folder a hook point
    --activations:   the rows' tokens are the data set; where the model would run, the row's activations are looked up

A row is looked up by its tokens, so what reads a cache needs no position of its own: shuffling the data set shuffles the
activations, and a run that resumes finds its place as it does without a cache. In the output folder:

    activations.json       `CacheIdentity`: whose activations these are
    <hook point>/          a data set on disk in the format of SAELens's CacheActivationsRunner (columns <hook point> and
                           token_ids), with a CRC-32 of each row, which is checked when the row is read

Shards are written whole and in order. After a kill the same command goes on with the first that is missing.
"""

import hashlib
import json
import shlex
import shutil
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import torch
from datasets import Array2D, Dataset, DatasetInfo, Features, Value, load_from_disk
from datasets import Sequence as Fixed
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm import demo
from sae_nfm.common import check_choice, partial_folder, publish, reading, remark, whole, write_json
from sae_nfm.common.options import EMBEDDED_MODEL, check_numbers
from sae_nfm.common.results import with_kind, without_kind
from sae_nfm.data.datasets import check_data, training_data
from sae_nfm.loading import quiet_saelens
from sae_nfm.models import LanguageModel, Site, check_context, device_of, find_site, load_model

KIND = "activations/1"
IDENTITY_FILENAME = "activations.json"
TOKENS, CHECKSUM = "token_ids", "crc32"
StoredDtype = Literal["float32", "float16"]
ROWS_PER_BATCH = 16
"""Rows that go through the model at once, as many as a training takes: the activations are the same to the last bit."""


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """Whose activations a cache holds."""

    model: str
    model_class_name: str
    model_dtype: str
    model_sha256: str
    """Of the parameters, as they are in memory."""
    tokenizer_sha256: str | None
    hooks: dict[str, int]
    """Width of each hook point."""
    dataset: str
    """Name of the data set that the rows are from, in its order."""
    context_size: int
    """Tokens in a row."""
    dtype: StoredDtype
    """In which the activations are stored."""
    rows: int
    tokens_sha256: str | None = None
    """Of the token ids of all rows; None until the cache is finished."""

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.context_size

    @property
    def bytes(self) -> int:
        """On disk, but for a few bytes a row."""
        return self.tokens * (sum(self.hooks.values()) * np.dtype(self.dtype).itemsize + 4 * (1 + len(self.hooks)))


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where the activations come from, for commands that train."""

    activations: str | None = None
    """Folder of `sae-nfm cache` to train on: its activations in place of the model's, its tokens in place of --dataset."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Whose activations to compute, on what text, and where they go."""

    model: str = EMBEDDED_MODEL
    """TransformerLens model name or local Hugging Face folder; by default the embedded model."""
    model_class_name: str = "HookedTransformer"
    """HookedTransformer, TransformerBridge or AutoModelForCausalLM."""
    hook: tuple[str, ...] = ("blocks.2.hook_resid_post",)
    """Hook points; one pass of the model serves all of them."""
    dataset: str | None = None
    """Training text or tokens, as for `sae-nfm train`; by default tokens sampled from the embedded model."""
    held_out: str | None = None
    """Held-out text that trainings on this cache will use: what is cut from the same data set for it is left out."""
    tokens: int = 400_000
    """Tokens to run the model over, rounded up to whole rows."""
    context_size: int = 256
    """Tokens in a row, BOS included."""
    dtype: StoredDtype = "float32"
    """How activations are stored; float16 takes half the space and rounds to 11 bits."""
    seed: int = 0
    """Of the order of a file's documents."""
    device: str = "cpu"
    """Device of the language model."""
    output: str = "runs/activations"
    """Folder for the cache; it must be a new one."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_numbers(self)
        check_choice("dtype", self.dtype, get_args(StoredDtype))
        if not self.hook or len(set(self.hook)) < len(self.hook):
            raise ValueError(f"hook is {list(self.hook)}; give at least one hook point, each once")


@dataclass(frozen=True, kw_only=True)
class WrittenCache:
    """A finished cache."""

    folder: Path
    identity: CacheIdentity

    def words(self) -> str:
        """Where it is, and what to do with it."""
        own = self.identity
        return (
            f"{own.tokens:,} tokens of {own.dataset!r} at {', '.join(own.hooks)}: {self.folder} ({own.bytes / 1e9:.2f} GB)\n"
            f"Train on it: sae-nfm train --activations {shlex.quote(str(self.folder))}"
        )


def run_cache(cfg: CacheConfig) -> WrittenCache:
    """The job of `sae-nfm cache`; an interrupted one goes on when it is called again.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work, and as `write_cache`.
    """
    model = load_model(cfg.model, cfg.device, model_class_name=cfg.model_class_name)
    sites = [find_site(model, hook) for hook in cfg.hook]
    check_context(model, cfg.context_size)
    if cfg.dataset is None and cfg.model != demo.MODEL_NAME:
        raise ValueError(f"the embedded tokens suit the embedded model only; give --dataset for {cfg.model!r}")
    dataset = (
        demo.load_tokens("train") if cfg.dataset is None else training_data(cfg.dataset, cfg.held_out, seed=cfg.seed)
    )
    identity = CacheIdentity(
        model=cfg.model,
        model_class_name=cfg.model_class_name,
        model_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        model_sha256=model_digest(model),
        tokenizer_sha256=tokenizer_digest(model),
        hooks={site.hook_name: site.d_in for site in sites},
        dataset=cfg.dataset or demo.MODEL_NAME,
        context_size=cfg.context_size,
        dtype=cfg.dtype,
        rows=-(-cfg.tokens // cfg.context_size),
    )
    write_cache(model, sites, dataset, cfg.output, identity)
    return WrittenCache(folder=Path(cfg.output), identity=identity)


def write_cache(
    model: LanguageModel,
    sites: Sequence[Site],
    dataset: Any,
    output: str | Path,
    identity: CacheIdentity,
    *,
    rows_per_shard: int = 512,
) -> None:
    """Run the model over `identity.rows` rows of the data set, in its order, and write the activations at every site.

    Shards that an earlier, interrupted call has finished are left as they are.

    Raises:
        ValueError: for an output that exists, too little free disk, a data set with fewer rows, activations that are not finite
            or beyond float16, or an interrupted cache of another model, data set or format.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"the output {str(output)!r} exists; give a new folder, or remove it")
    check_data(model, dataset, identity.context_size, identity.dataset)
    unfinished = partial_folder(str(output))
    _claim(unfinished, identity)
    features = {site.hook_name: _features(site, identity) for site in sites}
    starts = range(0, identity.rows, rows_per_shard)
    names = [f"data-{i:05d}-of-{len(starts):05d}.arrow" for i in range(len(starts))]
    first = next(
        (i for i, name in enumerate(names) if not all((unfinished / hook / name).is_file() for hook in features)), None
    )
    _check_disk(output, identity, 0 if first is None else first * rows_per_shard)
    digest = hashlib.sha256()
    sequences = _sequences(model, dataset, identity.context_size)
    with tqdm(total=identity.tokens, unit="token", unit_scale=True, desc="Caching activations") as progress:
        for i, start in enumerate(starts):
            wanted = min(rows_per_shard, identity.rows - start)
            rows = list(islice(sequences, wanted))
            if len(rows) < wanted:
                raise ValueError(
                    f"{identity.dataset!r} fills {start + len(rows)} rows of {identity.context_size} tokens, fewer than the "
                    f"{identity.rows} asked for; ask for at most {(start + len(rows)) * identity.context_size} tokens"
                )
            tokens = torch.stack(rows)
            digest.update(_ids(tokens).tobytes())
            if first is not None and i >= first:
                _write_shard(model, sites, tokens, features, unfinished, names[i])
            progress.update(tokens.numel())
    for hook, of_hook in features.items():
        _finish_hook(unfinished / hook, of_hook, names)
    write_json(
        unfinished / IDENTITY_FILENAME, with_kind(KIND, asdict(replace(identity, tokens_sha256=digest.hexdigest())))
    )
    publish(str(output))


class ActivationCache:
    """Activations on disk, by the tokens of their row.

    Args:
        folder: as `sae-nfm cache` writes it.

    Raises a ValueError for a folder that is none or is damaged, a FileNotFoundError where there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.identity = _read_identity(self.folder)
        if self.identity.tokens_sha256 is None:
            raise ValueError(f"{folder} is not finished; run the command that writes it again, it goes on")
        self._columns: dict[str, _Rows] = {}
        rows = self._rows(next(iter(self.identity.hooks)))
        digest = hashlib.sha256(rows.tokens.tobytes()).hexdigest()
        if digest != self.identity.tokens_sha256:
            raise ValueError(f"the token ids in {folder} are damaged: their sha256 is not that of {IDENTITY_FILENAME}")
        self._row_of = {row.tobytes(): i for i, row in enumerate(rows.tokens)}

    def dataset(self) -> Dataset:
        """The rows of tokens, as a data set that SAELens reads without tokenising: column `tokens`, in the order of the cache."""
        tokens = self._rows(next(iter(self.identity.hooks))).tokens
        flat = pa.array(tokens.reshape(-1).astype(np.int64))
        offsets = pa.array(np.arange(len(tokens) + 1, dtype=np.int32) * tokens.shape[1])
        return Dataset(pa.table({"tokens": pa.ListArray.from_arrays(offsets, flat)}))

    def activations(self, tokens: Int[Tensor, "rows pos"], hook_name: str) -> Float[Tensor, "rows pos d_in"]:
        """The activations of rows of tokens at a hook point, float32, on the tokens' device.

        Raises a ValueError for a row or hook point that is not in the cache, or a row whose checksum is wrong.
        """
        if hook_name not in self.identity.hooks:
            raise ValueError(f"{self.folder} has no {hook_name!r}; it has {', '.join(self.identity.hooks)}")
        rows = self._rows(hook_name)
        try:
            numbers = [self._row_of[row.tobytes()] for row in _ids(tokens)]
        except KeyError:
            raise ValueError(
                f"the row that begins with the tokens {tokens[0, :8].tolist()} is not in {self.folder}, whose rows have "
                f"{self.identity.context_size} tokens of {self.identity.dataset!r}; train on what was cached"
            ) from None
        found = np.stack([rows.activations(number) for number in numbers])
        return torch.from_numpy(found).to(tokens.device, torch.float32)

    def check(self, model: LanguageModel, hook_name: str, context_size: int) -> None:
        """Raise a ValueError, with both values, where a training has another model, tokenizer, hook point or context size."""
        own = self.identity
        if hook_name not in own.hooks:
            raise ValueError(
                f"the hook point is {hook_name!r}, and {self.folder} has {', '.join(own.hooks)}; give one of these"
            )
        wanted = {
            "context_size": context_size,
            "tokenizer_sha256": tokenizer_digest(model),
            "model_sha256": model_digest(model),
        }
        for name, value in wanted.items():
            if getattr(own, name) != value:
                raise ValueError(
                    f"{name} of this training is {value!r}, and {getattr(own, name)!r} in {self.folder} (model {own.model!r}); "
                    "train with the model and context size of the cache, or cache anew"
                )

    def _rows(self, hook_name: str) -> "_Rows":
        if hook_name not in self._columns:
            self._columns[hook_name] = _Rows(self.folder / hook_name, hook_name, self.identity)
        return self._columns[hook_name]


class _Rows:
    """The rows of one hook point, memory-mapped."""

    def __init__(self, folder: Path, hook_name: str, identity: CacheIdentity) -> None:
        self._folder, self._shape = folder, (identity.context_size, identity.hooks[hook_name])
        data = cast(Dataset, load_from_disk(str(folder))).data
        if data.num_rows != identity.rows:
            raise ValueError(f"{folder} has {data.num_rows} rows, {identity.rows} expected; it is damaged, cache anew")
        self.tokens: NDArray[np.int32] = np.concatenate(
            [chunk.flatten().to_numpy() for chunk in data.column(TOKENS).chunks]
        )
        self.tokens = self.tokens.reshape(identity.rows, identity.context_size)
        self._checksums = data.column(CHECKSUM).to_numpy()
        self._chunks = [chunk.storage.flatten().flatten().to_numpy() for chunk in data.column(hook_name).chunks]
        self._ends = np.cumsum([len(chunk) // (self._shape[0] * self._shape[1]) for chunk in self._chunks])

    def activations(self, row: int) -> NDArray[np.floating]:
        """[pos, d_in], as stored."""
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        size = self._shape[0] * self._shape[1]
        start = (row - (int(self._ends[chunk - 1]) if chunk else 0)) * size
        found = self._chunks[chunk][start : start + size]
        if zlib.crc32(found.data) != self._checksums[row]:
            raise ValueError(f"row {row} in {self._folder} is damaged (wrong checksum); cache anew")
        return found.reshape(self._shape)


class CachedModel:
    """A language model to SAELens's store, which looks up what it would compute. Everything else is the model's own."""

    def __init__(self, model: LanguageModel, cache: ActivationCache) -> None:
        self._model, self._cache = model, cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_with_cache(
        self, tokens: Int[Tensor, "rows pos"], names_filter: Sequence[str], **_: Any
    ) -> tuple[None, Mapping[str, Tensor]]:
        """What the store reads of the model's own `run_with_cache`: activations by name, of a spliced SAE's hook points too."""
        return None, {name: self._activations(tokens, name) for name in names_filter}

    def _activations(self, tokens: Int[Tensor, "rows pos"], name: str) -> Tensor:
        attached = getattr(self._model, "acts_to_saes", {})
        for hook_name, sae in attached.items():
            if name.startswith(f"{hook_name}."):
                inner = name.removeprefix(f"{hook_name}.")
                x = self._cache.activations(tokens, hook_name).to(sae.device, sae.dtype)
                return sae.run_with_cache(x, names_filter=[inner])[1][inner]
        return self._cache.activations(tokens, name)


def read_from_cache(store: ActivationsStore, cache: ActivationCache) -> None:
    """Let a store take its activations from the cache; its data set has to be the cache's."""
    store.model = cast(Any, CachedModel(cast(LanguageModel, store.model), cache))


def model_digest(model: LanguageModel) -> str:
    """sha256 of the parameters, names included."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(model: LanguageModel) -> str | None:
    """sha256 of the vocabulary and of the ids of special tokens; None without a tokenizer."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return None
    content = [sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ids(tokens: Int[Tensor, "rows pos"]) -> NDArray[np.int32]:
    return tokens.cpu().numpy().astype(np.int32)


def _sequences(model: LanguageModel, dataset: Any, context_size: int) -> Generator[Int[Tensor, " pos"]]:
    """The rows that a store of SAELens's gives in the first epoch, on the CPU."""
    with quiet_saelens():
        store = ActivationsStore.from_config_multi_hook(
            model=cast(Any, model),  # SAELens takes more than it says
            dataset=dataset,
            hook_names=["tokens only"],
            hook_d_ins={"tokens only": 1},
            context_size=context_size,
            total_training_tokens=1,
            device="cpu",
        )
    yield from store._iterate_tokenized_sequences()  # pyright: ignore[reportPrivateUsage]


def _read_identity(folder: Path) -> CacheIdentity:
    path = folder / IDENTITY_FILENAME
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {IDENTITY_FILENAME}; give a folder that `sae-nfm cache` wrote")
    with reading(path, "the description of cached activations", remedy="cache anew"):
        return CacheIdentity(**without_kind(KIND, json.loads(path.read_text(encoding="utf-8"))))


def _claim(unfinished: Path, identity: CacheIdentity) -> None:
    """Begin a cache, or check that the one that was begun is this one; more or fewer rows may be asked for."""
    if not (unfinished / IDENTITY_FILENAME).is_file():
        shutil.rmtree(unfinished, ignore_errors=True)
        write_json(unfinished / IDENTITY_FILENAME, with_kind(KIND, asdict(identity)))
        return
    begun = _read_identity(unfinished)
    for name in (field.name for field in fields(CacheIdentity) if field.name != "tokens_sha256"):
        if getattr(begun, name) != getattr(identity, name):
            raise ValueError(
                f"{name} is {getattr(identity, name)!r}, and {getattr(begun, name)!r} in the cache begun in {str(unfinished)!r}; "
                "give the same value, or remove that folder"
            )


def _check_disk(output: Path, identity: CacheIdentity, rows_done: int) -> None:
    needed = identity.bytes * (identity.rows - rows_done) // max(1, identity.rows)
    free = shutil.disk_usage(output.absolute().parent).free
    remark(f"{identity.tokens:,} tokens at {', '.join(identity.hooks)}: {identity.bytes / 1e9:.2f} GB on disk")
    if needed > free:
        raise ValueError(
            f"the cache needs {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free in {str(output.parent)!r}; ask for "
            "fewer tokens or hook points, or for float16"
        )


def _features(site: Site, identity: CacheIdentity) -> Features:
    shape = (identity.context_size, site.d_in)
    return Features(
        {
            site.hook_name: Array2D(shape=shape, dtype=identity.dtype),
            TOKENS: Fixed(Value("int32"), length=identity.context_size),
            CHECKSUM: Value("uint32"),
        }
    )


@torch.no_grad()
def _write_shard(
    model: LanguageModel,
    sites: Sequence[Site],
    tokens: Int[Tensor, "rows pos"],
    features: Mapping[str, Features],
    folder: Path,
    name: str,
) -> None:
    found: dict[str, list[pa.RecordBatch]] = {hook: [] for hook in features}
    layers = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in features]
    stop = None if None in layers else max(cast(list[int], layers))
    for rows in tokens.split(ROWS_PER_BATCH):
        computed = model.run_with_cache(
            rows.to(device_of(model)), names_filter=list(features), stop_at_layer=stop, prepend_bos=False
        )[1]
        for site in sites:
            hook = site.hook_name
            found[hook].append(_batch(computed[hook].flatten(2), rows, hook, features[hook]))
    for hook, batches in found.items():
        schema = features[hook].arrow_schema
        with whole(folder / hook / name) as partial, pa.ipc.new_stream(str(partial), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)


def _batch(x: Float[Tensor, "rows pos d_in"], tokens: Tensor, hook: str, features: Features) -> pa.RecordBatch:
    rows, pos, d_in = x.shape
    dtype = np.dtype(features[hook].dtype)
    with np.errstate(over="ignore"):  # what overflows is refused below
        stored = x.float().cpu().numpy().astype(dtype)
    finite = np.isfinite(stored).all(axis=(1, 2))
    if not finite.all():
        row = int(np.argmin(finite))
        largest = float(x[row].float().abs().max())
        raise ValueError(
            f"activations at {hook!r} of the row that begins with the tokens {tokens[row, :8].tolist()} are not finite as "
            f"{dtype} (largest value {largest:g}); "
            + ("store float32" if np.isfinite(largest) else "the model is at fault, or its precision")
        )
    inner = pa.ListArray.from_arrays(np.arange(rows * pos + 1, dtype=np.int32) * d_in, pa.array(stored.reshape(-1)))
    storage = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * pos, inner)
    schema = features.arrow_schema
    ids = pa.FixedSizeListArray.from_arrays(pa.array(_ids(tokens).reshape(-1)), pos)
    checksums = pa.array([zlib.crc32(row.data) for row in stored], pa.uint32())
    columns = {hook: pa.ExtensionArray.from_storage(schema.field(hook).type, storage), TOKENS: ids, CHECKSUM: checksums}
    return pa.RecordBatch.from_arrays([columns[field.name] for field in schema], schema=schema)


def _finish_hook(folder: Path, features: Features, names: Sequence[str]) -> None:
    """What `datasets.load_from_disk` wants beside the shards, as SAELens writes it."""
    DatasetInfo(features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256("".join(names).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", state)
