"""Activations of a language model, computed once and read by every training.

    sae-nfm cache:   rows of tokens, as SAELens cuts them -> one pass of the model for all hook points -> one folder a hook point
    --activations:   the rows' tokens are the data set; where the model would run, the row's activations are looked up

A row is looked up by its tokens, so what reads a cache needs no position of its own: shuffling the data set shuffles the
activations, and a run that resumes finds its place as it does without a cache. In the output folder:

    activations.json       `CacheIdentity`: whose activations these are
    <hook point>/          a data set on disk in the format of SAELens's CacheActivationsRunner (columns <hook point> and
                           token_ids), with the CRC-32 of each row's activations
    digests.json           sha256 of all files but the shards

A shard is read once, by what trains on it: opening a cache checks the small files, the tokens and that the checksums are those
that were written, by their digests in activations.json; a row's activations are checked whenever they are read.

Shards are written whole and in order. After a kill the same command goes on with the first that is missing.
"""

import hashlib
import json
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import torch
from datasets import Array2D, Dataset, DatasetInfo, Features, Value, load_from_disk
from datasets import Sequence as Fixed
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import ActivationsStore, LanguageModelSAETrainingRunner
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.common import (
    check_choice,
    check_digests,
    check_output,
    complete_publication,
    locked,
    partial_folder,
    publishing,
    quoted,
    reading,
    remark,
    whole,
    write_json,
)
from sae_nfm.common.files import digests
from sae_nfm.common.options import ACTIVATIONS, DEFAULT_HOOK, DEFAULT_HOOKS, EMBEDDED_MODEL, CacheOptions, check_numbers
from sae_nfm.common.outputs import final_place
from sae_nfm.common.results import SavedResult
from sae_nfm.data.datasets import (
    TOKEN_COLUMNS,
    check_data,
    data_column,
    first_rows,
    held_out_data,
    open_dataset,
    own_text,
    training_data,
)
from sae_nfm.loading import sha256_of
from sae_nfm.models import (
    LanguageModel,
    check_context,
    check_device,
    device_of,
    load_model,
    pair_hooks,
    passing,
    shape_at,
)

IDENTITY_FILENAME = "activations.json"
TOKENS, CHECKSUM = "token_ids", "crc32"
DATASET_INFO, DATASET_STATE = "dataset_info.json", "state.json"
"""What `datasets` calls its files beside the shards."""
ANEW = "cache them anew"
ITSELF = "."
"""The model and the data set of a cache whose folder is a model too: one of samples (`models.samples`)."""
TOLERANCE = 0.02
"""Relative difference of a row's activations from the model's: more than rounding makes on any device."""
StoredDtype = Literal["float32", "float16"]
ROWS_PER_BATCH, TOKENS_PER_BATCH = 16, 2**14
"""What goes through the model at once, at most: as many rows as in a comparison, so that the bits are the same."""
TOKENS_UNLESS_GIVEN = 400_000
SHARD_BYTES = 2**26
"""Of the widest hook point. A kill loses the shard that is being written."""


@dataclass(frozen=True, kw_only=True)
class CacheIdentity(SavedResult):
    """Whose activations a cache holds."""

    kind: ClassVar[str] = "cache/1"

    model: str
    model_class_name: str
    model_dtype: str
    model_sha256: str
    """Of the parameters and buffers, as they are in memory."""
    tokenizer_sha256: str | None
    hooks: dict[str, tuple[int, ...]]
    """Of each hook point, by the model's own name, the shape of a token's activations: [d_in], or [heads, d_head]."""
    dataset: str
    """Name of the data set that the rows are from, in its order."""
    held_out: str | None
    """Where held-out text is from, which is left out of the rows where it is of the same data set."""
    seed: int
    """Of the order of a file's documents."""
    context_size: int
    """Tokens in a row."""
    rows: int
    joined: bool
    """Whether a row goes on where the one before ended, as rows cut from text do."""
    tokens_sha256: str
    """Of the token ids of all rows, as int32."""
    dtype: StoredDtype
    """In which the activations are stored."""
    checksums_sha256: dict[str, str] = field(default_factory=dict[str, str])
    """Of the checksums of all rows, by hook point."""

    def named(self, folder: str | Path) -> "CacheIdentity":
        """The same, where the folder itself is model and data set with its path for their names."""
        return self if self.model != ITSELF else replace(self, model=str(folder), dataset=str(folder))

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.context_size

    @property
    def bytes(self) -> int:
        """On disk, but for some bytes a row."""
        widths = sum(prod(shape) for shape in self.hooks.values())
        return self.tokens * (widths * np.dtype(self.dtype).itemsize + 8 * len(self.hooks))

    def __str__(self) -> str:
        """Short, and that of no other cache."""
        digest = hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()
        return f"{self.rows:,} rows of {self.context_size} tokens in {self.dtype}, sha256 {digest[:16]}"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Whose activations to compute, on what text, and where they go."""

    model: str = EMBEDDED_MODEL
    """TransformerLens model name, local Hugging Face folder or smollm2; by default the embedded model."""
    model_class_name: str = "HookedTransformer"
    """HookedTransformer, TransformerBridge or AutoModelForCausalLM."""
    hook: tuple[str, ...] = ()
    """Hook points; one pass of the model serves all of them. By default blocks.2.hook_resid_post, of smollm2
    blocks.9.hook_resid_post."""
    dataset: str | None = None
    """Training text or tokens, as for `sae-nfm compare`; by default text sampled from the model itself, which the embedded one
    and smollm2 have."""
    held_out: str | None = None
    """Held-out text of the trainings to come, as for `sae-nfm compare`: documents of the data set that are held out are not
    cached."""
    split: str = "train"
    """Split of the data set; that of held-out text is for `sae-nfm dynamics`, and nothing to train on."""
    tokens: int | None = None
    """Tokens to run the model over, rounded up to whole rows; unless given all of the data set, 400,000 at most."""
    context_size: int = 256
    """Tokens in a row, BOS included."""
    dtype: StoredDtype = "float32"
    """How activations are stored; float16 takes half the space and rounds to 11 bits."""
    seed: int = 0
    """Of the order of a file's documents."""
    device: str = "cpu"
    """Device of the language model."""
    output: str = "runs/activations"
    """Folder for the cache."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_numbers(self)
        check_choice("dtype", self.dtype, get_args(StoredDtype))
        if len(set(self.hook)) < len(self.hook):
            raise ValueError(f"hook is {list(self.hook)}; give each hook point once")


@dataclass(frozen=True, kw_only=True)
class WrittenCache:
    """A finished cache."""

    folder: Path
    identity: CacheIdentity
    computed: bool
    """False where all of it was there already."""
    kept: Path | None = None
    """Where a cache lies now that was there before."""

    def words(self) -> str:
        """Where it is, and what to do with it."""
        own = self.identity.named(self.folder)
        lines = [
            f"{own.tokens:,} tokens of {own.dataset!r} at {', '.join(own.hooks)}: {self.folder} ({own.bytes / 1e9:.2f} GB)"
        ]
        lines += [] if self.computed else ["It was there already; nothing was computed."]
        lines += [] if self.kept is None else [f"What was there before: {self.kept}"]
        return "\n".join([*lines, f"Train on it: sae-nfm train --activations {shlex.quote(str(self.folder))}"])


def run_cache(cfg: CacheConfig, *, command: str | None = None) -> WrittenCache:
    """The job of `sae-nfm cache`; an interrupted one goes on when it is called again.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work, and as `write_cache`.
    """
    check_output(cfg.output)
    check_device(cfg.device)
    held_out = cfg.dataset if cfg.held_out is None else cfg.held_out
    if cfg.dataset is None:
        dataset = own_text(cfg.model, cfg.split, seed=cfg.seed)
    elif cfg.split != "train":
        dataset = open_dataset(cfg.dataset, split=cfg.split, seed=cfg.seed)
    else:
        dataset = training_data(cfg.dataset, held_out, seed=cfg.seed)
    model = load_model(cfg.model, cfg.device, model_class_name=cfg.model_class_name)
    hooks = cfg.hook or (DEFAULT_HOOKS.get(cfg.model, DEFAULT_HOOK),)
    places = [shape_at(model, hook)[0] for hook in hooks]  # there are such, before the text is read
    if len(set(places)) < len(places):
        raise ValueError(f"hook is {list(hooks)}, of which two are one place ({', '.join(places)}); give each once")
    check_context(model, cfg.context_size)
    name = (cfg.dataset or cfg.model) + ("" if cfg.split == "train" else f" ({cfg.split})")
    rows = rows_of(model, dataset, cfg.context_size, cfg.tokens, name)
    origin: dict[str, Any] = {"model_name": cfg.model, "model_class_name": cfg.model_class_name}
    origin |= {"dataset": name, "held_out": held_out, "seed": cfg.seed, "dtype": cfg.dtype}
    origin |= {"joined": data_column(dataset) not in TOKEN_COLUMNS}
    return write_cache(model, rows, identity_of(model, hooks, rows, **origin), cfg.output, command=command)


def rows_of(
    model: LanguageModel, dataset: Any, context_size: int, tokens: int | None, name: str
) -> Int[Tensor, "rows pos"]:
    """The first rows of a data set, as a training has them; `tokens` as in `CacheConfig`.

    Raises a ValueError for a data set with fewer, or as `check_data`.
    """
    check_data(model, dataset, context_size, name)
    wanted = -(-(tokens or TOKENS_UNLESS_GIVEN) // context_size)
    rows = first_rows(ActivationsStore, model, dataset, context_size, wanted)
    if not rows or (tokens is not None and len(rows) < wanted):
        raise ValueError(
            f"{name!r} fills {len(rows)} rows of {context_size} tokens, {wanted} were asked for; ask for at most "
            f"{len(rows) * context_size} tokens"
        )
    return torch.stack(rows)


def identity_of(
    model: LanguageModel,
    hooks: Sequence[str],
    rows: Int[Tensor, "rows pos"],
    *,
    model_name: str,
    dataset: str,
    model_class_name: str = "HookedTransformer",
    held_out: str | None = None,
    seed: int = 0,
    joined: bool = False,
    dtype: StoredDtype = "float32",
) -> CacheIdentity:
    """Whose activations those of a model on these rows are. A ValueError where the model lacks one of the hook points."""
    shapes = dict(shape_at(model, hook) for hook in hooks)
    for hook, shape in shapes.items():
        if len(shape) not in (3, 4):
            raise ValueError(
                f"activations at {hook!r} have shape {tuple(shape)}; expected [batch, pos, d_in] or [batch, pos, heads, d_head]"
            )
    return CacheIdentity(
        model=model_name,
        model_class_name=model_class_name,
        model_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        model_sha256=model_digest(model),
        tokenizer_sha256=tokenizer_digest(model),
        hooks={hook: tuple(shape[2:]) for hook, shape in shapes.items()},
        dataset=dataset,
        held_out=held_out,
        seed=seed,
        context_size=rows.shape[1],
        rows=len(rows),
        joined=joined,
        tokens_sha256=hashlib.sha256(_ids(rows).tobytes()).hexdigest(),
        dtype=dtype,
    )


def write_cache(
    model: LanguageModel,
    rows: Int[Tensor, "rows pos"],
    identity: CacheIdentity,
    output: str | Path,
    *,
    command: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Path], object] | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> WrittenCache:
    """Run the model over the rows and write the activations at every hook point of `identity`.

    Shards that an earlier, interrupted call has finished are left as they are; so is a finished cache of the same identity.

    Args:
        beside: writes other files into the folder that it is given, before that is published.
        made_with: settings that the activations depend on, by which a cache that was begun with others is refused.

    Raises:
        ValueError: for an output that is something else than a cache or run, or is being written by another process, too little
            free disk, activations that are not finite or beyond float16, or an interrupted cache of another identity.
        FileError: where the output cannot be written.
    """
    output, made_with = Path(output), made_with or {}
    settings = json.loads(
        json.dumps({**made_with, **{k: v for k, v in identity.content().items() if k not in made_with}})
    )
    with locked(final_place(output), command):
        complete_publication(output)
        was = _whole_cache(output)
        _refuse_other_begun(partial_folder(output), settings)
    if was is not None and replace(was, checksums_sha256={}) == identity:
        return WrittenCache(folder=output, identity=was, computed=False)
    features = {hook: _features(hook, identity) for hook in identity.hooks}
    shards = _shards(identity, shard_bytes)
    with publishing(output, "cache", command=command, settings=settings) as made:
        left = {n: s for n, s in shards.items() if not all((made.folder / hook / n).is_file() for hook in features)}
        rows_left = sum(map(len, left.values()))
        _check_disk(output, identity, rows_left)
        done = (identity.rows - rows_left) * identity.context_size
        with tqdm(
            total=identity.tokens, initial=done, unit="token", unit_scale=True, desc="Caching activations"
        ) as progress:
            for name, part in left.items():
                for n_tokens in _write_shard(model, rows[part.start : part.stop], features, made.folder, name):
                    progress.update(n_tokens)
        checksums = {hook: _finish_hook(made.folder / hook, features[hook], list(shards)) for hook in features}
        identity = replace(identity, checksums_sha256=checksums)
        identity.save(made.folder / IDENTITY_FILENAME)
        if beside is not None:
            beside(made.folder)
    return WrittenCache(folder=output, identity=identity, computed=True, kept=made.kept)


def _whole_cache(folder: Path) -> CacheIdentity | None:
    """The identity of a finished cache whose every row is as it was written; None for anything else."""
    if not (folder / IDENTITY_FILENAME).is_file():
        return None
    try:
        cache = ActivationCache(folder)
        cache.check_rows()
    except (ValueError, OSError) as error:
        remark(f"{error}: computed again")
        return None
    return cache.identity


def _refuse_other_begun(unfinished: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError where a cache of something else was begun, which may have taken hours."""
    content = digests(unfinished)
    was = None if content is None else content["run"].get("settings")
    if was is None or not any(unfinished.glob("*/*.arrow")):
        return
    for name, value in settings.items():
        if was.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, and {was.get(name)!r} in the cache that was begun in {quoted(unfinished)}; give the same, "
                "give another output, or remove that folder"
            )


class ActivationCache:
    """Activations on disk, by the tokens of their row.

    Args:
        folder: as `sae-nfm cache` writes it.
        order_seed: of an order of its rows that is drawn over all of them; unless given it is that of the data set.

    Raises a ValueError for a folder that is none or is damaged, a FileNotFoundError where there is no such folder.
    """

    def __init__(self, folder: str | Path, *, order_seed: int | None = None) -> None:
        self.folder, self.order_seed = Path(folder), order_seed
        self.identity = read_identity(self.folder)
        self._columns = {hook: _Rows(self.folder / hook, hook, self.identity) for hook in self.identity.hooks}
        rows = next(iter(self._columns.values())).tokens
        self._row_of = {row.tobytes(): i for i, row in enumerate(rows)}
        self.tokens = rows if order_seed is None else np.random.default_rng(order_seed).permutation(rows)
        """[rows, pos], in the order in which they are trained on."""

    @property
    def name(self) -> str:
        """What a training on it depends on, in words that fit no other."""
        drawn = "" if self.order_seed is None else f", in an order drawn with seed {self.order_seed}"
        return f"{self.identity}{drawn}"

    def dataset(self) -> Dataset:
        """The rows of tokens as a data set that SAELens reads without tokenising: column `tokens`."""
        offsets = pa.array(np.arange(len(self.tokens) + 1, dtype=np.int32) * self.tokens.shape[1])
        flat = pa.array(self.tokens.reshape(-1).astype(np.int64))
        return Dataset(pa.table({"tokens": pa.ListArray.from_arrays(offsets, flat)}))

    def activations(self, tokens: Int[Tensor, "rows pos"], hook_name: str) -> Float[Tensor, "rows pos *d_in"]:
        """The activations of rows of tokens at a hook point, float32, on the tokens' device.

        Raises a ValueError for a row or hook point that is not in the cache, or a row whose checksum is wrong.
        """
        column = self._column(hook_name)
        try:
            numbers = [self._row_of[row.tobytes()] for row in _ids(tokens)]
        except KeyError:
            raise ValueError(
                f"a row of tokens is not in {quoted(self.folder)}, which has {self.identity.rows:,} rows of "
                f"{self.identity.context_size} tokens of {self.identity.dataset!r}; give what was cached"
            ) from None
        found = torch.from_numpy(np.stack([column.activations(number) for number in numbers]))
        return found.to(tokens.device, torch.float32)

    def _column(self, hook_name: str) -> "_Rows":
        if hook_name not in self._columns:
            raise ValueError(
                f"the hook point is {hook_name!r}, and {quoted(self.folder)} has {', '.join(self._columns)}; give one of these, "
                "or cache that one"
            )
        return self._columns[hook_name]

    @torch.no_grad()
    def check(self, model: LanguageModel, hook_names: Sequence[str], context_size: int) -> None:
        """Raise a ValueError where a training with this model would have other activations than those in the cache.

        Compared are hook points, row length, tokenizer, data type and all weights, and the activations of one row.
        """
        attached = getattr(model, "acts_to_saes", {})
        own, hooks = self.identity, {_outer(hook, attached) for hook in hook_names}
        for hook in sorted(hooks):
            self._column(hook)
        wanted = {
            "context_size": context_size,
            "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
        wanted |= {"tokenizer_sha256": tokenizer_digest(model), "model_sha256": model_digest(model)}
        for name, value in wanted.items():
            if getattr(own, name) != value:
                raise ValueError(
                    f"{name} of this training is {value!r}, and {getattr(own, name)!r} in {quoted(self.folder)} (model "
                    f"{own.model!r}); give the model and context size of the cache, or {ANEW}"
                )
        tokens = torch.from_numpy(self.tokens[:1].astype(np.int64)).to(device_of(model))
        names = {hook: f"{hook}.hook_sae_input" if hook in attached else hook for hook in hooks}
        computed = _computed(model, tokens, [*names.values()])
        for hook, name in names.items():
            x, cached = computed[name].float(), self.activations(tokens, hook)
            error = float((x.flatten(2) - cached.flatten(2)).norm() / x.norm())
            if not error <= TOLERANCE:
                raise ValueError(
                    f"activations of this model at {hook!r} differ from those in {quoted(self.folder)} by {error:.1%} of their "
                    "norm, though its weights are the same; take off what is hooked to the model, load it as it was, or "
                    f"{ANEW}"
                )

    def check_rows(self) -> None:
        """Read everything. A ValueError names the first row that is damaged."""
        for column in self._columns.values():
            for row in range(self.identity.rows):
                column.activations(row)


def opened_cache(options: CacheOptions, seed: int) -> ActivationCache | None:
    """The cache that options name, its rows in the order that they ask for; None where they name none.

    Raises as `ActivationCache`, and a ValueError for a data set beside it that is not its own, or `shuffle_rows` without it.
    """
    if options.activations is None:
        if options.shuffle_rows:
            raise ValueError("shuffle_rows is for the rows of a cache; give activations too, or leave it out")
        return None
    cache = ActivationCache(options.activations, order_seed=seed if options.shuffle_rows else None)
    own, given = cache.identity.named(cache.folder).dataset, getattr(options, "dataset", None)
    if given not in (None, own):
        raise ValueError(
            f"dataset is {given!r}, and {own!r} in the cache {quoted(cache.folder)}, which has its own rows; leave one out"
        )
    return cache


def cached_splits(cache: ActivationCache, held_out: str | None) -> tuple[Dataset, Any]:
    """Training and held-out data of trainings on a cache, as `load_splits` has them without one.

    Raises as that, and a ValueError where held-out documents are among those cached.
    """
    own = cache.identity.named(cache.folder)
    named = None if own.dataset == own.model else own.dataset
    if held_out is not None and held_out == named != own.held_out:
        raise ValueError(
            f"held_out is {held_out!r}, and was {own.held_out!r} when {quoted(cache.folder)} was written, so that it has those "
            f"documents; give other held-out text, or {ANEW} with --held-out {held_out!r}"
        )
    return cache.dataset(), held_out_data(named, held_out or own.held_out, own.model)


class _Rows:
    """The rows of one hook point, memory-mapped. Lengths and offsets in the files are not relied on."""

    def __init__(self, folder: Path, hook_name: str, identity: CacheIdentity) -> None:
        self._folder, self._shape = folder, (identity.context_size, *identity.hooks[hook_name])
        self._size, self._dtype = prod(self._shape), np.dtype(identity.dtype)
        with reading(folder, "cached activations", remedy=f"restore it from a copy, or {ANEW}"):
            for missing in (name for name in (DATASET_INFO, DATASET_STATE) if not (folder / name).is_file()):
                raise FileNotFoundError(f"there is no file {quoted(folder / missing)}; restore it, or {ANEW}")
            check_digests(folder, DATASET_INFO, DATASET_STATE)
            data = cast(Dataset, load_from_disk(str(folder))).data
            data.validate()
            self.tokens, self._checksums = _tokens_of(data, identity.context_size), data.column(CHECKSUM).to_numpy()
            self._chunks = [chunk.storage.values.values.to_numpy() for chunk in data.column(hook_name).chunks]
            rows = np.array([len(chunk) // self._size for chunk in self._chunks])
            if any(chunk.dtype != self._dtype for chunk in self._chunks) or rows.sum() != identity.rows:
                raise ValueError(f"{rows.sum()} rows of {self._size} values, {identity.rows} expected")
            found = {"tokens": self.tokens, "checksums": self._checksums}
            wanted = {"tokens": identity.tokens_sha256, "checksums": identity.checksums_sha256.get(hook_name)}
            for what, array in found.items():
                if (own := hashlib.sha256(array.tobytes()).hexdigest()) != wanted[what]:
                    raise ValueError(
                        f"its {what} (sha256 {own[:16]}) are not those of {IDENTITY_FILENAME} (sha256 {str(wanted[what])[:16]})"
                    )
        self._ends = np.cumsum(rows)

    def activations(self, row: int) -> NDArray[np.floating]:
        """[pos, *d_in], as stored."""
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        start = (row - (int(self._ends[chunk - 1]) if chunk else 0)) * self._size
        found = self._chunks[chunk][start : start + self._size]
        if zlib.crc32(found.data) != self._checksums[row]:
            raise ValueError(
                f"row {row} in {quoted(self._folder)} is damaged (its checksum is wrong); restore it from a copy, or {ANEW}"
            )
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
        attached, found = getattr(self._model, "acts_to_saes", {}), dict[str, Tensor]()
        for hook in {_outer(name, attached) for name in names_filter}:
            x, inside = self._cache.activations(tokens, hook), [n for n in names_filter if n.startswith(f"{hook}.")]
            found |= {hook: x} | (passing(self._model, hook, x, tokens, inside) if inside else {})
        return None, found


def _outer(hook_name: str, attached: Mapping[str, Any]) -> str:
    """The hook point at which an SAE is spliced in that has this hook point; itself where it is the model's own."""
    return next((hook for hook in attached if hook_name.startswith(f"{hook}.")), hook_name)


HOW_ROWS_ARE_MADE: dict[str, Any] = {
    "prepend_bos": True,
    "sequence_separator_token": "bos",
    "disable_concat_sequences": False,
    "use_chat_formatting": False,
    "autocast_lm": False,
    "model_kwargs": {},
    "use_cached_activations": False,
}
"""Settings of a runner that decide about rows and activations, as caches are written."""


def read_from_cache(runner: Any, cache: ActivationCache) -> None:
    """Let a runner of SAELens that was made with `override_dataset=cache.dataset()` take its activations from the cache.

    Which cache it is goes into the metadata of its SAEs and the file of its settings, so that a checkpoint is resumed with no
    other.

    Raises a ValueError where the runner's settings, model or hook points are not those of the cache.
    """
    pair_hooks(runner)
    store, cfg = runner.activations_store, runner.cfg
    for name, value in HOW_ROWS_ARE_MADE.items():
        if (given := getattr(cfg, name, value)) != value:
            raise ValueError(
                f"{name} is {given!r}, and {value!r} in every cache, such as {quoted(cache.folder)}; leave it out, or train "
                "without a cache"
            )
    model = cast(LanguageModel, getattr(runner.model, "_orig_mod", runner.model))  # where it is compiled
    cache.check(model, store._hook_names or [store.hook_name], cfg.context_size)
    store.model, store.rows_joined = CachedModel(model, cache), cache.identity.joined and cache.order_seed is None
    cfg.dataset_path = cache.identity.named(cache.folder).dataset
    if hasattr(cfg, "cached_activations_path"):  # SAELens reads it with use_cached_activations only
        cfg.cached_activations_path = str(cache.folder)
    for sae in runner.saes.values() if hasattr(runner, "saes") else [runner.sae]:
        setattr(sae.cfg.metadata, ACTIVATIONS, cache.name)
    _tell_epochs(cache, store, cfg.training_tokens)


def cached_runner(
    cfg: Any,
    folder: str | Path,
    *,
    order_seed: int | None = None,
    runner_class: type[Any] = LanguageModelSAETrainingRunner,
    **overrides: Any,
) -> Any:
    """A runner of SAELens that trains on a cache: `cached_runner(cfg, "runs/activations").run()`.

    Args:
        cfg: SAELens's, as without a cache; its model is loaded unless `override_model` is given.
        order_seed: as for `ActivationCache`.
        runner_class: SAELens's for one SAE, or `MultiSAETrainingRunner`.
        overrides: as that takes them.

    Raises a ValueError or FileNotFoundError for a cache that is damaged, missing or of something else than `cfg` says.
    """
    opened = ActivationCache(folder, order_seed=order_seed)
    if overrides.get("override_model") is None:
        kwargs = cfg.model_from_pretrained_kwargs or {}
        device = cfg.llm_device or "cpu"
        overrides["override_model"] = load_model(
            cfg.model_name, device, model_class_name=cfg.model_class_name, **kwargs
        )
    runner = runner_class(cfg, override_dataset=opened.dataset(), **overrides)
    read_from_cache(runner, opened)
    return runner


def _tell_epochs(cache: ActivationCache, store: Any, training_tokens: int) -> None:
    used = cache.tokens[:, slice(*store.seqpos_slice)]
    excluded = [] if store.exclude_special_tokens is None else store.exclude_special_tokens.tolist()
    n_tokens = int((~np.isin(used, excluded)).sum())
    if training_tokens > n_tokens:
        remark(
            f"the cache has {n_tokens:,} tokens to train on, training_tokens is {training_tokens:,}: they are trained on about "
            f"{training_tokens / max(1, n_tokens):.1f} times"
        )


def model_digest(model: LanguageModel) -> str:
    """sha256 of the parameters and buffers, names included, without those of SAEs that are spliced in."""
    inside = tuple(f"{hook}." for hook in getattr(model, "acts_to_saes", {}))
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sha256_of({name: tensor for name, tensor in named.items() if not name.startswith(inside)})


def tokenizer_digest(model: LanguageModel) -> str | None:
    """sha256 of the vocabulary and of the ids of special tokens; None without a tokenizer."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return None
    content = [sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ids(tokens: Int[Tensor, "rows pos"]) -> NDArray[np.int32]:
    return tokens.cpu().numpy().astype(np.int32)


def read_identity(folder: str | Path) -> CacheIdentity:
    """What a cache is of, its files not looked at. Raises as `ActivationCache`."""
    folder = Path(folder)
    if (folder / IDENTITY_FILENAME).is_file():
        return CacheIdentity.load(folder / IDENTITY_FILENAME)
    if (folder.parent / IDENTITY_FILENAME).is_file():
        raise FileNotFoundError(f"{quoted(folder)} is one hook point of a cache; give {quoted(folder.parent)}")
    if (folder / DATASET_STATE).is_file():
        raise FileNotFoundError(
            f"{quoted(folder)} has no {IDENTITY_FILENAME}, so it is not known whose activations these are; if they are of "
            "SAELens's CacheActivationsRunner, train with --use_cached_activations true --cached_activations_path, which "
            "checks nothing but their shape, or use `sae-nfm cache`"
        )
    if partial_folder(folder).is_dir():
        raise FileNotFoundError(f"{quoted(folder)} is not finished; run the command that writes it again, it goes on")
    raise FileNotFoundError(f"{quoted(folder)} has no {IDENTITY_FILENAME}; give a folder that `sae-nfm cache` wrote")


def _check_disk(output: Path, identity: CacheIdentity, rows_left: int) -> None:
    needed = identity.bytes * rows_left // identity.rows
    place = final_place(output).parent
    free = disk_usage(place).free
    left = "" if rows_left == identity.rows else f", {needed / 1e9:.2f} GB of it still to be written"
    remark(f"{identity.tokens:,} tokens at {', '.join(identity.hooks)}: {identity.bytes / 1e9:.2f} GB on disk{left}")
    if needed > free:
        raise ValueError(
            f"the cache needs {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free in {quoted(place)}; ask for "
            "fewer tokens or hook points, or for float16"
        )


def _rows_per_batch(context_size: int) -> int:
    return max(1, min(ROWS_PER_BATCH, TOKENS_PER_BATCH // context_size))


def _shards(identity: CacheIdentity, shard_bytes: int) -> dict[str, range]:
    """The rows of each file."""
    row = identity.context_size * max(map(prod, identity.hooks.values())) * np.dtype(identity.dtype).itemsize
    batch = _rows_per_batch(identity.context_size)
    rows = max(1, shard_bytes // row // batch) * batch
    starts = range(0, identity.rows, rows)
    return {
        f"data-{i:05d}-of-{len(starts):05d}.arrow": range(start, min(start + rows, identity.rows))
        for i, start in enumerate(starts)
    }


def _features(hook: str, identity: CacheIdentity) -> Features:
    return Features(
        {
            hook: Array2D(shape=(identity.context_size, prod(identity.hooks[hook])), dtype=identity.dtype),
            TOKENS: Fixed(Value("int32"), length=identity.context_size),
            CHECKSUM: Value("uint32"),
        }
    )


def _computed(model: LanguageModel, tokens: Int[Tensor, "rows pos"], hooks: Sequence[str]) -> Any:
    """The model's activations, as SAELens's store asks for them."""
    layers = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hooks]
    stop = None if None in layers else max(cast(list[int], layers))
    tokens = tokens.to(device_of(model))
    found: Any = model.run_with_cache(tokens, names_filter=list(hooks), stop_at_layer=stop, prepend_bos=False)
    return found[1]


@torch.no_grad()
def _write_shard(
    model: LanguageModel, rows: Int[Tensor, "rows pos"], features: Mapping[str, Features], folder: Path, name: str
) -> Iterator[int]:
    """Write the files of one shard; the number of tokens after each batch."""
    with ExitStack() as stack:
        writers: dict[str, Any] = {}
        for hook in features:
            partial = stack.enter_context(whole(folder / hook / name))
            writers[hook] = stack.enter_context(pa.ipc.new_stream(str(partial), features[hook].arrow_schema))
        for batch in rows.split(_rows_per_batch(rows.shape[1])):
            computed = _computed(model, batch, list(features))
            for hook, writer in writers.items():
                writer.write_batch(_record_batch(computed[hook].flatten(2), batch, hook, features[hook]))
            yield batch.numel()


def _record_batch(x: Float[Tensor, "rows pos d_in"], tokens: Tensor, hook: str, features: Features) -> pa.RecordBatch:
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


def _finish_hook(folder: Path, features: Features, names: Sequence[str]) -> str:
    """Write what `datasets.load_from_disk` wants beside the shards, as SAELens does; the digest of all checksums."""
    with whole(folder / DATASET_INFO) as partial:
        partial.write_text(json.dumps(asdict(DatasetInfo(features=features))), encoding="utf-8")
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256("".join(names).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / DATASET_STATE, state)
    data = cast(Dataset, load_from_disk(str(folder))).data
    return hashlib.sha256(data.column(CHECKSUM).to_numpy().tobytes()).hexdigest()


def _tokens_of(data: Any, context_size: int) -> NDArray[np.int32]:
    chunks = [chunk.values.to_numpy() for chunk in data.column(TOKENS).chunks]
    return np.concatenate(chunks).reshape(-1, context_size)
